//! The plugin ABI: the `#[repr(C)]` mirror of `include/lorasmith_plugin.h`, and the host's side of the operation table.
//!
//! The header is the contract and has the comments; `tests/layout.rs` holds the two together.

pub mod host;

use std::ffi::c_void;

/// Major version of this ABI; another one is incompatible.
pub const ABI_MAJOR: u32 = 1;
/// Minor version of this ABI; a plugin that needs a higher one is refused.
pub const ABI_MINOR: u32 = 1;
/// Member of an optimizer's settings schema: bytes of state that it keeps for each trained element. 8 where it is absent.
pub const STATE_BYTES_KEYWORD: &str = "x-state-bytes-per-element";
/// Name of the one exported symbol.
pub const ENTRY_SYMBOL: &str = "lorasmith_plugin_entry";

/// What a function answers.
pub type Status = i32;
/// Done.
pub const OK: Status = 0;
/// The plugin gave up and said why.
pub const FAILED: Status = 1;
/// A tensor handle that is zero, released, or of another step.
pub const BAD_HANDLE: Status = 2;
/// Shapes that do not go together.
pub const BAD_SHAPE: Status = 3;
/// A null pointer, an axis out of range, invalid UTF-8, an unknown number.
pub const BAD_ARGUMENT: Status = 4;
/// The device could not do it.
pub const DEVICE: Status = 5;
/// The host was called on another thread than `step`.
pub const WRONG_THREAD: Status = 6;
/// A panic, caught at the boundary.
pub const PANIC: Status = 7;

/// Parameter number that means the optimizer as a whole.
pub const GLOBAL: u32 = u32::MAX;
/// Axis that means all axes.
pub const ALL_AXES: i32 = i32::MIN;
/// The largest tensor that can be made, in elements.
pub const MAX_ELEMENTS: usize = 1 << 30;
/// The highest rank of a tensor.
pub const MAX_RANK: usize = 4;

/// A state of its parameter's shape.
pub const STATE_LIKE_PARAM: u32 = 0;
/// A state of a given shape.
pub const STATE_SHAPE: u32 = 1;
/// A state of rank 0.
pub const STATE_SCALAR: u32 = 2;
/// A state of its parameter's shape in 8 bits per element, which may be negative. Since 1.1.
pub const STATE_BLOCKS8_SIGNED: u32 = 3;
/// The same without a sign. Since 1.1.
pub const STATE_BLOCKS8_UNSIGNED: u32 = 4;

/// Severity of a log line: error.
pub const LOG_ERROR: u32 = 1;
/// Severity of a log line: warning.
pub const LOG_WARN: u32 = 2;
/// Severity of a log line: information.
pub const LOG_INFO: u32 = 3;
/// Severity of a log line: debug.
pub const LOG_DEBUG: u32 = 4;

/// Each element's update depends on that element alone.
pub const OPTIMIZER_ELEMENTWISE: u32 = 1;

/// `ls_tensor`: a handle; zero is no tensor.
pub type Handle = u64;

/// `ls_str`: borrowed UTF-8.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LsStr {
    /// First byte; may be null when `len` is zero.
    pub ptr: *const u8,
    /// Length in bytes.
    pub len: u64,
}

impl LsStr {
    /// Borrows `text`; the caller sees to it that it lives as long as the receiver may read it.
    pub const fn new(text: &str) -> Self {
        Self {
            ptr: text.as_ptr(),
            len: text.len() as u64,
        }
    }
}

/// `fail` of a report or of the host.
pub type FailFn = unsafe extern "C" fn(*mut c_void, LsStr) -> Status;
/// `log` of a report or of the host.
pub type LogFn = unsafe extern "C" fn(*mut c_void, u32, LsStr) -> Status;

/// `ls_report`: how a plugin reports outside of a step.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LsReport {
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// First argument of the functions.
    pub ctx: *mut c_void,
    /// Leaves a message.
    pub fail: FailFn,
    /// Writes a log line.
    pub log: LogFn,
}

