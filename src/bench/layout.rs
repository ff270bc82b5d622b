//! Names and shapes of the tensors of a Stable Diffusion 1 model in one file (LDM names). Nothing here has values.

use crate::diffusion::ldm::{TEXT_ENCODER_PREFIX, UNET_PREFIX, VAE_PREFIX};

/// Tokens in a row of the text encoder.
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
    /// Channels of the UNet's levels; all but the last attend to the text.
    pub unet_channels: [usize; 4],
    /// Residual blocks of a level on the way down; one more on the way up.
    pub unet_blocks: usize,
    /// Channels of the VAE's levels.
    pub vae_channels: [usize; 4],
    /// Residual blocks of a level of the VAE's encoder; its decoder has one more.
    pub vae_blocks: usize,
    /// Ids that the text encoder embeds.
    pub vocabulary: usize,
    /// Width of a text state.
    pub text_width: usize,
    /// Width of the text encoder's MLP.
    pub text_mlp: usize,
    /// Layers of the text encoder.
    pub text_layers: usize,
}

impl Sizes {
    /// Stable Diffusion 1.5 as published.
    pub const SD15: Self = Self {
        unet_channels: [320, 640, 1280, 1280],
        unet_blocks: 2,
        vae_channels: [128, 256, 512, 512],
        vae_blocks: 2,
        vocabulary: 49_408,
        text_width: 768,
        text_mlp: 3072,
        text_layers: 12,
    };

    /// Every tensor of the model.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut list = List(Vec::new());
        self.text_encoder(&mut list.below(TEXT_ENCODER_PREFIX));
        self.unet(&mut list.below(UNET_PREFIX));
        self.vae(&mut list.below(VAE_PREFIX));
        list.0
    }

    fn text_encoder(&self, list: &mut Below<'_>) {
        let d = self.text_width;
        let embeddings = "text_model.embeddings";
        let tokens = vec![self.vocabulary, d];
        list.add(format!("{embeddings}.token_embedding.weight"), tokens);
        let positions = vec![POSITIONS, d];
        list.add(format!("{embeddings}.position_embedding.weight"), positions);
        for layer in 0..self.text_layers {
            let at = format!("text_model.encoder.layers.{layer}");
            list.norm(&format!("{at}.layer_norm1"), d);
            for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                list.linear(&format!("{at}.self_attn.{name}"), d, d);
            }
            list.norm(&format!("{at}.layer_norm2"), d);
            list.linear(&format!("{at}.mlp.fc1"), d, self.text_mlp);
            list.linear(&format!("{at}.mlp.fc2"), self.text_mlp, d);
        }
        list.norm("text_model.final_layer_norm", d);
    }

    fn unet(&self, list: &mut Below<'_>) {
        let first = self.unet_channels[0];
        let last_level = self.unet_channels.len() - 1;
        list.linear("time_embed.0", first, 4 * first);
        list.linear("time_embed.2", 4 * first, 4 * first);
        list.conv("input_blocks.0.0", LATENT, first, 3);

        let mut skips = vec![first]; // channels of what the way up takes over from the way down
        let mut channels = first;
        for (level, &wide) in self.unet_channels.iter().enumerate() {
            for _ in 0..self.unet_blocks {
                let at = format!("input_blocks.{}", skips.len());
                self.unet_resnet(list, &format!("{at}.0"), channels, wide);
                if level != last_level {
                    self.transformer(list, &format!("{at}.1"), wide);
                }
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
        self.transformer(list, "middle_block.1", channels);
        self.unet_resnet(list, "middle_block.2", channels, channels);

        let blocks = skips.len();
        for (level, &wide) in self.unet_channels.iter().enumerate().rev() {
            for block in 0..=self.unet_blocks {
                let at = format!("output_blocks.{}", blocks - skips.len());
                let skip = skips.pop().unwrap_or_default();
                self.unet_resnet(list, &format!("{at}.0"), channels + skip, wide);
                channels = wide;
                let mut part = 1;
                if level != last_level {
                    self.transformer(list, &format!("{at}.{part}"), wide);
                    part += 1;
                }
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

    fn transformer(&self, list: &mut Below<'_>, at: &str, c: usize) {
        list.norm(&format!("{at}.norm"), c);
        list.conv(&format!("{at}.proj_in"), c, c, 1);
        let block = format!("{at}.transformer_blocks.0");
        for (attention, d_context) in [("attn1", c), ("attn2", self.text_width)] {
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
        list.conv(&format!("{at}.proj_out"), c, c, 1);
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
    use std::path::Path;

    use super::*;
    use crate::diffusion::Weights;

    /// The small reference model has the same parts, written by the reference's own conversion.
    #[test]
    fn names_and_shapes_are_those_of_a_single_file() {
        let tiny = Sizes {
            unet_channels: [32, 32, 64, 32],
            unet_blocks: 1,
            vae_channels: [32; 4],
            vae_blocks: 1,
            vocabulary: 49_408,
            text_width: 8,
            text_mlp: 32,
            text_layers: 3,
        };
        let file = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/tiny-sd15/tiny-sd15-ldm.safetensors");
        let weights = Weights::open(&[file]).unwrap();
        let mut expected: Vec<_> = weights
            .stored()
            .map(|(name, shape, _)| TensorSpec {
                name: name.to_owned(),
                shape: shape.to_vec(),
            })
            .collect();
        let mut found = tiny.tensors();
        expected.sort();
        found.sort();
        assert_eq!(found, expected);
    }

    #[test]
    fn the_full_size_has_the_published_number_of_parameters() {
        let tensors = Sizes::SD15.tensors();
        let count = |prefix: &str| -> usize {
            let below = tensors.iter().filter(|t| t.name.starts_with(prefix));
            below.map(TensorSpec::len).sum()
        };
        assert_eq!(count(UNET_PREFIX), 859_520_964);
        assert_eq!(count(VAE_PREFIX), 83_653_863);
        assert_eq!(count(TEXT_ENCODER_PREFIX), 123_060_480);
    }
}
