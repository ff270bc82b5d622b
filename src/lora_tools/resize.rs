//! A LoRA file with other ranks: sd-scripts' `networks/resize_lora.py`, by the small products of the factors alone.
//!
//! With singular values `S` of `up down` (without the scale) a rule tells how many are kept. `alpha / rank` of every
//! adapter stays what it was.

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};
use serde::Serialize;

use super::change::{self, Content, DeltaShape};
use super::error::ToolError;
use super::file::{AdapterFile, Module};
use super::matrix::{self};
use super::merge::{LowRank, MAX_RANK, planned};
use super::notes::{self, float};
use super::writer::Writer;
use super::{Progress, Written, batch};
use crate::networks::SavePrecision;

/// Singular values that are not larger count as nothing.
const MIN_SINGULAR_VALUE: f32 = 1e-6;

/// How many singular values are kept, at most as many as the rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// As many as the rank.
    Rank,
    /// Those larger than the largest divided by this.
    Ratio(f64),
    /// As many as make up this part of the sum.
    Cumulative(f64),
    /// As many as make up this part of the Frobenius norm.
    Frobenius(f64),
}

impl Rule {
    /// sd-scripts' name of it, and its number.
    pub fn words(self) -> Option<(&'static str, f64)> {
        match self {
            Self::Rank => None,
            Self::Ratio(value) => Some(("sv_ratio", value)),
            Self::Cumulative(value) => Some(("sv_cumulative", value)),
            Self::Frobenius(value) => Some(("sv_fro", value)),
        }
    }

    /// The rule of this name.
    ///
    /// # Errors
    /// When there is none, or its number makes no sense.
    pub fn named(name: RuleName, value: f64) -> Result<Self, ToolError> {
        let (rule, fits, expected) = match name {
            RuleName::SvRatio => (Self::Ratio(value), value >= 2.0, "at least 2"),
            RuleName::SvCumulative => (
                Self::Cumulative(value),
                value > 0.0 && value <= 1.0,
                "above 0 and at most 1",
            ),
            RuleName::SvFro => (
                Self::Frobenius(value),
                value > 0.0 && value <= 1.0,
                "above 0 and at most 1",
            ),
        };
        if fits && value.is_finite() {
            Ok(rule)
        } else {
            Err(ToolError::option(
                "value",
                format!("found {value}, expected a number {expected}"),
            ))
        }
    }

    /// How many of `s` are kept, before the rank limits it. `count` is how many there would be of the whole matrix:
    /// beyond `s` they are 0.
    fn keeps(self, s: &[f32], count: usize) -> Option<usize> {
        let index = match self {
            Self::Rank => return None,
            Self::Ratio(target) => {
                let least = s[0] / target as f32;
                s.iter().filter(|value| **value > least).count()
            }
            Self::Cumulative(target) => reaching(s.iter().copied(), target as f32),
            Self::Frobenius(target) => reaching(
                s.iter().map(|value| value * value),
                (target * target) as f32,
            ),
        };
        // The reference counts one further than it has found, and never the last one.
        Some(index.clamp(1, count.saturating_sub(1).max(1)) + 1)
    }
}

/// The first position, from 1, at which the running sum is at least this part of the whole.
fn reaching(values: impl Iterator<Item = f32> + Clone, part: f32) -> usize {
    let whole: f64 = values.clone().map(f64::from).sum();
    let mut sum = 0.0_f64;
    let below = values.take_while(|value| {
        sum += f64::from(*value);
        ((sum / whole) as f32) < part
    });
    below.count() + 1
}

/// Names of the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuleName {
    SvRatio,
    SvCumulative,
    SvFro,
}

impl FromStr for RuleName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "sv_ratio" => Ok(Self::SvRatio),
            "sv_cumulative" => Ok(Self::SvCumulative),
            "sv_fro" => Ok(Self::SvFro),
            _ => Err(format!(
                "found `{name}`, expected sv_ratio, sv_cumulative or sv_fro"
            )),
        }
    }
}

/// What is to be made.
#[derive(Clone, Debug)]
pub struct Resizing {
    pub rule: Rule,
    /// Largest rank of linear layers.
    pub rank: usize,
    /// Largest rank of convolutions, 1×1 ones too; without, the same.
    pub conv_rank: Option<usize>,
    /// Number format of the result; without, that of the file.
    pub precision: Option<SavePrecision>,
}

/// What became of one adapter.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ResizedModule {
    pub name: String,
    pub old_rank: usize,
    pub new_rank: usize,
    pub new_alpha: f64,
    /// Part of the sum of the singular values that is kept.
    pub sum_retained: f64,
    /// Part of the Frobenius norm that is kept; 1 where there is none.
    pub fro_retained: f64,
    /// Largest singular value by the smallest that is kept; none where that is 0.
    pub max_ratio: Option<f64>,
}

