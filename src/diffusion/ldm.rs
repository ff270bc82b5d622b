//! Names of a single-file checkpoint (the LDM layout of the original Stable Diffusion code) as diffusers names.
//!
//! The layout is read off the keys that are there, so that any number of levels, blocks and attentions works.
//! Also the two older spellings found in diffusers folders.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;

use super::weights::{KeySource, StoredView, Weights};

/// Where the UNet is in a single file.
pub const UNET_PREFIX: &str = "model.diffusion_model.";
/// Where the VAE is in a single file.
pub const VAE_PREFIX: &str = "first_stage_model.";
/// Where Stable Diffusion 1's text encoder is in a single file.
pub const TEXT_ENCODER_PREFIX: &str = "cond_stage_model.transformer.";
/// Where Stable Diffusion 2's text encoder is in a single file, in OpenCLIP's names.
pub const SD2_TEXT_ENCODER_PREFIX: &str = "cond_stage_model.model.";
/// Where SDXL's first text encoder is in a single file.
pub const SDXL_TEXT_ENCODER_PREFIX: &str = "conditioner.embedders.0.transformer.";
/// Where SDXL's second text encoder is in a single file, in OpenCLIP's names.
pub const SDXL_TEXT_ENCODER_2_PREFIX: &str = "conditioner.embedders.1.model.";

/// Diffusers name to stored name.
pub type KeyMap = HashMap<String, KeySource>;

/// Parts of a residual block: `ResBlock` in LDM, `ResnetBlock2D` in diffusers.
const RESNET: [(&str, &str); 6] = [
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
];

/// The UNet's parts outside the blocks.
const UNET_ENDS: [(&str, &str); 7] = [
    ("input_blocks.0.0.", "conv_in."),
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("label_emb.0.0.", "add_embedding.linear_1."),
    ("label_emb.0.2.", "add_embedding.linear_2."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
];

/// Parts of the VAE's blocks, in the encoder and the decoder alike.
const VAE_PARTS: [(&str, &str); 10] = [
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    ("nin_shortcut.", "conv_shortcut."),
    ("norm_out.", "conv_norm_out."),
    ("sample.conv.", "samplers.0.conv."),
];

/// Parts of a layer of OpenCLIP's text tower, but for its queries, keys and values.
const OPEN_CLIP_LAYER: [(&str, &str); 5] = [
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
];

/// The tower's parts outside the layers.
const OPEN_CLIP_ENDS: [(&str, &str); 4] = [
    (
        "token_embedding.weight",
        "text_model.embeddings.token_embedding.weight",
    ),
    (
        "positional_embedding",
        "text_model.embeddings.position_embedding.weight",
    ),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
];

/// Names of the VAE's attention before diffusers 0.18.
const OLD_VAE_ATTENTION: [(&str, &str); 4] = [
    (".query.", ".to_q."),
    (".key.", ".to_k."),
    (".value.", ".to_v."),
    (".proj_attn.", ".to_out.0."),
];

/// The UNet of a single file.
pub fn unet(weights: &Weights) -> KeyMap {
    unet_names(weights.stored().map(|(key, ..)| key))
}

/// The UNet among the names of a single file.
pub fn unet_names<'a>(stored: impl Iterator<Item = &'a str>) -> KeyMap {
    let keys = Below::new(stored, UNET_PREFIX);
    let mut map = KeyMap::new();
    for (ldm, diffusers) in UNET_ENDS {
        keys.rename(ldm, diffusers, &[], &mut map);
    }
    map_input_blocks(&keys, &mut map);
    map_middle_block(&keys, &mut map);
    map_output_blocks(&keys, &mut map);
    map
}

/// What of a UNet decides where its blocks are in the LDM layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UNetLayout {
    /// Residual blocks of each level on the way down; one more on the way up.
    pub layers_per_block: usize,
    /// Which blocks on the way up attend to the text.
    pub up_attends: Vec<bool>,
}

