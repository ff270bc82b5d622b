//! The operation table: reads the arguments, calls the session, keeps the first fault, lets no panic out.
#![expect(unsafe_code, reason = "functions that a plugin calls")]

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::memory::{
    shape_from_plugin, slice_from_plugin, slice_to_plugin, text_from_plugin, write_out,
};
use super::session::Slot;
use super::{Binary, Code, Fault, Reduce, Scalar, Session, Shape, Tensors, Unary, panic_message};
use crate::{
    BAD_ARGUMENT, BAD_SHAPE, DEVICE, FAILED, Handle, LsHost, LsStr, OK, PANIC,
    STATE_BLOCKS8_SIGNED, STATE_BLOCKS8_UNSIGNED, STATE_LIKE_PARAM, STATE_SCALAR, STATE_SHAPE,
    Status, WRONG_THREAD,
};

type Made<B> = Result<Slot<<B as Tensors>::Tensor>, Fault>;

/// The table for one session. It must not be used after the session has moved or ended.
pub(super) fn of<B: Tensors>(session: &mut Session<B>) -> LsHost {
    LsHost {
        struct_size: size_of::<LsHost>() as u32,
        reserved: 0,
        ctx: (&raw mut *session).cast(),
        add: binary::<B, { Binary::Add as usize }>,
        sub: binary::<B, { Binary::Sub as usize }>,
        mul: binary::<B, { Binary::Mul as usize }>,
        div: binary::<B, { Binary::Div as usize }>,
        pow: binary::<B, { Binary::Pow as usize }>,
        min: binary::<B, { Binary::Min as usize }>,
        max: binary::<B, { Binary::Max as usize }>,
        greater: binary::<B, { Binary::Greater as usize }>,
        add_scalar: scalar::<B, { Scalar::Add as usize }>,
        sub_scalar: scalar::<B, { Scalar::Sub as usize }>,
        rsub_scalar: scalar::<B, { Scalar::ReverseSub as usize }>,
        mul_scalar: scalar::<B, { Scalar::Mul as usize }>,
        div_scalar: scalar::<B, { Scalar::Div as usize }>,
        rdiv_scalar: scalar::<B, { Scalar::ReverseDiv as usize }>,
        pow_scalar: scalar::<B, { Scalar::Pow as usize }>,
        greater_scalar: scalar::<B, { Scalar::Greater as usize }>,
        neg: unary::<B, { Unary::Neg as usize }>,
        abs: unary::<B, { Unary::Abs as usize }>,
        sign: unary::<B, { Unary::Sign as usize }>,
        sqrt: unary::<B, { Unary::Sqrt as usize }>,
        rsqrt: unary::<B, { Unary::Rsqrt as usize }>,
        square: unary::<B, { Unary::Square as usize }>,
        exp: unary::<B, { Unary::Exp as usize }>,
        log: unary::<B, { Unary::Log as usize }>,
        clamp: clamp::<B>,
        where_: select::<B>,
        lerp: lerp::<B>,
        matmul: matmul::<B>,
        transpose: transpose::<B>,
        reshape: reshape::<B>,
        sum: reduce::<B, { Reduce::Sum as usize }>,
        mean: reduce::<B, { Reduce::Mean as usize }>,
        max_axis: reduce::<B, { Reduce::Max as usize }>,
        dot: dot::<B>,
        norm: norm::<B>,
        shape: shape::<B>,
        zeros: zeros::<B>,
        full: full::<B>,
        release: release::<B>,
        assign: assign::<B>,
        state: state::<B>,
        assign_state: assign_state::<B>,
        counter: counter::<B>,
        set_counter: set_counter::<B>,
        read_scalar: read_scalar::<B>,
        read: read::<B>,
        write: write::<B>,
        fail: fail::<B>,
        log_message: log_message::<B>,
    }
}

/// Enters the session: checks the thread, answers an earlier fault again, keeps the first one, catches panics.
///
/// # Safety
/// A non-null `ctx` comes from a table whose session is still running.
unsafe fn enter<B: Tensors>(
    ctx: *mut c_void,
    body: impl FnOnce(&mut Session<B>) -> Result<(), Fault>,
) -> Status {
    let session: *mut Session<B> = ctx.cast();
    if session.is_null() {
        return BAD_ARGUMENT;
    }
    // SAFETY: the session runs; its thread is never written, so another thread may look at it too.
    if unsafe { (*session).thread } != std::thread::current().id() {
        return WRONG_THREAD;
    }
    // SAFETY: only the session's own thread gets here, and `Session::drive` waits in the plugin meanwhile.
    let session = unsafe { &mut *session };
    if let Some(fault) = &session.fault {
        return fault.status;
    }
    let outcome = catch_unwind(AssertUnwindSafe(|| body(session))).unwrap_or_else(|payload| {
        let message = format!(
            "the host's operation panicked: {}",
            panic_message(&*payload)
        );
        Err(Fault::new(PANIC, message))
    });
    match outcome {
        Ok(()) => OK,
        Err(fault) => {
            let status = fault.status;
            session.fault = Some(fault);
            status
        }
    }
}

