//! Names and shapes of the tensors of a Stable Diffusion model in one file (LDM names). Nothing here has values.

use crate::diffusion::Family;
use crate::diffusion::ldm::{
    SD2_TEXT_ENCODER_PREFIX, SDXL_TEXT_ENCODER_2_PREFIX, SDXL_TEXT_ENCODER_PREFIX,
    TEXT_ENCODER_PREFIX, UNET_PREFIX, VAE_PREFIX,
};

/// Tokens in a row of a text encoder.
const POSITIONS: usize = 77;
/// Channels of a latent.
const LATENT: usize = 4;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TensorSpec {
    /// Its stored name.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// How wide and deep the parts of a model are.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Channels of the UNet's levels.
    pub unet_channels: &'static [usize],
    /// Residual blocks of a level on the way down; one more on the way up.
    pub unet_blocks: usize,
    /// Transformer blocks of each attention of a level; 0 where it does not attend to the text.
    pub unet_depths: &'static [usize],
    /// The same in the middle.
    pub middle_depth: usize,
    /// Whether the projections around transformers are matrices instead of 1×1 convolutions.
    pub linear_projections: bool,
    /// Length of a text state.
    pub context: usize,
    /// How many numbers are added to the timestep; 0 where none are.
    pub added: usize,
    /// Channels of the VAE's levels.
    pub vae_channels: [usize; 4],
    /// Residual blocks of a level of the VAE's encoder; its decoder has one more.
    pub vae_blocks: usize,
    /// The text encoders.
    pub text_encoders: &'static [TextSizes],
}

/// How wide and deep a text encoder is, and where it is.
#[derive(Clone, Debug)]
pub struct TextSizes {
    /// Where it is in the file.
    pub prefix: &'static str,
    /// Whether it has OpenCLIP's names; otherwise transformers'.
    pub open_clip: bool,
    /// Ids that it embeds.
    pub vocabulary: usize,
    /// Width of a state.
    pub width: usize,
    /// Width of its MLP.
    pub mlp: usize,
    /// Its layers.
    pub layers: usize,
    /// Length of the pooled state, of OpenCLIP's.
    pub pooled: usize,
}

const CLIP_L: TextSizes = TextSizes {
    prefix: TEXT_ENCODER_PREFIX,
    open_clip: false,
    vocabulary: 49_408,
    width: 768,
    mlp: 3072,
    layers: 12,
    pooled: 0,
};

impl Sizes {
    /// Stable Diffusion 1.5 as published.
    pub const SD15: Self = Self {
        unet_channels: &[320, 640, 1280, 1280],
        unet_blocks: 2,
        unet_depths: &[1, 1, 1, 0],
        middle_depth: 1,
        linear_projections: false,
        context: 768,
        added: 0,
        vae_channels: [128, 256, 512, 512],
        vae_blocks: 2,
        text_encoders: &[CLIP_L],
    };

    /// Stable Diffusion 2.1 as published: OpenCLIP-H, the last of whose layers is not used.
    pub const SD21: Self = Self {
        linear_projections: true,
        context: 1024,
        text_encoders: &[TextSizes {
            prefix: SD2_TEXT_ENCODER_PREFIX,
            open_clip: true,
            width: 1024,
            mlp: 4096,
            layers: 24,
            pooled: 1024,
            ..CLIP_L
        }],
        ..Self::SD15
    };

    /// Stable Diffusion XL 1.0 as published: CLIP-L and OpenCLIP-bigG.
    pub const SDXL: Self = Self {
        unet_channels: &[320, 640, 1280],
        unet_depths: &[0, 2, 10],
        middle_depth: 10,
        linear_projections: true,
        context: 2048,
        added: 2816,
        text_encoders: &[
            TextSizes {
                prefix: SDXL_TEXT_ENCODER_PREFIX,
                ..CLIP_L
            },
            TextSizes {
                prefix: SDXL_TEXT_ENCODER_2_PREFIX,
                open_clip: true,
                width: 1280,
                mlp: 5120,
                layers: 32,
                pooled: 1280,
                ..CLIP_L
            },
        ],
        ..Self::SD15
    };

    /// Those of a family.
    pub fn of(family: Family) -> Self {
        match family {
            Family::Sd1 => Self::SD15,
            Family::Sd2 => Self::SD21,
            Family::Sdxl => Self::SDXL,
        }
    }

