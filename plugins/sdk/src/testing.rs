//! A host for a plugin's own tests: the same checked operation table, over vectors of `f32`.
#![expect(unsafe_code, reason = "calls the plugin's step as a host does")]

mod cpu;

use lorasmith_abi::host::{HostParam, Session, Shape, StateValue, States, StepInput};

pub use cpu::{CpuTensor, CpuTensors};

use crate::export;
use crate::{Optimizer, Run, Schedule};

/// One parameter of a [`TestHost`].
#[derive(Debug, Clone, PartialEq)]
pub struct TestParam {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements, row-major.
    pub value: Vec<f32>,
    /// Learning rate.
    pub lr: f64,
    /// Whether weight decay applies.
    pub weight_decay: bool,
}

/// Runs an optimizer step by step on the CPU.
pub struct TestHost<O: Optimizer> {
    optimizer: Box<O>,
    states: States<CpuTensors>,
    step: u64,
    /// The parameters; may be changed between steps.
    pub params: Vec<TestParam>,
}

impl<O: Optimizer> TestHost<O> {
    /// A host for an optimizer with these settings.
    ///
    /// # Errors
    /// Settings that do not deserialise or that the optimizer refuses.
    pub fn new(settings: serde_json::Value) -> Result<Self, String> {
        let optimizer: O = serde_json::from_value(settings).map_err(|error| error.to_string())?;
        optimizer.check().map_err(|error| error.to_string())?;
        Ok(Self {
            optimizer: Box::new(optimizer),
            states: States::default(),
            step: 0,
            params: Vec::new(),
        })
    }

    /// Adds a parameter with weight decay.
    #[must_use]
    pub fn param(mut self, name: &str, shape: &[usize], value: &[f32], lr: f64) -> Self {
        self.params.push(TestParam {
            name: name.to_owned(),
            shape: shape.to_vec(),
            value: value.to_vec(),
            lr,
            weight_decay: true,
        });
        self
    }

    /// One step with a gradient for each parameter.
    ///
    /// # Errors
    /// The plugin's or the host's message; nothing has changed then.
    pub fn step(&mut self, grads: &[Vec<f32>]) -> Result<(), String> {
        let input = input(&self.params, self.step, Some(grads))?;
        let this = (&raw mut *self.optimizer).cast();
        let values = Session::run(CpuTensors, input, &mut self.states, |host, step| {
            // SAFETY: `this` is an `O`, and the session keeps host and step alive during the call.
            unsafe { export::step::<O>(this, host, step) }
        })?;
        for (param, value) in self.params.iter_mut().zip(values) {
            if let Some(value) = value {
                param.value = value.values().to_vec();
            }
        }
        self.step += 1;
        Ok(())
    }

    /// The values to save and measure with, which do not take the place of the parameters.
    ///
    /// # Errors
    /// The plugin's or the host's message.
    pub fn eval(&mut self) -> Result<Vec<Vec<f32>>, String> {
        let input = input(&self.params, self.step, None)?;
        let this = (&raw mut *self.optimizer).cast();
        let values = Session::eval(CpuTensors, input, &mut self.states, |host, step| {
            // SAFETY: as in `step`.
            unsafe { export::eval::<O>(this, host, step) }
        })?;
        let params = self.params.iter().zip(values);
        Ok(params
            .map(|(param, value)| {
                value.map_or_else(|| param.value.clone(), |v| v.values().to_vec())
            })
            .collect())
    }

    /// The elements of a state tensor, or a counter as its one element; `param` is empty for the optimizer's own.
    pub fn state(&self, param: &str, name: &str) -> Option<Vec<f32>> {
        match self.states.get(param, name)? {
            StateValue::Tensor(tensor, _) => Some(tensor.values().to_vec()),
            StateValue::Blocks(blocks, code, _) => Some(code.dequantize(blocks)),
            StateValue::Counter(value) => Some(vec![*value as f32]),
        }
    }
}

fn input<'a>(
    all: &'a [TestParam],
    step: u64,
    grads: Option<&[Vec<f32>]>,
) -> Result<StepInput<'a, CpuTensor>, String> {
    let mut params = Vec::new();
    for (id, param) in (0..).zip(all) {
        let grad = match grads {
            Some(grads) => match grads.get(id as usize) {
                Some(grad) => Some(grad.clone()),
                None => break,
            },
            None => None,
        };
        let shape = Shape::new(&param.shape).map_err(|fault| fault.message)?;
        params.push(HostParam {
            id,
            name: &param.name,
            shape: &param.shape,
            value: CpuTensor::new(param.value.clone(), shape.dims())?,
            grad: grad
                .map(|grad| CpuTensor::new(grad, shape.dims()))
                .transpose()?,
            lr: if grads.is_some() { param.lr } else { 0.0 },
            weight_decay: param.weight_decay,
        });
    }
    Ok(StepInput { step, params })
}

/// The factors of a schedule at steps `0..steps`.
///
/// # Errors
/// Settings that do not deserialise or that the schedule refuses.
pub fn factors<S: Schedule>(
    settings: serde_json::Value,
    run: Run,
    steps: u64,
) -> Result<Vec<f64>, String> {
    let schedule: S = serde_json::from_value(settings).map_err(|error| error.to_string())?;
    schedule.check(&run).map_err(|error| error.to_string())?;
    Ok((0..steps).map(|step| schedule.factor(&run, step)).collect())
}
