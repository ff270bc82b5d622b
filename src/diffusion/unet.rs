//! The UNet that predicts noise (`UNet2DConditionModel` in diffusers): down, through the middle, and up again.
//!
//! Rombach et al. 2022, arXiv:2112.10752.

use burn::tensor::{Device, Tensor, TensorData};

use super::conditioning::{SIZES, TimeIds};
use super::config::UNetConfig;
use super::error::LoadError;
use super::layers::{Conv2d, GroupNorm, LayerMut, Layers, Linear, silu};
use super::resnet::{Downsample, ResnetBlock, Upsample};
use super::transformer::{Transformer2d, TransformerSize};
use super::weights::WeightsAt;
use crate::kernels::Precision;

/// Longest period of the timestep embedding.
const MAX_PERIOD: f64 = 10_000.0;

/// Predicts the noise (or velocity) in a noisy latent.
#[derive(Debug)]
pub struct UNet {
    pub(super) time_embedding: TimeEmbedding,
    pub(super) add_embedding: Option<AddEmbedding>, // SDXL
    pub(super) conv_in: Conv2d,
    pub(super) down_blocks: Vec<DownBlock>,
    pub(super) mid_block: MidBlock,
    pub(super) up_blocks: Vec<UpBlock>,
    pub(super) conv_norm_out: GroupNorm,
    pub(super) conv_out: Conv2d,
    pub(super) device: Device,
    pub(super) precision: Precision,
}

#[derive(Debug)]
pub(super) struct TimeEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    cosines_first: bool,
    frequency_shift: f64,
}

/// What SDXL adds to the timestep embedding: two layers over the pooled text and the sinusoids of the sizes.
#[derive(Debug)]
pub(super) struct AddEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    size_width: usize,
}

#[derive(Debug)]
pub(super) struct DownBlock {
    pub(super) resnets: Vec<ResnetBlock>,
    pub(super) attentions: Vec<Transformer2d>, // empty, or one for each residual block
    pub(super) downsampler: Option<Downsample>,
}

#[derive(Debug)]
pub(super) struct MidBlock {
    pub(super) first: ResnetBlock,
    pub(super) attention: Transformer2d,
    pub(super) second: ResnetBlock,
}

#[derive(Debug)]
pub(super) struct UpBlock {
    pub(super) resnets: Vec<ResnetBlock>,
    pub(super) attentions: Vec<Transformer2d>, // empty, or one for each residual block
    pub(super) upsampler: Option<Upsample>,
}

impl UNet {
    /// Reads the UNet; `weights` is the root that holds `conv_in`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape than `config` says.
    pub fn load(weights: &WeightsAt<'_>, config: &UNetConfig) -> Result<Self, LoadError> {
        let channels = &config.block_out_channels;
        let (narrow, wide) = (channels[0], channels[channels.len() - 1]);
        let (groups, eps) = (config.norm_num_groups, config.norm_eps);
        let plan = BlockPlan { config };
        Ok(Self {
            time_embedding: TimeEmbedding::load(&weights.at("time_embedding"), config)?,
            add_embedding: match config.size_embedding_width() {
                Some(width) => Some(AddEmbedding::load(&weights.at("add_embedding"), width)?),
                None => None,
            },
            conv_in: Conv2d::load(&weights.at("conv_in"), config.in_channels, narrow, 3)?,
            down_blocks: (0..channels.len())
                .map(|index| plan.down(&weights.at(format!("down_blocks.{index}")), index))
                .collect::<Result<_, _>>()?,
            mid_block: plan.mid(&weights.at("mid_block"), wide)?,
            up_blocks: (0..channels.len())
                .map(|index| plan.up(&weights.at(format!("up_blocks.{index}")), index))
                .collect::<Result<_, _>>()?,
            conv_norm_out: GroupNorm::load(&weights.at("conv_norm_out"), narrow, groups, eps)?,
            conv_out: Conv2d::load(&weights.at("conv_out"), narrow, config.out_channels, 3)?,
            device: weights.device().clone(),
            precision: weights.precision(),
        })
    }

    /// Channels of a latent.
    pub fn latent_channels(&self) -> usize {
        self.conv_in.c_in()
    }

