//! What adapters are called by different programs, and which layer of the model that is.
//!
//! sd-scripts joins a layer's path with `_`, which does not tell where names that hold a `_` themselves begin; the
//! words of the models that are known do.

use serde::Serialize;

use crate::diffusion::ldm::UNetLayout;
use crate::diffusion::{Family, Part};
use crate::networks::Naming;

/// Ways of naming the adapters of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Convention {
    /// `lora_unet_…` and `lora_te_…`; of SDXL with the paths of the original code.
    Kohya,
    /// `unet.…` and `text_encoder.…`: what diffusers and PEFT write.
    Diffusers,
}

/// A layer of a model.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Which network of the model.
    pub part: PartName,
    /// The layer's path in diffusers or transformers.
    pub path: String,
}

/// A network of the model; [`Part`] with an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PartName {
    TextEncoder,
    #[serde(rename = "text_encoder_2")]
    TextEncoder2,
    #[serde(rename = "unet")]
    UNet,
}

impl PartName {
    /// The folder that diffusers keeps it in.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
            Self::UNet => "unet",
        }
    }
}

impl From<PartName> for Part {
    fn from(part: PartName) -> Self {
        match part {
            PartName::TextEncoder => Self::TextEncoder,
            PartName::TextEncoder2 => Self::TextEncoder2,
            PartName::UNet => Self::UNet,
        }
    }
}

/// Beginnings of names; a longer one stands before its own beginning.
const PREFIXES: [(&str, PartName, Convention); 7] = [
    ("lora_unet_", PartName::UNet, Convention::Kohya),
    ("lora_te1_", PartName::TextEncoder, Convention::Kohya),
    ("lora_te2_", PartName::TextEncoder2, Convention::Kohya),
    ("lora_te_", PartName::TextEncoder, Convention::Kohya),
    ("unet.", PartName::UNet, Convention::Diffusers),
    (
        "text_encoder_2.",
        PartName::TextEncoder2,
        Convention::Diffusers,
    ),
    (
        "text_encoder.",
        PartName::TextEncoder,
        Convention::Diffusers,
    ),
];

/// Names within paths that hold a `_` themselves.
const WORDS: [&str; 43] = [
    // diffusers' UNet
    "down_blocks",
    "mid_block",
    "up_blocks",
    "transformer_blocks",
    "proj_in",
    "proj_out",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "time_emb_proj",
    "conv_shortcut",
    "conv_in",
    "conv_out",
    "conv_norm_out",
    "time_embedding",
    "add_embedding",
    "linear_1",
    "linear_2",
    "group_norm",
    // the original code's
    "input_blocks",
    "middle_block",
    "output_blocks",
    "in_layers",
    "out_layers",
    "emb_layers",
    "skip_connection",
    "time_embed",
    "label_emb",
    // transformers' text encoder
    "text_model",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "text_projection",
    "token_embedding",
    "position_embedding",
    "layer_norm1",
    "layer_norm2",
    "final_layer_norm",
    "in_proj",
    "c_proj",
];

/// First parts of the original code's paths.
const LDM_STARTS: [&str; 6] = [
    "input_blocks.",
    "middle_block.",
    "output_blocks.",
    "time_embed.",
    "label_emb.",
    "out.",
];

/// How most of the names are built.
pub fn convention_of<'a>(names: impl Iterator<Item = &'a str>) -> Option<Convention> {
    let (mut kohya, mut diffusers) = (0, 0);
    for name in names {
        match beginning(name) {
            Some((_, Convention::Kohya, _)) => kohya += 1,
            Some((_, Convention::Diffusers, _)) => diffusers += 1,
            None => {}
        }
    }
    match (kohya, diffusers) {
        (0, 0) => None,
        (kohya, diffusers) if kohya >= diffusers => Some(Convention::Kohya),
        _ => Some(Convention::Diffusers),
    }
}

