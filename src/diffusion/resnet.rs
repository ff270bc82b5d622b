//! Residual blocks and the layers that change the resolution, shared by UNet and VAE.

use burn::tensor::Tensor;
use burn::tensor::module::interpolate;
use burn::tensor::ops::{InterpolateMode, InterpolateOptions};

use super::error::LoadError;
use super::layers::{Conv2d, GroupNorm, LayerMut, Layers, Linear};
use super::weights::WeightsAt;
use crate::kernels::Value;

/// Two convolutions and a skip path; in the UNet shifted by the timestep embedding.
///
/// `y = skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time_emb_proj(silu(t)))))`
///
/// Field names are the checkpoint's keys (`ResnetBlock2D` in diffusers).
#[derive(Debug)]
pub struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>, // absent in the VAE
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>, // 1x1, present when the channel count changes
}

impl ResnetBlock {
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(
        weights: &WeightsAt<'_>,
        c_in: usize,
        c_out: usize,
        groups: usize,
        eps: f64,
    ) -> Result<Self, LoadError> {
        let time = weights.at("time_emb_proj");
        let shortcut = weights.at("conv_shortcut");
        Ok(Self {
            norm1: GroupNorm::load(&weights.at("norm1"), c_in, groups, eps)?,
            conv1: Conv2d::load(&weights.at("conv1"), c_in, c_out, 3)?,
            time_emb_proj: if time.has("weight") {
                Some(Linear::load(&time)?)
            } else {
                None
            },
            norm2: GroupNorm::load(&weights.at("norm2"), c_out, groups, eps)?,
            conv2: Conv2d::load(&weights.at("conv2"), c_out, c_out, 3)?,
            conv_shortcut: if shortcut.has("weight") {
                Some(Conv2d::load(&shortcut, c_in, c_out, 1)?)
            } else {
                None
            },
        })
    }

    /// # Shapes
    /// - `x`: `[batch, c_in, height, width]`
    /// - `time`: `[batch, d_time]`, after its activation
    /// - output: `[batch, c_out, height, width]`
    pub fn forward(&self, x: Tensor<4>, time: Option<&Tensor<2>>) -> Tensor<4> {
        self.forward_for(Value::Read, x, time)
    }

    /// The same, or the graph alone where nothing reads the output.
    pub fn forward_for(&self, value: Value, x: Tensor<4>, time: Option<&Tensor<2>>) -> Tensor<4> {
        let hidden = self.conv1.forward(self.norm1.forward_silu(x.clone()));
        let hidden = match (&self.time_emb_proj, time) {
            (Some(projection), Some(time)) => {
                let shift = projection.forward(time.clone()); // [batch, c_out]
                let [batch, channels] = shift.dims();
                hidden + shift.reshape([batch, channels, 1, 1]) // over height and width
            }
            _ => hidden,
        };
        let hidden = self.norm2.forward_silu(hidden);
        let hidden = self.conv2.forward_for(value, hidden);
        let skip = match &self.conv_shortcut {
            Some(conv) => conv.forward_for(value, x),
            None => x,
        };
        skip + hidden
    }

    /// Whether a layer of it has an adapter.
    pub fn is_adapted(&self) -> bool {
        self.conv1.is_adapted()
            || self.conv2.is_adapted()
            || self.time_emb_proj.as_ref().is_some_and(Linear::is_adapted)
            || self.conv_shortcut.as_ref().is_some_and(Conv2d::is_adapted)
    }

    /// Layers below `path`, for adapters.
    pub fn collect_layers<'a>(&'a mut self, path: &str, found: &mut Layers<'a>) {
        found.push((format!("{path}.conv1"), LayerMut::Conv(&mut self.conv1)));
        if let Some(linear) = &mut self.time_emb_proj {
            found.push((format!("{path}.time_emb_proj"), LayerMut::Linear(linear)));
        }
        found.push((format!("{path}.conv2"), LayerMut::Conv(&mut self.conv2)));
        if let Some(conv) = &mut self.conv_shortcut {
            found.push((format!("{path}.conv_shortcut"), LayerMut::Conv(conv)));
        }
    }
}

/// Halves height and width by a convolution of stride 2.
#[derive(Debug)]
pub struct Downsample {
    conv: Conv2d,
    /// The VAE pads only right and below, as the original implementation did.
    pads_one_side: bool,
}

impl Downsample {
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(
        weights: &WeightsAt<'_>,
        channels: usize,
        pads_one_side: bool,
    ) -> Result<Self, LoadError> {
        let conv = Conv2d::load(&weights.at("conv"), channels, channels, 3)?;
        Ok(Self {
            conv: conv.with_geometry(2, usize::from(!pads_one_side)),
            pads_one_side,
        })
    }

    /// # Shapes
    /// - `x`: `[batch, c, height, width]`
    /// - output: `[batch, c, height / 2, width / 2]`, rounded up in the UNet, down in the VAE
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.forward_for(Value::Read, x)
    }

    /// The same, or the graph alone where nothing reads the output.
    pub fn forward_for(&self, value: Value, x: Tensor<4>) -> Tensor<4> {
        let x = if self.pads_one_side {
            x.pad((0, 1, 0, 1), 0.0)
        } else {
            x
        };
        self.conv.forward_for(value, x)
    }

    /// Whether its convolution has an adapter.
    pub fn is_adapted(&self) -> bool {
        self.conv.is_adapted()
    }

    /// Layers below `path`, for adapters.
    pub fn collect_layers<'a>(&'a mut self, path: &str, found: &mut Layers<'a>) {
        found.push((format!("{path}.conv"), LayerMut::Conv(&mut self.conv)));
    }
}

/// Doubles height and width by repeating pixels, then convolves.
#[derive(Debug)]
pub struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(weights: &WeightsAt<'_>, channels: usize) -> Result<Self, LoadError> {
        Ok(Self {
            conv: Conv2d::load(&weights.at("conv"), channels, channels, 3)?,
        })
    }

    /// `size` is the height and width to reach: twice the input's, or one less where the way down met an odd size.
    ///
    /// # Shapes
    /// - `x`: `[batch, c, height, width]`
    /// - output: `[batch, c, size[0], size[1]]`
    pub fn forward(&self, x: Tensor<4>, size: [usize; 2]) -> Tensor<4> {
        self.forward_for(Value::Read, x, size)
    }

    /// The same, or the graph alone where nothing reads the output.
    pub fn forward_for(&self, value: Value, x: Tensor<4>, size: [usize; 2]) -> Tensor<4> {
        let [batch, channels, height, width] = x.dims();
        let x = if size == [height * 2, width * 2] {
            // Repeating by broadcast has a gradient on every backend.
            x.reshape([batch, channels, height, 1, width, 1])
                .expand([batch, channels, height, 2, width, 2])
                .reshape([batch, channels, size[0], size[1]])
        } else {
            let options = InterpolateOptions::new(InterpolateMode::Nearest);
            interpolate(x, options.with_output_size(size))
        };
        self.conv.forward_for(value, x)
    }

    /// Whether its convolution has an adapter.
    pub fn is_adapted(&self) -> bool {
        self.conv.is_adapted()
    }

    /// Layers below `path`, for adapters.
    pub fn collect_layers<'a>(&'a mut self, path: &str, found: &mut Layers<'a>) {
        found.push((format!("{path}.conv"), LayerMut::Conv(&mut self.conv)));
    }
}