impl UNetLayout {
    /// The LDM path of a module with this path in diffusers; `None` for what is not known.
    pub fn ldm_path(&self, path: &str) -> Option<String> {
        let rename = |rest: &str, table: &[(&str, &str)]| -> Option<String> {
            let rest = format!("{rest}.");
            let found = table.iter().find_map(|(ldm, diffusers)| {
                Some(format!("{ldm}{}", rest.strip_prefix(diffusers)?))
            });
            Some(found?.trim_end_matches('.').to_owned())
        };
        let resnet = |rest: &str| rename(rest, &RESNET);
        let mut parts = path.splitn(4, '.');
        let (block, second) = (parts.next()?, parts.next());
        let (third, rest) = (parts.next(), parts.next());
        if block == "mid_block" {
            // Two residual blocks around the attention.
            return match (second?, third?) {
                ("resnets", index) => {
                    let index: usize = index.parse().ok()?;
                    Some(format!("middle_block.{}.{}", 2 * index, resnet(rest?)?))
                }
                ("attentions", "0") => Some(format!("middle_block.1.{}", rest?)),
                _ => None,
            };
        }
        let down = match block {
            "down_blocks" => true,
            "up_blocks" => false,
            _ => return rename(path, &UNET_ENDS),
        };
        let level: usize = second?.parse().ok()?;
        let (index, part) = rest?.split_once('.')?;
        let index: usize = index.parse().ok()?;
        let per_level = self.layers_per_block + 1;
        let (side, number) = if down {
            ("input_blocks", per_level * level + index + 1)
        } else {
            ("output_blocks", per_level * level + index)
        };
        Some(match (third?, part) {
            ("resnets", part) => format!("{side}.{number}.0.{}", resnet(part)?),
            ("attentions", part) => format!("{side}.{number}.1.{part}"),
            ("downsamplers", "conv") => format!("{side}.{}.0.op", per_level * (level + 1)),
            ("upsamplers", "conv") => {
                let place = 1 + usize::from(*self.up_attends.get(level)?);
                let last = per_level * level + self.layers_per_block;
                format!("{side}.{last}.{place}.conv")
            }
            _ => return None,
        })
    }

    /// That of the published models of a generation.
    pub fn published(sdxl: bool) -> Self {
        let up_attends: &[bool] = if sdxl {
            &[true, true, false]
        } else {
            &[false, true, true, true]
        };
        Self {
            layers_per_block: 2,
            up_attends: up_attends.to_vec(),
        }
    }

    /// That of a UNet whose tensors have these names in diffusers; `None` where there are no blocks.
    pub fn of_names<'a>(names: impl Iterator<Item = &'a str>) -> Option<Self> {
        let (mut resnets, mut attends) = (BTreeSet::new(), BTreeSet::new());
        let mut levels = BTreeSet::new();
        for name in names {
            let mut parts = name.split('.');
            let (Some(block), Some(level)) = (parts.next(), parts.next()) else {
                continue;
            };
            let (Ok(level), kind) = (level.parse::<usize>(), parts.next()) else {
                continue;
            };
            match (block, kind) {
                ("down_blocks", Some("resnets")) if level == 0 => {
                    resnets.insert(parts.next());
                }
                ("up_blocks", kind) => {
                    levels.insert(level);
                    if kind == Some("attentions") {
                        attends.insert(level);
                    }
                }
                _ => {}
            }
        }
        let last = *levels.last()?;
        (!resnets.is_empty() && last < 64).then(|| Self {
            layers_per_block: resnets.len(),
            up_attends: (0..=last).map(|level| attends.contains(&level)).collect(),
        })
    }

    /// The path in diffusers of a module with this LDM path: the other way of [`Self::ldm_path`].
    pub fn diffusers_path(&self, ldm: &str) -> Option<String> {
        let rename = |rest: &str, table: &[(&str, &str)]| -> Option<String> {
            let rest = format!("{rest}.");
            let found = table.iter().find_map(|(ldm, diffusers)| {
                Some(format!("{diffusers}{}", rest.strip_prefix(ldm)?))
            });
            Some(found?.trim_end_matches('.').to_owned())
        };
        let mut parts = ldm.splitn(4, '.');
        let side = parts.next()?;
        let path = match side {
            "input_blocks" | "output_blocks" if !ldm.starts_with("input_blocks.0.") => {
                let (number, place) = (parts.next()?, parts.next()?);
                let (number, rest) = (number.parse::<usize>().ok()?, parts.next()?);
                let down = side == "input_blocks";
                let number = number.checked_sub(usize::from(down))?;
                let per_level = self.layers_per_block + 1;
                let (level, index) = (number / per_level, number % per_level);
                let block = if down { "down_blocks" } else { "up_blocks" };
                match (place, rest) {
                    ("0", "op") => format!("{block}.{level}.downsamplers.0.conv"),
                    ("0", rest) => {
                        format!("{block}.{level}.resnets.{index}.{}", rename(rest, &RESNET)?)
                    }
                    (_, "conv") => format!("{block}.{level}.upsamplers.0.conv"),
                    ("1", rest) => format!("{block}.{level}.attentions.{index}.{rest}"),
                    _ => return None,
                }
            }
            "middle_block" => {
                let (part, rest) = ldm.strip_prefix("middle_block.")?.split_once('.')?;
                match part {
                    "0" => format!("mid_block.resnets.0.{}", rename(rest, &RESNET)?),
                    "1" => format!("mid_block.attentions.0.{rest}"),
                    "2" => format!("mid_block.resnets.1.{}", rename(rest, &RESNET)?),
                    _ => return None,
                }
            }
            _ => rename(ldm, &UNET_ENDS)?,
        };
        // What does not come back is of another layout.
        (self.ldm_path(&path)? == ldm).then_some(path)
    }
}

