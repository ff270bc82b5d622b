//! The UNet's forward and backward, as a list of segments with a stack of skip connections.

use burn::tensor::{Gradients, Tensor};

use super::layers::{Conv2d, GroupNorm, silu};
use super::resnet::{Downsample, ResnetBlock, Upsample};
use super::segments::{Inputs, Keep, Kept, leaf_if};
use super::transformer::Transformer2d;
use super::unet::{MidBlock, UNet};
use crate::kernels::widen;

/// A part of the UNet between two hidden states.
#[derive(Clone, Copy)]
enum Segment<'a> {
    Enter(&'a Conv2d),
    Down(&'a ResnetBlock, Option<&'a Transformer2d>),
    Downsample(&'a Downsample),
    Middle(&'a MidBlock),
    Up(&'a ResnetBlock, Option<&'a Transformer2d>),
    Upsample(&'a Upsample),
    Leave(&'a GroupNorm, &'a Conv2d),
}

/// What a segment reads.
#[derive(Clone, Debug)]
struct SegmentInputs {
    /// `[batch, channels, height, width]`
    hidden: Tensor<4>,
    /// The state from the way down that is appended to it, on the way up.
    skip: Option<Tensor<4>>,
    /// `[batch, tokens, d_context]`
    context: Tensor<3>,
    /// Height and width of the next skip state: what an upsampling has to reach.
    size: [usize; 2],
    /// Whether an earlier segment needs the gradients of the states.
    states_wanted: bool,
    /// Whether the text encoder needs the gradient of the context.
    context_wanted: bool,
}

impl Inputs for SegmentInputs {
    fn leaves(self) -> Self {
        let wanted = self.states_wanted;
        Self {
            hidden: leaf_if(wanted, self.hidden),
            skip: self.skip.map(|skip| leaf_if(wanted, skip)),
            context: leaf_if(self.context_wanted, self.context),
            ..self
        }
    }
}

/// A forward that a backward can follow.
#[derive(Debug)]
pub struct UNetTrace {
    /// From the first segment on that has a gradient to compute.
    kept: Vec<Kept<SegmentInputs, 4>>,
    time: Tensor<2>,
}

impl UNet {
    /// # Shapes
    /// - `sample` and output: `[batch, c, height, width]`
    /// - `timesteps`: one for each sample
    /// - `context`: `[batch, tokens, d_context]`
    pub fn forward(&self, sample: Tensor<4>, timesteps: &[f32], context: Tensor<3>) -> Tensor<4> {
        let time = self.time(timesteps);
        let (sample, context) = (self.precision.enter(sample), self.precision.enter(context));
        widen(self.run(sample, context, false, |_, segment, inputs| {
            segment.forward(inputs, &time)
        }))
    }

    /// The same, untracked, with what [`Self::backward`] needs.
    ///
    /// With [`Keep::Graphs`] adapters have to be attached as leaves here already, with [`Keep::Inputs`] for the
    /// backward. Nothing is kept of the segments before the first that has an adapter, or reads the context when
    /// `context_wanted`.
    pub fn forward_kept(
        &self,
        sample: Tensor<4>,
        timesteps: &[f32],
        context: Tensor<3>,
        context_wanted: bool,
        keep: Keep,
    ) -> (Tensor<4>, UNetTrace) {
        let time = self.time(timesteps);
        let (sample, context) = (self.precision.enter(sample), self.precision.enter(context));
        let first = self.first_wanted(context_wanted);
        let mut kept = Vec::new();
        let output = self.run(sample, context, context_wanted, |index, segment, inputs| {
            if index < first {
                return segment.forward(inputs, &time);
            }
            let inputs = SegmentInputs {
                states_wanted: index > first,
                ..inputs
            };
            let (output, part) = Kept::run(keep, inputs, |inputs| segment.forward(inputs, &time));
            kept.push(part);
            output
        });
        (widen(output), UNetTrace { kept, time })
    }

    /// Walks back from the gradient of the output.
    ///
    /// `collect` gets the gradients of one segment after the other. The result is the context's, where it was wanted.
    ///
    /// # Shapes
    /// - `gradient`: `[batch, c, height, width]`
    /// - output: `[batch, tokens, d_context]`
    pub fn backward(
        &self,
        trace: UNetTrace,
        gradient: Tensor<4>,
        collect: &mut dyn FnMut(&mut Gradients),
    ) -> Option<Tensor<3>> {
        let segments = self.segments();
        let first = segments.len() - trace.kept.len();
        let mut gradient = Some(self.precision.enter(gradient));
        let mut skips: Vec<Option<Tensor<4>>> = Vec::new();
        let mut context_gradient: Option<Tensor<3>> = None;
        for (segment, part) in segments[first..].iter().zip(trace.kept).rev() {
            if segment.pushes() {
                gradient = plus(gradient, skips.pop().flatten());
            }
            let Some(of_output) = gradient.take() else {
                continue;
            };
            let (mut gradients, leaves) =
                part.backward(of_output, |inputs| segment.forward(inputs, &trace.time));
            gradient = leaves.hidden.grad_remove(&mut gradients);
            if let Some(skip) = leaves.skip {
                skips.push(skip.grad_remove(&mut gradients));
            }
            let of_context = leaves.context.grad_remove(&mut gradients);
            context_gradient = plus(context_gradient, of_context);
            collect(&mut gradients);
        }
        context_gradient.map(widen)
    }

    fn first_wanted(&self, context_wanted: bool) -> usize {
        let segments = self.segments();
        segments
            .iter()
            .position(|segment| segment.is_adapted() || (context_wanted && segment.attends()))
            .unwrap_or(segments.len())
    }

    /// Each residual block applies the same activation to the embedding: it is done once.
    fn time(&self, timesteps: &[f32]) -> Tensor<2> {
        let time = self.time_embedding.forward(timesteps, &self.device);
        self.precision.enter(silu(time))
    }

    fn run<'a>(
        &'a self,
        sample: Tensor<4>,
        context: Tensor<3>,
        context_wanted: bool,
        mut each: impl FnMut(usize, Segment<'a>, SegmentInputs) -> Tensor<4>,
    ) -> Tensor<4> {
        let mut hidden = sample;
        let mut skips: Vec<Tensor<4>> = Vec::new();
        for (index, segment) in self.segments().into_iter().enumerate() {
            let skip = if segment.pops() { skips.pop() } else { None };
            let [_, _, height, width] = skips.last().unwrap_or(&hidden).dims();
            let inputs = SegmentInputs {
                hidden,
                skip,
                context: context.clone(),
                size: [height, width],
                states_wanted: false,
                context_wanted,
            };
            hidden = each(index, segment, inputs);
            if segment.pushes() {
                skips.push(hidden.clone());
            }
        }
        hidden
    }

    fn segments(&self) -> Vec<Segment<'_>> {
        let mut segments = vec![Segment::Enter(&self.conv_in)];
        for block in &self.down_blocks {
            for (index, resnet) in block.resnets.iter().enumerate() {
                segments.push(Segment::Down(resnet, block.attentions.get(index)));
            }
            segments.extend(block.downsampler.as_ref().map(Segment::Downsample));
        }
        segments.push(Segment::Middle(&self.mid_block));
        for block in &self.up_blocks {
            for (index, resnet) in block.resnets.iter().enumerate() {
                segments.push(Segment::Up(resnet, block.attentions.get(index)));
            }
            segments.extend(block.upsampler.as_ref().map(Segment::Upsample));
        }
        segments.push(Segment::Leave(&self.conv_norm_out, &self.conv_out));
        segments
    }
}

impl Segment<'_> {
    /// Whether the result is also a skip state.
    fn pushes(self) -> bool {
        matches!(self, Self::Enter(_) | Self::Down(..) | Self::Downsample(_))
    }

    /// Whether it reads a skip state.
    fn pops(self) -> bool {
        matches!(self, Self::Up(..))
    }

    /// Whether it reads the context.
    fn attends(self) -> bool {
        matches!(
            self,
            Self::Down(_, Some(_)) | Self::Up(_, Some(_)) | Self::Middle(_)
        )
    }

    fn is_adapted(self) -> bool {
        match self {
            Self::Enter(conv) | Self::Leave(_, conv) => conv.is_adapted(),
            Self::Down(resnet, attention) | Self::Up(resnet, attention) => {
                resnet.is_adapted() || attention.is_some_and(Transformer2d::is_adapted)
            }
            Self::Downsample(sampler) => sampler.is_adapted(),
            Self::Upsample(sampler) => sampler.is_adapted(),
            Self::Middle(block) => {
                block.first.is_adapted()
                    || block.attention.is_adapted()
                    || block.second.is_adapted()
            }
        }
    }

    fn forward(self, inputs: SegmentInputs, time: &Tensor<2>) -> Tensor<4> {
        let SegmentInputs {
            hidden,
            skip,
            context,
            size,
            ..
        } = inputs;
        match self {
            Self::Enter(conv) => conv.forward(hidden),
            Self::Down(resnet, attention) | Self::Up(resnet, attention) => {
                let hidden = match skip {
                    Some(skip) => Tensor::cat(vec![hidden, skip], 1),
                    None => hidden,
                };
                let hidden = resnet.forward(hidden, Some(time));
                match attention {
                    Some(attention) => attention.forward(hidden, &context),
                    None => hidden,
                }
            }
            Self::Downsample(sampler) => sampler.forward(hidden),
            Self::Middle(block) => {
                let hidden = block.first.forward(hidden, Some(time));
                let hidden = block.attention.forward(hidden, &context);
                block.second.forward(hidden, Some(time))
            }
            Self::Upsample(sampler) => sampler.forward(hidden, size),
            Self::Leave(norm, conv) => conv.forward(norm.forward_silu(hidden)),
        }
    }
}

fn plus<const D: usize>(a: Option<Tensor<D>>, b: Option<Tensor<D>>) -> Option<Tensor<D>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}
