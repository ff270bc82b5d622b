//! A plugin's optimizer as the training loop sees it: its state is here, so that it can be saved and restored.

use burn::tensor::{Device, Tensor};
use lorasmith_abi::host::{HostParam, Shape, StateValue, States, StepInput, Tensors as _};

use super::library::OptimizerInstance;
use super::tensors::{BurnTensor, BurnTensors};
use crate::training::optimizer::{Optimizer, OptimizerError, ParamUpdate, StateDtype, StateTensor};

/// See [`Optimizer`].
pub struct PluginOptimizer {
    id: String,
    instance: OptimizerInstance,
    states: States<BurnTensor>,
    /// State of an earlier run; goes to the device with the first step, which knows the device.
    restored: Vec<StateTensor>,
}

impl PluginOptimizer {
    pub fn new(id: &str, instance: OptimizerInstance) -> Self {
        Self {
            id: id.to_owned(),
            instance,
            states: States::default(),
            restored: Vec::new(),
        }
    }

    fn failed(&self, message: impl AsRef<str>) -> OptimizerError {
        OptimizerError(format!("optimizer `{}`: {}", self.id, message.as_ref()))
    }

    fn upload_restored(&mut self, device: &Device) -> Result<(), OptimizerError> {
        let backend = BurnTensors::new(device);
        for state in std::mem::take(&mut self.restored) {
            let value = read_state(&backend, &state).map_err(|message| {
                self.failed(format!("state {}/{}: {message}", state.param, state.name))
            })?;
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
        let input = StepInput {
            step,
            params: params
                .iter()
                .map(|param| HostParam {
                    id: param.id,
                    name: param.name,
                    shape: param.shape,
                    value: param.value.clone(),
                    grad: param.grad.clone(),
                    lr: param.lr,
                    weight_decay: param.weight_decay,
                })
                .collect(),
        };
        let values = self
            .instance
            .step(input, &mut self.states, BurnTensors::new(&device))
            .map_err(|message| self.failed(message))?;
        for (param, value) in params.iter_mut().zip(values) {
            if let Some(value) = value {
                *param.value = value;
            }
        }
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<StateTensor>, OptimizerError> {
        if !self.restored.is_empty() {
            return Ok(self.restored.clone());
        }
        self.states
            .iter()
            .map(|(param, name, value)| {
                write_state(param, name, value).map_err(|message| self.failed(message))
            })
            .collect()
    }

    fn restore(&mut self, state: Vec<StateTensor>) -> Result<(), OptimizerError> {
        self.states = States::default();
        self.restored = state;
        Ok(())
    }
}

fn write_state(
    param: &str,
    name: &str,
    value: &StateValue<BurnTensor>,
) -> Result<StateTensor, String> {
    let (shape, data, dtype) = match value {
        StateValue::Counter(count) => (Vec::new(), count.to_le_bytes().to_vec(), StateDtype::I64),
        StateValue::Tensor(tensor, shape) => {
            let values = BurnTensors::new(&tensor.device()).read(tensor)?;
            let data = values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect();
            (shape.as_slice().to_vec(), data, StateDtype::F32)
        }
    };
    Ok(StateTensor {
        param: param.to_owned(),
        name: name.to_owned(),
        shape,
        data,
        dtype,
    })
}

fn read_state(backend: &BurnTensors, state: &StateTensor) -> Result<StateValue<Tensor<4>>, String> {
    match state.dtype {
        StateDtype::I64 => {
            let bytes = <[u8; 8]>::try_from(state.data.as_slice())
                .map_err(|_| format!("{} bytes, expected 8", state.data.len()))?;
            Ok(StateValue::Counter(i64::from_le_bytes(bytes)))
        }
        StateDtype::F32 => {
            let shape = Shape::new(&state.shape).map_err(|fault| fault.message)?;
            let (values, rest) = state.data.as_chunks::<4>();
            if !rest.is_empty() || values.len() != shape.elements() {
                return Err(format!(
                    "{} bytes, expected {} of shape {:?}",
                    state.data.len(),
                    4 * shape.elements(),
                    state.shape
                ));
            }
            let values = values
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect();
            Ok(StateValue::Tensor(
                backend.write(values, shape.dims())?,
                shape,
            ))
        }
        StateDtype::U8 => Err("bytes are not a state of this version".to_owned()),
    }
}