/// `input_blocks.k`: the convolution at the start, then residual blocks, each with its attention; a level ends with a
/// block that only downsamples (`op`).
fn map_input_blocks(keys: &Below<'_>, map: &mut KeyMap) {
    let (mut level, mut block) = (0, 0);
    for k in keys.indices("input_blocks.") {
        if k == 0 {
            continue;
        }
        let at = format!("input_blocks.{k}.");
        if keys.any(&format!("{at}0.op.")) {
            let down = format!("down_blocks.{level}.downsamplers.0.conv.");
            keys.rename(&format!("{at}0.op."), &down, &[], map);
            (level, block) = (level + 1, 0);
        } else {
            map_block(keys, &at, &format!("down_blocks.{level}."), block, map);
            block += 1;
        }
    }
}

/// `middle_block`: residual blocks and attentions, numbered separately in diffusers.
fn map_middle_block(keys: &Below<'_>, map: &mut KeyMap) {
    let (mut resnets, mut attentions) = (0, 0);
    for part in keys.indices("middle_block.") {
        let at = format!("middle_block.{part}.");
        if keys.any(&format!("{at}in_layers.")) {
            let to = format!("mid_block.resnets.{resnets}.");
            keys.rename(&at, &to, &RESNET, map);
            resnets += 1;
        } else {
            let to = format!("mid_block.attentions.{attentions}.");
            keys.rename(&at, &to, &[], map);
            attentions += 1;
        }
    }
}

/// `output_blocks.k`: as the input blocks, but the last block of a level also holds the upsampler.
fn map_output_blocks(keys: &Below<'_>, map: &mut KeyMap) {
    let (mut level, mut block) = (0, 0);
    for k in keys.indices("output_blocks.") {
        let at = format!("output_blocks.{k}.");
        let to = format!("up_blocks.{level}.");
        map_block(keys, &at, &to, block, map);
        block += 1;
        for part in keys.indices(&at) {
            let upsampler = format!("{at}{part}.conv.");
            if keys.any(&upsampler) {
                keys.rename(&upsampler, &format!("{to}upsamplers.0.conv."), &[], map);
                (level, block) = (level + 1, 0);
            }
        }
    }
}

/// Part 0 is the residual block, part 1 the attention, if it is one.
fn map_block(keys: &Below<'_>, at: &str, to: &str, block: usize, map: &mut KeyMap) {
    let resnet = format!("{to}resnets.{block}.");
    keys.rename(&format!("{at}0."), &resnet, &RESNET, map);
    let attention = format!("{at}1.");
    if keys.any(&format!("{attention}transformer_blocks.")) {
        keys.rename(&attention, &format!("{to}attentions.{block}."), &[], map);
    }
}

/// The VAE of a single file.
pub fn vae(weights: &Weights) -> KeyMap {
    vae_below(weights, VAE_PREFIX)
}