/// What became of a file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ResizeReport {
    pub modules: Vec<ResizedModule>,
    pub size_bytes: u64,
    /// Mean of the parts of the norms that are kept.
    pub fro_retained_mean: f64,
    /// Their standard deviation.
    pub fro_retained_std: f64,
}

/// Resizes a file; its names stay.
///
/// # Errors
/// When the file cannot be read, holds other adapters than LoRA and LoCon, or a number makes no sense.
pub fn resize(
    file: &AdapterFile,
    wish: &Resizing,
    output: &Path,
    progress: &mut dyn Progress,
) -> Result<ResizeReport, ToolError> {
    for (field, rank) in [("rank", Some(wish.rank)), ("conv_rank", wish.conv_rank)] {
        if let Some(rank) = rank.filter(|rank| !(1..=MAX_RANK).contains(rank)) {
            let message = format!("found {rank}, expected 1 to {MAX_RANK}");
            return Err(ToolError::option(field, message));
        }
    }
    let precision = wish.precision.unwrap_or_else(|| file.precision());
    progress.total(file.modules.len());
    // Ranks are known at the end, so the small adapters wait until then.
    let mut resized = Vec::with_capacity(file.modules.len());
    for modules in file.modules.chunks(batch()) {
        let done: Vec<_> = modules
            .par_iter()
            .map(|module| one(file, module, wish, precision))
            .collect::<Result<_, _>>()?;
        resized.extend(done);
        progress.done(modules.len());
    }
    let mut plan = Vec::with_capacity(3 * resized.len());
    for (report, shape, _) in &resized {
        plan.extend(planned(&report.name, *shape, report.new_rank, precision));
    }
    let reports: Vec<ResizedModule> = resized.iter().map(|(report, ..)| report.clone()).collect();
    let metadata = description(file, wish, &reports);
    let mut writer = Writer::begin(output, plan, metadata, true)?;
    for (_, _, tensors) in resized {
        for bytes in tensors {
            writer.push(&bytes)?;
        }
    }
    let size_bytes = writer.finish()?;
    let (mean, std) = spread(reports.iter().map(|report| report.fro_retained));
    Ok(ResizeReport {
        modules: reports,
        size_bytes,
        fro_retained_mean: mean,
        fro_retained_std: std,
    })
}

impl ResizeReport {
    /// What was written.
    pub fn written(&self, precision: Option<SavePrecision>) -> Written {
        Written {
            size_bytes: self.size_bytes,
            precision,
            modules: self.modules.len(),
        }
    }
}

fn one(
    file: &AdapterFile,
    module: &Module,
    wish: &Resizing,
    precision: SavePrecision,
) -> Result<(ResizedModule, DeltaShape, [Vec<u8>; 3]), ToolError> {
    let change = change::read(file, module)?;
    let Content::LowRank { up, down, scale } = &change.content else {
        let message = format!(
            "`{}` is a {}, expected LoRA or LoCon; `lora merge --rank` makes one of it",
            module.name, change.kind
        );
        return Err(ToolError::kind(&file.path, message));
    };
    if change.magnitudes.is_some() || change.changes_bias {
        let message = format!(
            "`{}` is a DoRA or changes a bias, expected LoRA or LoCon: its magnitudes hang on what is left out",
            module.name
        );
        return Err(ToolError::kind(&file.path, message));
    }
    let not_converged =
        || ToolError::tensor(&file.path, &module.name, "no singular values", "some");
    let found = matrix::svd_of_product(up, down).ok_or_else(not_converged)?;
    let is_conv = change.shape.kernel.is_some();
    let most = if is_conv {
        wish.conv_rank.unwrap_or(wish.rank)
    } else {
        wish.rank
    };
    let count = change.shape.out.min(change.shape.columns);
    let rank = kept(&found.s, wish.rule, most, count);
    let (up, down) = matrix::split(&found, rank);
    let adapter = LowRank {
        up,
        down,
        scale: *scale,
        shape: change.shape,
    };
    let tensors = adapter.encode(precision).ok_or_else(|| {
        let expected = format!("numbers that {precision:?} can hold");
        ToolError::tensor(&file.path, &module.name, "larger ones", expected)
    })?;
    let report = report(module, &found.s, down_rank(&change.rank), rank, *scale);
    Ok((report, change.shape, tensors))
}

fn down_rank(rank: &Option<usize>) -> usize {
    rank.unwrap_or(0)
}

/// How many singular values stay: what the rule says within the limit, at least 1, and no more than there are.
fn kept(s: &[f32], rule: Rule, most: usize, count: usize) -> usize {
    let largest = s.first().copied().unwrap_or(0.0);
    if largest <= MIN_SINGULAR_VALUE {
        return 1;
    }
    let wanted = rule.keeps(s, count).unwrap_or(most);
    wanted.min(most).min(s.len())
}

