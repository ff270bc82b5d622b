//! Which settings of a network make no sense, alone or together.

use super::{BlockSettings, MAX_RANK, NetworkKind, NetworkSettings};
use crate::networks::blocks::{MAX_BLOCKS, MAX_WEIGHT_CHARS};
use crate::networks::pattern;

/// The most patterns of `include`, and of `exclude`.
pub const MAX_PATTERNS: usize = 64;
/// Longest pattern, in characters.
pub const MAX_PATTERN_CHARS: usize = 256;
/// Largest factor of a learning rate.
const MAX_RATIO: f64 = 1e4;
/// Longest name of a file to begin with, in bytes.
const MAX_FILE_NAME: usize = 255;

/// A field by its name on the wire, with `/` before the number in a list, and what is wrong with it.
pub type NetworkProblem = (String, String);

impl NetworkSettings {
    /// The fields that make no sense.
    pub fn problems(&self) -> Vec<NetworkProblem> {
        let mut check = Check(Vec::new());
        self.check_sizes(&mut check);
        self.check_kind(&mut check);
        self.check_dropout(&mut check);
        self.check_blocks(&mut check);
        self.check_rates(&mut check);
        self.check_layers(&mut check);
        check.0
    }

    fn check_sizes(&self, check: &mut Check) {
        check.rank("rank", self.rank, 1);
        if let Some(rank) = self.conv_rank {
            check.rank("conv_rank", rank, 1);
        }
        for (field, value) in [("alpha", Some(self.alpha)), ("conv_alpha", self.conv_alpha)] {
            if let Some(value) = value {
                check.number(field, value, f64::INFINITY);
            }
        }
        if self.conv().is_none() {
            let why = match self.preset() {
                Some(preset) => format!(
                    "is given, but the preset `{}` has no convolutions",
                    preset.name()
                ),
                None => "is given without conv_rank".to_owned(),
            };
            for (field, given) in [
                ("conv_rank", self.conv_rank.is_some()),
                ("conv_alpha", self.conv_alpha.is_some()),
            ] {
                check.refuse_if(given, field, why.clone());
            }
        }
    }

    /// Settings of one kind on another.
    fn check_kind(&self, check: &mut Check) {
        let kind = self.kind.algo();
        let foreign = |what: &str| format!("belongs to {what}, found on `{kind}`");
        let lokr = self.kind == NetworkKind::Lokr;
        for (field, given) in [
            ("factor", self.factor.is_some()),
            ("decompose_both", self.decompose_both),
            ("full_matrix", self.full_matrix),
        ] {
            check.refuse_if(given && !lokr, field, foreign("`lokr`"));
        }
        if let Some(factor) = self.factor
            && !(2..=MAX_RANK).contains(&factor)
        {
            let message = format!("is {factor}, expected a whole number from 2 to {MAX_RANK}");
            check.report("factor", message);
        }
        let both = self.decompose_both && self.full_matrix;
        check.refuse_if(
            both,
            "full_matrix",
            "is given beside decompose_both, expected one of the two".to_owned(),
        );
        if self.kind == NetworkKind::Ia3 {
            let others = "`lora`, `locon`, `loha` and `lokr`";
            for (field, given) in [
                ("dora", self.dora),
                ("tucker", self.tucker),
                ("scale_weight_norms", self.scale_weight_norms.is_some()),
                ("rank_dropout", self.dropout.rank != 0.0),
            ] {
                check.refuse_if(given, field, foreign(others));
            }
        }
        let convolutions = self.conv().is_some() || self.blocks.conv_dims.is_some();
        check.refuse_if(
            self.tucker && !convolutions,
            "tucker",
            "is given without 3×3 convolutions: give conv_rank, or a preset that has them"
                .to_owned(),
        );
        if let Some(norm) = self.scale_weight_norms
            && !(norm.is_finite() && norm > 0.0)
        {
            let message = format!("is {norm}, expected a number above 0");
            check.report("scale_weight_norms", message);
        }
    }

    fn check_dropout(&self, check: &mut Check) {
        let dropout = &self.dropout;
        for (field, value) in [
            ("dropout", dropout.neuron),
            ("rank_dropout", dropout.rank),
            ("module_dropout", dropout.module),
        ] {
            if !(0.0..1.0).contains(&value) {
                let message = format!("is {value}, expected a number of at least 0 and below 1");
                check.report(field, message);
            }
        }
        let between = matches!(self.kind, NetworkKind::Lora | NetworkKind::Locon) && !self.dora;
        check.refuse_if(
            dropout.neuron != 0.0 && !between,
            "dropout",
            format!(
                "belongs to `lora` and `locon` without dora, found on `{}`{}: LyCORIS leaves no neurons out there",
                self.kind.algo(),
                if self.dora { " with dora" } else { "" }
            ),
        );
    }

