//! One optimizer step: the arena of handles, the parameters, and what the plugin assigned.
//!
//! Nothing here is unsafe; `table.rs` calls it with arguments it has read from the plugin's memory.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::ThreadId;

use super::{Code, Fault, Shape, StateValue, States, Tensors, table};
use crate::{
    BAD_ARGUMENT, BAD_HANDLE, BAD_SHAPE, DEVICE, GLOBAL, Handle, LsHost, LsParam, LsStep, LsStr,
    OK, Status,
};

/// Handles of different steps differ in their upper half, so that a stale one is noticed.
static SERIAL: AtomicU32 = AtomicU32::new(1);

/// One parameter as the host passes it to a step.
pub struct HostParam<'a, T> {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub name: &'a str,
    /// Its own shape.
    pub shape: &'a [usize],
    /// Its value, padded to rank 4.
    pub value: T,
    /// Its gradient, padded to rank 4; `None` in `eval`.
    pub grad: Option<T>,
    /// Its learning rate.
    pub lr: f64,
    /// Whether weight decay applies.
    pub weight_decay: bool,
}

/// All parameters of a step and the number of steps done before.
pub struct StepInput<'a, T> {
    /// Steps done before.
    pub step: u64,
    /// The parameters that have a gradient.
    pub params: Vec<HostParam<'a, T>>,
}

pub(super) struct Slot<T> {
    pub tensor: T,
    pub shape: Shape,
}

struct Param<T> {
    name: String,
    shape: Shape,
    assigned: Option<T>,
}

/// What the operation table works on during one step.
pub struct Session<B: Tensors> {
    pub(super) backend: B,
    pub(super) thread: ThreadId,
    pub(super) fault: Option<Fault>,
    serial: u32,
    slots: Vec<Option<Slot<B::Tensor>>>,
    /// The first slots are the parameters' and are not released.
    pinned: usize,
    params: Vec<Param<B::Tensor>>,
    by_id: HashMap<u32, usize>,
    states: States<B>,
    /// States of this step; merged into `states` if it succeeds.
    changed: States<B>,
    /// Whether states cannot be changed: this is `eval`.
    frozen: bool,
}

impl<B: Tensors> Session<B> {
    /// Runs one step: `call` passes the two pointers on to a plugin's `step`. On success the new values are returned
    /// in the order of the parameters, `None` where nothing was assigned, and `states` has the new states.
    ///
    /// # Errors
    /// The first message of the host or the plugin. Parameters and states are then as before.
    pub fn run(
        backend: B,
        input: StepInput<'_, B::Tensor>,
        states: &mut States<B>,
        call: impl FnOnce(*const LsHost, *const LsStep) -> Status,
    ) -> Result<Vec<Option<B::Tensor>>, String> {
        Self::run_as(backend, input, states, false, call)
    }

