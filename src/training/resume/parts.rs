//! The parts that every run has: adapters and optimizer. Those of the loop are beside it.

use burn::tensor::{DType, Tensor, TensorData};
use serde_json::json;

use super::{Part, PartTensor, Resumable, ResumeError};
use crate::networks::LoraNetwork;
use crate::training::TrainError;
use crate::training::optimizer::{Optimizer, StateDtype, StateTensor};

/// The values of the parameters, to the bit.
impl Resumable for LoraNetwork {
    fn keep(&mut self) -> Result<Part, TrainError> {
        let tensors = self.parameters().iter().map(|parameter| {
            PartTensor::of_floats(&parameter.name, &parameter.shape, &parameter.value)
        });
        Ok(Part {
            values: json!({}),
            tensors: tensors.collect::<Result<_, TrainError>>()?,
        })
    }

    fn take_up(&mut self, part: Part) -> Result<(), TrainError> {
        if part.tensors.len() != self.parameters().len() {
            let message = format!(
                "{} adapter tensors, expected {}",
                part.tensors.len(),
                self.parameters().len()
            );
            return Err(ResumeError::Parts(message).into());
        }
        for parameter in self.parameters_mut() {
            let kept = part.tensor(&parameter.name)?;
            parameter.value = kept.floats_like(&parameter.shape, &parameter.value)?;
        }
        Ok(())
    }
}

/// The states that the plugin has named.
impl Resumable for &mut dyn Optimizer {
    fn keep(&mut self) -> Result<Part, TrainError> {
        let states = self.state()?;
        let names: Vec<_> = states
            .iter()
            .map(|state| json!([state.param, state.name]))
            .collect();
        let tensors = states
            .into_iter()
            .enumerate()
            .map(|(index, state)| PartTensor {
                name: index.to_string(),
                shape: state.shape,
                dtype: state.dtype,
                data: state.data,
            });
        Ok(Part {
            values: json!({ "names": names }),
            tensors: tensors.collect(),
        })
    }

    fn take_up(&mut self, part: Part) -> Result<(), TrainError> {
        let names: Vec<(String, String)> = serde_json::from_value(part.values["names"].clone())
            .map_err(|error| ResumeError::Parts(format!("optimizer: {error}")))?;
        let mut states = Vec::with_capacity(names.len());
        for (index, (param, name)) in names.into_iter().enumerate() {
            let kept = part.tensor(&index.to_string())?;
            states.push(StateTensor {
                param,
                name,
                shape: kept.shape.clone(),
                data: kept.data.clone(),
                dtype: kept.dtype,
            });
        }
        Ok(self.restore(states)?)
    }
}

impl PartTensor {
    /// 32-bit floats, to the bit.
    ///
    /// # Errors
    /// When the device does not hand them over.
    pub fn of_floats(name: &str, shape: &[usize], value: &Tensor<4>) -> Result<Self, TrainError> {
        let values = value
            .try_to_vec_as::<f32>()
            .map_err(|error| TrainError::Device(format!("{name}: {error}")))?;
        Ok(Self {
            name: name.to_owned(),
            shape: shape.to_vec(),
            dtype: StateDtype::F32,
            data: values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        })
    }

    /// What [`of_floats`](Self::of_floats) was given, in the place of a tensor like it.
    ///
    /// # Errors
    /// When its shape is another.
    pub fn floats_like(&self, shape: &[usize], like: &Tensor<4>) -> Result<Tensor<4>, TrainError> {
        if self.shape != shape || self.dtype != StateDtype::F32 {
            let message = format!(
                "{} has the shape {:?}, expected {shape:?}",
                self.name, self.shape
            );
            return Err(ResumeError::Parts(message).into());
        }
        let data = TensorData::new(floats(&self.data), like.dims());
        Ok(Tensor::from_data(data, (&like.device(), DType::F32)))
    }

    /// 64-bit floats, kept by their bits.
    pub fn of_doubles(name: &str, values: &[f64]) -> Self {
        Self {
            name: name.to_owned(),
            shape: vec![values.len()],
            dtype: StateDtype::I64,
            data: values
                .iter()
                .flat_map(|value| value.to_bits().to_le_bytes())
                .collect(),
        }
    }

    /// What [`of_doubles`](Self::of_doubles) was given.
    pub fn doubles(&self) -> Vec<f64> {
        let (values, _) = self.data.as_chunks::<8>();
        values
            .iter()
            .map(|bytes| f64::from_bits(u64::from_le_bytes(*bytes)))
            .collect()
    }
}

fn floats(data: &[u8]) -> Vec<f32> {
    let (values, _) = data.as_chunks::<4>();
    values
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}
