//! What an optimizer implements, and what a step looks like from inside.
#![expect(unsafe_code, reason = "calls the host's operation table")]

use lorasmith_abi::{
    GLOBAL, LOG_INFO, LsHost, LsStr, STATE_BLOCKS8_SIGNED, STATE_BLOCKS8_UNSIGNED,
    STATE_LIKE_PARAM, STATE_SCALAR, STATE_SHAPE,
};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::tensor::check;
use crate::{Result, Tensor};

/// An optimizer. The type is its settings: whatever must survive a step is a state on the host, so that a resumed run
/// loses nothing.
pub trait Optimizer: DeserializeOwned + JsonSchema + Send + 'static {
    /// Id by which a run chooses it.
    const ID: &'static str;
    /// One sentence for a list.
    const SUMMARY: &'static str;
    /// Whether each element's update depends on that element alone.
    const ELEMENTWISE: bool = false;
    /// Whether [`eval`](Self::eval) has something to say.
    const EVAL: bool = false;
    /// Bytes of state that are kept for each trained element: for the estimate of a run's memory. In the schema it is
    /// `x-state-bytes-per-element`.
    const STATE_BYTES: f64 = 8.0;

    /// Refuses settings that the schema alone cannot.
    ///
    /// # Errors
    /// What is wrong, for the user.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// One step over all parameters that have a gradient.
    ///
    /// # Errors
    /// Ends the run with the message; no parameter and no state changes.
    fn step(&self, step: &Step<'_>) -> Result<()>;

    /// Sets the values to save, measure and draw pictures with, where those are not the values that are trained on.
    /// The host puts the training values back. There are no gradients, and states cannot be changed.
    ///
    /// # Errors
    /// Ends the run with the message.
    fn eval(&self, _step: &Step<'_>) -> Result<()> {
        Ok(())
    }
}

/// An optimizer that updates each element by itself. It is an [`Optimizer`].
pub trait ElementwiseOptimizer: DeserializeOwned + JsonSchema + Send + 'static {
    /// Id by which a run chooses it.
    const ID: &'static str;
    /// One sentence for a list.
    const SUMMARY: &'static str;
    /// Whether [`eval`](Self::eval) has something to say.
    const EVAL: bool = false;
    /// Bytes of state that are kept for each trained element: for the estimate of a run's memory. In the schema it is
    /// `x-state-bytes-per-element`.
    const STATE_BYTES: f64 = 8.0;

    /// Refuses settings that the schema alone cannot.
    ///
    /// # Errors
    /// What is wrong, for the user.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// As [`Optimizer::eval`], for one parameter.
    ///
    /// # Errors
    /// Ends the run with the message.
    fn eval(&self, _param: &Param<'_>) -> Result<()> {
        Ok(())
    }

    /// The update of one parameter.
    ///
    /// # Errors
    /// Ends the run with the message; no parameter and no state changes.
    fn update(&self, param: &Param<'_>) -> Result<()>;
}

impl<T: ElementwiseOptimizer> Optimizer for T {
    const ID: &'static str = T::ID;
    const SUMMARY: &'static str = T::SUMMARY;
    const ELEMENTWISE: bool = true;
    const EVAL: bool = T::EVAL;
    const STATE_BYTES: f64 = T::STATE_BYTES;

    fn check(&self) -> Result<()> {
        ElementwiseOptimizer::check(self)
    }

    fn step(&self, step: &Step<'_>) -> Result<()> {
        step.params()
            .iter()
            .try_for_each(|param| self.update(param))
    }

    fn eval(&self, step: &Step<'_>) -> Result<()> {
        step.params()
            .iter()
            .try_for_each(|param| ElementwiseOptimizer::eval(self, param))
    }
}

/// One optimizer step.
#[derive(Debug)]
pub struct Step<'h> {
    pub(crate) global: Param<'h>,
    pub(crate) step: u64,
    pub(crate) params: Vec<Param<'h>>,
}

impl<'h> Step<'h> {
    /// Steps done before.
    pub fn number(&self) -> u64 {
        self.step
    }

    /// The parameters that have a gradient.
    pub fn params(&self) -> &[Param<'h>] {
        &self.params
    }

