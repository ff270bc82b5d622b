//! The adapters of one model: creation, attachment to the frozen layers, files.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::diffusion::layers::{Adapter, LayerMut};
use crate::diffusion::{Part, StableDiffusion};
use crate::kernels::widen;
use crate::networks::NetworkError;
use crate::networks::adapters::{self, Moment, Place};
use crate::networks::beginning::compare;
use crate::networks::blocks::{Blocks, block_index};
use crate::networks::filter::LayerFilter;
use crate::networks::form::{Form, TensorSpec};
use crate::networks::format::{HostTensor, LoraFile, SavedLora};
use crate::networks::initial;
use crate::networks::reading::{KnownLayer, group_by_adapter};
use crate::networks::settings::{DropoutSettings, NetworkSettings, SavePrecision, TrainParts};
use crate::networks::targets::{LayerShape, Naming, Rules, Target};

/// One trainable tensor.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its key in a LoRA file.
    pub name: String,
    /// Half of the model that it belongs to.
    pub part: Part,
    /// Its shape in a LoRA file, rank 1 to 4.
    pub shape: Vec<usize>,
    /// Its value: f32, the shape padded with ones on the left to rank 4.
    pub value: Tensor<4>,
    /// Factor of its learning rate.
    pub lr_factor: f64,
}

/// The leaves of the autodiff graph after [`LoraNetwork::attach`], index-aligned with the parameters.
#[derive(Debug)]
pub struct Leaves(pub Vec<Tensor<4>>);

/// The adapters of one model.
///
/// It owns the values of its parameters. The model's layers hold adapters that share them only between
/// [`attach`](Self::attach) and [`detach`](Self::detach).
#[derive(Debug)]
pub struct LoraNetwork {
    modules: Vec<Module>,
    parameters: Vec<Parameter>,
    multiplier: f64,
    dropout: DropoutSettings,
}

/// One adapter.
#[derive(Debug)]
struct Module {
    target: Target,
    /// Its tensors among the parameters, in the order of [`Target::tensors`].
    parameters: Range<usize>,
    /// `‖W‖²` of each row of the layer's weight, where lengths are trained.
    squares: Option<Tensor<1>>,
}

impl LoraNetwork {
    /// Makes adapters for the layers of a model, with first values that do not change the model's output: `lora_down`
    /// is Kaiming-uniform, `lora_up` zero, and so on, as sd-scripts and LyCORIS have it.
    ///
    /// The numbers depend on the seed and the adapter's name alone, not on the device or the set of layers.
    pub fn create(
        model: &mut StableDiffusion,
        settings: &NetworkSettings,
        parts: TrainParts,
        seed: u64,
        device: &Device,
    ) -> Result<Self, NetworkError> {
        let naming = Naming::of(model);
        let rules = Rules::new(&naming, settings)?;
        let mut network = Self::empty();
        for (part, path, layer) in model.layers_mut() {
            if !parts.has(part) {
                continue;
            }
            let Some(target) = rules.target(part, &path, shape_of(&layer)) else {
                continue;
            };
            let specs = target.tensors();
            let values = specs.iter().map(|spec| {
                let drawn = initial::values(seed, &target.name, spec);
                drawn.map(|values| from_host(values, spec, device))
            });
            network.add(target.clone(), values.collect(), &layer);
        }
        network.with_settings(settings)
    }

    /// Reads the adapters of a file with sd-scripts' names for a model; an adapter without alpha has alpha = rank.
    pub fn load(
        path: &Path,
        model: &mut StableDiffusion,
        device: &Device,
    ) -> Result<Self, NetworkError> {
        let file = LoraFile::read(path)?;
        let naming = Naming::of(model);
        let mut layers = HashMap::new();
        for (part, path, layer) in model.layers_mut() {
            let name = naming.lora_name(part, &path);
            let shape = naming.shape_in_files(part, &path, shape_of(&layer));
            layers.insert(name, KnownLayer { part, path, shape });
        }
        let mut groups = group_by_adapter(file.tensors, &layers)?;

        let mut network = Self::empty();
        for (part, path, layer) in model.layers_mut() {
            let name = naming.lora_name(part, &path);
            let (Some(tensors), Some(known)) = (groups.remove(&name), layers.remove(&name)) else {
                continue;
            };
            let (target, values) = tensors.into_adapter(&name, known)?;
            let specs = target.tensors();
            let values = values
                .into_iter()
                .zip(&specs)
                .map(|(values, spec)| Some(from_host(values, spec, device)))
                .collect();
            network.add(target, values, &layer);
        }
        if network.modules.is_empty() {
            return Err(NetworkError::NoTargets);
        }
        Ok(network)
    }