/// The VAE below a prefix. Its decoder counts levels from the smallest side, diffusers from the largest.
pub fn vae_below(weights: &Weights, prefix: &str) -> KeyMap {
    let keys = Below::new(weights.stored().map(|(key, ..)| key), prefix);
    let last_level = keys.indices("decoder.up.").last().unwrap_or(0);
    let rename_level = |rest: &str, flip: bool| {
        let (level, part) = rest.split_once('.')?;
        let level: usize = level.parse().ok()?;
        let level = if flip {
            last_level.checked_sub(level)?
        } else {
            level
        };
        let part = part.replacen("block.", "resnets.", 1);
        Some(format!("{level}.{part}"))
    };
    let mut map = KeyMap::new();
    for key in keys.all() {
        let mut name = if let Some(rest) = key.strip_prefix("encoder.down.") {
            let Some(rest) = rename_level(rest, false) else {
                continue;
            };
            format!("encoder.down_blocks.{rest}")
        } else if let Some(rest) = key.strip_prefix("decoder.up.") {
            let Some(rest) = rename_level(rest, true) else {
                continue;
            };
            format!("decoder.up_blocks.{rest}")
        } else {
            key.to_owned()
        };
        for (ldm, diffusers) in VAE_PARTS {
            name = name.replacen(ldm, diffusers, 1);
        }
        map.insert(name, KeySource::whole(format!("{prefix}{key}")));
    }
    map
}

/// The text encoder of a single file that keeps it in transformers' names below `prefix`.
pub fn text_encoder(weights: &Weights, prefix: &str) -> KeyMap {
    text_encoder_below(weights, prefix)
}

/// The text encoder of a single file that keeps it in OpenCLIP's names below `prefix`.
pub fn open_clip(weights: &Weights, prefix: &str) -> KeyMap {
    open_clip_names(weights.stored().map(|(key, ..)| key), prefix)
}

/// The text tower among the names of a single file.
pub fn open_clip_names<'a>(stored: impl Iterator<Item = &'a str>, prefix: &'a str) -> KeyMap {
    let keys = Below::new(stored, prefix);
    let mut map = KeyMap::new();
    for (stored, name) in OPEN_CLIP_ENDS {
        if keys.any(stored) {
            map.insert(
                name.to_owned(),
                KeySource::whole(format!("{prefix}{stored}")),
            );
        }
    }
    for (stored, view) in [
        ("text_projection", StoredView::Transposed),
        ("text_projection.weight", StoredView::Whole),
    ] {
        if keys.keys.contains(stored) {
            let key = format!("{prefix}{stored}");
            map.insert("text_projection.weight".to_owned(), KeySource { key, view });
        }
    }
    for layer in keys.indices("transformer.resblocks.") {
        let at = format!("transformer.resblocks.{layer}.");
        let to = format!("text_model.encoder.layers.{layer}.");
        keys.rename(&at, &to, &OPEN_CLIP_LAYER, &mut map);
        for end in ["weight", "bias"] {
            let stored = format!("{at}attn.in_proj_{end}");
            if !keys.any(&stored) {
                continue;
            }
            for (index, name) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
                let source = KeySource {
                    key: format!("{prefix}{stored}"),
                    view: StoredView::Rows { index, of: 3 },
                };
                map.insert(format!("{to}self_attn.{name}.{end}"), source);
            }
        }
    }
    map
}

/// The VAE of a diffusers folder, whose attention may have its old names.
pub fn vae_of_folder(weights: &Weights) -> KeyMap {
    let rename = |key: &str| {
        let mut name = key.to_owned();
        for (old, new) in OLD_VAE_ATTENTION {
            name = name.replacen(old, new, 1);
        }
        name
    };
    weights
        .stored()
        .map(|(key, ..)| (rename(key), KeySource::whole(key.to_owned())))
        .collect()
}

/// The text encoder of a diffusers folder.
pub fn text_encoder_of_folder(weights: &Weights) -> KeyMap {
    text_encoder_below(weights, "")
}

