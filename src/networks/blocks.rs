//! The UNet's blocks by sd-scripts' numbers, and what differs between them: ranks, alphas, learning rates.

use crate::diffusion::{Family, Part};
use crate::networks::NetworkError;
use crate::networks::settings::NetworkSettings;
use crate::networks::targets::Naming;

/// The most blocks of any generation.
pub const MAX_BLOCKS: usize = 25;
/// Longest text of a list of learning-rate weights.
pub const MAX_WEIGHT_CHARS: usize = 256;

/// How many blocks the UNet has in sd-scripts' count: on the way down, in the middle, on the way up, and whether there is
/// one more at each end.
fn sides(family: Family) -> ([usize; 3], bool) {
    match family {
        Family::Sd1 | Family::Sd2 => ([12, 1, 12], false),
        Family::Sdxl => ([9, 3, 9], true),
    }
}

/// How many values a list by blocks has.
pub fn block_count(family: Family) -> usize {
    let ([down, middle, up], ends) = sides(family);
    down + middle + up + 2 * usize::from(ends)
}

/// The number of the block that a layer of the UNet is in; the first for what is before all blocks, the last for what is
/// behind them.
pub fn block_index(naming: &Naming, part: Part, path: &str) -> Option<usize> {
    if part != Part::UNet {
        return None;
    }
    let last = block_count(naming.family) - 1;
    let found = match naming.family {
        Family::Sd1 | Family::Sd2 => diffusers_index(path),
        Family::Sdxl => naming
            .unet_layout
            .ldm_path(path)
            .and_then(|path| ldm_index(&path)),
    };
    let outside = if path.starts_with("conv_out") {
        last
    } else {
        0
    };
    Some(found.unwrap_or(outside).min(last))
}

/// Three places in each level: two, or three, blocks, and the change of size with the last of them.
fn diffusers_index(path: &str) -> Option<usize> {
    let mut parts = path.split('.');
    let first = match parts.next()? {
        "down_blocks" => 1,
        "mid_block" => return Some(12),
        "up_blocks" => 13,
        _ => return None,
    };
    let level: usize = parts.next()?.parse().ok()?;
    let place = match parts.next()? {
        "resnets" | "attentions" => parts.next()?.parse().ok()?,
        _ => 2,
    };
    Some(first + 3 * level + place)
}

fn ldm_index(path: &str) -> Option<usize> {
    let mut parts = path.split('.');
    let first = match parts.next()? {
        "input_blocks" => 1,
        "middle_block" => 10,
        "output_blocks" => 13,
        "out" => return Some(22),
        _ => return None,
    };
    let index: usize = parts.next()?.parse().ok()?;
    Some(first + index)
}

/// Ranks, alphas and learning rates of each block; what a whole network has where nothing is given by block.
#[derive(Debug, Clone, PartialEq)]
pub struct Blocks {
    linear: Option<Vec<(usize, f64)>>,
    conv: Option<Vec<(usize, f64)>>,
    lr_weights: Option<Vec<f64>>,
}

impl Blocks {
    /// # Errors
    /// When a list is not as long as the model has blocks.
    pub fn new(family: Family, settings: &NetworkSettings) -> Result<Self, NetworkError> {
        let lr_weights = lr_weights(family, settings)?;
        let count = block_count(family);
        let given = &settings.blocks;
        let length = |field: &str, found: Option<usize>| match found {
            Some(found) if found != count => Err(NetworkError::Settings {
                field: field.to_owned(),
                message: format!("has {found} entries, expected {count} for this base model"),
            }),
            _ => Ok(()),
        };
        length("block_dims", given.dims.as_ref().map(Vec::len))?;
        length("block_alphas", given.alphas.as_ref().map(Vec::len))?;
        length("conv_block_dims", given.conv_dims.as_ref().map(Vec::len))?;
        length(
            "conv_block_alphas",
            given.conv_alphas.as_ref().map(Vec::len),
        )?;
        let lists = |dims: &Option<Vec<usize>>, alphas: &Option<Vec<f64>>, alpha: f64| {
            dims.as_ref().map(|dims| {
                let alphas = alphas.clone().unwrap_or_else(|| vec![alpha; count]);
                dims.iter().copied().zip(alphas).collect()
            })
        };
        // sd-scripts gives the convolutions of a list alpha 1 where nothing else is said.
        let conv_alpha = settings.conv().map_or(1.0, |(_, alpha)| alpha);
        Ok(Self {
            linear: lists(&given.dims, &given.alphas, settings.alpha),
            conv: lists(&given.conv_dims, &given.conv_alphas, conv_alpha),
            lr_weights,
        })
    }