    /// The adapters of a file, to be trained further by these settings. Its adapters of halves of the model that are not
    /// trained are left out.
    ///
    /// # Errors
    /// When the file cannot be read, or has other adapters than the settings ask for, where those decide.
    pub fn continue_from(
        path: &Path,
        model: &mut StableDiffusion,
        settings: &NetworkSettings,
        parts: TrainParts,
        device: &Device,
    ) -> Result<Self, NetworkError> {
        let naming = Naming::of(model);
        let rules = Rules::new(&naming, settings)?;
        let filter = LayerFilter::new(settings)?;
        let blocks = Blocks::new(naming.family, settings)?;
        let whole = Self::load(path, model, device)?;
        let by_weights = settings
            .init_from
            .as_ref()
            .is_some_and(|from| from.dim_from_weights);
        if !by_weights {
            let expected = model
                .layers_mut()
                .into_iter()
                .filter_map(|(part, path, layer)| {
                    parts
                        .has(part)
                        .then(|| rules.target(part, &path, shape_of(&layer)))?
                });
            let found = whole.modules.iter().map(|module| &module.target);
            compare(found.filter(|target| parts.has(target.part)), expected)?;
        }
        let mut network = Self::empty();
        for mut module in whole.modules {
            let target = &mut module.target;
            let block = block_index(&naming, target.part, &target.path);
            target.lr_weight = block.map_or(1.0, |block| blocks.lr_weight(block));
            let admitted = filter.admits(&target.name, &target.path) && target.lr_weight != 0.0;
            if !parts.has(target.part) || !admitted {
                continue;
            }
            let own = whole.parameters[module.parameters.clone()].iter().cloned();
            let start = network.parameters.len();
            network.parameters.extend(own);
            module.parameters = start..network.parameters.len();
            network.modules.push(module);
        }
        network.with_settings(settings)
    }

    fn empty() -> Self {
        Self {
            modules: Vec::new(),
            parameters: Vec::new(),
            multiplier: 1.0,
            dropout: DropoutSettings::default(),
        }
    }

    /// Adds an adapter; tensors without values begin with the lengths of the layer's rows.
    fn add(&mut self, target: Target, values: Vec<Option<Tensor<4>>>, layer: &LayerMut<'_>) {
        let squares = target.dora.then(|| row_squares(layer));
        let start = self.parameters.len();
        for (spec, value) in target.tensors().into_iter().zip(values) {
            let value = value.or_else(|| {
                let lengths = squares.clone()?.sqrt();
                Some(lengths.reshape(padded(&spec.shape)))
            });
            let Some(value) = value else { continue };
            self.parameters.push(Parameter {
                name: format!("{}.{}", target.name, spec.suffix),
                part: target.part,
                shape: spec.shape,
                value,
                lr_factor: 1.0,
            });
        }
        self.modules.push(Module {
            parameters: start..self.parameters.len(),
            target,
            squares,
        });
    }

    /// What of the settings is about training.
    fn with_settings(mut self, settings: &NetworkSettings) -> Result<Self, NetworkError> {
        if self.modules.is_empty() {
            return Err(NetworkError::NoTargets);
        }
        self.dropout = settings.dropout;
        for module in &self.modules {
            let target = &module.target;
            let plus = settings.lora_plus.of(target.part.is_text());
            for parameter in &mut self.parameters[module.parameters.clone()] {
                let factor = if parameter.name.ends_with(".lora_up.weight") {
                    plus
                } else {
                    1.0
                };
                parameter.lr_factor = target.lr_weight * factor;
            }
        }
        Ok(self)
    }

    /// The adapters, in the order of the model's layers.
    pub fn modules(&self) -> impl Iterator<Item = &Target> {
        self.modules.iter().map(|module| &module.target)
    }

    /// The trainable tensors.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The trainable tensors, to be changed by an optimizer.
    pub fn parameters_mut(&mut self) -> &mut [Parameter] {
        &mut self.parameters
    }

