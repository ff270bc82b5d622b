//! The autoencoder between pictures and latents (`AutoencoderKL` in diffusers).

use burn::tensor::Tensor;

use super::attention::attention;
use super::config::VaeConfig;
use super::error::LoadError;
use super::layers::{Conv2d, GroupNorm, Linear};
use super::resnet::{Downsample, ResnetBlock, Upsample};
use super::weights::WeightsAt;
use crate::kernels::Precision;

/// Epsilon of all norms; fixed in the reference implementation.
const EPS: f64 = 1e-6;

/// Encodes pictures to latents and back.
///
/// Kingma & Welling 2013, arXiv:1312.6114; Esser et al. 2021, arXiv:2012.09841.
#[derive(Debug)]
pub struct Vae {
    encoder: Encoder,
    quant_conv: Conv2d,
    post_quant_conv: Conv2d,
    decoder: Decoder,
    scaling_factor: f64,
    factor: usize,
}

/// The distribution that a picture is encoded to: an independent normal for each latent element.
#[derive(Debug, Clone)]
pub struct Moments {
    /// `[batch, c, height, width]`
    pub mean: Tensor<4>,
    /// `[batch, c, height, width]`, natural logarithm of the variance
    pub logvar: Tensor<4>,
}

impl Moments {
    /// `mean + exp(logvar / 2) * noise`
    ///
    /// # Shapes
    /// - `noise`: as the mean
    pub fn sample(&self, noise: Tensor<4>) -> Tensor<4> {
        self.mean.clone() + self.logvar.clone().mul_scalar(0.5).exp() * noise
    }
}

#[derive(Debug)]
struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<EncoderLevel>,
    mid_block: Middle,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

#[derive(Debug)]
struct EncoderLevel {
    resnets: Vec<ResnetBlock>,
    downsampler: Option<Downsample>,
}

#[derive(Debug)]
struct Decoder {
    conv_in: Conv2d,
    mid_block: Middle,
    up_blocks: Vec<DecoderLevel>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

#[derive(Debug)]
struct DecoderLevel {
    resnets: Vec<ResnetBlock>,
    upsampler: Option<Upsample>,
}

#[derive(Debug)]
struct Middle {
    first: ResnetBlock,
    attention: Option<PixelAttention>,
    second: ResnetBlock,
}

/// Attention of all pixels to each other, with a single head.
#[derive(Debug)]
struct PixelAttention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Vae {
    /// Reads the autoencoder; `weights` is the root that holds `encoder` and `decoder`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape than `config` says.
    pub fn load(weights: &WeightsAt<'_>, config: &VaeConfig) -> Result<Self, LoadError> {
        let c = config.latent_channels;
        Ok(Self {
            encoder: Encoder::load(&weights.at("encoder"), config)?,
            quant_conv: Conv2d::load(&weights.at("quant_conv"), 2 * c, 2 * c, 1)?,
            post_quant_conv: Conv2d::load(&weights.at("post_quant_conv"), c, c, 1)?,
            decoder: Decoder::load(&weights.at("decoder"), config)?,
            scaling_factor: config.scaling_factor,
            factor: config.factor(),
        })
    }

    /// Latents are multiplied by this before the UNet sees them.
    pub fn scaling_factor(&self) -> f64 {
        self.scaling_factor
    }

    /// Pixels of a picture's side for each element of its latent's: 8 for Stable Diffusion.
    pub fn factor(&self) -> usize {
        self.factor
    }

    /// # Shapes
    /// - `image`: `[batch, 3, height, width]` in -1 to 1, sides multiples of [`Self::factor`]
    /// - moments: `[batch, c, height / factor, width / factor]`, not scaled
    pub fn encode(&self, image: Tensor<4>) -> Moments {
        let moments = self.quant_conv.forward(self.encoder.forward(image));
        let c = moments.dims()[1] / 2;
        Moments {
            mean: moments.clone().narrow(1, 0, c),
            // The reference's guard against overflow.
            logvar: moments.narrow(1, c, c).clamp(-30.0, 20.0),
        }
    }