    /// Whether convolutions have ranks of their own by block.
    pub fn has_convolutions(&self) -> bool {
        self.conv.is_some()
    }

    /// Rank and alpha in a block, where they are given by block.
    pub fn size(&self, block: usize, wide_conv: bool) -> Option<(usize, f64)> {
        let list = if wide_conv { &self.conv } else { &self.linear };
        list.as_ref()?.get(block).copied()
    }

    /// Factor of the learning rate in a block.
    pub fn lr_weight(&self, block: usize) -> f64 {
        let given = self.lr_weights.as_ref().and_then(|list| list.get(block));
        given.copied().unwrap_or(1.0)
    }
}

/// The factors of all blocks in their order; `None` where none are given.
fn lr_weights(
    family: Family,
    settings: &NetworkSettings,
) -> Result<Option<Vec<f64>>, NetworkError> {
    let given = &settings.blocks;
    let texts = [
        ("down_lr_weight", &given.down_lr_weight),
        ("mid_lr_weight", &given.mid_lr_weight),
        ("up_lr_weight", &given.up_lr_weight),
    ];
    if texts.iter().all(|(_, text)| text.is_none()) {
        return Ok(None);
    }
    let (lengths, ends) = sides(family);
    let mut all = Vec::new();
    all.extend(ends.then_some(1.0));
    for ((field, text), length) in texts.into_iter().zip(lengths) {
        let mut weights = match text {
            None => Vec::new(),
            Some(text) => curve(text, length).map_err(|message| NetworkError::Settings {
                field: field.to_owned(),
                message,
            })?,
        };
        weights.resize(length, 1.0);
        let threshold = given.lr_zero_threshold;
        all.extend(
            weights
                .iter()
                .map(|w| if *w > threshold { *w } else { 0.0 }),
        );
    }
    all.extend(ends.then_some(1.0));
    Ok(Some(all))
}

/// Numbers with commas between them, of which an absent one is 0; or `name` or `name+base` of a curve over `length`
/// blocks. A short list leaves the rest to the caller.
pub fn curve(text: &str, length: usize) -> Result<Vec<f64>, String> {
    let (name, base) = text.split_once('+').unwrap_or((text, "0"));
    let span = length.saturating_sub(1).max(1) as f64;
    let sine = |i: usize| (std::f64::consts::FRAC_PI_2 * i as f64 / span).sin();
    let line = |i: usize| i as f64 / span;
    let places = 0..length;
    let weights: Option<Vec<f64>> = match name.trim() {
        "sine" => Some(places.map(sine).collect()),
        "cosine" => Some(places.rev().map(sine).collect()),
        "linear" => Some(places.map(line).collect()),
        "reverse_linear" => Some(places.rev().map(line).collect()),
        "zeros" => Some(vec![0.0; length]),
        _ => None,
    };
    if let Some(weights) = weights {
        let base = number(base)?;
        return Ok(weights.into_iter().map(|weight| weight + base).collect());
    }
    let weights: Vec<f64> = text.split(',').map(number).collect::<Result<_, _>>()?;
    if weights.len() > length {
        return Err(format!(
            "has {} numbers, expected at most {length}",
            weights.len()
        ));
    }
    Ok(weights)
}