    /// Number of trainable elements.
    pub fn parameter_count(&self) -> usize {
        let sizes = self.parameters.iter();
        sizes.map(|p| p.shape.iter().product::<usize>()).sum()
    }

    /// The device that holds the parameters.
    pub fn device(&self) -> Device {
        self.parameters[0].value.device()
    }

    /// Whether a part of the model has adapters.
    pub fn covers(&self, part: Part) -> bool {
        self.modules().any(|module| module.part == part)
    }

    /// Whether a text encoder has adapters.
    pub fn covers_text(&self) -> bool {
        self.modules().any(|module| module.part.is_text())
    }

    /// Factor on the strength of all adapters at the next [`attach`](Self::attach): 0 is the base model, 1 the LoRA.
    pub fn set_multiplier(&mut self, multiplier: f64) {
        self.multiplier = multiplier;
    }

    /// Puts the adapters into the model's layers.
    ///
    /// With `tracked` the values become leaves of a new autodiff graph and gradients can be asked of the returned
    /// leaves; without, the adapters are constants. The layers keep the values of this moment: attach again after
    /// an optimizer's step.
    pub fn attach(&self, model: &mut StableDiffusion, tracked: bool) -> Leaves {
        self.put(model, tracked, None)
    }

    /// The same in a training step, where the settings leave something out. In one place that is always the same.
    pub fn attach_at(&self, model: &mut StableDiffusion, tracked: bool, place: Place) -> Leaves {
        let drops = self.drops();
        self.put(model, tracked, drops.then_some(place))
    }

    /// Whether something is left out in training.
    pub fn drops(&self) -> bool {
        self.dropout != DropoutSettings::default()
    }

    fn put(&self, model: &mut StableDiffusion, tracked: bool, place: Option<Place>) -> Leaves {
        let leaves: Vec<Tensor<4>> = self
            .parameters
            .iter()
            .map(|parameter| {
                let value = parameter.value.clone();
                if tracked {
                    value.autodiff().require_grad()
                } else {
                    value
                }
            })
            .collect();
        let moment = Moment {
            multiplier: self.multiplier,
            dropout: place.map(|place| (&self.dropout, place)),
        };
        let by_layer: HashMap<(Part, &str), &Module> = self
            .modules
            .iter()
            .map(|module| ((module.target.part, module.target.path.as_str()), module))
            .collect();
        for (part, path, mut layer) in model.layers_mut() {
            if let Some(module) = by_layer.get(&(part, path.as_str())) {
                let own = &leaves[module.parameters.clone()];
                let squares = module.squares.as_ref();
                let adapter = adapters::build(&module.target, own, squares, moment);
                set_adapter(&mut layer, adapter);
            }
        }
        Leaves(leaves)
    }

    /// Takes the adapters out of the model's layers again.
    pub fn detach(&self, model: &mut StableDiffusion) {
        for (_, _, mut layer) in model.layers_mut() {
            set_adapter(&mut layer, None);
        }
    }

    /// What an adapter adds to its layer's weight: `multiplier · alpha / rank · up · down`, or what it is with its kind, in
    /// the layer's shape `[out, in]` or `[out, in, kh, kw]` and row-major order. Trained lengths are not in it.
    pub fn weight_delta(&self, name: &str) -> Option<HostTensor> {
        let module = self.modules.iter().find(|m| m.target.name == name)?;
        let delta = adapters::weight_delta(&module.target, &self.values_of(module))?;
        let values = delta.mul_scalar(self.multiplier);
        Some(HostTensor {
            shape: module.target.shape.dims(),
            values: values.try_into_vec_as::<f32>().ok()?,
        })
    }

    fn values_of(&self, module: &Module) -> Vec<Tensor<4>> {
        let own = self.parameters[module.parameters.clone()].iter();
        own.map(|parameter| parameter.value.clone()).collect()
    }