/// An operation that makes a tensor.
///
/// # Safety
/// As [`enter`]; a non-null `out` is writable.
unsafe fn make<B: Tensors>(
    ctx: *mut c_void,
    out: *mut Handle,
    body: impl FnOnce(&mut Session<B>) -> Made<B>,
) -> Status {
    // SAFETY: the caller vouches for `out`. A failed operation leaves no stale handle behind.
    let ready = unsafe { write_out(out, 0) };
    // SAFETY: the caller vouches for `ctx`, and `out` was just written.
    unsafe {
        enter::<B>(ctx, |session| {
            ready?;
            let slot = body(session)?;
            let handle = session.push(slot.tensor, slot.shape)?;
            write_out(out, handle)
        })
    }
}

fn device<T>(result: Result<T, String>) -> Result<T, Fault> {
    result.map_err(|message| Fault::new(DEVICE, message))
}

fn slot<T>(tensor: Result<T, String>, shape: Shape) -> Result<Slot<T>, Fault> {
    Ok(Slot {
        tensor: device(tensor)?,
        shape,
    })
}

/// What is done under the name of a state.
///
/// # Safety
/// The bytes of `name` are readable.
unsafe fn of_state<T>(
    name: LsStr,
    body: impl FnOnce(&str) -> Result<T, Fault>,
) -> Result<T, Fault> {
    // SAFETY: the caller vouches for `name`.
    let name = unsafe { text_from_plugin(name, "state name") }?;
    body(&name)
}

// SAFETY, for all functions below: the header asks the plugin for the conditions of `enter` and `make`, and for
// pointers that are good for as many values as it says.

unsafe extern "C" fn unary<B: Tensors, const OP: usize>(
    ctx: *mut c_void,
    a: Handle,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            let a = s.get(a)?;
            slot(s.backend.unary(Unary::ALL[OP], &a.tensor), a.shape)
        })
    }
}

unsafe extern "C" fn binary<B: Tensors, const OP: usize>(
    ctx: *mut c_void,
    a: Handle,
    b: Handle,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe { make::<B>(ctx, out, |s| binary_op(s, Binary::ALL[OP], a, b)) }
}

fn binary_op<B: Tensors>(s: &Session<B>, op: Binary, a: Handle, b: Handle) -> Made<B> {
    let (a, b) = (s.get(a)?, s.get(b)?);
    let shape = a.shape.broadcast(&b.shape)?;
    slot(
        s.backend.binary(op, &a.tensor, &b.tensor, shape.dims()),
        shape,
    )
}

unsafe extern "C" fn scalar<B: Tensors, const OP: usize>(
    ctx: *mut c_void,
    a: Handle,
    number: f64,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            let a = s.get(a)?;
            slot(
                s.backend.scalar(Scalar::ALL[OP], &a.tensor, number),
                a.shape,
            )
        })
    }
}

unsafe extern "C" fn clamp<B: Tensors>(
    ctx: *mut c_void,
    a: Handle,
    low: f64,
    high: f64,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            // Also refuses NaN.
            if !matches!(low.partial_cmp(&high), Some(order) if order.is_le()) {
                let message = format!("clamp: {low} is not below {high}");
                return Err(Fault::new(BAD_ARGUMENT, message));
            }
            let a = s.get(a)?;
            slot(s.backend.clamp(&a.tensor, low, high), a.shape)
        })
    }
}

unsafe extern "C" fn select<B: Tensors>(
    ctx: *mut c_void,
    condition: Handle,
    a: Handle,
    b: Handle,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            let (condition, a, b) = (s.get(condition)?, s.get(a)?, s.get(b)?);
            let shape = condition.shape.broadcast(&a.shape.broadcast(&b.shape)?)?;
            let tensor = s
                .backend
                .select(&condition.tensor, &a.tensor, &b.tensor, shape.dims());
            slot(tensor, shape)
        })
    }
}

unsafe extern "C" fn lerp<B: Tensors>(
    ctx: *mut c_void,
    a: Handle,
    b: Handle,
    t: f64,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            let (start, end) = (s.get(a)?, s.get(b)?);
            let shape = start.shape.broadcast(&end.shape)?;
            let dims = shape.dims();
            let ops = &s.backend;
            let difference = device(ops.binary(Binary::Sub, &end.tensor, &start.tensor, dims))?;
            let (from, op, weight) = if t < 0.5 {
                (start, Binary::Add, t)
            } else {
                (end, Binary::Sub, 1.0 - t)
            };
            let part = device(ops.scalar(Scalar::Mul, &difference, weight))?;
            slot(ops.binary(op, &from.tensor, &part, dims), shape)
        })
    }
}