/// CLIP's names, which older and newer files write without `text_model.`. `position_ids` are not weights.
fn text_encoder_below(weights: &Weights, prefix: &str) -> KeyMap {
    let keys = Below::new(weights.stored().map(|(key, ..)| key), prefix);
    keys.all()
        .filter(|key| !key.ends_with("position_ids"))
        .map(|key| {
            let bare = key.strip_prefix("text_model.").unwrap_or(key);
            let name = if bare.starts_with("text_projection") {
                bare.to_owned()
            } else {
                format!("text_model.{bare}")
            };
            (name, KeySource::whole(format!("{prefix}{key}")))
        })
        .collect()
}

/// The stored names below a prefix, in order, without it.
struct Below<'a> {
    prefix: &'a str,
    keys: BTreeSet<&'a str>,
}

impl<'a> Below<'a> {
    fn new(stored: impl Iterator<Item = &'a str>, prefix: &'a str) -> Self {
        Self {
            prefix,
            keys: stored.filter_map(|key| key.strip_prefix(prefix)).collect(),
        }
    }

    fn all(&self) -> impl Iterator<Item = &'a str> + '_ {
        self.keys.iter().copied()
    }

    fn under<'s>(&'s self, start: &'s str) -> impl Iterator<Item = (&'a str, &'a str)> + 's {
        let from = self
            .keys
            .range::<str, _>((Bound::Included(start), Bound::Unbounded));
        from.map_while(move |key| key.strip_prefix(start).map(|rest| (*key, rest)))
    }

    fn any(&self, start: &str) -> bool {
        self.under(start).next().is_some()
    }

    /// The numbers that follow `start`, ascending.
    fn indices(&self, start: &str) -> impl Iterator<Item = usize> + use<> {
        let numbers: BTreeSet<usize> = self
            .under(start)
            .filter_map(|(_, rest)| rest.split('.').next()?.parse().ok())
            .collect();
        numbers.into_iter()
    }

