//! A plugin's optimizer as the training loop sees it: its state is here, so that it can be saved and restored.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::Device;
use lorasmith_abi::host::blocks::{BLOCK, Quantized};
use lorasmith_abi::host::{
    Code, HostParam, Scalar, Shape, StateValue, States, StepInput, Tensors as _, panic_message,
};

use super::lazy::{LazyTensor, LazyTensors, settle};
use super::library::OptimizerInstance;
use super::tensors::BurnTensor;
use crate::training::optimizer::{
    Optimizer, OptimizerError, ParamUpdate, ParamValue, StateDtype, StateTensor,
};

/// What the name of an 8-bit state's scales ends in, by its map.
const SCALES: [(Code, &str); 2] = [
    (Code::Signed, ".absmax_signed"),
    (Code::Unsigned, ".absmax_unsigned"),
];

/// See [`Optimizer`].
pub struct PluginOptimizer {
    id: String,
    instance: OptimizerInstance,
    states: States<LazyTensors>,
    /// Where the states are; `None` before the first step.
    device: Option<Device>,
    /// State of an earlier run; goes to the device with the first step, which knows the device.
    restored: Vec<StateTensor>,
}

impl PluginOptimizer {
    pub fn new(id: &str, instance: OptimizerInstance) -> Self {
        Self {
            id: id.to_owned(),
            instance,
            states: States::default(),
            device: None,
            restored: Vec::new(),
        }
    }

    fn failed(&self, message: impl AsRef<str>) -> OptimizerError {
        OptimizerError(format!("optimizer `{}`: {}", self.id, message.as_ref()))
    }

    fn upload_restored(&mut self, device: &Device) -> Result<(), OptimizerError> {
        self.device.get_or_insert_with(|| device.clone());
        let backend = LazyTensors::new(device);
        let restored = std::mem::take(&mut self.restored);
        for state in &restored {
            let failed = |message: String| {
                self.failed(format!("state {}/{}: {message}", state.param, state.name))
            };
            let value = match state.dtype {
                StateDtype::U8 => read_blocks(&backend, state, &restored).map_err(failed)?,
                _ if is_scales(state, &restored) => continue,
                _ => read_state(&backend, state).map_err(failed)?,
            };
            self.states.insert(&state.param, &state.name, value);
        }
        Ok(())
    }
}

