//! An ONNX network from a picture to probabilities, run by tract on the CPU.
//!
//! Files come from strangers: sizes are looked at before anything is made of them, a panic inside of the library is an
//! error, and files beside the network are read only where they lie in its folder (the library sees to that).

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tract_onnx::pb::tensor_shape_proto::dimension::Value as Size;
use tract_onnx::pb::type_proto::Value as Kind;
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use tract_onnx::prelude::*;

use crate::captioning::CaptionError;

/// The largest file; protobuf itself ends at 2 GiB.
const MAX_FILE_BYTES: u64 = 2 << 30;
/// The most bytes of weights in files beside the network.
const MAX_EXTERNAL_BYTES: u64 = 8 << 30;
/// The most operations, those inside of others included.
const MAX_NODES: usize = 100_000;
/// The most numbers between two operations: 1 GiB.
const MAX_VALUES: usize = 1 << 28;
/// Sides of pictures.
const SIDES: std::ops::RangeInclusive<usize> = 16..=2048;
/// The most probabilities.
const MAX_OUTPUTS: usize = 1 << 20;

/// In which order the numbers of a picture lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelOrder {
    /// The channels of a pixel side by side.
    Last,
    /// One plane for each channel.
    First,
}

/// What a network takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PictureInput {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// In which order.
    pub order: ChannelOrder,
}

/// A network that is ready.
#[derive(Debug)]
pub struct Network {
    path: PathBuf,
    /// What it takes.
    pub input: PictureInput,
    plan: Arc<TypedRunnableModel>,
    /// How many probabilities it gives.
    pub outputs: usize,
}

impl Network {
    /// Reads a network; `fallback` is the size of its pictures when it takes any.
    ///
    /// # Errors
    /// [`CaptionError::Model`].
    pub fn load(path: &Path, fallback: (usize, usize)) -> Result<Self, CaptionError> {
        let guarded = catch_unwind(AssertUnwindSafe(|| read(path, fallback)));
        guarded
            .unwrap_or_else(|panic| Err(panic_text(panic.as_ref())))
            .map_err(|reason| CaptionError::model(path, reason))
    }

    /// The probabilities of a picture, given as `height × width × 3` numbers with the channels last.
    ///
    /// # Errors
    /// [`CaptionError::Model`] when the network fails or gives no probabilities.
    pub fn run(&self, pixels: &[f32]) -> Result<Vec<f32>, CaptionError> {
        let guarded = catch_unwind(AssertUnwindSafe(|| self.compute(pixels)));
        guarded
            .unwrap_or_else(|panic| Err(panic_text(panic.as_ref())))
            .map_err(|reason| CaptionError::model(&self.path, reason))
    }

    fn compute(&self, pixels: &[f32]) -> Result<Vec<f32>, String> {
        let PictureInput {
            width,
            height,
            order,
        } = self.input;
        let picture = match order {
            ChannelOrder::Last => Tensor::from_shape(&[1, height, width, 3], pixels),
            ChannelOrder::First => {
                let planes = (0..3).flat_map(|channel| pixels.iter().skip(channel).step_by(3));
                let planes: Vec<f32> = planes.copied().collect();
                Tensor::from_shape(&[1, 3, height, width], &planes)
            }
        };
        let picture = picture.map_err(words)?;
        let outputs = self.plan.run(tvec!(picture.into())).map_err(words)?;
        let first = outputs.first().ok_or("it gives nothing")?;
        let found = first.to_plain_array_view::<f32>().map_err(words)?;
        let found: Vec<f32> = found.iter().copied().collect();
        // Rounding may go a little over 1.
        match found.iter().find(|p| !(-1e-4..=1.0001).contains(*p)) {
            Some(odd) => Err(format!(
                "it gives {odd}, expected probabilities from 0 to 1: its last operation has to be a sigmoid"
            )),
            None => Ok(found),
        }
    }
}