fn report(
    module: &Module,
    s: &[f32],
    old_rank: usize,
    new_rank: usize,
    scale: f32,
) -> ResizedModule {
    let sum = |values: &[f32]| values.iter().map(|value| f64::from(*value)).sum::<f64>();
    let squares = |values: &[f32]| {
        values
            .iter()
            .map(|value| f64::from(*value).powi(2))
            .sum::<f64>()
    };
    let part = |kept: f64, whole: f64| if whole > 0.0 { kept / whole } else { 1.0 };
    let last = f64::from(s[new_rank - 1]);
    ResizedModule {
        name: module.name.clone(),
        old_rank,
        new_rank,
        new_alpha: f64::from(scale) * new_rank as f64,
        sum_retained: part(sum(&s[..new_rank]), sum(s)),
        fro_retained: part(squares(&s[..new_rank]), squares(s)).sqrt(),
        max_ratio: (last > 0.0).then(|| f64::from(s[0]) / last),
    }
}

fn spread(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let count = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / count;
    let variance = values.map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    (mean, variance.sqrt())
}

fn description(
    file: &AdapterFile,
    wish: &Resizing,
    reports: &[ResizedModule],
) -> BTreeMap<String, String> {
    let mut entries = file.metadata();
    let comment = entries.remove("ss_training_comment").unwrap_or_default();
    let old = reports
        .iter()
        .map(|report| report.old_rank)
        .max()
        .unwrap_or(0);
    let (comment, dim, alpha) = match wish.rule.words() {
        None => {
            let rank = wish.rank;
            let conv = wish.conv_rank.filter(|conv| *conv != rank);
            let conv = conv.map_or_else(String::new, |conv| format!(" (conv: {conv})"));
            let alpha = reports.last().map_or(0.0, |report| report.new_alpha);
            (
                format!("dimension is resized from {old} to {rank}{conv}; {comment}"),
                rank.to_string(),
                float(alpha),
            )
        }
        Some((method, value)) => (
            format!("Dynamic resize with {method}: {value} from {old}; {comment}"),
            "Dynamic".to_owned(),
            "Dynamic".to_owned(),
        ),
    };
    for (key, value) in [
        ("ss_training_comment", comment),
        ("ss_network_dim", dim),
        ("ss_network_alpha", alpha),
    ] {
        entries.insert(key.to_owned(), value);
    }
    if !entries.contains_key("ss_network_module") {
        entries.insert("ss_network_module".to_owned(), "networks.lora".to_owned());
    }
    let family = notes::family_of_file(file);
    if !entries.contains_key("modelspec.architecture") {
        notes::modelspec_entries(&mut entries, family, &notes::title_of(file));
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: [f32; 5] = [8.0, 4.0, 2.0, 1.0, 0.5];

    /// By hand: the sum is 15.5, the squares are 64, 16, 4, 1 and 0.25 of 85.25.
    #[test]
    fn rules_count_as_the_reference_does() {
        let keeps = |rule: Rule| rule.keeps(&S, 20).expect("a rule");
        // 8 + 4 = 12 of 15.5 are 77 %: index 2, and one more.
        assert_eq!(keeps(Rule::Cumulative(0.7)), 3);
        assert_eq!(keeps(Rule::Cumulative(0.8)), 4);
        // 80 of 85.25 are 93.8 %, below 0.97² = 94.09 %.
        assert_eq!(keeps(Rule::Frobenius(0.97)), 4);
        assert_eq!(keeps(Rule::Frobenius(0.96)), 3);
        // Larger than 8 / 4.5 are three.
        assert_eq!(keeps(Rule::Ratio(4.5)), 4);
        // Never fewer than two, before the limit.
        assert_eq!(keeps(Rule::Cumulative(0.1)), 2);
        // All of the sum: after the last of five, if there are more of the whole matrix; one is added.
        assert_eq!(keeps(Rule::Ratio(100.0)), 6);
        assert_eq!(Rule::Ratio(100.0).keeps(&S, 5), Some(5));
    }

    #[test]
    fn the_limit_and_the_file_bound_the_rank() {
        assert_eq!(kept(&S, Rule::Ratio(100.0), 4, 20), 4);
        assert_eq!(kept(&S, Rule::Ratio(100.0), 64, 20), 5);
        assert_eq!(kept(&S, Rule::Rank, 64, 20), 5);
        assert_eq!(kept(&[1e-7, 0.0], Rule::Rank, 64, 20), 1);
    }

    #[test]
    fn numbers_of_rules_are_checked() {
        assert!(Rule::named(RuleName::SvRatio, 1.5).is_err());
        assert!(Rule::named(RuleName::SvFro, 1.1).is_err());
        assert!(Rule::named(RuleName::SvCumulative, f64::NAN).is_err());
        assert_eq!(
            Rule::named(RuleName::SvFro, 0.9).ok(),
            Some(Rule::Frobenius(0.9))
        );
    }
}
