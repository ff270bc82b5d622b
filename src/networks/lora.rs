//! The adapters of one model: creation, attachment to the frozen layers, files.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use sha2::{Digest, Sha256};

use crate::diffusion::layers::LayerMut;
use crate::diffusion::{Part, StableDiffusion};
use crate::networks::NetworkError;
use crate::networks::adapter::LoraAdapter;
use crate::networks::format::{HostTensor, LoraFile, SavedLora};
use crate::networks::settings::{MAX_RANK, NetworkSettings, SavePrecision, TrainParts};
use crate::networks::targets::{LayerShape, Naming, Target, target};

/// One trainable tensor.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its key in a LoRA file.
    pub name: String,
    /// Half of the model that it belongs to.
    pub part: Part,
    /// Its shape in a LoRA file, rank 2 or 4.
    pub shape: Vec<usize>,
    /// Its value: f32, the shape padded with ones on the left to rank 4.
    pub value: Tensor<4>,
}

/// The leaves of the autodiff graph after [`LoraNetwork::attach`], index-aligned with the parameters.
#[derive(Debug)]
pub struct Leaves(pub Vec<Tensor<4>>);

/// The LoRA adapters of one model.
///
/// It owns the values of its parameters. The model's layers hold adapters that share them only between
/// [`attach`](Self::attach) and [`detach`](Self::detach).
#[derive(Debug)]
pub struct LoraNetwork {
    modules: Vec<Target>,
    /// `lora_down` of module `i` at `2 i`, `lora_up` at `2 i + 1`.
    parameters: Vec<Parameter>,
    multiplier: f64,
}

impl LoraNetwork {
    /// Makes adapters for the layers of a model: `lora_down` Kaiming-uniform, `lora_up` zero, so that the model's
    /// output does not change at first.
    ///
    /// The numbers depend on the seed and the adapter's name alone, not on the device or the set of layers.
    pub fn create(
        model: &mut StableDiffusion,
        settings: &NetworkSettings,
        parts: TrainParts,
        seed: u64,
        device: &Device,
    ) -> Result<Self, NetworkError> {
        if let Some((field, message)) = settings.problems().into_iter().next() {
            return Err(NetworkError::Settings { field, message });
        }
        let naming = Naming::of(model);
        let mut modules = Vec::new();
        for (part, path, layer) in model.layers_mut() {
            let trained = if part.is_text() {
                parts.text_encoder
            } else {
                parts.unet
            };
            if trained {
                modules.extend(target(&naming, part, &path, shape_of(&layer), settings));
            }
        }
        if modules.is_empty() {
            return Err(NetworkError::NoTargets);
        }
        let parameters = modules.iter().flat_map(|module| {
            let down_shape = module.shape.down_shape(module.rank);
            let down = kaiming_uniform(seed, &module.name, &down_shape);
            let up_shape = module.shape.up_shape(module.rank);
            let up = vec![0.0; up_shape.iter().product()];
            [
                parameter(module, "lora_down", down_shape, down, device),
                parameter(module, "lora_up", up_shape, up, device),
            ]
        });
        Ok(Self {
            parameters: parameters.collect(),
            modules,
            multiplier: 1.0,
        })
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
        let mut order = Vec::new();
        for (part, path, layer) in model.layers_mut() {
            let name = naming.lora_name(part, &path);
            let shape = naming.shape_in_files(part, &path, shape_of(&layer));
            order.push(name.clone());
            layers.insert(name, (part, path, shape));
        }
        let mut groups = group_by_module(file.tensors, &layers)?;

        let mut modules = Vec::new();
        let mut parameters = Vec::new();
        for name in order {
            let Some(tensors) = groups.remove(&name) else {
                continue;
            };
            let Some((part, path, shape)) = layers.remove(&name) else {
                continue;
            };
            let (module, down, up) = tensors.into_module(name, part, path, shape)?;
            let down_shape = shape.down_shape(module.rank);
            let up_shape = shape.up_shape(module.rank);
            parameters.push(parameter(&module, "lora_down", down_shape, down, device));
            parameters.push(parameter(&module, "lora_up", up_shape, up, device));
            modules.push(module);
        }
        if modules.is_empty() {
            return Err(NetworkError::NoTargets);
        }
        Ok(Self {
            modules,
            parameters,
            multiplier: 1.0,
        })
    }

    /// The adapters, in the order of the model's layers.
    pub fn modules(&self) -> &[Target] {
        &self.modules
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
        self.modules.iter().any(|module| module.part == part)
    }