unsafe extern "C" fn matmul<B: Tensors>(
    ctx: *mut c_void,
    a: Handle,
    b: Handle,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            let (a, b) = (s.get(a)?, s.get(b)?);
            let shape = a.shape.matmul(&b.shape)?;
            slot(s.backend.matmul(&a.tensor, &b.tensor, shape.dims()), shape)
        })
    }
}

unsafe extern "C" fn transpose<B: Tensors>(
    ctx: *mut c_void,
    a: Handle,
    axis0: i32,
    axis1: i32,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            let a = s.get(a)?;
            let (axis0, axis1) = (a.shape.axis(axis0)?, a.shape.axis(axis1)?);
            slot(
                s.backend.swap_axes(&a.tensor, axis0, axis1),
                a.shape.swapped(axis0, axis1),
            )
        })
    }
}

unsafe extern "C" fn reshape<B: Tensors>(
    ctx: *mut c_void,
    a: Handle,
    dims: *const u64,
    rank: u32,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            let shape = shape_from_plugin(dims, rank)?;
            let a = s.get(a)?;
            if shape.elements() != a.shape.elements() {
                let message = format!("reshape of {:?} to {shape:?}", a.shape);
                return Err(Fault::new(BAD_SHAPE, message));
            }
            slot(s.backend.reshape(&a.tensor, shape.dims()), shape)
        })
    }
}

unsafe extern "C" fn reduce<B: Tensors, const OP: usize>(
    ctx: *mut c_void,
    a: Handle,
    axis: i32,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            let a = s.get(a)?;
            let axis = a.shape.reduction_axis(axis)?;
            slot(
                s.backend.reduce(Reduce::ALL[OP], &a.tensor, axis),
                a.shape.reduced(axis),
            )
        })
    }
}

unsafe extern "C" fn dot<B: Tensors>(
    ctx: *mut c_void,
    a: Handle,
    b: Handle,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            let (left, right) = (s.get(a)?.shape, s.get(b)?.shape);
            if left != right {
                let message = format!("dot of {left:?} and {right:?}");
                return Err(Fault::new(BAD_SHAPE, message));
            }
            let product = binary_op(s, Binary::Mul, a, b)?;
            slot(
                s.backend.reduce(Reduce::Sum, &product.tensor, None),
                Shape::SCALAR,
            )
        })
    }
}

unsafe extern "C" fn norm<B: Tensors>(ctx: *mut c_void, a: Handle, out: *mut Handle) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            let squares = device(s.backend.unary(Unary::Square, &s.get(a)?.tensor))?;
            let sum = device(s.backend.reduce(Reduce::Sum, &squares, None))?;
            slot(s.backend.unary(Unary::Sqrt, &sum), Shape::SCALAR)
        })
    }
}

unsafe extern "C" fn shape<B: Tensors>(
    ctx: *mut c_void,
    a: Handle,
    dims: *mut u64,
    rank: *mut u32,
) -> Status {
    // SAFETY: see above; the header asks for room for four dimensions.
    unsafe {
        enter::<B>(ctx, |s| {
            let shape = s.get(a)?.shape;
            let own: Vec<u64> = shape.as_slice().iter().map(|&dim| dim as u64).collect();
            slice_to_plugin(&own, dims)?;
            write_out(rank, own.len() as u32)
        })
    }
}

unsafe extern "C" fn zeros<B: Tensors>(
    ctx: *mut c_void,
    dims: *const u64,
    rank: u32,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe { full::<B>(ctx, dims, rank, 0.0, out) }
}

unsafe extern "C" fn full<B: Tensors>(
    ctx: *mut c_void,
    dims: *const u64,
    rank: u32,
    value: f64,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            let shape = shape_from_plugin(dims, rank)?;
            slot(s.backend.full(shape.dims(), value), shape)
        })
    }
}

unsafe extern "C" fn release<B: Tensors>(ctx: *mut c_void, a: Handle) -> Status {
    // SAFETY: see above.
    unsafe { enter::<B>(ctx, |s| s.release(a)) }
}

unsafe extern "C" fn assign<B: Tensors>(ctx: *mut c_void, param: u32, a: Handle) -> Status {
    // SAFETY: see above.
    unsafe { enter::<B>(ctx, |s| s.assign(param, a)) }
}