    /// # Shapes
    /// - `latent`: `[batch, c, height, width]`, not scaled
    /// - output: `[batch, 3, height * factor, width * factor]`, about -1 to 1
    pub fn decode(&self, latent: Tensor<4>) -> Tensor<4> {
        self.decoder.forward(self.post_quant_conv.forward(latent))
    }
}

impl Encoder {
    fn load(weights: &WeightsAt<'_>, config: &VaeConfig) -> Result<Self, LoadError> {
        let channels = &config.block_out_channels;
        let (groups, last) = (config.norm_num_groups, channels.len() - 1);
        let level = |index: usize| -> Result<EncoderLevel, LoadError> {
            let weights = weights.at(format!("down_blocks.{index}"));
            let c_out = channels[index];
            let c_in = channels[index.saturating_sub(1)];
            Ok(EncoderLevel {
                resnets: load_resnets(&weights, config.layers_per_block, c_in, c_out, groups)?,
                downsampler: if index < last {
                    Some(Downsample::load(
                        &weights.at("downsamplers.0"),
                        c_out,
                        true,
                    )?)
                } else {
                    None
                },
            })
        };
        let wide = channels[last];
        Ok(Self {
            conv_in: Conv2d::load(&weights.at("conv_in"), 3, channels[0], 3)?,
            down_blocks: (0..=last).map(level).collect::<Result<_, _>>()?,
            mid_block: Middle::load(&weights.at("mid_block"), wide, groups)?,
            conv_norm_out: GroupNorm::load(&weights.at("conv_norm_out"), wide, groups, EPS)?,
            conv_out: Conv2d::load(&weights.at("conv_out"), wide, 2 * config.latent_channels, 3)?,
        })
    }

    fn forward(&self, image: Tensor<4>) -> Tensor<4> {
        let mut hidden = self.conv_in.forward(image);
        for level in &self.down_blocks {
            for resnet in &level.resnets {
                hidden = resnet.forward(hidden, None);
            }
            if let Some(downsampler) = &level.downsampler {
                hidden = downsampler.forward(hidden);
            }
        }
        let hidden = self.mid_block.forward(hidden);
        self.conv_out
            .forward(self.conv_norm_out.forward_silu(hidden))
    }
}

impl Decoder {
    fn load(weights: &WeightsAt<'_>, config: &VaeConfig) -> Result<Self, LoadError> {
        let channels = &config.block_out_channels;
        let (groups, last) = (config.norm_num_groups, channels.len() - 1);
        let level = |index: usize| -> Result<DecoderLevel, LoadError> {
            let weights = weights.at(format!("up_blocks.{index}"));
            let mirrored = last - index;
            let c_out = channels[mirrored];
            let c_in = channels[(mirrored + 1).min(last)];
            Ok(DecoderLevel {
                resnets: load_resnets(&weights, config.layers_per_block + 1, c_in, c_out, groups)?,
                upsampler: if index < last {
                    Some(Upsample::load(&weights.at("upsamplers.0"), c_out)?)
                } else {
                    None
                },
            })
        };
        let (narrow, wide) = (channels[0], channels[last]);
        Ok(Self {
            conv_in: Conv2d::load(&weights.at("conv_in"), config.latent_channels, wide, 3)?,
            mid_block: Middle::load(&weights.at("mid_block"), wide, groups)?,
            up_blocks: (0..=last).map(level).collect::<Result<_, _>>()?,
            conv_norm_out: GroupNorm::load(&weights.at("conv_norm_out"), narrow, groups, EPS)?,
            conv_out: Conv2d::load(&weights.at("conv_out"), narrow, 3, 3)?,
        })
    }