    /// Scales adapters down whose change of their weight has a norm above `limit`, and tells how many those are.
    ///
    /// # Errors
    /// When the device does not hand over the norms.
    pub fn scale_norms(&mut self, limit: f64) -> Result<usize, NetworkError> {
        let squares: Vec<Tensor<1>> = self
            .modules
            .iter()
            .filter_map(|module| adapters::norm_square(&module.target, &self.values_of(module)))
            .collect();
        if squares.len() != self.modules.len() {
            return Ok(0); // adapters that add nothing have no norm
        }
        let squares = Tensor::cat(squares, 0);
        let squares = squares
            .try_into_vec_as::<f32>()
            .map_err(|error| NetworkError::Device(error.to_string()))?;
        let mut scaled = 0;
        for (module, square) in self.modules.iter().zip(squares) {
            let norm = f64::from(square).sqrt();
            if norm <= limit {
                continue;
            }
            scaled += 1;
            let factors = adapters::norm_factors(&module.target, limit / norm);
            let own = &mut self.parameters[module.parameters.clone()];
            for (parameter, factor) in own.iter_mut().zip(factors) {
                if factor != 1.0 {
                    parameter.value = parameter.value.clone().mul_scalar(factor);
                }
            }
        }
        Ok(scaled)
    }

    /// The tensors of a file with sd-scripts' names.
    pub fn tensors(&self) -> Result<BTreeMap<String, HostTensor>, NetworkError> {
        let mut tensors = BTreeMap::new();
        for Module { target, .. } in &self.modules {
            let (suffix, value) = match target.form {
                Form::Scale { on_input } => ("on_input", f32::from(u8::from(on_input))),
                _ => ("alpha", target.alpha as f32),
            };
            let number = HostTensor {
                shape: Vec::new(),
                values: vec![value],
            };
            tensors.insert(format!("{}.{suffix}", target.name), number);
        }
        for parameter in &self.parameters {
            let values = parameter
                .value
                .try_to_vec_as::<f32>()
                .map_err(|error| NetworkError::Device(format!("{}: {error}", parameter.name)))?;
            let shape = parameter.shape.clone();
            tensors.insert(parameter.name.clone(), HostTensor { shape, values });
        }
        Ok(tensors)
    }

    /// Writes a LoRA file with the given description; the file appears whole or not at all.
    pub fn save(
        &self,
        path: &Path,
        precision: SavePrecision,
        metadata: BTreeMap<String, String>,
    ) -> Result<SavedLora, NetworkError> {
        let tensors = self.tensors()?;
        LoraFile { tensors, metadata }.write(path, precision)
    }
}

impl TrainParts {
    /// Whether a part of the model is among them.
    pub fn has(self, part: Part) -> bool {
        if part.is_text() {
            self.text_encoder
        } else {
            self.unet
        }
    }
}

fn set_adapter(layer: &mut LayerMut<'_>, adapter: Option<Arc<dyn Adapter>>) {
    match layer {
        LayerMut::Linear(linear) => linear.set_adapter(adapter),
        LayerMut::Conv(conv) => conv.set_adapter(adapter),
    }
}

/// `‖W‖²` of each row of a layer's weight.
fn row_squares(layer: &LayerMut<'_>) -> Tensor<1> {
    let weight = match layer {
        LayerMut::Linear(linear) => linear.weight.clone(),
        LayerMut::Conv(conv) => {
            let [rows, columns, height, width] = conv.weight.dims();
            let shape = [rows, columns * height * width];
            conv.weight.clone().reshape(shape)
        }
    };
    let [rows, _] = weight.dims();
    widen(weight).square().sum_dim(1).reshape([rows])
}

/// Kind and size of a layer.
pub fn shape_of(layer: &LayerMut<'_>) -> LayerShape {
    match layer {
        LayerMut::Linear(linear) => {
            let [d_out, d_in] = linear.weight.dims();
            LayerShape::Linear { d_in, d_out }
        }
        LayerMut::Conv(conv) => {
            let [c_out, c_in, height, width] = conv.weight.dims();
            let kernel = [height, width];
            LayerShape::Conv {
                c_in,
                c_out,
                kernel,
            }
        }
    }
}

fn padded(shape: &[usize]) -> [usize; 4] {
    let mut padded = [1; 4];
    padded[4 - shape.len()..].copy_from_slice(shape);
    padded
}

fn from_host(values: Vec<f32>, spec: &TensorSpec, device: &Device) -> Tensor<4> {
    let data = TensorData::new(values, padded(&spec.shape));
    Tensor::from_data(data, (device, DType::F32))
}