    /// Every tensor of the model.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut list = List(Vec::new());
        for encoder in self.text_encoders {
            encoder.tensors(&mut list.below(encoder.prefix));
        }
        self.unet(&mut list.below(UNET_PREFIX));
        self.vae(&mut list.below(VAE_PREFIX));
        list.0
    }

    fn unet(&self, list: &mut Below<'_>) {
        let first = self.unet_channels[0];
        let last_level = self.unet_channels.len() - 1;
        list.linear("time_embed.0", first, 4 * first);
        list.linear("time_embed.2", 4 * first, 4 * first);
        if self.added != 0 {
            list.linear("label_emb.0.0", self.added, 4 * first);
            list.linear("label_emb.0.2", 4 * first, 4 * first);
        }
        list.conv("input_blocks.0.0", LATENT, first, 3);

        let mut skips = vec![first]; // channels of what the way up takes over from the way down
        let mut channels = first;
        for (level, &wide) in self.unet_channels.iter().enumerate() {
            for _ in 0..self.unet_blocks {
                let at = format!("input_blocks.{}", skips.len());
                self.unet_resnet(list, &format!("{at}.0"), channels, wide);
                self.transformer(list, &format!("{at}.1"), wide, self.unet_depths[level]);
                channels = wide;
                skips.push(channels);
            }
            if level != last_level {
                let at = format!("input_blocks.{}.0.op", skips.len());
                list.conv(&at, channels, channels, 3);
                skips.push(channels);
            }
        }

        self.unet_resnet(list, "middle_block.0", channels, channels);
        self.transformer(list, "middle_block.1", channels, self.middle_depth);
        self.unet_resnet(list, "middle_block.2", channels, channels);

        let blocks = skips.len();
        for (level, &wide) in self.unet_channels.iter().enumerate().rev() {
            for block in 0..=self.unet_blocks {
                let at = format!("output_blocks.{}", blocks - skips.len());
                let skip = skips.pop().unwrap_or_default();
                self.unet_resnet(list, &format!("{at}.0"), channels + skip, wide);
                channels = wide;
                let depth = self.unet_depths[level];
                self.transformer(list, &format!("{at}.1"), wide, depth);
                let part = 1 + usize::from(depth != 0);
                if level != 0 && block == self.unet_blocks {
                    list.conv(&format!("{at}.{part}.conv"), wide, wide, 3);
                }
            }
        }
        list.norm("out.0", first);
        list.conv("out.2", first, LATENT, 3);
    }

    fn unet_resnet(&self, list: &mut Below<'_>, at: &str, c_in: usize, c_out: usize) {
        list.norm(&format!("{at}.in_layers.0"), c_in);
        list.conv(&format!("{at}.in_layers.2"), c_in, c_out, 3);
        let d_time = 4 * self.unet_channels[0];
        list.linear(&format!("{at}.emb_layers.1"), d_time, c_out);
        list.norm(&format!("{at}.out_layers.0"), c_out);
        list.conv(&format!("{at}.out_layers.3"), c_out, c_out, 3);
        if c_in != c_out {
            list.conv(&format!("{at}.skip_connection"), c_in, c_out, 1);
        }
    }

    fn transformer(&self, list: &mut Below<'_>, at: &str, c: usize, depth: usize) {
        if depth == 0 {
            return;
        }
        let projection = |list: &mut Below<'_>, name: &str| {
            let at = format!("{at}.{name}");
            if self.linear_projections {
                list.linear(&at, c, c);
            } else {
                list.conv(&at, c, c, 1);
            }
        };
        list.norm(&format!("{at}.norm"), c);
        projection(list, "proj_in");
        for index in 0..depth {
            let block = format!("{at}.transformer_blocks.{index}");
            for (attention, d_context) in [("attn1", c), ("attn2", self.context)] {
                for (name, d_in) in [("to_q", c), ("to_k", d_context), ("to_v", d_context)] {
                    list.add(format!("{block}.{attention}.{name}.weight"), vec![c, d_in]);
                }
                list.linear(&format!("{block}.{attention}.to_out.0"), c, c);
            }
            list.linear(&format!("{block}.ff.net.0.proj"), c, 8 * c); // GEGLU: value and gate
            list.linear(&format!("{block}.ff.net.2"), 4 * c, c);
            for norm in ["norm1", "norm2", "norm3"] {
                list.norm(&format!("{block}.{norm}"), c);
            }
        }
        projection(list, "proj_out");
    }

    fn vae(&self, list: &mut Below<'_>) {
        let narrow = self.vae_channels[0];
        let last_level = self.vae_channels.len() - 1;
        let widest = self.vae_channels[last_level];

        list.conv("encoder.conv_in", 3, narrow, 3);
        let mut channels = narrow;
        for (level, &wide) in self.vae_channels.iter().enumerate() {
            let at = format!("encoder.down.{level}");
            vae_blocks(list, &at, self.vae_blocks, channels, wide);
            channels = wide;
            if level != last_level {
                list.conv(&format!("{at}.downsample.conv"), wide, wide, 3);
            }
        }
        vae_middle(list, "encoder.mid", widest);
        list.norm("encoder.norm_out", widest);
        list.conv("encoder.conv_out", widest, 2 * LATENT, 3); // mean and variance
        list.conv("quant_conv", 2 * LATENT, 2 * LATENT, 1);

        list.conv("post_quant_conv", LATENT, LATENT, 1);
        list.conv("decoder.conv_in", LATENT, widest, 3);
        vae_middle(list, "decoder.mid", widest);
        for (level, &wide) in self.vae_channels.iter().enumerate().rev() {
            let at = format!("decoder.up.{level}");
            vae_blocks(list, &at, self.vae_blocks + 1, channels, wide);
            channels = wide;
            if level != 0 {
                list.conv(&format!("{at}.upsample.conv"), wide, wide, 3);
            }
        }
        list.norm("decoder.norm_out", narrow);
        list.conv("decoder.conv_out", narrow, 3, 3);
    }
}