    /// A tensor of one value.
    pub fn full(&self, shape: &[u64], value: f64) -> Tensor<'h> {
        let host = self.global.host;
        Tensor::made(host, |out| {
            // SAFETY: the table outlives `'h`; the shape has as many entries as it says.
            unsafe { (host.full)(host.ctx, shape.as_ptr(), shape.len() as u32, value, out) }
        })
    }

    /// A tensor of zeros.
    pub fn zeros(&self, shape: &[u64]) -> Tensor<'h> {
        self.full(shape, 0.0)
    }

    /// A tensor of these elements, row-major. Slow.
    pub fn tensor(&self, data: &[f32], shape: &[u64]) -> Tensor<'h> {
        let host = self.global.host;
        Tensor::made(host, |out| {
            // SAFETY: the table outlives `'h`; both slices have as many entries as they say.
            unsafe {
                (host.write)(
                    host.ctx,
                    data.as_ptr(),
                    data.len() as u64,
                    shape.as_ptr(),
                    shape.len() as u32,
                    out,
                )
            }
        })
    }

    /// A scalar state of the optimizer as a whole.
    pub fn scalar_state(&self, name: &str) -> Tensor<'h> {
        self.global.scalar_state(name)
    }

    /// Replaces a state of the optimizer as a whole.
    ///
    /// # Errors
    /// Another shape, or an earlier error of the step.
    pub fn set_state(&self, name: &str, tensor: &Tensor<'_>) -> Result<()> {
        self.global.set_state(name, tensor)
    }

    /// A counter of the optimizer as a whole; 0 at first.
    ///
    /// # Errors
    /// A state of another kind, or an earlier error of the step.
    pub fn counter(&self, name: &str) -> Result<i64> {
        self.global.counter(name)
    }

    /// Sets a counter of the optimizer as a whole.
    ///
    /// # Errors
    /// A state of another kind, or an earlier error of the step.
    pub fn set_counter(&self, name: &str, value: i64) -> Result<()> {
        self.global.set_counter(name, value)
    }

    /// Adds one to a counter of the optimizer as a whole and returns the new value.
    ///
    /// # Errors
    /// A state of another kind, or an earlier error of the step.
    pub fn count(&self, name: &str) -> Result<i64> {
        self.global.count(name)
    }

    /// Writes a line to the service's log.
    pub fn log(&self, message: &str) {
        let host = self.global.host;
        // SAFETY: the table outlives `'h` and the text is copied. A lost log line is no error.
        let _ = unsafe { (host.log_message)(host.ctx, LOG_INFO, LsStr::new(message)) };
    }
}

/// One trainable tensor in one step.
#[derive(Debug)]
pub struct Param<'h> {
    pub(crate) host: &'h LsHost,
    pub(crate) id: u32,
    pub(crate) name: &'h str,
    pub(crate) value: u64,
    pub(crate) grad: u64,
    pub(crate) lr: f64,
    pub(crate) weight_decay: bool,
}

impl<'h> Param<'h> {
    /// The stand-in for the optimizer as a whole.
    pub(crate) fn global(host: &'h LsHost) -> Self {
        Self {
            host,
            id: GLOBAL,
            name: "",
            value: 0,
            grad: 0,
            lr: 0.0,
            weight_decay: false,
        }
    }