fn read(path: &Path, fallback: (usize, usize)) -> Result<Network, String> {
    let mut file = File::open(path).map_err(|error| error.to_string())?;
    let bytes = file.metadata().map_err(|error| error.to_string())?.len();
    if bytes > MAX_FILE_BYTES {
        return Err(format!(
            "has {bytes} bytes, expected at most {MAX_FILE_BYTES}"
        ));
    }
    let onnx = tract_onnx::onnx();
    let mut proto = onnx.proto_model_for_read(&mut file).map_err(words)?;
    if let Some(graph) = &mut proto.graph {
        floor_modulos(graph);
    }
    let graph = proto.graph.as_ref().ok_or("holds no network")?;
    check_size(graph)?;
    let input = input_of(graph, fallback)?;
    let model = build(&onnx, &proto, path, input)?;
    drop(proto); // its weights are there twice until here
    let typed = model.into_typed().map_err(words)?;
    check_values(&typed)?;
    let outputs = outputs_of(&typed)?;
    let plan = typed.into_optimized().map_err(words)?;
    check_values(&plan)?;
    let plan = plan.into_runnable().map_err(words)?;
    Ok(Network {
        path: path.to_owned(),
        input,
        plan,
        outputs,
    })
}

/// The network for one picture of a known size.
fn build(
    onnx: &tract_onnx::Onnx,
    proto: &ModelProto,
    path: &Path,
    input: PictureInput,
) -> Result<InferenceModel, String> {
    let folder = path.parent().and_then(Path::to_str);
    let parsed = onnx.parse(proto, folder).map_err(words)?;
    if let Some(name) = parsed.unresolved_inputs.first() {
        return Err(format!("an operation takes `{name}`, which nothing gives"));
    }
    let shape = match input.order {
        ChannelOrder::Last => tvec!(1, input.height, input.width, 3),
        ChannelOrder::First => tvec!(1, 3, input.height, input.width),
    };
    let fact = InferenceFact::dt_shape(f32::datum_type(), shape);
    let model = parsed.model.with_input_fact(0, fact).map_err(words)?;
    let first = model.outputs.first().copied().ok_or("gives nothing")?;
    model.with_output_outlets(&[first]).map_err(words)
}

/// The remainder of ONNX has the sign of its divisor, tract's that of its dividend: `mod(mod(a, b) + b, b)` is the same
/// with either. tf2onnx writes rolled windows with it.
fn floor_modulos(graph: &mut GraphProto) {
    let nodes = std::mem::take(&mut graph.node);
    for mut node in nodes {
        let has_sign_of_dividend = node
            .attribute
            .iter()
            .any(|attribute| attribute.name == "fmod" && attribute.i != 0);
        let ([_, divisor], [_]) = (node.input.as_slice(), node.output.as_slice()) else {
            graph.node.push(node);
            continue;
        };
        if node.op_type != "Mod" || has_sign_of_dividend {
            graph.node.push(node);
            continue;
        }
        let divisor = divisor.clone();
        let output = node.output[0].clone();
        let step = |number: u32| format!("{output}/floored/{number}");
        let make = |op_type: &str, input: String, output: String| NodeProto {
            name: output.clone(),
            op_type: op_type.to_owned(),
            input: vec![input, divisor.clone()],
            output: vec![output],
            ..NodeProto::default()
        };
        let sum = make("Add", step(1), step(2));
        let last = make("Mod", step(2), output.clone());
        node.output = vec![step(1)];
        graph.node.extend([node, sum, last]);
    }
}

/// How many operations and how many bytes of weights elsewhere there are.
fn check_size(graph: &GraphProto) -> Result<(), String> {
    let (mut nodes, mut external) = (0_usize, 0_u64);
    let mut waiting = vec![graph];
    while let Some(graph) = waiting.pop() {
        nodes += graph.node.len();
        let attributes = || graph.node.iter().flat_map(|node| &node.attribute);
        let given = attributes().flat_map(|attribute| attribute.t.iter().chain(&attribute.tensors));
        for tensor in graph.initializer.iter().chain(given) {
            if tensor.data_location == Some(1) {
                external = external.saturating_add(bytes_of(tensor)?);
            }
        }
        waiting
            .extend(attributes().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs)));
    }
    if nodes > MAX_NODES {
        return Err(format!(
            "has {nodes} operations, expected at most {MAX_NODES}"
        ));
    }
    if external > MAX_EXTERNAL_BYTES {
        return Err(format!(
            "has {external} bytes of weights in other files, expected at most {MAX_EXTERNAL_BYTES}"
        ));
    }
    Ok(())
}