impl TextSizes {
    fn tensors(&self, list: &mut Below<'_>) {
        if self.open_clip {
            self.open_clip(list);
        } else {
            self.transformers(list);
        }
    }

    fn transformers(&self, list: &mut Below<'_>) {
        let d = self.width;
        let embeddings = "text_model.embeddings";
        let tokens = vec![self.vocabulary, d];
        list.add(format!("{embeddings}.token_embedding.weight"), tokens);
        let positions = vec![POSITIONS, d];
        list.add(format!("{embeddings}.position_embedding.weight"), positions);
        for layer in 0..self.layers {
            let at = format!("text_model.encoder.layers.{layer}");
            list.norm(&format!("{at}.layer_norm1"), d);
            for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                list.linear(&format!("{at}.self_attn.{name}"), d, d);
            }
            list.norm(&format!("{at}.layer_norm2"), d);
            list.linear(&format!("{at}.mlp.fc1"), d, self.mlp);
            list.linear(&format!("{at}.mlp.fc2"), self.mlp, d);
        }
        list.norm("text_model.final_layer_norm", d);
    }

    fn open_clip(&self, list: &mut Below<'_>) {
        let d = self.width;
        list.add("token_embedding.weight", vec![self.vocabulary, d]);
        list.add("positional_embedding", vec![POSITIONS, d]);
        for layer in 0..self.layers {
            let at = format!("transformer.resblocks.{layer}");
            list.norm(&format!("{at}.ln_1"), d);
            list.add(format!("{at}.attn.in_proj_bias"), vec![3 * d]);
            list.add(format!("{at}.attn.in_proj_weight"), vec![3 * d, d]);
            list.linear(&format!("{at}.attn.out_proj"), d, d);
            list.norm(&format!("{at}.ln_2"), d);
            list.linear(&format!("{at}.mlp.c_fc"), d, self.mlp);
            list.linear(&format!("{at}.mlp.c_proj"), self.mlp, d);
        }
        list.norm("ln_final", d);
        list.add("text_projection", vec![d, self.pooled]);
    }
}

fn vae_blocks(list: &mut Below<'_>, at: &str, blocks: usize, c_in: usize, c_out: usize) {
    for block in 0..blocks {
        let c_in = if block == 0 { c_in } else { c_out };
        vae_resnet(list, &format!("{at}.block.{block}"), c_in, c_out);
    }
}

fn vae_resnet(list: &mut Below<'_>, at: &str, c_in: usize, c_out: usize) {
    list.norm(&format!("{at}.norm1"), c_in);
    list.conv(&format!("{at}.conv1"), c_in, c_out, 3);
    list.norm(&format!("{at}.norm2"), c_out);
    list.conv(&format!("{at}.conv2"), c_out, c_out, 3);
    if c_in != c_out {
        list.conv(&format!("{at}.nin_shortcut"), c_in, c_out, 1);
    }
}