    /// Length of the pooled text that the UNet is told; `None` where it is told none.
    pub fn pooled_width(&self) -> Option<usize> {
        self.add_embedding.as_ref().map(AddEmbedding::pooled_width)
    }

    /// Every linear layer and convolution with its path, for adapters.
    pub fn layers_mut(&mut self) -> Layers<'_> {
        let mut found: Layers<'_> = vec![("conv_in".to_owned(), LayerMut::Conv(&mut self.conv_in))];
        for (name, linear) in [
            ("linear_1", &mut self.time_embedding.linear_1),
            ("linear_2", &mut self.time_embedding.linear_2),
        ] {
            found.push((format!("time_embedding.{name}"), LayerMut::Linear(linear)));
        }
        if let Some(added) = &mut self.add_embedding {
            for (name, linear) in [
                ("linear_1", &mut added.linear_1),
                ("linear_2", &mut added.linear_2),
            ] {
                found.push((format!("add_embedding.{name}"), LayerMut::Linear(linear)));
            }
        }
        for (index, block) in self.down_blocks.iter_mut().enumerate() {
            let path = format!("down_blocks.{index}");
            collect(&path, &mut block.attentions, &mut block.resnets, &mut found);
            if let Some(downsampler) = &mut block.downsampler {
                downsampler.collect_layers(&format!("{path}.downsamplers.0"), &mut found);
            }
        }
        for (index, block) in self.up_blocks.iter_mut().enumerate() {
            let path = format!("up_blocks.{index}");
            collect(&path, &mut block.attentions, &mut block.resnets, &mut found);
            if let Some(upsampler) = &mut block.upsampler {
                upsampler.collect_layers(&format!("{path}.upsamplers.0"), &mut found);
            }
        }
        let mid = &mut self.mid_block;
        mid.attention
            .collect_layers("mid_block.attentions.0", &mut found);
        mid.first.collect_layers("mid_block.resnets.0", &mut found);
        mid.second.collect_layers("mid_block.resnets.1", &mut found);
        found.push(("conv_out".to_owned(), LayerMut::Conv(&mut self.conv_out)));
        found
    }
}

/// Layers of a block in the order in which the reference registers them: attentions, then residual blocks.
fn collect<'a>(
    path: &str,
    attentions: &'a mut [Transformer2d],
    resnets: &'a mut [ResnetBlock],
    found: &mut Layers<'a>,
) {
    for (index, attention) in attentions.iter_mut().enumerate() {
        attention.collect_layers(&format!("{path}.attentions.{index}"), found);
    }
    for (index, resnet) in resnets.iter_mut().enumerate() {
        resnet.collect_layers(&format!("{path}.resnets.{index}"), found);
    }
}

/// Knows the sizes of each block.
struct BlockPlan<'a> {
    config: &'a UNetConfig,
}