/// The most that a tensor of this shape takes: 8 bytes a number, or what it says of its part of a file.
fn bytes_of(tensor: &TensorProto) -> Result<u64, String> {
    let told = tensor
        .external_data
        .iter()
        .find(|entry| entry.key == "length");
    let told: Option<u64> = told.and_then(|entry| entry.value.parse().ok());
    let sides = tensor.dims.iter().try_fold(8_u64, |bytes, side| {
        bytes.checked_mul(u64::try_from(*side).ok()?)
    });
    let most = sides.ok_or_else(|| format!("`{}` has a shape that cannot be", tensor.name))?;
    Ok(told.map_or(most, |told| told.min(most)))
}

/// What the network takes: one picture of three channels.
fn input_of(graph: &GraphProto, fallback: (usize, usize)) -> Result<PictureInput, String> {
    let is_weight = |input: &&ValueInfoProto| {
        let mut weights = graph.initializer.iter();
        weights.any(|weight| weight.name == input.name)
    };
    let inputs: Vec<_> = graph
        .input
        .iter()
        .filter(|input| !is_weight(input))
        .collect();
    let [input] = inputs.as_slice() else {
        return Err(format!(
            "takes {} inputs, expected one picture",
            inputs.len()
        ));
    };
    let kind = input.r#type.as_ref().and_then(|kind| kind.value.as_ref());
    let shape = match kind {
        Some(Kind::TensorType(tensor)) => tensor.shape.as_ref(),
        _ => None,
    };
    let shape = shape.ok_or("does not tell the shape of its input")?;
    let sides: Vec<Option<usize>> = shape
        .dim
        .iter()
        .map(|side| match &side.value {
            Some(Size::DimValue(size)) => usize::try_from(*size).ok().filter(|size| *size > 0),
            _ => None,
        })
        .collect();
    let (order, height, width) = match sides.as_slice() {
        [_, height, width, Some(3)] => (ChannelOrder::Last, height, width),
        [_, Some(3), height, width] => (ChannelOrder::First, height, width),
        _ => {
            let words = sides
                .iter()
                .map(|side| side.map_or("?".to_owned(), |side| side.to_string()));
            let words: Vec<String> = words.collect();
            return Err(format!(
                "takes [{}], expected [?, height, width, 3] or [?, 3, height, width]",
                words.join(", ")
            ));
        }
    };
    let input = PictureInput {
        width: width.unwrap_or(fallback.0),
        height: height.unwrap_or(fallback.1),
        order,
    };
    if SIDES.contains(&input.width) && SIDES.contains(&input.height) {
        return Ok(input);
    }
    Err(format!(
        "takes pictures of {} × {} pixels, expected {} to {}",
        input.width,
        input.height,
        SIDES.start(),
        SIDES.end()
    ))
}

/// Values between operations are of known sizes that a machine can hold.
fn check_values(model: &TypedModel) -> Result<(), String> {
    for node in model.nodes() {
        for output in &node.outputs {
            let sides = output.fact.shape.as_concrete();
            let sides = sides.ok_or_else(|| format!("`{}` gives no fixed size", node.name))?;
            let count = sides
                .iter()
                .try_fold(1_usize, |count, side| count.checked_mul(*side));
            if count.is_none_or(|count| count > MAX_VALUES) {
                return Err(format!(
                    "`{}` gives {sides:?} numbers, expected at most {MAX_VALUES}",
                    node.name
                ));
            }
        }
    }
    Ok(())
}

/// How many probabilities the network gives for one picture.
fn outputs_of(model: &TypedModel) -> Result<usize, String> {
    let fact = model.output_fact(0).map_err(words)?;
    let sides = fact.shape.as_concrete().unwrap_or_default();
    match sides {
        [1, count] | [count] if fact.datum_type == f32::datum_type() && *count <= MAX_OUTPUTS => {
            Ok(*count)
        }
        _ => Err(format!(
            "gives {:?} of {sides:?}, expected f32 of [1, tags]",
            fact.datum_type
        )),
    }
}

fn words(error: impl std::fmt::Display) -> String {
    let mut text = format!("{error:#}");
    // The library's messages can hold whole operations.
    if let Some((end, _)) = text.char_indices().nth(600) {
        text.truncate(end);
        text.push('…');
    }
    text
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    words(text.unwrap_or("it cannot be run"))
}