    /// Map everything below `from` to `to`; with `parts`, only what is one of them.
    fn rename(&self, from: &str, to: &str, parts: &[(&str, &str)], map: &mut KeyMap) {
        for (key, rest) in self.under(from) {
            let part = parts
                .iter()
                .find_map(|(ldm, diffusers)| Some((diffusers, rest.strip_prefix(ldm)?)));
            let name = match part {
                Some((part, rest)) => format!("{to}{part}{rest}"),
                None if parts.is_empty() => format!("{to}{rest}"),
                None => continue,
            };
            map.insert(name, KeySource::whole(format!("{}{key}", self.prefix)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    use std::path::{Path, PathBuf};

    use burn::tensor::Tensor;

    fn fixture(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures")
            .join(path)
    }

    /// Both layouts of a reference model hold the same tensors; the map must find each one, with the same numbers.
    fn same_as_folder(single: &Weights, map: KeyMap, folder_file: &str) {
        let folder = Weights::open(&[fixture(folder_file)]).unwrap();
        let stored: Vec<_> = folder
            .stored()
            .map(|(key, shape, _)| (key.to_owned(), shape.iter().product::<usize>()))
            .collect();
        assert_eq!(map.len(), stored.len());
        let single = single.clone().with_key_map(map);
        let (single, whole) = (single.at(""), folder.at(""));
        for (key, count) in stored {
            let shape = whole.shape(&key).unwrap();
            let values = |weights: &crate::diffusion::WeightsAt<'_>| {
                let data = match shape[..] {
                    [a, b] => weights.tensor_f32(&key, [a, b]).map(Tensor::<2>::into_data),
                    [a, b, c, d] => weights
                        .tensor_f32(&key, [a, b, c, d])
                        .map(Tensor::<4>::into_data),
                    _ => weights
                        .tensor_f32(&key, [count])
                        .map(Tensor::<1>::into_data),
                };
                data.unwrap().try_into_vec::<f32>().unwrap()
            };
            assert_eq!(values(&single), values(&whole), "{key}");
        }
    }

    #[test]
    fn every_tensor_of_a_single_file_has_its_diffusers_name() {
        let of = |model: &str, part: &str| format!("{model}/diffusers/{part}.safetensors");
        for model in ["tiny-sd15", "tiny-sdxl"] {
            let file = fixture(&format!("{model}/{model}-ldm.safetensors"));
            let single = Weights::open(&[file]).unwrap();
            let part = of(model, "unet/diffusion_pytorch_model");
            same_as_folder(&single, unet(&single), &part);
            let part = of(model, "vae/diffusion_pytorch_model");
            same_as_folder(&single, vae(&single), &part);
            let part = of(model, "text_encoder/model");
            let prefix = match model {
                "tiny-sd15" => TEXT_ENCODER_PREFIX,
                _ => SDXL_TEXT_ENCODER_PREFIX,
            };
            same_as_folder(&single, text_encoder(&single, prefix), &part);
            if model == "tiny-sdxl" {
                let map = open_clip(&single, SDXL_TEXT_ENCODER_2_PREFIX);
                same_as_folder(&single, map, &of(model, "text_encoder_2/model"));
            }
        }
    }

    fn with_keys(dir: &Path, keys: &[&str]) -> Weights {
        let path = dir.join("keys.safetensors");
        let data = [0u8; 4];
        let views = keys
            .iter()
            .map(|key| (*key, TensorView::new(Dtype::F32, vec![1], &data).unwrap()));
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        Weights::open(&[path]).unwrap()
    }

    fn sorted(map: KeyMap) -> Vec<(String, String)> {
        let mut pairs: Vec<_> = map.into_iter().map(|(k, v)| (k, v.key)).collect();
        pairs.sort();
        pairs
    }

    #[test]
    fn old_names_of_a_folder_are_understood() {
        let dir = tempfile::tempdir().unwrap();
        let weights = with_keys(
            dir.path(),
            &[
                "encoder.mid_block.attentions.0.query.weight",
                "encoder.mid_block.attentions.0.proj_attn.bias",
                "encoder.conv_in.weight",
            ],
        );
        let names: Vec<_> = sorted(vae_of_folder(&weights))
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(
            names,
            [
                "encoder.conv_in.weight",
                "encoder.mid_block.attentions.0.to_out.0.bias",
                "encoder.mid_block.attentions.0.to_q.weight",
            ]
        );
    }

    #[test]
    fn a_text_encoder_is_found_with_and_without_its_first_name() {
        let dir = tempfile::tempdir().unwrap();
        let weights = with_keys(
            dir.path(),
            &[
                "cond_stage_model.transformer.embeddings.position_ids",
                "cond_stage_model.transformer.final_layer_norm.bias",
                "cond_stage_model.transformer.text_model.final_layer_norm.weight",
                "model.diffusion_model.out.2.bias",
            ],
        );
        assert_eq!(
            sorted(text_encoder(&weights, TEXT_ENCODER_PREFIX)),
            [
                (
                    "text_model.final_layer_norm.bias".into(),
                    "cond_stage_model.transformer.final_layer_norm.bias".into()
                ),
                (
                    "text_model.final_layer_norm.weight".into(),
                    "cond_stage_model.transformer.text_model.final_layer_norm.weight".into()
                ),
            ]
        );
    }

    /// The reference's own names for every module of SDXL's UNet.
    #[test]
    fn diffusers_paths_have_their_ldm_paths() {
        let text = std::fs::read_to_string(fixture(
            "tiny-sdxl/goldens/unet_module_names_diffusers_to_sgm.json",
        ))
        .unwrap();
        let names: HashMap<String, String> = serde_json::from_str(&text).unwrap();
        let layout = UNetLayout {
            layers_per_block: 1,
            up_attends: vec![true, true, false],
        };
        assert!(names.len() > 100);
        for (path, expected) in &names {
            assert_eq!(layout.ldm_path(path).as_ref(), Some(expected), "{path}");
        }
        for path in [
            "",
            "down_blocks",
            "down_blocks.x.resnets.0.conv1",
            "mid_block.0",
        ] {
            assert_eq!(layout.ldm_path(path), None, "{path}");
        }
    }

    #[test]
    fn nonsense_keys_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let weights = with_keys(
            dir.path(),
            &[
                "first_stage_model.decoder.up.99999999999999999999.block.0.conv1.bias",
                "first_stage_model.decoder.up.x.block.0.conv1.bias",
                "model.diffusion_model.input_blocks.18446744073709551616.0.op.bias",
                "model.diffusion_model.input_blocks.1.0.unknown.bias",
            ],
        );
        assert!(vae(&weights).is_empty() && unet(&weights).is_empty());
    }
}