fn beginning(name: &str) -> Option<(PartName, Convention, &str)> {
    PREFIXES.iter().find_map(|(prefix, part, convention)| {
        Some((*part, *convention, name.strip_prefix(prefix)?))
    })
}

/// The layer that an adapter of this name belongs to; `None` for names that are not known.
pub fn place_of(name: &str, layout: &UNetLayout) -> Option<Place> {
    let (part, convention, rest) = beginning(name)?;
    let path = match convention {
        Convention::Kohya => dotted(rest),
        Convention::Diffusers => rest.to_owned(),
    };
    let is_ldm = LDM_STARTS.iter().any(|start| path.starts_with(start));
    let path = if part == PartName::UNet && is_ldm {
        layout.diffusers_path(&path)?
    } else {
        path
    };
    (!path.is_empty()).then_some(Place { part, path })
}

/// A path whose parts are joined by `_`, with dots.
fn dotted(joined: &str) -> String {
    let parts: Vec<&str> = joined.split('_').collect();
    let mut path = Vec::new();
    let mut at = 0;
    while at < parts.len() {
        let longest = (1..=3.min(parts.len() - at)).rev().find_map(|count| {
            let word = parts[at..at + count].join("_");
            (count == 1 || WORDS.contains(&word.as_str())).then_some((word, count))
        });
        let Some((word, count)) = longest else { break };
        path.push(word);
        at += count;
    }
    path.join(".")
}

/// The name of a layer's adapter.
pub fn name_of(
    place: &Place,
    convention: Convention,
    family: Family,
    layout: &UNetLayout,
) -> String {
    match convention {
        Convention::Diffusers => format!("{}.{}", place.part.as_str(), place.path),
        Convention::Kohya => {
            let naming = Naming {
                family,
                unet_layout: layout.clone(),
            };
            naming.lora_name(place.part.into(), &place.path)
        }
    }
}

/// What a place is counted with in reports: its block of the UNet or its layer of a text encoder.
pub fn block_of(place: &Place) -> String {
    let parts: Vec<&str> = place.path.split('.').collect();
    let is_number = |part: &&str| part.bytes().all(|byte| byte.is_ascii_digit());
    let count = match (place.part, parts.first().copied()) {
        (PartName::UNet, Some("mid_block")) => 3,
        (PartName::UNet, Some("down_blocks" | "up_blocks")) => 4,
        (PartName::UNet, _) => 1,
        _ => {
            // `text_model.encoder.layers.3`
            let number = parts.iter().position(is_number);
            let layer = number.map_or("ends", |at| parts[at]);
            return format!("{}.layers.{layer}", place.part.as_str());
        }
    };
    let block = parts[..count.min(parts.len())].join(".");
    format!("{}.{block}", place.part.as_str())
}

/// Side of a layer's kernel, told by its name: 3 for the convolutions of residual blocks and between levels.
/// `None` for a linear layer.
pub fn kernel_of(place: &Place, family: Option<Family>) -> Option<usize> {
    if place.part != PartName::UNet {
        return None;
    }
    let last = place.path.rsplit('.').next().unwrap_or_default();
    match last {
        "conv" | "conv1" | "conv2" | "conv_in" | "conv_out" => Some(3),
        "conv_shortcut" => Some(1),
        // Files of Stable Diffusion 2 have them as convolutions too.
        "proj_in" | "proj_out" if family != Some(Family::Sdxl) => Some(1),
        _ => None,
    }
}