fn number(text: &str) -> Result<f64, String> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(0.0);
    }
    match text.parse::<f64>() {
        Ok(value) if (0.0..=1e4).contains(&value) => Ok(value),
        _ => Err(format!(
            "has {text:?}, expected numbers from 0 to 10000 with commas between them, or `cosine`, `sine`, `linear`, \
             `reverse_linear` or `zeros`, each also with `+` and a number behind it"
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::f64::consts::FRAC_1_SQRT_2;

    use super::*;
    use crate::diffusion::ldm::UNetLayout;

    fn naming(family: Family) -> Naming {
        Naming {
            family,
            unet_layout: UNetLayout {
                layers_per_block: 2,
                up_attends: vec![true, true, false],
            },
        }
    }

    #[test]
    fn indices_are_those_of_sd_scripts() {
        let sd1 = naming(Family::Sd1);
        for (path, index) in [
            ("down_blocks.0.attentions.0.proj_in", 1),
            ("down_blocks.0.resnets.1.conv1", 2),
            ("down_blocks.0.downsamplers.0.conv", 3),
            ("down_blocks.3.resnets.1.conv2", 11),
            ("mid_block.attentions.0.proj_in", 12),
            ("up_blocks.0.resnets.0.conv1", 13),
            ("up_blocks.0.upsamplers.0.conv", 15),
            ("up_blocks.3.attentions.2.proj_out", 24),
            ("conv_in", 0),
            ("time_embedding.linear_1", 0),
            ("conv_out", 24),
        ] {
            assert_eq!(block_index(&sd1, Part::UNet, path), Some(index), "{path}");
        }
        let sdxl = naming(Family::Sdxl);
        for (path, index) in [
            ("down_blocks.1.attentions.0.proj_in", 1 + 4),
            ("down_blocks.0.downsamplers.0.conv", 1 + 3),
            ("mid_block.resnets.0.conv1", 10),
            ("mid_block.attentions.0.proj_in", 11),
            ("mid_block.resnets.1.conv1", 12),
            ("up_blocks.0.attentions.2.proj_in", 13 + 2),
            ("up_blocks.2.resnets.2.conv1", 13 + 8),
            ("conv_in", 1),
            ("conv_out", 22),
            ("time_embedding.linear_1", 0),
        ] {
            assert_eq!(block_index(&sdxl, Part::UNet, path), Some(index), "{path}");
        }
        assert_eq!(block_index(&sd1, Part::TextEncoder, "x"), None);
    }

    #[test]
    fn curves_are_those_of_sd_scripts() {
        let close = |text: &str, length, expected: &[f64]| {
            let found = curve(text, length).expect(text);
            assert_eq!(found.len(), expected.len(), "{text}");
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-12, "{text}: {found}");
            }
        };
        // [math.sin(math.pi * (i / 2) / 2) + 0.25 for i in range(3)]
        close("sine+.25", 3, &[0.25, FRAC_1_SQRT_2 + 0.25, 1.25]);
        close("cosine", 3, &[1.0, FRAC_1_SQRT_2, 0.0]);
        close("linear+0.5", 3, &[0.5, 1.0, 1.5]);
        close("reverse_linear", 3, &[1.0, 0.5, 0.0]);
        close("zeros+1", 2, &[1.0, 1.0]);
        close("1,,0.5", 12, &[1.0, 0.0, 0.5]);
        for text in ["sin", "1,x", "-1", "sine+x", "1,1,1,1", "nan", "inf"] {
            assert!(curve(text, 3).is_err(), "{text}");
        }
    }

    #[test]
    fn missing_weights_are_one_and_small_ones_are_none() {
        let mut settings = NetworkSettings::default();
        settings.blocks.up_lr_weight = Some("0.1,0.3".to_owned());
        settings.blocks.lr_zero_threshold = 0.1;
        let blocks = Blocks::new(Family::Sd1, &settings).expect("right");
        let weights: Vec<f64> = (0..25).map(|block| blocks.lr_weight(block)).collect();
        let mut expected = vec![1.0; 25];
        (expected[13], expected[14]) = (0.0, 0.3);
        assert_eq!(weights, expected);
        let blocks = Blocks::new(Family::Sdxl, &settings).expect("right");
        assert_eq!(blocks.lr_weight(22), 1.0);
        assert_eq!([blocks.lr_weight(13), blocks.lr_weight(14)], [0.0, 0.3]);
        settings.blocks.dims = Some(vec![4; 23]);
        assert!(Blocks::new(Family::Sdxl, &settings).is_ok());
        let error = Blocks::new(Family::Sd2, &settings).expect_err("25 blocks");
        assert!(
            error.to_string().contains("23 entries, expected 25"),
            "{error}"
        );
    }
}