impl BlockPlan<'_> {
    fn transformer(&self, channels: usize, index: usize) -> TransformerSize {
        TransformerSize {
            channels,
            heads: self.config.heads()[index],
            context: self.config.cross_attention_dim,
            groups: self.config.norm_num_groups,
        }
    }

    fn resnet(
        &self,
        weights: &WeightsAt<'_>,
        c_in: usize,
        c_out: usize,
    ) -> Result<ResnetBlock, LoadError> {
        let (groups, eps) = (self.config.norm_num_groups, self.config.norm_eps);
        ResnetBlock::load(weights, c_in, c_out, groups, eps)
    }

    fn down(&self, weights: &WeightsAt<'_>, index: usize) -> Result<DownBlock, LoadError> {
        let channels = &self.config.block_out_channels;
        let (c_in, c_out) = (channels[index.saturating_sub(1)], channels[index]);
        let mut block = DownBlock {
            resnets: Vec::new(),
            attentions: Vec::new(),
            downsampler: None,
        };
        for layer in 0..self.config.layers_per_block {
            let c_in = if layer == 0 { c_in } else { c_out };
            let resnet = weights.at(format!("resnets.{layer}"));
            block.resnets.push(self.resnet(&resnet, c_in, c_out)?);
            if self.config.down_attends(index) {
                let size = self.transformer(c_out, index);
                let attention = weights.at(format!("attentions.{layer}"));
                block
                    .attentions
                    .push(Transformer2d::load(&attention, size)?);
            }
        }
        if index + 1 < channels.len() {
            let weights = weights.at("downsamplers.0");
            block.downsampler = Some(Downsample::load(&weights, c_out, false)?);
        }
        Ok(block)
    }

    fn mid(&self, weights: &WeightsAt<'_>, channels: usize) -> Result<MidBlock, LoadError> {
        let last = self.config.block_out_channels.len() - 1;
        let size = self.transformer(channels, last);
        Ok(MidBlock {
            first: self.resnet(&weights.at("resnets.0"), channels, channels)?,
            attention: Transformer2d::load(&weights.at("attentions.0"), size)?,
            second: self.resnet(&weights.at("resnets.1"), channels, channels)?,
        })
    }

    fn up(&self, weights: &WeightsAt<'_>, index: usize) -> Result<UpBlock, LoadError> {
        let channels = &self.config.block_out_channels;
        let last = channels.len() - 1;
        // The way up mirrors the way down.
        let mirrored = last - index;
        let c_out = channels[mirrored];
        let c_before = channels[(mirrored + 1).min(last)];
        let c_last_skip = channels[mirrored.saturating_sub(1)];
        let layers = self.config.layers_per_block + 1;
        let mut block = UpBlock {
            resnets: Vec::new(),
            attentions: Vec::new(),
            upsampler: None,
        };
        for layer in 0..layers {
            let c_hidden = if layer == 0 { c_before } else { c_out };
            let c_skip = if layer + 1 == layers {
                c_last_skip
            } else {
                c_out
            };
            let resnet = weights.at(format!("resnets.{layer}"));
            block
                .resnets
                .push(self.resnet(&resnet, c_hidden + c_skip, c_out)?);
            if self.config.up_attends(index) {
                let size = self.transformer(c_out, mirrored);
                let attention = weights.at(format!("attentions.{layer}"));
                block
                    .attentions
                    .push(Transformer2d::load(&attention, size)?);
            }
        }
        if index < last {
            let weights = weights.at("upsamplers.0");
            block.upsampler = Some(Upsample::load(&weights, c_out)?);
        }
        Ok(block)
    }
}

impl TimeEmbedding {
    fn load(weights: &WeightsAt<'_>, config: &UNetConfig) -> Result<Self, LoadError> {
        Ok(Self {
            linear_1: Linear::load(&weights.at("linear_1"))?,
            linear_2: Linear::load(&weights.at("linear_2"))?,
            cosines_first: config.flip_sin_to_cos,
            frequency_shift: config.freq_shift,
        })
    }

    /// Whether a layer of it has an adapter.
    pub(super) fn is_adapted(&self) -> bool {
        self.linear_1.is_adapted() || self.linear_2.is_adapted()
    }

    /// Sinusoids of the timestep, then two layers: `[batch, d_time]`
    pub(super) fn forward(&self, timesteps: &[f32], device: &Device) -> Tensor<2> {
        let width = self.linear_1.d_in();
        let values: Vec<f32> = timesteps
            .iter()
            .flat_map(|timestep| self.sinusoids(*timestep, width))
            .collect();
        let data = TensorData::new(values, [timesteps.len(), width]);
        let waves = Tensor::<2>::from_data(data, device);
        self.linear_2.forward(silu(self.linear_1.forward(waves)))
    }

    /// `cos(t ω_i)`, `sin(t ω_i)` with `ω_i = max_period^(-i / (half - shift))`; in f32 as the reference.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "indices are below 2^24, and the reference computes in f32"
    )]
    fn sinusoids(&self, timestep: f32, width: usize) -> Vec<f32> {
        let half = width / 2;
        let angle = |index: usize| {
            let exponent = -(MAX_PERIOD.ln() as f32) * index as f32
                / (half as f64 - self.frequency_shift) as f32;
            timestep * exponent.exp()
        };
        let sines = (0..half).map(|index| angle(index).sin());
        let cosines = (0..half).map(|index| angle(index).cos());
        let mut waves: Vec<f32> = if self.cosines_first {
            cosines.chain(sines).collect()
        } else {
            sines.chain(cosines).collect()
        };
        waves.resize(width, 0.0); // an odd width ends with a zero
        waves
    }
}