    fn forward(&self, latent: Tensor<4>) -> Tensor<4> {
        let mut hidden = self.mid_block.forward(self.conv_in.forward(latent));
        for level in &self.up_blocks {
            for resnet in &level.resnets {
                hidden = resnet.forward(hidden, None);
            }
            if let Some(upsampler) = &level.upsampler {
                let [_, _, height, width] = hidden.dims();
                hidden = upsampler.forward(hidden, [2 * height, 2 * width]);
            }
        }
        self.conv_out
            .forward(self.conv_norm_out.forward_silu(hidden))
    }
}

fn load_resnets(
    weights: &WeightsAt<'_>,
    count: usize,
    c_in: usize,
    c_out: usize,
    groups: usize,
) -> Result<Vec<ResnetBlock>, LoadError> {
    (0..count)
        .map(|index| {
            let c_in = if index == 0 { c_in } else { c_out };
            let weights = weights.at(format!("resnets.{index}"));
            ResnetBlock::load(&weights, c_in, c_out, groups, EPS)
        })
        .collect()
}

impl Middle {
    fn load(weights: &WeightsAt<'_>, channels: usize, groups: usize) -> Result<Self, LoadError> {
        let attention = weights.at("attentions.0");
        Ok(Self {
            first: ResnetBlock::load(&weights.at("resnets.0"), channels, channels, groups, EPS)?,
            attention: if attention.has("group_norm.weight") {
                Some(PixelAttention::load(&attention, channels, groups)?)
            } else {
                None
            },
            second: ResnetBlock::load(&weights.at("resnets.1"), channels, channels, groups, EPS)?,
        })
    }

    fn forward(&self, hidden: Tensor<4>) -> Tensor<4> {
        let hidden = self.first.forward(hidden, None);
        let hidden = match &self.attention {
            Some(attention) => attention.forward(hidden),
            None => hidden,
        };
        self.second.forward(hidden, None)
    }
}

impl PixelAttention {
    fn load(weights: &WeightsAt<'_>, channels: usize, groups: usize) -> Result<Self, LoadError> {
        let linear = |name: &str| Linear::load_sized(&weights.at(name), channels, channels);
        Ok(Self {
            group_norm: GroupNorm::load(&weights.at("group_norm"), channels, groups, EPS)?,
            to_q: linear("to_q")?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
            to_out: linear("to_out.0")?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, height, width] = x.dims();
        let tokens = self
            .group_norm
            .forward(x.clone())
            .reshape([batch, channels, height * width])
            .swap_dims(1, 2); // [batch, pixels, channels]
        let head = |linear: &Linear| linear.forward(tokens.clone()).unsqueeze_dim::<4>(1);
        let mixed = attention(
            [&self.to_q, &self.to_k, &self.to_v].map(head),
            false,
            Precision::Fp32,
        );
        let mixed = self.to_out.forward(mixed.squeeze_dim::<3>(1));
        x + mixed
            .swap_dims(1, 2)
            .reshape([batch, channels, height, width])
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::Hints;
    use super::super::testing::{Goldens, weights};
    use super::*;

    const TOLERANCE: f32 = 2e-5;

    #[test]
    fn moments_and_pictures_equal_the_reference() {
        let (weights, folder) = weights("vae");
        let config = VaeConfig::from_json(&folder.join("config.json")).unwrap();
        let vae = Vae::load(&weights.at(""), &config).unwrap();
        assert_eq!(vae.factor(), 8);
        let goldens = Goldens::open("vae");
        let moments = vae.encode(goldens.tensor("image"));
        goldens.check("moments_mean", moments.mean.clone(), TOLERANCE);
        goldens.check("moments_logvar", moments.logvar.clone(), TOLERANCE);
        let latent: Tensor<4> = goldens.tensor("latent_in");
        let picture = vae.decode(latent.div_scalar(vae.scaling_factor()));
        goldens.check("decoded", picture, TOLERANCE);
    }

    #[test]
    fn sizes_are_inferred_from_shapes() {
        let (weights, folder) = weights("vae");
        let stated = VaeConfig::from_json(&folder.join("config.json")).unwrap();
        let inferred = VaeConfig::infer(&weights.at(""), &Hints::SD1).unwrap();
        assert_eq!(format!("{inferred:?}"), format!("{stated:?}"));
    }
}