    /// As [`run`](Self::run), for a plugin's `eval`: the states stay as they are.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn eval(
        backend: B,
        input: StepInput<'_, B::Tensor>,
        states: &mut States<B>,
        call: impl FnOnce(*const LsHost, *const LsStep) -> Status,
    ) -> Result<Vec<Option<B::Tensor>>, String> {
        Self::run_as(backend, input, states, true, call)
    }

    fn run_as(
        backend: B,
        input: StepInput<'_, B::Tensor>,
        states: &mut States<B>,
        frozen: bool,
        call: impl FnOnce(*const LsHost, *const LsStep) -> Status,
    ) -> Result<Vec<Option<B::Tensor>>, String> {
        let mut session = Self::new(backend, std::mem::take(states));
        session.frozen = frozen;
        let outcome = session.drive(input, call);
        let Self {
            states: before,
            changed,
            params,
            ..
        } = session;
        *states = before;
        outcome?;
        if !frozen {
            states.merge(changed);
        }
        Ok(params.into_iter().map(|param| param.assigned).collect())
    }

    fn new(backend: B, states: States<B>) -> Self {
        Self {
            backend,
            thread: std::thread::current().id(),
            fault: None,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            slots: Vec::new(),
            pinned: 0,
            params: Vec::new(),
            by_id: HashMap::new(),
            states,
            changed: States::default(),
            frozen: false,
        }
    }

    fn drive(
        &mut self,
        input: StepInput<'_, B::Tensor>,
        call: impl FnOnce(*const LsHost, *const LsStep) -> Status,
    ) -> Result<(), String> {
        let names: Vec<&str> = input.params.iter().map(|param| param.name).collect();
        let step = input.step;
        let mut params = Vec::with_capacity(names.len());
        for (param, name) in input.params.into_iter().zip(&names) {
            params.push(self.add_param(param, name).map_err(|fault| fault.message)?);
        }
        self.pinned = self.slots.len();
        let step = LsStep {
            struct_size: size_of::<LsStep>() as u32,
            param_size: size_of::<LsParam>() as u32,
            step,
            param_count: params.len() as u64,
            params: params.as_ptr(),
        };
        let host = table::of(self);
        let status = call(&raw const host, &raw const step);
        match (&self.fault, status) {
            (Some(fault), _) => Err(fault.message.clone()),
            (None, OK) => Ok(()),
            (None, status) => Err(format!("status {status} without a message")),
        }
    }

    fn add_param(&mut self, param: HostParam<'_, B::Tensor>, name: &str) -> Result<LsParam, Fault> {
        let shape = Shape::new(param.shape)?;
        let index = self.params.len();
        if param.id == GLOBAL || self.by_id.insert(param.id, index).is_some() {
            let message = format!("parameter number {} twice or reserved", param.id);
            return Err(Fault::new(BAD_ARGUMENT, message));
        }
        self.params.push(Param {
            name: name.to_owned(),
            shape,
            assigned: None,
        });
        Ok(LsParam {
            struct_size: size_of::<LsParam>() as u32,
            id: param.id,
            name: LsStr::new(name),
            value: self.push(param.value, shape)?,
            grad: match param.grad {
                Some(grad) => self.push(grad, shape)?,
                None => 0,
            },
            lr: param.lr,
            weight_decay: u32::from(param.weight_decay),
            reserved: 0,
        })
    }

    pub(super) fn push(&mut self, tensor: B::Tensor, shape: Shape) -> Result<Handle, Fault> {
        let index = u32::try_from(self.slots.len() + 1).map_err(|_| {
            Fault::new(BAD_HANDLE, "over four thousand million tensors in one step")
        })?;
        self.slots.push(Some(Slot { tensor, shape }));
        Ok(u64::from(self.serial) << 32 | u64::from(index))
    }

    pub(super) fn get(&self, handle: Handle) -> Result<&Slot<B::Tensor>, Fault> {
        self.index(handle)
            .and_then(|index| self.slots[index].as_ref())
            .ok_or_else(|| {
                let why = if handle == 0 {
                    "zero"
                } else {
                    "released, or of another step"
                };
                Fault::new(BAD_HANDLE, format!("dead tensor handle {handle:#x}: {why}"))
            })
    }

    pub(super) fn release(&mut self, handle: Handle) -> Result<(), Fault> {
        self.get(handle)?;
        if let Some(index) = self.index(handle).filter(|&index| index >= self.pinned) {
            self.slots[index] = None;
        }
        Ok(())
    }

    fn index(&self, handle: Handle) -> Option<usize> {
        let index = ((handle & u64::from(u32::MAX)) as usize).checked_sub(1)?;
        (handle >> 32 == u64::from(self.serial) && index < self.slots.len()).then_some(index)
    }

    pub(super) fn assign(&mut self, param: u32, handle: Handle) -> Result<(), Fault> {
        let index = self.param(param)?;
        let slot = self.get(handle)?;
        let (tensor, shape) = (slot.tensor.clone(), slot.shape);
        let param = &mut self.params[index];
        if shape != param.shape {
            let message = format!(
                "assign: a tensor of shape {shape:?} to `{}` of shape {:?}",
                param.name, param.shape
            );
            return Err(Fault::new(BAD_SHAPE, message));
        }
        param.assigned = Some(tensor);
        Ok(())
    }

    /// The shape that a state of the parameter's shape has.
    pub(super) fn param_shape(&self, param: u32) -> Result<Shape, Fault> {
        Ok(self.params[self.param(param)?].shape)
    }

    /// A state as a tensor; with `code`, one that is kept in 8 bits per element.
    pub(super) fn state(
        &mut self,
        param: u32,
        name: &str,
        shape: Shape,
        code: Option<Code>,
    ) -> Result<Slot<B::Tensor>, Fault> {
        let key = self.state_key(param, name)?;
        let tensor = match (self.find_state(&key, name), code) {
            (None, _) => {
                let zeros = device(self.backend.full(shape.dims(), 0.0))?;
                let value = self.stored(zeros.clone(), shape, code)?;
                self.changed.insert(&key, name, value);
                zeros
            }
            (Some(StateValue::Tensor(tensor, found)), None) => {
                same_shape(&key, name, *found, shape)?;
                tensor.clone()
            }
            (Some(StateValue::Blocks(blocks, found_code, found)), Some(code))
                if *found_code == code =>
            {
                same_shape(&key, name, *found, shape)?;
                device(self.backend.dequantize(blocks, code, shape.dims()))?
            }
            (Some(found), _) => return Err(wrong_kind(&key, name, found)),
        };
        Ok(Slot { tensor, shape })
    }

    pub(super) fn assign_state(
        &mut self,
        param: u32,
        name: &str,
        handle: Handle,
    ) -> Result<(), Fault> {
        self.refuse_in_eval(name)?;
        let key = self.state_key(param, name)?;
        let slot = self.get(handle)?;
        let (tensor, shape) = (slot.tensor.clone(), slot.shape);
        let (found, code) = match self.find_state(&key, name) {
            Some(StateValue::Tensor(_, found)) => (*found, None),
            Some(StateValue::Blocks(_, code, found)) => (*found, Some(*code)),
            Some(counter) => return Err(wrong_kind(&key, name, counter)),
            None => {
                let message =
                    format!("state `{name}` of `{key}` was assigned before it was asked for");
                return Err(Fault::new(BAD_ARGUMENT, message));
            }
        };
        if found != shape {
            let message = format!(
                "a tensor of shape {shape:?} to state `{name}` of `{key}` of shape {found:?}"
            );
            return Err(Fault::new(BAD_SHAPE, message));
        }
        let value = self.stored(tensor, shape, code)?;
        self.changed.insert(&key, name, value);
        Ok(())
    }

    fn stored(
        &self,
        tensor: B::Tensor,
        shape: Shape,
        code: Option<Code>,
    ) -> Result<StateValue<B>, Fault> {
        Ok(match code {
            None => StateValue::Tensor(tensor, shape),
            Some(code) => {
                StateValue::Blocks(device(self.backend.quantize(&tensor, code))?, code, shape)
            }
        })
    }

    fn refuse_in_eval(&self, name: &str) -> Result<(), Fault> {
        if self.frozen {
            let message = format!("`eval` may not change the state `{name}`");
            return Err(Fault::new(BAD_ARGUMENT, message));
        }
        Ok(())
    }

    pub(super) fn counter(&mut self, param: u32, name: &str) -> Result<i64, Fault> {
        let key = self.state_key(param, name)?;
        match self.find_state(&key, name) {
            Some(StateValue::Counter(value)) => Ok(*value),
            Some(found) => Err(wrong_kind(&key, name, found)),
            None => Ok(0),
        }
    }

    pub(super) fn set_counter(&mut self, param: u32, name: &str, value: i64) -> Result<(), Fault> {
        self.refuse_in_eval(name)?;
        let key = self.state_key(param, name)?;
        match self.find_state(&key, name) {
            None | Some(StateValue::Counter(_)) => {
                self.changed.insert(&key, name, StateValue::Counter(value));
                Ok(())
            }
            Some(found) => Err(wrong_kind(&key, name, found)),
        }
    }

    fn find_state(&self, key: &str, name: &str) -> Option<&StateValue<B>> {
        self.changed
            .get(key, name)
            .or_else(|| self.states.get(key, name))
    }

    fn state_key(&self, param: u32, name: &str) -> Result<String, Fault> {
        if name.is_empty() || name.len() > 128 {
            let message = format!("a state name of {} bytes (1 to 128)", name.len());
            return Err(Fault::new(BAD_ARGUMENT, message));
        }
        if param == GLOBAL {
            return Ok(String::new());
        }
        Ok(self.params[self.param(param)?].name.clone())
    }

    fn param(&self, id: u32) -> Result<usize, Fault> {
        self.by_id.get(&id).copied().ok_or_else(|| {
            let message = format!("parameter number {id} is not listed in this step");
            Fault::new(BAD_ARGUMENT, message)
        })
    }
}

fn device<T>(result: Result<T, String>) -> Result<T, Fault> {
    result.map_err(|message| Fault::new(DEVICE, message))
}

fn same_shape(key: &str, name: &str, found: Shape, wanted: Shape) -> Result<(), Fault> {
    if found == wanted {
        return Ok(());
    }
    let message = format!("state `{name}` of `{key}` has shape {found:?}, asked for {wanted:?}");
    Err(Fault::new(BAD_SHAPE, message))
}

fn wrong_kind<B: Tensors>(key: &str, name: &str, found: &StateValue<B>) -> Fault {
    let found = match found {
        StateValue::Tensor(..) => "a tensor",
        StateValue::Blocks(_, Code::Signed, _) => "in 8 bits with a sign",
        StateValue::Blocks(_, Code::Unsigned, _) => "in 8 bits without a sign",
        StateValue::Counter(_) => "a counter",
    };
    Fault::new(
        BAD_ARGUMENT,
        format!("state `{name}` of `{key}` is {found}, asked for as another kind"),
    )
}