    /// Its key in the LoRA file.
    pub fn name(&self) -> &'h str {
        self.name
    }

    /// Its value before the update.
    pub fn value(&self) -> Tensor<'h> {
        Tensor::borrowed(self.host, self.value)
    }

    /// Its gradient, clipped.
    pub fn grad(&self) -> Tensor<'h> {
        Tensor::borrowed(self.host, self.grad)
    }

    /// Learning rate in this step, schedule included.
    pub fn lr(&self) -> f64 {
        self.lr
    }

    /// Whether weight decay applies.
    pub fn weight_decay(&self) -> bool {
        self.weight_decay
    }

    /// Number of its elements.
    ///
    /// # Errors
    /// An earlier error of the step.
    pub fn elements(&self) -> Result<u64> {
        Ok(self.value().shape()?.iter().product())
    }

    /// `weight_decay` where weight decay applies, else 0.
    pub fn decay(&self, weight_decay: f64) -> f64 {
        if self.weight_decay { weight_decay } else { 0.0 }
    }

    /// Replaces the value at the end of the step.
    ///
    /// # Errors
    /// Another shape, or an earlier error of the step.
    pub fn set_value(&self, tensor: &Tensor<'_>) -> Result<()> {
        // SAFETY: the table outlives `'h`.
        check(unsafe { (self.host.assign)(self.host.ctx, self.id, tensor.handle()) })
    }

    /// A state of the parameter's shape; zeros at first.
    pub fn state(&self, name: &str) -> Tensor<'h> {
        self.any_state(name, STATE_LIKE_PARAM, &[])
    }

    /// A state of a shape of its own; zeros at first.
    pub fn shaped_state(&self, name: &str, shape: &[u64]) -> Tensor<'h> {
        self.any_state(name, STATE_SHAPE, shape)
    }

    /// A state of rank 0; zero at first.
    pub fn scalar_state(&self, name: &str) -> Tensor<'h> {
        self.any_state(name, STATE_SCALAR, &[])
    }

    /// A state of the parameter's shape that is kept in 8 bits per element; zeros at first.
    pub fn signed_8bit_state(&self, name: &str) -> Tensor<'h> {
        self.any_state(name, STATE_BLOCKS8_SIGNED, &[])
    }

    /// The same for numbers that are never negative.
    pub fn unsigned_8bit_state(&self, name: &str) -> Tensor<'h> {
        self.any_state(name, STATE_BLOCKS8_UNSIGNED, &[])
    }

    /// Replaces a state that was asked for before.
    ///
    /// # Errors
    /// Another shape, or an earlier error of the step.
    pub fn set_state(&self, name: &str, tensor: &Tensor<'_>) -> Result<()> {
        let name = LsStr::new(name);
        // SAFETY: the table outlives `'h` and the name is copied.
        check(unsafe { (self.host.assign_state)(self.host.ctx, self.id, name, tensor.handle()) })
    }

    /// A counter; 0 at first. Reading it does not wait for the device.
    ///
    /// # Errors
    /// A state of another kind, or an earlier error of the step.
    pub fn counter(&self, name: &str) -> Result<i64> {
        let mut value = 0;
        // SAFETY: the table outlives `'h`, the name is copied, the result goes to a local.
        check(unsafe {
            (self.host.counter)(self.host.ctx, self.id, LsStr::new(name), &raw mut value)
        })?;
        Ok(value)
    }

    /// Sets a counter.
    ///
    /// # Errors
    /// A state of another kind, or an earlier error of the step.
    pub fn set_counter(&self, name: &str, value: i64) -> Result<()> {
        // SAFETY: the table outlives `'h` and the name is copied.
        check(unsafe { (self.host.set_counter)(self.host.ctx, self.id, LsStr::new(name), value) })
    }

    /// A number in double precision that is known without the device, kept in the bits of a counter; 0 at first.
    ///
    /// # Errors
    /// A state of another kind, or an earlier error of the step.
    pub fn number(&self, name: &str) -> Result<f64> {
        Ok(f64::from_bits(self.counter(name)?.cast_unsigned()))
    }

    /// Sets a number.
    ///
    /// # Errors
    /// A state of another kind, or an earlier error of the step.
    pub fn set_number(&self, name: &str, value: f64) -> Result<()> {
        self.set_counter(name, value.to_bits().cast_signed())
    }

    /// Adds one to a counter and returns the new value.
    ///
    /// # Errors
    /// A state of another kind, or an earlier error of the step.
    pub fn count(&self, name: &str) -> Result<i64> {
        let value = self.counter(name)?.saturating_add(1);
        self.set_counter(name, value)?;
        Ok(value)
    }

    fn any_state(&self, name: &str, kind: u32, shape: &[u64]) -> Tensor<'h> {
        Tensor::made(self.host, |out| {
            // SAFETY: the table outlives `'h`, the name is copied, the shape has as many entries as it says.
            unsafe {
                (self.host.state)(
                    self.host.ctx,
                    self.id,
                    LsStr::new(name),
                    kind,
                    shape.as_ptr(),
                    shape.len() as u32,
                    out,
                )
            }
        })
    }
}