unsafe extern "C" fn state<B: Tensors>(
    ctx: *mut c_void,
    param: u32,
    name: LsStr,
    kind: u32,
    dims: *const u64,
    rank: u32,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        make::<B>(ctx, out, |s| {
            of_state(name, |name| {
                let code = match kind {
                    STATE_BLOCKS8_SIGNED => Some(Code::Signed),
                    STATE_BLOCKS8_UNSIGNED => Some(Code::Unsigned),
                    _ => None,
                };
                let shape = match kind {
                    STATE_LIKE_PARAM | STATE_BLOCKS8_SIGNED | STATE_BLOCKS8_UNSIGNED => {
                        s.param_shape(param)?
                    }
                    STATE_SHAPE => shape_from_plugin(dims, rank)?,
                    STATE_SCALAR => Shape::SCALAR,
                    kind => {
                        let message = format!("state `{name}`: unknown kind {kind}");
                        return Err(Fault::new(BAD_ARGUMENT, message));
                    }
                };
                s.state(param, name, shape, code)
            })
        })
    }
}

unsafe extern "C" fn assign_state<B: Tensors>(
    ctx: *mut c_void,
    param: u32,
    name: LsStr,
    a: Handle,
) -> Status {
    // SAFETY: see above.
    unsafe {
        enter::<B>(ctx, |s| {
            of_state(name, |name| s.assign_state(param, name, a))
        })
    }
}

unsafe extern "C" fn counter<B: Tensors>(
    ctx: *mut c_void,
    param: u32,
    name: LsStr,
    out: *mut i64,
) -> Status {
    // SAFETY: see above.
    unsafe {
        enter::<B>(ctx, |s| {
            of_state(name, |name| write_out(out, s.counter(param, name)?))
        })
    }
}

unsafe extern "C" fn set_counter<B: Tensors>(
    ctx: *mut c_void,
    param: u32,
    name: LsStr,
    value: i64,
) -> Status {
    // SAFETY: see above.
    unsafe {
        enter::<B>(ctx, |s| {
            of_state(name, |name| s.set_counter(param, name, value))
        })
    }
}

unsafe extern "C" fn read_scalar<B: Tensors>(ctx: *mut c_void, a: Handle, out: *mut f64) -> Status {
    // SAFETY: see above.
    unsafe {
        enter::<B>(ctx, |s| {
            let a = s.get(a)?;
            if a.shape.elements() != 1 {
                let message = format!("read_scalar of a tensor of shape {:?}", a.shape);
                return Err(Fault::new(BAD_SHAPE, message));
            }
            let values = device(s.backend.read(&a.tensor))?;
            let value = values
                .first()
                .ok_or_else(|| Fault::new(DEVICE, "the device returned no value"))?;
            write_out(out, f64::from(*value))
        })
    }
}

unsafe extern "C" fn read<B: Tensors>(
    ctx: *mut c_void,
    a: Handle,
    out: *mut f32,
    len: u64,
) -> Status {
    // SAFETY: see above; exactly `len` values are written.
    unsafe {
        enter::<B>(ctx, |s| {
            let a = s.get(a)?;
            let elements = a.shape.elements();
            if elements as u64 != len {
                let message = format!("read of {elements} elements to room for {len}");
                return Err(Fault::new(BAD_SHAPE, message));
            }
            let values = device(s.backend.read(&a.tensor))?;
            if values.len() != elements {
                return Err(Fault::new(DEVICE, "the device returned too few values"));
            }
            slice_to_plugin(&values, out)
        })
    }
}

unsafe extern "C" fn write<B: Tensors>(
    ctx: *mut c_void,
    data: *const f32,
    len: u64,
    dims: *const u64,
    rank: u32,
    out: *mut Handle,
) -> Status {
    // SAFETY: see above; the length is bounded by the checked shape.
    unsafe {
        make::<B>(ctx, out, |s| {
            let shape = shape_from_plugin(dims, rank)?;
            if shape.elements() as u64 != len {
                let message = format!("write of {len} floats to shape {shape:?}");
                return Err(Fault::new(BAD_SHAPE, message));
            }
            let data = slice_from_plugin(data, shape.elements())?;
            slot(s.backend.write(data, shape.dims()), shape)
        })
    }
}

unsafe extern "C" fn fail<B: Tensors>(ctx: *mut c_void, message: LsStr) -> Status {
    // SAFETY: see above.
    unsafe {
        enter::<B>(ctx, |_| {
            let message = text_from_plugin(message, "message")?;
            Err(Fault::new(FAILED, message))
        })
    }
}

unsafe extern "C" fn log_message<B: Tensors>(
    ctx: *mut c_void,
    level: u32,
    message: LsStr,
) -> Status {
    // SAFETY: see above.
    unsafe {
        enter::<B>(ctx, |s| {
            let message = text_from_plugin(message, "log line")?;
            s.backend.log(level, &message);
            Ok(())
        })
    }
}
