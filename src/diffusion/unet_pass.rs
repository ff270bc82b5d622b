//! The UNet's forward and backward, as a list of segments with a stack of skip connections.

use burn::tensor::{Gradients, Tensor};

use super::conditioning::{Added, Condition, ConditionGradients};
use super::layers::{Conv2d, GroupNorm, silu};
use super::resnet::{Downsample, ResnetBlock, Upsample};
use super::segments::{Inputs, Keep, Kept, leaf_if};
use super::transformer::{Transformer2d, TransformerBlock};
use super::unet::{AddEmbedding, UNet};
use crate::kernels::{Value, widen};

/// A part of the UNet between two hidden states.
#[derive(Clone, Copy)]
enum Segment<'a> {
    Enter(&'a Conv2d),
    Resnet(&'a ResnetBlock, Skip),
    EnterTransformer(&'a Transformer2d),
    Block(&'a TransformerBlock),
    LeaveTransformer(&'a Transformer2d, Skip),
    Downsample(&'a Downsample),
    Upsample(&'a Upsample),
    Leave(&'a GroupNorm, &'a Conv2d),
}

/// What a segment has to do with the states that go around others: around the middle of the UNet to the way up, and
/// around the blocks of a transformer to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Skip {
    Nothing,
    /// It reads the newest of them.
    Pops,
    /// Its result is one of them.
    Pushes,
    Both,
}

/// What a segment reads.
#[derive(Clone, Debug)]
struct SegmentInputs {
    /// `[batch, channels, height, width]`, or `[batch, 1, height * width, channels]` between a transformer's blocks
    hidden: Tensor<4>,
    /// The state that goes around others to here: appended on the way up, added at the end of a transformer.
    skip: Option<Tensor<4>>,
    /// `[batch, tokens, d_context]`
    context: Tensor<3>,
    /// `[batch, d_time]`, after its activation
    time: Tensor<2>,
    /// Height and width of the next skip state: what an upsampling has to reach.
    size: [usize; 2],
    /// Whether an earlier segment needs the gradients of the states.
    states_wanted: bool,
    /// Whether the text encoder needs the gradient of the context.
    context_wanted: bool,
    /// Whether something needs that of the time embedding: its own adapters, or the pooled text in it.
    time_wanted: bool,
}

impl Inputs for SegmentInputs {
    fn leaves(self) -> Self {
        let wanted = self.states_wanted;
        Self {
            hidden: leaf_if(wanted, self.hidden),
            skip: self.skip.map(|skip| leaf_if(wanted, skip)),
            context: leaf_if(self.context_wanted, self.context),
            time: leaf_if(self.time_wanted, self.time),
            ..self
        }
    }
}

/// What the time embedding is made of besides the timesteps.
#[derive(Clone, Debug)]
struct TimeInputs {
    added: Option<Added>,
    pooled_wanted: bool,
}

impl Inputs for TimeInputs {
    fn leaves(self) -> Self {
        let wanted = self.pooled_wanted;
        let leaf = |added: Added| Added {
            pooled: leaf_if(wanted, added.pooled),
            ..added
        };
        Self {
            added: self.added.map(leaf),
            ..self
        }
    }
}

/// A forward that a backward can follow.
#[derive(Debug)]
pub struct UNetTrace {
    /// From the first segment on that has a gradient to compute.
    kept: Vec<Kept<SegmentInputs, 4>>,
    /// With the timesteps, where the pooled text or an adapter has a gradient to compute.
    time: Option<(Kept<TimeInputs, 2>, Vec<f32>)>,
}

impl UNet {
    /// # Shapes
    /// - `sample` and output: `[batch, c, height, width]`
    /// - `timesteps`: one for each sample
    /// - `condition`: states `[batch, tokens, d_context]`, and what SDXL is told besides
    pub fn forward(
        &self,
        sample: Tensor<4>,
        timesteps: &[f32],
        condition: impl Into<Condition>,
    ) -> Tensor<4> {
        let Condition { states, added } = condition.into();
        let time = self.time(timesteps, added);
        let (sample, context) = (self.precision.enter(sample), self.precision.enter(states));
        let told = (context, time);
        widen(self.run(sample, told, false, |_, segment, inputs| {
            segment.forward(inputs)
        }))
    }

    /// The same, untracked, with what [`Self::backward`] needs.
    ///
    /// With [`Keep::Graphs`] adapters have to be attached as leaves here already, with [`Keep::Inputs`] for the
    /// backward. Nothing is kept of the segments before the first that has an adapter, or reads the condition when
    /// `condition_wanted`.
    pub fn forward_kept(
        &self,
        sample: Tensor<4>,
        timesteps: &[f32],
        condition: impl Into<Condition>,
        condition_wanted: bool,
        keep: Keep,
    ) -> (Tensor<4>, UNetTrace) {
        let Condition { states, added } = condition.into();
        let pooled_wanted = condition_wanted && added.is_some() && self.add_embedding.is_some();
        let time_wanted = pooled_wanted || self.embeds_adapted();
        let (time, time_kept) = if time_wanted {
            let inputs = TimeInputs {
                added,
                pooled_wanted,
            };
            let (time, part) = Kept::run(keep, inputs, |inputs| self.time(timesteps, inputs.added));
            (time, Some((part, timesteps.to_vec())))
        } else {
            (self.time(timesteps, added), None)
        };
        let (sample, context) = (self.precision.enter(sample), self.precision.enter(states));
        let first = self.first_wanted(condition_wanted, time_wanted);
        let mut kept = Vec::new();
        let told = (context, time);
        let output = self.run(sample, told, condition_wanted, |index, segment, inputs| {
            if index < first {
                return segment.forward(inputs);
            }
            let inputs = SegmentInputs {
                states_wanted: index > first,
                time_wanted,
                ..inputs
            };
            let (output, part) = Kept::run(keep, inputs, |inputs| segment.forward(inputs));
            kept.push(part);
            output
        });
        let time = time_kept;
        (widen(output), UNetTrace { kept, time })
    }

    /// Walks back from the gradient of the output.
    ///
    /// `collect` gets the gradients of one segment after the other. The result is the condition's, where it was wanted.
    ///
    /// # Shapes
    /// - `gradient`: `[batch, c, height, width]`
    pub fn backward(
        &self,
        trace: UNetTrace,
        gradient: Tensor<4>,
        collect: &mut dyn FnMut(&mut Gradients),
    ) -> ConditionGradients {
        let segments = self.segments();
        let first = segments.len() - trace.kept.len();
        let mut gradient = Some(self.precision.enter(gradient));
        let mut skips: Vec<Option<Tensor<4>>> = Vec::new();
        let mut of_context: Option<Tensor<3>> = None;
        let mut of_time: Option<Tensor<2>> = None;
        for (segment, part) in segments[first..].iter().zip(trace.kept).rev() {
            if segment.pushes() {
                gradient = plus(gradient, skips.pop().flatten());
            }
            let Some(of_output) = gradient.take() else {
                continue;
            };
            let (mut gradients, leaves) = part.backward(of_output, |inputs| segment.rerun(inputs));
            gradient = leaves.hidden.grad_remove(&mut gradients);
            if let Some(skip) = leaves.skip {
                skips.push(skip.grad_remove(&mut gradients));
            }
            of_context = plus(of_context, leaves.context.grad_remove(&mut gradients));
            if leaves.time_wanted {
                of_time = plus(of_time, leaves.time.grad_remove(&mut gradients));
            }
            collect(&mut gradients);
        }
        let of_pooled = trace
            .time
            .zip(of_time)
            .and_then(|((part, timesteps), gradient)| {
                let (mut gradients, leaves) =
                    part.backward(gradient, |inputs| self.time(&timesteps, inputs.added));
                let of_pooled = leaves
                    .added
                    .and_then(|added| added.pooled.grad_remove(&mut gradients));
                collect(&mut gradients);
                of_pooled
            });
        ConditionGradients {
            states: of_context.map(widen),
            pooled: of_pooled.map(widen),
        }
    }

    fn first_wanted(&self, context_wanted: bool, time_wanted: bool) -> usize {
        let segments = self.segments();
        let wanted = |segment: &Segment<'_>| {
            segment.is_adapted()
                || (context_wanted && segment.attends())
                || (time_wanted && segment.is_timed())
        };
        let first = segments.iter().position(wanted);
        first.unwrap_or(segments.len())
    }

    fn embeds_adapted(&self) -> bool {
        self.time_embedding.is_adapted()
            || self
                .add_embedding
                .as_ref()
                .is_some_and(AddEmbedding::is_adapted)
    }

    /// Each residual block applies the same activation to the embedding: it is done once.
    fn time(&self, timesteps: &[f32], added: Option<Added>) -> Tensor<2> {
        let time = self.time_embedding.forward(timesteps, &self.device);
        let time = match (&self.add_embedding, added) {
            (Some(embedding), Some(Added { pooled, time_ids })) => {
                time + embedding.forward(pooled, &time_ids, &self.time_embedding)
            }
            _ => time,
        };
        self.precision.enter(silu(time))
    }

    fn run<'a>(
        &'a self,
        sample: Tensor<4>,
        (context, time): (Tensor<3>, Tensor<2>),
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
                time: time.clone(),
                size: [height, width],
                states_wanted: false,
                context_wanted,
                time_wanted: false,
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
                // What goes around a transformer is what goes into it.
                segments.push(Segment::Resnet(resnet, Skip::Pushes));
                if let Some(attention) = block.attentions.get(index) {
                    transform(&mut segments, attention, Skip::Both);
                }
            }
            segments.extend(block.downsampler.as_ref().map(Segment::Downsample));
        }
        let middle = &self.mid_block;
        segments.push(Segment::Resnet(&middle.first, Skip::Pushes));
        transform(&mut segments, &middle.attention, Skip::Pops);
        segments.push(Segment::Resnet(&middle.second, Skip::Nothing));
        for block in &self.up_blocks {
            for (index, resnet) in block.resnets.iter().enumerate() {
                match block.attentions.get(index) {
                    None => segments.push(Segment::Resnet(resnet, Skip::Pops)),
                    Some(attention) => {
                        segments.push(Segment::Resnet(resnet, Skip::Both));
                        transform(&mut segments, attention, Skip::Pops);
                    }
                }
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
        matches!(
            self,
            Self::Enter(_)
                | Self::Downsample(_)
                | Self::Resnet(_, Skip::Pushes | Skip::Both)
                | Self::LeaveTransformer(_, Skip::Pushes | Skip::Both)
        )
    }

    /// Whether it reads a skip state.
    fn pops(self) -> bool {
        matches!(
            self,
            Self::Resnet(_, Skip::Pops | Skip::Both)
                | Self::LeaveTransformer(_, Skip::Pops | Skip::Both)
        )
    }

    /// Whether it reads the context.
    fn attends(self) -> bool {
        matches!(self, Self::Block(_))
    }

    /// Whether it reads the time embedding.
    fn is_timed(self) -> bool {
        matches!(self, Self::Resnet(..))
    }

    fn is_adapted(self) -> bool {
        match self {
            Self::Enter(conv) | Self::Leave(_, conv) => conv.is_adapted(),
            Self::Resnet(resnet, _) => resnet.is_adapted(),
            Self::EnterTransformer(transformer) => transformer.entry_is_adapted(),
            Self::Block(block) => block.is_adapted(),
            Self::LeaveTransformer(transformer, _) => transformer.exit_is_adapted(),
            Self::Downsample(sampler) => sampler.is_adapted(),
            Self::Upsample(sampler) => sampler.is_adapted(),
        }
    }

    fn forward(self, inputs: SegmentInputs) -> Tensor<4> {
        self.forward_for(Value::Read, inputs)
    }

    /// The graph once more: what comes last in the segment need not be computed again, since nothing reads it.
    fn rerun(self, inputs: SegmentInputs) -> Tensor<4> {
        self.forward_for(Value::Unread, inputs)
    }

    fn forward_for(self, value: Value, inputs: SegmentInputs) -> Tensor<4> {
        let SegmentInputs {
            hidden,
            skip,
            context,
            time,
            size,
            ..
        } = inputs;
        match self {
            Self::Enter(conv) => conv.forward_for(value, hidden),
            Self::Resnet(resnet, _) => {
                let hidden = match skip {
                    Some(skip) => Tensor::cat(vec![hidden, skip], 1),
                    None => hidden,
                };
                resnet.forward_for(value, hidden, Some(&time))
            }
            Self::EnterTransformer(transformer) => {
                transformer.enter_for(value, hidden).unsqueeze_dim(1)
            }
            Self::Block(block) => {
                let hidden = hidden.squeeze_dim(1);
                block.forward_for(value, hidden, &context).unsqueeze_dim(1)
            }
            Self::LeaveTransformer(transformer, _) => {
                let Some(around) = skip else {
                    unreachable!("what precedes a transformer has pushed its state")
                };
                transformer.leave_for(value, hidden.squeeze_dim(1), around)
            }
            Self::Downsample(sampler) => sampler.forward_for(value, hidden),
            Self::Upsample(sampler) => sampler.forward_for(value, hidden, size),
            Self::Leave(norm, conv) => conv.forward_for(value, norm.forward_silu(hidden)),
        }
    }
}

fn transform<'a>(segments: &mut Vec<Segment<'a>>, transformer: &'a Transformer2d, last: Skip) {
    segments.push(Segment::EnterTransformer(transformer));
    segments.extend(transformer.blocks().iter().map(Segment::Block));
    segments.push(Segment::LeaveTransformer(transformer, last));
}

fn plus<const D: usize>(a: Option<Tensor<D>>, b: Option<Tensor<D>>) -> Option<Tensor<D>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}