impl AddEmbedding {
    fn load(weights: &WeightsAt<'_>, size_width: usize) -> Result<Self, LoadError> {
        let loaded = Self {
            linear_1: Linear::load(&weights.at("linear_1"))?,
            linear_2: Linear::load(&weights.at("linear_2"))?,
            size_width,
        };
        let (d_in, sizes) = (loaded.linear_1.d_in(), SIZES * size_width);
        if d_in <= sizes {
            return Err(LoadError::config(
                std::path::Path::new(weights.path()),
                format!("{d_in} values are added, of which {sizes} would be the sizes of pictures"),
            ));
        }
        Ok(loaded)
    }

    fn pooled_width(&self) -> usize {
        self.linear_1.d_in() - SIZES * self.size_width
    }

    /// Whether a layer of it has an adapter.
    pub(super) fn is_adapted(&self) -> bool {
        self.linear_1.is_adapted() || self.linear_2.is_adapted()
    }

    /// `[batch, d_time]` of the pooled text `[batch, d_pooled]` and the sizes.
    pub(super) fn forward(
        &self,
        pooled: Tensor<2>,
        time_ids: &[TimeIds],
        waves: &TimeEmbedding,
    ) -> Tensor<2> {
        let values: Vec<f32> = time_ids
            .iter()
            .flatten()
            .flat_map(|id| waves.sinusoids(*id, self.size_width))
            .collect();
        let data = TensorData::new(values, [time_ids.len(), SIZES * self.size_width]);
        let sizes = Tensor::<2>::from_data(data, &pooled.device());
        let added = Tensor::cat(vec![pooled, sizes], 1);
        self.linear_2.forward(silu(self.linear_1.forward(added)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::{HeadRule, Hints};
    use super::super::testing::{Goldens, weights};
    use super::*;

    const TOLERANCE: f32 = 2e-5;

    fn tiny() -> (UNet, UNetConfig) {
        let (weights, folder) = weights("unet");
        let config = UNetConfig::from_json(&folder.join("config.json")).unwrap();
        (UNet::load(&weights.at(""), &config).unwrap(), config)
    }

    #[test]
    fn predictions_equal_the_reference() {
        let (unet, _) = tiny();
        let goldens = Goldens::open("unet");
        let sample: Tensor<4> = goldens.tensor("sample");
        let context: Tensor<3> = goldens.tensor("context");
        for (name, timesteps) in [
            ("pred_t0", [0.0, 0.0]),
            ("pred_t500", [500.0, 500.0]),
            ("pred_t999", [999.0, 999.0]),
            ("pred_mixed_t0_t999", [0.0, 999.0]),
        ] {
            let predicted = unet.forward(sample.clone(), &timesteps, context.clone());
            goldens.check(name, predicted, TOLERANCE);
        }
        let predicted = unet.forward(
            goldens.tensor("sample_rect"),
            &[321.0],
            goldens.tensor("context_152"),
        );
        goldens.check("pred_rect_ctx152_t321", predicted, TOLERANCE);
    }

    #[test]
    fn sizes_are_inferred_from_shapes() {
        let (weights, _) = weights("unet");
        let (_, stated) = tiny();
        let hints = Hints {
            unet_heads: HeadRule::Count(4),
            ..Hints::SD1
        };
        let inferred = UNetConfig::infer(&weights.at(""), &hints).unwrap();
        assert_eq!(format!("{inferred:?}"), format!("{stated:?}"));
    }

    #[test]
    fn an_odd_latent_keeps_its_size() {
        let (unet, config) = tiny();
        let device = Device::flex();
        let sample = Tensor::<4>::ones([1, config.in_channels, 10, 6], &device);
        let context = Tensor::<3>::ones([1, 5, config.cross_attention_dim], &device);
        let predicted = unet.forward(sample, &[10.0], context);
        assert_eq!(predicted.dims(), [1, config.out_channels, 10, 6]);
    }
}