/// `ls_param`: one trainable tensor in one step.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LsParam {
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// Number of the parameter.
    pub id: u32,
    /// Its key in the LoRA file.
    pub name: LsStr,
    /// Value before the update.
    pub value: Handle,
    /// Clipped gradient.
    pub grad: Handle,
    /// Learning rate in this step.
    pub lr: f64,
    /// Whether weight decay applies.
    pub weight_decay: u32,
    /// 0.
    pub reserved: u32,
}

/// `ls_step`: one optimizer step.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LsStep {
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// Distance in bytes between two entries of `params`.
    pub param_size: u32,
    /// Steps done before.
    pub step: u64,
    /// Number of parameters.
    pub param_count: u64,
    /// The parameters.
    pub params: *const LsParam,
}

/// An operation on one tensor.
pub type UnaryFn = unsafe extern "C" fn(*mut c_void, Handle, *mut Handle) -> Status;
/// An operation on two tensors.
pub type BinaryFn = unsafe extern "C" fn(*mut c_void, Handle, Handle, *mut Handle) -> Status;
/// An operation on a tensor and a number.
pub type ScalarFn = unsafe extern "C" fn(*mut c_void, Handle, f64, *mut Handle) -> Status;
/// A reduction.
pub type ReduceFn = unsafe extern "C" fn(*mut c_void, Handle, i32, *mut Handle) -> Status;

/// `ls_host`: the operation table.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "the header documents each operation")]
pub struct LsHost {
    pub struct_size: u32,
    pub reserved: u32,
    pub ctx: *mut c_void,
    pub add: BinaryFn,
    pub sub: BinaryFn,
    pub mul: BinaryFn,
    pub div: BinaryFn,
    pub pow: BinaryFn,
    pub min: BinaryFn,
    pub max: BinaryFn,
    pub greater: BinaryFn,
    pub add_scalar: ScalarFn,
    pub sub_scalar: ScalarFn,
    pub rsub_scalar: ScalarFn,
    pub mul_scalar: ScalarFn,
    pub div_scalar: ScalarFn,
    pub rdiv_scalar: ScalarFn,
    pub pow_scalar: ScalarFn,
    pub greater_scalar: ScalarFn,
    pub neg: UnaryFn,
    pub abs: UnaryFn,
    pub sign: UnaryFn,
    pub sqrt: UnaryFn,
    pub rsqrt: UnaryFn,
    pub square: UnaryFn,
    pub exp: UnaryFn,
    pub log: UnaryFn,
    pub clamp: unsafe extern "C" fn(*mut c_void, Handle, f64, f64, *mut Handle) -> Status,
    pub where_: unsafe extern "C" fn(*mut c_void, Handle, Handle, Handle, *mut Handle) -> Status,
    pub lerp: unsafe extern "C" fn(*mut c_void, Handle, Handle, f64, *mut Handle) -> Status,
    pub matmul: BinaryFn,
    pub transpose: unsafe extern "C" fn(*mut c_void, Handle, i32, i32, *mut Handle) -> Status,
    pub reshape: unsafe extern "C" fn(*mut c_void, Handle, *const u64, u32, *mut Handle) -> Status,
    pub sum: ReduceFn,
    pub mean: ReduceFn,
    pub max_axis: ReduceFn,
    pub dot: BinaryFn,
    pub norm: UnaryFn,
    pub shape: unsafe extern "C" fn(*mut c_void, Handle, *mut u64, *mut u32) -> Status,
    pub zeros: unsafe extern "C" fn(*mut c_void, *const u64, u32, *mut Handle) -> Status,
    pub full: unsafe extern "C" fn(*mut c_void, *const u64, u32, f64, *mut Handle) -> Status,
    pub release: unsafe extern "C" fn(*mut c_void, Handle) -> Status,
    pub assign: unsafe extern "C" fn(*mut c_void, u32, Handle) -> Status,
    pub state:
        unsafe extern "C" fn(*mut c_void, u32, LsStr, u32, *const u64, u32, *mut Handle) -> Status,
    pub assign_state: unsafe extern "C" fn(*mut c_void, u32, LsStr, Handle) -> Status,
    pub counter: unsafe extern "C" fn(*mut c_void, u32, LsStr, *mut i64) -> Status,
    pub set_counter: unsafe extern "C" fn(*mut c_void, u32, LsStr, i64) -> Status,
    pub read_scalar: unsafe extern "C" fn(*mut c_void, Handle, *mut f64) -> Status,
    pub read: unsafe extern "C" fn(*mut c_void, Handle, *mut f32, u64) -> Status,
    pub write:
        unsafe extern "C" fn(*mut c_void, *const f32, u64, *const u64, u32, *mut Handle) -> Status,
    pub fail: FailFn,
    pub log_message: LogFn,
}