    fn check_blocks(&self, check: &mut Check) {
        let BlockSettings {
            dims,
            alphas,
            conv_dims,
            conv_alphas,
            lr_zero_threshold,
            ..
        } = &self.blocks;
        for (field, list) in [("block_dims", dims), ("conv_block_dims", conv_dims)] {
            let Some(list) = list else { continue };
            check.length(field, list.len());
            for (index, rank) in list.iter().enumerate().take(MAX_BLOCKS) {
                check.rank(&format!("{field}/{index}"), *rank, 0);
            }
            if list.iter().all(|rank| *rank == 0) && !list.is_empty() {
                check.report(field, "is 0 everywhere, expected a rank".to_owned());
            }
        }
        for (field, list) in [("block_alphas", alphas), ("conv_block_alphas", conv_alphas)] {
            let Some(list) = list else { continue };
            check.length(field, list.len());
            for (index, alpha) in list.iter().enumerate().take(MAX_BLOCKS) {
                check.number(&format!("{field}/{index}"), *alpha, f64::INFINITY);
            }
        }
        let rank_less = self.kind == NetworkKind::Ia3;
        for (field, given) in [
            ("block_dims", dims.is_some()),
            ("block_alphas", alphas.is_some()),
            ("conv_block_dims", conv_dims.is_some()),
            ("conv_block_alphas", conv_alphas.is_some()),
        ] {
            check.refuse_if(
                given && rank_less,
                field,
                "is given, but `ia3` has no rank".to_owned(),
            );
        }
        for (field, given, other) in [
            (
                "block_alphas",
                alphas.is_some() && dims.is_none(),
                "block_dims",
            ),
            (
                "conv_block_alphas",
                conv_alphas.is_some() && conv_dims.is_none(),
                "conv_block_dims",
            ),
        ] {
            check.refuse_if(given, field, format!("is given without {other}"));
        }
        check.number("block_lr_zero_threshold", *lr_zero_threshold, MAX_RATIO);
    }

    fn check_rates(&self, check: &mut Check) {
        for (name, text) in [
            ("down_lr_weight", &self.blocks.down_lr_weight),
            ("mid_lr_weight", &self.blocks.mid_lr_weight),
            ("up_lr_weight", &self.blocks.up_lr_weight),
        ] {
            let Some(text) = text else { continue };
            let field = name.to_owned();
            if text.chars().count() > MAX_WEIGHT_CHARS {
                let message = format!(
                    "has {} characters, expected at most {MAX_WEIGHT_CHARS}",
                    text.chars().count()
                );
                check.report(&field, message);
            } else if let Err(message) = crate::networks::blocks::curve(text, MAX_BLOCKS) {
                check.report(&field, message);
            }
        }
        let plain = matches!(self.kind, NetworkKind::Lora | NetworkKind::Locon);
        for (name, ratio) in [
            ("loraplus_lr_ratio", self.lora_plus.ratio),
            ("loraplus_unet_lr_ratio", self.lora_plus.unet_ratio),
            (
                "loraplus_text_encoder_lr_ratio",
                self.lora_plus.text_encoder_ratio,
            ),
        ] {
            let Some(ratio) = ratio else { continue };
            let field = name.to_owned();
            check.number(&field, ratio, MAX_RATIO);
            check.refuse_if(
                !plain,
                &field,
                format!(
                    "belongs to `lora` and `locon`, found on `{}`",
                    self.kind.algo()
                ),
            );
        }
    }

    fn check_layers(&self, check: &mut Check) {
        for (field, patterns) in [("include", &self.include), ("exclude", &self.exclude)] {
            if patterns.len() > MAX_PATTERNS {
                let message = format!(
                    "has {} patterns, expected at most {MAX_PATTERNS}",
                    patterns.len()
                );
                check.report(field, message);
            }
            for (index, text) in patterns.iter().enumerate().take(MAX_PATTERNS) {
                if let Err(message) = pattern(text) {
                    check.report(&format!("{field}/{index}"), message);
                }
            }
        }
        let Some(from) = &self.init_from else { return };
        if from.lora_id.is_some() == from.file.is_some() {
            let message = "has lora_id and file both or neither, expected one of the two";
            check.report("init_from", message.to_owned());
        }
        if let Some(file) = &from.file {
            let plain = !file.is_empty()
                && file.len() <= MAX_FILE_NAME
                && !file.starts_with('.')
                && !file.contains(|c: char| c.is_control() || "/\\:*?\"<>|".contains(c));
            check.refuse_if(
                !plain,
                "init_from/file",
                "is no plain file name, expected that of a file in the folder `lora`".to_owned(),
            );
        }
    }
}

struct Check(Vec<NetworkProblem>);

impl Check {
    fn report(&mut self, field: &str, message: String) {
        self.0.push((field.to_owned(), message));
    }

    fn refuse_if(&mut self, wrong: bool, field: &str, message: String) {
        if wrong {
            self.report(field, message);
        }
    }

    fn rank(&mut self, field: &str, value: usize, least: usize) {
        if !(least..=MAX_RANK).contains(&value) {
            let message = format!("is {value}, expected a whole number from {least} to {MAX_RANK}");
            self.report(field, message);
        }
    }

    fn number(&mut self, field: &str, value: f64, most: f64) {
        if !value.is_finite() || value < 0.0 {
            self.report(
                field,
                format!("is {value}, expected a number of at least 0"),
            );
        } else if value > most {
            self.report(
                field,
                format!("is {value}, expected a number of at most {most}"),
            );
        }
    }

    fn length(&mut self, field: &str, found: usize) {
        if !(1..=MAX_BLOCKS).contains(&found) {
            let message =
                format!("has {found} entries, expected 25 (Stable Diffusion 1 and 2) or 23 (SDXL)");
            self.report(field, message);
        }
    }
}