fn vae_middle(list: &mut Below<'_>, at: &str, c: usize) {
    vae_resnet(list, &format!("{at}.block_1"), c, c);
    list.norm(&format!("{at}.attn_1.norm"), c);
    for name in ["q", "k", "v", "proj_out"] {
        list.conv(&format!("{at}.attn_1.{name}"), c, c, 1);
    }
    vae_resnet(list, &format!("{at}.block_2"), c, c);
}

/// The tensors so far.
struct List(Vec<TensorSpec>);

impl List {
    fn below(&mut self, prefix: &'static str) -> Below<'_> {
        Below { list: self, prefix }
    }
}

/// Adds tensors below a prefix.
struct Below<'a> {
    list: &'a mut List,
    prefix: &'static str,
}

impl Below<'_> {
    fn add(&mut self, name: impl AsRef<str>, shape: Vec<usize>) {
        let name = format!("{}{}", self.prefix, name.as_ref());
        self.list.0.push(TensorSpec { name, shape });
    }

    fn with_bias(&mut self, at: &str, shape: Vec<usize>) {
        self.add(format!("{at}.bias"), vec![shape[0]]);
        self.add(format!("{at}.weight"), shape);
    }

    fn norm(&mut self, at: &str, c: usize) {
        self.with_bias(at, vec![c]);
    }

    fn linear(&mut self, at: &str, d_in: usize, d_out: usize) {
        self.with_bias(at, vec![d_out, d_in]);
    }

    fn conv(&mut self, at: &str, c_in: usize, c_out: usize, kernel: usize) {
        self.with_bias(at, vec![c_out, c_in, kernel, kernel]);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};
    use std::path::Path;

    use super::*;
    use crate::diffusion::ldm::{self, UNetLayout};
    use crate::diffusion::weights::StoredView;
    use crate::diffusion::{KeySource, Part, Weights};
    use crate::networks::{LayerShape, Naming, NetworkSettings, Rules, Target};

    /// The small reference models have the same parts, written by the reference's own conversion.
    #[test]
    fn names_and_shapes_are_those_of_single_files() {
        let sd15 = Sizes {
            unet_channels: &[32, 32, 64, 32],
            unet_blocks: 1,
            context: 8,
            vae_channels: [32; 4],
            vae_blocks: 1,
            text_encoders: &[TextSizes {
                width: 8,
                mlp: 32,
                layers: 3,
                ..CLIP_L
            }],
            ..Sizes::SD15
        };
        let sdxl = Sizes {
            unet_channels: &[32, 64, 32],
            unet_blocks: 1,
            unet_depths: &[0, 1, 2],
            middle_depth: 2,
            context: 20,
            added: 58,
            vae_channels: [32; 4],
            vae_blocks: 1,
            text_encoders: &[
                TextSizes {
                    prefix: SDXL_TEXT_ENCODER_PREFIX,
                    width: 8,
                    mlp: 16,
                    layers: 3,
                    ..CLIP_L
                },
                TextSizes {
                    prefix: SDXL_TEXT_ENCODER_2_PREFIX,
                    open_clip: true,
                    width: 12,
                    mlp: 32,
                    layers: 4,
                    pooled: 10,
                    ..CLIP_L
                },
            ],
            ..Sizes::SDXL
        };
        for (name, tiny) in [("tiny-sd15", sd15), ("tiny-sdxl", sdxl)] {
            let file = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join(format!("tests/fixtures/{name}/{name}-ldm.safetensors"));
            let weights = Weights::open(&[file]).unwrap();
            let mut expected: Vec<_> = weights
                .stored()
                .filter(|(key, ..)| !key.ends_with("logit_scale"))
                .map(|(key, shape, _)| TensorSpec {
                    name: key.to_owned(),
                    shape: shape.to_vec(),
                })
                .collect();
            let mut found = tiny.tensors();
            expected.sort();
            found.sort();
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn full_sizes_have_the_published_numbers_of_parameters() {
        let count = |tensors: &[TensorSpec], prefix: &str| -> usize {
            let below = tensors.iter().filter(|t| t.name.starts_with(prefix));
            below.map(TensorSpec::len).sum()
        };
        let (sd15, sd21) = (Sizes::SD15.tensors(), Sizes::SD21.tensors());
        assert_eq!(count(&sd15, UNET_PREFIX), 859_520_964);
        assert_eq!(count(&sd15, VAE_PREFIX), 83_653_863);
        assert_eq!(count(&sd15, TEXT_ENCODER_PREFIX), 123_060_480);
        assert_eq!(count(&sd21, UNET_PREFIX), 865_910_724);
        let sdxl = Sizes::SDXL.tensors();
        assert_eq!(count(&sdxl, UNET_PREFIX), 2_567_463_684);
        assert_eq!(count(&sdxl, SDXL_TEXT_ENCODER_PREFIX), 123_060_480);
        assert_eq!(count(&sdxl, SDXL_TEXT_ENCODER_2_PREFIX), 694_659_840);
    }

    /// Adapters of the full-size models, named by the tensors of their single files, against sd-scripts' own lists.
    #[test]
    fn adapters_of_full_sizes_are_those_of_sd_scripts() {
        let lists = [
            (
                Family::Sd2,
                None,
                include_str!("../../tests/fixtures/kohya/kohya_keys_sd2.txt"),
            ),
            (
                Family::Sd2,
                Some(8),
                include_str!("../../tests/fixtures/kohya/kohya_keys_sd2_conv.txt"),
            ),
            (
                Family::Sdxl,
                None,
                include_str!("../../tests/fixtures/kohya/kohya_keys_sdxl.txt"),
            ),
            (
                Family::Sdxl,
                Some(8),
                include_str!("../../tests/fixtures/kohya/kohya_keys_sdxl_conv.txt"),
            ),
        ];
        for (family, conv_rank, list) in lists {
            let settings = NetworkSettings {
                rank: 16,
                alpha: 1.0,
                conv_rank,
                ..NetworkSettings::default()
            };
            let expected: BTreeMap<String, String> = list
                .lines()
                .filter_map(|line| line.split_once('\t'))
                .map(|(key, shape)| (key.to_owned(), shape.to_owned()))
                .collect();
            assert!(expected.len() > 900);
            assert_eq!(
                adapter_keys(family, &settings),
                expected,
                "{family:?} {conv_rank:?}"
            );
        }
    }

    fn adapter_keys(family: Family, settings: &NetworkSettings) -> BTreeMap<String, String> {
        let sizes = Sizes::of(family);
        let tensors = sizes.tensors();
        let shapes: HashMap<&str, &[usize]> = tensors
            .iter()
            .map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice()))
            .collect();
        let stored = || shapes.keys().copied();
        let mut parts = vec![(Part::UNet, ldm::unet_names(stored()))];
        match family {
            Family::Sd1 => {}
            Family::Sd2 => {
                let map = ldm::open_clip_names(stored(), SD2_TEXT_ENCODER_PREFIX);
                let used = |name: &String| !name.contains(".layers.23.");
                let map = map.into_iter().filter(|(name, _)| used(name));
                parts.push((Part::TextEncoder, map.collect()));
            }
            Family::Sdxl => {
                let map = ldm::open_clip_names(stored(), SDXL_TEXT_ENCODER_2_PREFIX);
                parts.push((Part::TextEncoder2, map));
                let names = stored().filter_map(|key| {
                    let name = key.strip_prefix(SDXL_TEXT_ENCODER_PREFIX)?;
                    Some((name.to_owned(), KeySource::whole(key.to_owned())))
                });
                parts.push((Part::TextEncoder, names.collect()));
            }
        }
        let naming = Naming {
            family,
            unet_layout: UNetLayout {
                layers_per_block: sizes.unet_blocks,
                up_attends: sizes.unet_depths.iter().rev().map(|d| *d != 0).collect(),
            },
        };
        let rules = Rules::new(&naming, settings).expect("rules");
        let mut keys = BTreeMap::new();
        for (part, map) in parts {
            for (name, source) in map {
                let rows = match source.view {
                    StoredView::Rows { of, .. } => of,
                    StoredView::Whole | StoredView::Transposed => 1,
                };
                let shape = match *shapes[source.key.as_str()] {
                    [d_out, d_in] => LayerShape::Linear {
                        d_in,
                        d_out: d_out / rows,
                    },
                    [c_out, c_in, height, width] => LayerShape::Conv {
                        c_in,
                        c_out,
                        kernel: [height, width],
                    },
                    _ => continue,
                };
                let Some(path) = name.strip_suffix(".weight") else {
                    continue;
                };
                let Some(target) = rules.target(part, path, shape) else {
                    continue;
                };
                let Target {
                    name, shape, rank, ..
                } = target;
                keys.insert(format!("{name}.alpha"), "[]".to_owned());
                let down = format!("{:?}", shape.down_shape(rank));
                keys.insert(format!("{name}.lora_down.weight"), down);
                let up = format!("{:?}", shape.up_shape(rank));
                keys.insert(format!("{name}.lora_up.weight"), up);
            }
        }
        keys
    }
}