/// `ls_optimizer.create`.
pub type CreateOptimizerFn =
    unsafe extern "C" fn(*const LsReport, LsStr, *mut *mut c_void) -> Status;
/// `ls_optimizer.step`.
pub type StepFn = unsafe extern "C" fn(*mut c_void, *const LsHost, *const LsStep) -> Status;
/// `destroy` of both kinds.
pub type DestroyFn = unsafe extern "C" fn(*mut c_void);
/// `ls_schedule.create`.
pub type CreateScheduleFn =
    unsafe extern "C" fn(*const LsReport, LsStr, f64, u64, u64, *mut *mut c_void) -> Status;
/// `ls_schedule.factor`.
pub type FactorFn = unsafe extern "C" fn(*mut c_void, *const LsReport, u64, *mut f64) -> Status;

/// `ls_optimizer`: an optimizer of a plugin.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LsOptimizer {
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// `OPTIMIZER_*` bits.
    pub flags: u32,
    /// Its id.
    pub id: LsStr,
    /// One sentence.
    pub summary: LsStr,
    /// JSON Schema of its settings.
    pub settings_schema: LsStr,
    /// Makes one for a run.
    pub create: Option<CreateOptimizerFn>,
    /// One step.
    pub step: Option<StepFn>,
    /// Frees it.
    pub destroy: Option<DestroyFn>,
    /// The values to save and measure with. Since 1.1.
    pub eval: Option<StepFn>,
}

impl LsOptimizer {
    /// Its size in ABI 1.0, the smallest that is taken.
    pub const SIZE_1_0: usize = std::mem::offset_of!(Self, eval);
}

/// `ls_schedule`: a learning-rate schedule of a plugin.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LsSchedule {
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Its id.
    pub id: LsStr,
    /// One sentence.
    pub summary: LsStr,
    /// JSON Schema of its settings.
    pub settings_schema: LsStr,
    /// Makes one for a run.
    pub create: Option<CreateScheduleFn>,
    /// The factor after a number of steps.
    pub factor: Option<FactorFn>,
    /// Frees it.
    pub destroy: Option<DestroyFn>,
}

/// `ls_plugin`: what a library offers.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LsPlugin {
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// Major version it was built with.
    pub abi_major: u32,
    /// Minor version it needs.
    pub abi_minor: u32,
    /// 0.
    pub reserved: u32,
    /// Its id.
    pub id: LsStr,
    /// Its version.
    pub version: LsStr,
    /// Its license, an SPDX expression.
    pub license: LsStr,
    /// Number of optimizers.
    pub optimizer_count: u64,
    /// The optimizers.
    pub optimizers: *const *const LsOptimizer,
    /// Number of schedules.
    pub schedule_count: u64,
    /// The schedules.
    pub schedules: *const *const LsSchedule,
}

/// The entry symbol.
pub type EntryFn = unsafe extern "C" fn(u32) -> *const LsPlugin;