    /// Whether a text encoder has adapters.
    pub fn covers_text(&self) -> bool {
        self.modules.iter().any(|module| module.part.is_text())
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
        let by_layer: HashMap<(Part, &str), usize> = self
            .modules
            .iter()
            .enumerate()
            .map(|(index, module)| ((module.part, module.path.as_str()), index))
            .collect();
        for (part, path, mut layer) in model.layers_mut() {
            if let Some(&index) = by_layer.get(&(part, path.as_str())) {
                let module = &self.modules[index];
                let adapter = LoraAdapter {
                    down: leaves[2 * index].clone(),
                    up: leaves[2 * index + 1].clone(),
                    rank: module.rank,
                    scale: self.multiplier * module.alpha / module.rank as f64,
                };
                set_adapter(&mut layer, Some(Arc::new(adapter)));
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

    /// What an adapter adds to its layer's weight: `multiplier · alpha / rank · up · down`, in the layer's shape
    /// `[out, in]` or `[out, in, kh, kw]` and row-major order.
    pub fn weight_delta(&self, name: &str) -> Option<HostTensor> {
        let index = self.modules.iter().position(|module| module.name == name)?;
        let module = &self.modules[index];
        let scale = self.multiplier * module.alpha / module.rank as f64;
        let down = self.parameters[2 * index].value.clone();
        let up = self.parameters[2 * index + 1].value.clone();
        let mut shape = module.shape.down_shape(module.rank);
        let columns: usize = shape[1..].iter().product();
        shape[0] = module.shape.up_shape(module.rank)[0];
        let down = down.reshape([module.rank, columns]);
        let up = up.reshape([shape[0], module.rank]);
        let values = up.matmul(down).mul_scalar(scale);
        let values = values.try_into_vec_as::<f32>().ok()?;
        Some(HostTensor { shape, values })
    }

    /// The tensors of a file with sd-scripts' names.
    pub fn tensors(&self) -> Result<BTreeMap<String, HostTensor>, NetworkError> {
        let mut tensors = BTreeMap::new();
        for module in &self.modules {
            let alpha = HostTensor {
                shape: Vec::new(),
                values: vec![module.alpha as f32],
            };
            tensors.insert(format!("{}.alpha", module.name), alpha);
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

fn set_adapter(layer: &mut LayerMut<'_>, adapter: Option<Arc<LoraAdapter>>) {
    let adapter = adapter.map(|adapter| adapter as Arc<dyn crate::diffusion::layers::Adapter>);
    match layer {
        LayerMut::Linear(linear) => linear.set_adapter(adapter),
        LayerMut::Conv(conv) => conv.set_adapter(adapter),
    }
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

fn parameter(
    module: &Target,
    which: &str,
    shape: Vec<usize>,
    values: Vec<f32>,
    device: &Device,
) -> Parameter {
    let mut padded = [1; 4];
    padded[4 - shape.len()..].copy_from_slice(&shape);
    let data = TensorData::new(values, padded);
    Parameter {
        name: format!("{}.{which}.weight", module.name),
        part: module.part,
        shape,
        value: Tensor::from_data(data, (device, DType::F32)),
    }
}

/// `U(-1/√fan_in, 1/√fan_in)`, which is torch's `kaiming_uniform_(a=√5)`.
fn kaiming_uniform(seed: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    let fan_in: usize = shape[1..].iter().product();
    let bound = 1.0 / (fan_in as f32).sqrt();
    let mut key = Sha256::new();
    key.update(b"lora_down");
    key.update(seed.to_le_bytes());
    key.update(name);
    let mut rng = ChaCha12Rng::from_seed(key.finalize().into());
    let count = shape.iter().product();
    (0..count)
        .map(|_| (rng.random::<f32>() * 2.0 - 1.0) * bound)
        .collect()
}

/// The tensors of one adapter as they are found in a file.
#[derive(Default)]
struct ModuleTensors {
    alpha: Option<HostTensor>,
    down: Option<HostTensor>,
    up: Option<HostTensor>,
}

/// Sorts a file's tensors by adapter; every key must be one of an adapter of the model.
fn group_by_module<T>(
    tensors: BTreeMap<String, HostTensor>,
    layers: &HashMap<String, T>,
) -> Result<HashMap<String, ModuleTensors>, NetworkError> {
    let mut groups: HashMap<String, ModuleTensors> = HashMap::new();
    for (key, tensor) in tensors {
        let (name, slot) = key.split_once('.').unwrap_or((&key, ""));
        if !layers.contains_key(name) {
            return Err(NetworkError::UnknownModule { key });
        }
        let group = groups.entry(name.to_owned()).or_default();
        let slot = match slot {
            "alpha" => &mut group.alpha,
            "lora_down.weight" => &mut group.down,
            "lora_up.weight" => &mut group.up,
            _ => return Err(NetworkError::UnknownKey { key }),
        };
        *slot = Some(tensor);
    }
    Ok(groups)
}

impl ModuleTensors {
    /// Checks the shapes against the layer; a 1×1 convolution's tensors may have rank 2.
    fn into_module(
        self,
        name: String,
        part: Part,
        path: String,
        shape: LayerShape,
    ) -> Result<(Target, Vec<f32>, Vec<f32>), NetworkError> {
        let missing = |which: &str| NetworkError::Incomplete {
            key: format!("{name}.{which}.weight"),
        };
        let down = self.down.ok_or_else(|| missing("lora_down"))?;
        let up = self.up.ok_or_else(|| missing("lora_up"))?;
        let rank = down.shape.first().copied().unwrap_or(0);
        let wrong = |key: &str, found: &[usize], expected: String| NetworkError::Shape {
            key: format!("{name}.{key}"),
            found: found.to_vec(),
            expected,
        };
        if !(1..=MAX_RANK).contains(&rank) {
            let expected = format!("a rank from 1 to {MAX_RANK} first");
            return Err(wrong("lora_down.weight", &down.shape, expected));
        }
        for (key, tensor, expected) in [
            ("lora_down.weight", &down, shape.down_shape(rank)),
            ("lora_up.weight", &up, shape.up_shape(rank)),
        ] {
            if without_trailing_ones(&tensor.shape) != without_trailing_ones(&expected) {
                return Err(wrong(key, &tensor.shape, format!("{expected:?}")));
            }
        }
        let alpha = match self.alpha {
            None => rank as f64,
            Some(alpha) => match alpha.values[..] {
                [value] if value.is_finite() => f64::from(value),
                _ => return Err(wrong("alpha", &alpha.shape, "one finite number".to_owned())),
            },
        };
        let module = Target {
            part,
            path,
            name,
            shape,
            rank,
            alpha,
        };
        Ok((module, down.values, up.values))
    }
}

fn without_trailing_ones(shape: &[usize]) -> &[usize] {
    let kept = shape.len().min(2);
    let wide = shape
        .iter()
        .rposition(|&size| size != 1)
        .map_or(0, |i| i + 1);
    &shape[..kept.max(wide)]
}