/// What tells the generation of a model that adapters are for: names, then the width of the text that the UNet reads.
pub fn family_of(
    names: &[&str],
    version: Option<&str>,
    text_width: Option<usize>,
) -> Option<Family> {
    let any = |test: &dyn Fn(&str) -> bool| names.iter().any(|name| test(name));
    let second = any(&|name| {
        ["lora_te1_", "lora_te2_", "text_encoder_2."]
            .iter()
            .any(|start| name.starts_with(start))
    });
    let ldm = any(&|name| {
        let rest = name.strip_prefix("lora_unet_").unwrap_or_default();
        ["input_blocks_", "middle_block_", "output_blocks_"]
            .iter()
            .any(|start| rest.starts_with(start))
    });
    if second || ldm {
        return Some(Family::Sdxl);
    }
    let told = version.unwrap_or_default().to_ascii_lowercase();
    for (words, family) in [
        (["sdxl", "stable-diffusion-xl", "xl_base"], Family::Sdxl),
        (["sd_v2", "stable-diffusion-v2", "sd2"], Family::Sd2),
        (["sd_v1", "stable-diffusion-v1", "sd1"], Family::Sd1),
    ] {
        if words.iter().any(|word| told.contains(word)) {
            return Some(family);
        }
    }
    match text_width {
        Some(2048) => Some(Family::Sdxl),
        Some(1024) => Some(Family::Sd2),
        Some(768) => Some(Family::Sd1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every name of the published models is read and written as sd-scripts has it.
    #[test]
    fn names_of_sd_scripts_come_back() {
        for (list, family, count) in [
            (
                include_str!("../../tests/fixtures/kohya/kohya_keys_sd15_conv.txt"),
                Family::Sd1,
                350,
            ),
            (
                include_str!("../../tests/fixtures/kohya/kohya_keys_sd2_conv.txt"),
                Family::Sd2,
                416,
            ),
            (
                include_str!("../../tests/fixtures/kohya/kohya_keys_sdxl_conv.txt"),
                Family::Sdxl,
                1052,
            ),
        ] {
            let layout = UNetLayout::published(family == Family::Sdxl);
            let names: Vec<&str> = list
                .lines()
                .filter_map(|line| line.split_once(".alpha").map(|(name, _)| name))
                .collect();
            assert_eq!(names.len(), count, "{family:?}");
            assert_eq!(
                family_of(&names, None, None).is_some(),
                family == Family::Sdxl
            );
            for name in names {
                let place = place_of(name, &layout).unwrap_or_else(|| panic!("{name}"));
                assert!(!place.path.contains("_blocks_"), "{name}: {place:?}");
                assert_eq!(name_of(&place, Convention::Kohya, family, &layout), name);
                let diffusers = name_of(&place, Convention::Diffusers, family, &layout);
                assert_eq!(place_of(&diffusers, &layout), Some(place));
            }
        }
    }

    #[test]
    fn paths_of_the_original_code_are_those_of_diffusers() {
        let layout = UNetLayout::published(true);
        let place = |name| place_of(name, &layout).map(|place| place.path);
        for (name, path) in [
            (
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
                "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            ),
            (
                "lora_unet_input_blocks_3_0_op",
                "down_blocks.0.downsamplers.0.conv",
            ),
            (
                "lora_unet_output_blocks_2_2_conv",
                "up_blocks.0.upsamplers.0.conv",
            ),
            (
                "lora_unet_middle_block_2_out_layers_3",
                "mid_block.resnets.1.conv2",
            ),
            (
                "lora_unet_output_blocks_8_0_skip_connection",
                "up_blocks.2.resnets.2.conv_shortcut",
            ),
        ] {
            assert_eq!(place(name).as_deref(), Some(path), "{name}");
        }
        // Another number of blocks in a level.
        assert_eq!(place("lora_unet_input_blocks_2_0_op"), None);
    }

    #[test]
    fn blocks_are_parts_of_paths() {
        let layout = UNetLayout::published(false);
        let block = |name| block_of(&place_of(name, &layout).expect("a place"));
        assert_eq!(
            block("lora_unet_down_blocks_0_attentions_1_proj_in"),
            "unet.down_blocks.0.attentions.1"
        );
        assert_eq!(
            block("lora_te_text_model_encoder_layers_7_mlp_fc1"),
            "text_encoder.layers.7"
        );
    }
}
