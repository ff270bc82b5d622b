//! What the training loop asks of an optimizer and of a learning-rate schedule. The only implementations are plugins.

use burn::tensor::Tensor;

/// Changes the trainable tensors once per step.
pub trait Optimizer: Send {
    /// Updates all listed parameters; `step` counts the steps done before.
    fn step(&mut self, step: u64, params: &mut [ParamUpdate<'_>]) -> Result<(), OptimizerError>;
    /// The values to save, measure and draw pictures with, in the order of `params`; `None` when those are the values
    /// that are trained on.
    fn eval(
        &mut self,
        _params: &[ParamValue<'_>],
    ) -> Result<Option<Vec<Tensor<4>>>, OptimizerError> {
        Ok(None)
    }
    /// The state that a resumed run needs.
    fn state(&mut self) -> Result<Vec<StateTensor>, OptimizerError>;
    /// Takes over the state of an earlier run.
    fn restore(&mut self, state: Vec<StateTensor>) -> Result<(), OptimizerError>;
}

/// One parameter with its gradient. Parameters without a gradient are not listed.
#[derive(Debug)]
pub struct ParamUpdate<'a> {
    /// Number of the parameter, the same in every step.
    pub id: u32,
    /// Its key in a LoRA file.
    pub name: &'a str,
    /// Its own shape; `value` and `grad` have it padded with ones on the left to rank 4.
    pub shape: &'a [usize],
    /// Its value, to be replaced.
    pub value: &'a mut Tensor<4>,
    /// Its gradient.
    pub grad: Tensor<4>,
    /// What the gradient is to be multiplied with: clips it, and takes the scale of the loss out.
    pub grad_scale: f64,
    /// Learning rate in this step.
    pub lr: f64,
    /// Whether weight decay applies.
    pub weight_decay: bool,
}

/// One parameter without a gradient.
#[derive(Debug)]
pub struct ParamValue<'a> {
    /// Number of the parameter, the same in every step.
    pub id: u32,
    /// Its key in a LoRA file.
    pub name: &'a str,
    /// Its own shape.
    pub shape: &'a [usize],
    /// Its value that is trained on.
    pub value: &'a Tensor<4>,
}

/// One tensor of an optimizer's state, on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateTensor {
    /// The parameter's name.
    pub param: String,
    /// The state's name, such as `exp_avg`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements, little-endian.
    pub data: Vec<u8>,
    /// Their type.
    pub dtype: StateDtype,
}

/// Element type of a state tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateDtype {
    /// 32-bit float.
    F32,
    /// Byte.
    U8,
    /// 64-bit integer.
    I64,
}

/// The factor on the learning rates.
pub trait LrScheduler: Send {
    /// The factor after `step` optimizer steps; a pure function.
    fn factor(&self, step: u64) -> Result<f64, OptimizerError>;
}

/// Why an optimizer or a schedule gave up.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct OptimizerError(pub String);