impl Optimizer for PluginOptimizer {
    fn step(&mut self, step: u64, params: &mut [ParamUpdate<'_>]) -> Result<(), OptimizerError> {
        let Some(device) = params.first().map(|param| param.value.device()) else {
            return Ok(());
        };
        self.upload_restored(&device)?;
        let tensors = LazyTensors::new(&device);
        let listed = params.iter().map(|param| {
            Ok(HostParam {
                id: param.id,
                name: param.name,
                shape: param.shape,
                value: LazyTensor::leaf(param.value.clone()),
                grad: Some(scaled_gradient(&tensors, param)?),
                lr: param.lr,
                weight_decay: param.weight_decay,
            })
        });
        let listed: Result<Vec<HostParam<'_, LazyTensor>>, String> = listed.collect();
        let input = StepInput {
            step,
            params: listed.map_err(|message| self.failed(message))?,
        };
        let names: Vec<&str> = params.iter().map(|param| param.name).collect();
        let values = self
            .instance
            .step(input, &mut self.states, tensors)
            .and_then(|values| settled(&device, &names, values, &mut self.states))
            .map_err(|message| self.failed(message))?;
        for (param, value) in params.iter_mut().zip(values) {
            if let Some(value) = value {
                *param.value = value;
            }
        }
        Ok(())
    }

    fn eval(
        &mut self,
        params: &[ParamValue<'_>],
    ) -> Result<Option<Vec<BurnTensor>>, OptimizerError> {
        let Some(device) = params.first().map(|param| param.value.device()) else {
            return Ok(None);
        };
        if !self.instance.has_eval() {
            return Ok(None);
        }
        self.upload_restored(&device)?;
        let input = StepInput {
            step: 0,
            params: params
                .iter()
                .map(|param| HostParam {
                    id: param.id,
                    name: param.name,
                    shape: param.shape,
                    value: LazyTensor::leaf(param.value.clone()),
                    grad: None,
                    lr: 0.0,
                    weight_decay: true,
                })
                .collect(),
        };
        let names: Vec<&str> = params.iter().map(|param| param.name).collect();
        let values = self
            .instance
            .eval(input, &mut self.states, LazyTensors::new(&device))
            .and_then(|values| settled(&device, &names, values, &mut self.states))
            .map_err(|message| self.failed(message))?;
        let values = params.iter().zip(values);
        Ok(Some(
            values
                .map(|(param, value)| value.unwrap_or_else(|| param.value.clone()))
                .collect(),
        ))
    }

    fn state(&mut self) -> Result<Vec<StateTensor>, OptimizerError> {
        if !self.restored.is_empty() {
            return Ok(self.restored.clone());
        }
        let Some(device) = &self.device else {
            return Ok(Vec::new()); // no step was done
        };
        let tensors = LazyTensors::new(device);
        let mut states = Vec::new();
        for (param, name, value) in self.states.iter() {
            write_state(&tensors, param, name, value, &mut states)
                .map_err(|message| self.failed(message))?;
        }
        Ok(states)
    }

    fn restore(&mut self, state: Vec<StateTensor>) -> Result<(), OptimizerError> {
        self.states = States::default();
        self.restored = state;
        Ok(())
    }
}

/// The gradient as a plugin sees it.
fn scaled_gradient(tensors: &LazyTensors, param: &ParamUpdate<'_>) -> Result<LazyTensor, String> {
    let grad = LazyTensor::leaf(param.grad.clone());
    if param.grad_scale == 1.0 {
        return Ok(grad);
    }
    tensors.scalar(Scalar::Mul, &grad, param.grad_scale)
}

/// Computes what a step has assigned. Burn panics where a device fails; that is an error as those of operations are.
fn settled(
    device: &Device,
    names: &[&str],
    values: Vec<Option<LazyTensor>>,
    states: &mut States<LazyTensors>,
) -> Result<Vec<Option<BurnTensor>>, String> {
    let tensors = LazyTensors::new(device);
    let settled = catch_unwind(AssertUnwindSafe(|| settle(&tensors, names, values, states)));
    settled.unwrap_or_else(|payload| {
        let message = panic_message(&*payload);
        Err(format!(
            "the host panicked at the end of the step: {message}"
        ))
    })
}

fn write_state(
    tensors: &LazyTensors,
    param: &str,
    name: &str,
    value: &StateValue<LazyTensors>,
    states: &mut Vec<StateTensor>,
) -> Result<(), String> {
    let mut write = |name: String, shape: Vec<usize>, data: Vec<u8>, dtype: StateDtype| {
        states.push(StateTensor {
            param: param.to_owned(),
            name,
            shape,
            data,
            dtype,
        });
    };
    let bytes = |values: &[f32]| {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    };
    match value {
        StateValue::Counter(count) => {
            let data = count.to_le_bytes().to_vec();
            write(name.to_owned(), Vec::new(), data, StateDtype::I64);
        }
        StateValue::Tensor(tensor, shape) => {
            let values = tensors.read(tensor)?;
            let shape = shape.as_slice().to_vec();
            write(name.to_owned(), shape, bytes(&values), StateDtype::F32);
        }
        StateValue::Blocks(blocks, code, shape) => {
            let Quantized { codes, absmax } = tensors.codes(blocks)?.read()?;
            write(
                name.to_owned(),
                shape.as_slice().to_vec(),
                codes,
                StateDtype::U8,
            );
            let shape = vec![absmax.len()];
            write(
                scales_name(name, *code),
                shape,
                bytes(&absmax),
                StateDtype::F32,
            );
        }
    }
    Ok(())
}

fn scales_name(name: &str, code: Code) -> String {
    let ending = SCALES.iter().find(|(known, _)| *known == code);
    format!("{name}{}", ending.map_or("", |(_, ending)| ending))
}

/// The scales that belong to the codes `state`, and their map.
fn scales_of<'a>(state: &StateTensor, all: &'a [StateTensor]) -> Option<(&'a StateTensor, Code)> {
    SCALES.iter().find_map(|&(code, _)| {
        let name = scales_name(&state.name, code);
        let found = all
            .iter()
            .find(|other| other.param == state.param && other.name == name)?;
        Some((found, code))
    })
}

fn is_scales(state: &StateTensor, all: &[StateTensor]) -> bool {
    let codes = all.iter().filter(|other| other.dtype == StateDtype::U8);
    let mut scales = codes.filter_map(|codes| scales_of(codes, all));
    SCALES
        .iter()
        .any(|(_, ending)| state.name.ends_with(ending))
        && scales.any(|(scales, _)| std::ptr::eq(scales, state))
}

fn read_blocks(
    backend: &LazyTensors,
    state: &StateTensor,
    all: &[StateTensor],
) -> Result<StateValue<LazyTensors>, String> {
    let (scales, code) = scales_of(state, all).ok_or("bytes without the scales of their blocks")?;
    let shape = Shape::new(&state.shape).map_err(|fault| fault.message)?;
    let absmax = floats(&scales.data)?;
    if state.data.len() != shape.elements() || absmax.len() != shape.elements().div_ceil(BLOCK) {
        return Err(format!(
            "{} codes and {} scales, expected {} codes of shape {:?}",
            state.data.len(),
            absmax.len(),
            shape.elements(),
            state.shape
        ));
    }
    let codes = state.data.clone();
    let blocks = backend.write_blocks(Quantized { codes, absmax }, code);
    Ok(StateValue::Blocks(blocks, code, shape))
}

fn floats(data: &[u8]) -> Result<Vec<f32>, String> {
    let (values, rest) = data.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(format!("{} bytes, expected a multiple of 4", data.len()));
    }
    Ok(values
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect())
}

fn read_state(
    backend: &LazyTensors,
    state: &StateTensor,
) -> Result<StateValue<LazyTensors>, String> {
    if state.dtype == StateDtype::I64 {
        let bytes = <[u8; 8]>::try_from(state.data.as_slice())
            .map_err(|_| format!("{} bytes, expected 8", state.data.len()))?;
        return Ok(StateValue::Counter(i64::from_le_bytes(bytes)));
    }
    let shape = Shape::new(&state.shape).map_err(|fault| fault.message)?;
    let values = floats(&state.data)?;
    if values.len() != shape.elements() {
        return Err(format!(
            "{} bytes, expected {} of shape {:?}",
            state.data.len(),
            4 * shape.elements(),
            state.shape
        ));
    }
    let tensor = backend.write(values, shape.dims())?;
    Ok(StateValue::Tensor(tensor, shape))
}
