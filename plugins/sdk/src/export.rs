//! Makes the C descriptors and callbacks of a plugin from its Rust types. Used through `export_plugin!`.
#![expect(unsafe_code, reason = "functions that the host calls")]

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;

use lorasmith_abi::{
    ABI_MAJOR, ABI_MINOR, BAD_ARGUMENT, LsHost, LsOptimizer, LsParam, LsPlugin, LsReport,
    LsSchedule, LsStep, LsStr, OK, OPTIMIZER_ELEMENTWISE, PANIC, STATE_BYTES_KEYWORD, Status,
};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::{Error, Optimizer, Param, Result, Run, Schedule, Step};

/// Exports a library's entry symbol.
///
/// `optimizers` and `schedules` list types that implement [`Optimizer`](crate::Optimizer) and
/// [`Schedule`](crate::Schedule). Version and license come from the crate's manifest.
#[macro_export]
macro_rules! export_plugin {
    (id: $id:expr, optimizers: [$($optimizer:ty),* $(,)?], schedules: [$($schedule:ty),* $(,)?] $(,)?) => {
        /// The entry symbol of the plugin ABI.
        #[expect(unsafe_code, reason = "the plugin's one exported symbol")]
        // SAFETY: no other symbol of this name is in the library.
        #[unsafe(no_mangle)]
        pub extern "C" fn lorasmith_plugin_entry(host_abi_major: u32) -> *const $crate::abi::LsPlugin {
            static PLUGIN: $crate::export::Exported = $crate::export::Exported::new();
            PLUGIN.entry(host_abi_major, || $crate::export::plugin(
                [$id, env!("CARGO_PKG_VERSION"), env!("CARGO_PKG_LICENSE")],
                vec![$($crate::export::optimizer::<$optimizer>()),*],
                vec![$($crate::export::schedule::<$schedule>()),*],
            ))
        }
    };
}

/// A descriptor that is made at the first call and then stays.
pub struct Exported(std::sync::OnceLock<Option<Descriptor>>);

struct Descriptor(&'static LsPlugin);

// SAFETY: a descriptor is immutable and points to leaked, immutable memory.
unsafe impl Send for Descriptor {}
// SAFETY: as above.
unsafe impl Sync for Descriptor {}

impl Exported {
    /// Nothing made yet.
    #[expect(clippy::new_without_default, reason = "only the macro makes one")]
    pub const fn new() -> Self {
        Self(std::sync::OnceLock::new())
    }

    /// The entry function's body: null for another major version.
    pub fn entry(
        &self,
        host_abi_major: u32,
        make: impl FnOnce() -> &'static LsPlugin,
    ) -> *const LsPlugin {
        if host_abi_major != ABI_MAJOR {
            return std::ptr::null();
        }
        let made = self
            .0
            .get_or_init(|| catch_unwind(AssertUnwindSafe(make)).ok().map(Descriptor));
        made.as_ref()
            .map_or(std::ptr::null(), |descriptor| &raw const *descriptor.0)
    }
}

/// The library's descriptor; `facts` are id, version and license.
pub fn plugin(
    facts: [&'static str; 3],
    optimizers: Vec<&'static LsOptimizer>,
    schedules: Vec<&'static LsSchedule>,
) -> &'static LsPlugin {
    let [id, version, license] = facts;
    let optimizers: Vec<*const LsOptimizer> =
        optimizers.into_iter().map(std::ptr::from_ref).collect();
    let schedules: Vec<*const LsSchedule> = schedules.into_iter().map(std::ptr::from_ref).collect();
    Box::leak(Box::new(LsPlugin {
        struct_size: size_of::<LsPlugin>() as u32,
        abi_major: ABI_MAJOR,
        abi_minor: ABI_MINOR,
        reserved: 0,
        id: LsStr::new(id),
        version: LsStr::new(version),
        license: LsStr::new(license),
        optimizer_count: optimizers.len() as u64,
        optimizers: optimizers.leak().as_ptr(),
        schedule_count: schedules.len() as u64,
        schedules: schedules.leak().as_ptr(),
    }))
}

/// The descriptor of an optimizer.
pub fn optimizer<O: Optimizer>() -> &'static LsOptimizer {
    Box::leak(Box::new(LsOptimizer {
        struct_size: size_of::<LsOptimizer>() as u32,
        flags: if O::ELEMENTWISE {
            OPTIMIZER_ELEMENTWISE
        } else {
            0
        },
        id: LsStr::new(O::ID),
        summary: LsStr::new(O::SUMMARY),
        settings_schema: LsStr::new(optimizer_schema::<O>()),
        create: Some(create_optimizer::<O>),
        step: Some(step::<O>),
        destroy: Some(destroy::<O>),
        eval: if O::EVAL { Some(eval::<O>) } else { None },
    }))
}

/// The descriptor of a schedule.
pub fn schedule<S: Schedule>() -> &'static LsSchedule {
    Box::leak(Box::new(LsSchedule {
        struct_size: size_of::<LsSchedule>() as u32,
        reserved: 0,
        id: LsStr::new(S::ID),
        summary: LsStr::new(S::SUMMARY),
        settings_schema: LsStr::new(schema::<S>()),
        create: Some(create_schedule::<S>),
        factor: Some(factor::<S>),
        destroy: Some(destroy::<Running<S>>),
    }))
}

fn optimizer_schema<O: Optimizer>() -> &'static str {
    let mut schema = schemars::schema_for!(O);
    schema.insert(STATE_BYTES_KEYWORD.to_owned(), O::STATE_BYTES.into());
    schema.to_value().to_string().leak()
}

fn schema<S: JsonSchema>() -> &'static str {
    schemars::schema_for!(S).to_value().to_string().leak()
}

/// A schedule with what it knows of its run.
struct Running<S> {
    schedule: S,
    run: Run,
}

unsafe extern "C" fn create_optimizer<O: Optimizer>(
    report: *const LsReport,
    settings: LsStr,
    this: *mut *mut c_void,
) -> Status {
    // SAFETY: the host passes a live report, live text and a writable pointer.
    unsafe {
        create(report, settings, this, |optimizer: O| {
            optimizer.check()?;
            Ok(optimizer)
        })
    }
}

unsafe extern "C" fn create_schedule<S: Schedule>(
    report: *const LsReport,
    settings: LsStr,
    base_lr: f64,
    warmup_steps: u64,
    total_steps: u64,
    this: *mut *mut c_void,
) -> Status {
    let run = Run {
        base_lr,
        warmup_steps,
        total_steps,
    };
    // SAFETY: the host passes a live report, live text and a writable pointer.
    unsafe {
        create(report, settings, this, |schedule: S| {
            schedule.check(&run)?;
            Ok(Running { schedule, run })
        })
    }
}

/// # Safety
/// `report` and `settings` are live for the call and `this` is writable, or they are null.
unsafe fn create<S: DeserializeOwned, T>(
    report: *const LsReport,
    settings: LsStr,
    this: *mut *mut c_void,
    make: impl FnOnce(S) -> Result<T>,
) -> Status {
    // SAFETY: the caller vouches for the pointers, which are checked for null.
    unsafe {
        guard_report(report, || {
            let settings = serde_json::from_str(text(settings)?)
                .map_err(|error| Error::new(format!("settings: {error}")))?;
            if this.is_null() {
                return Err(Error::Host(BAD_ARGUMENT));
            }
            this.write(Box::into_raw(Box::new(make(settings)?)).cast());
            Ok(())
        })
    }
}

unsafe extern "C" fn destroy<T>(this: *mut c_void) {
    if !this.is_null() {
        // SAFETY: `create` made it of this type, and the host calls this once. A panic of a destructor ends here.
        let _ = catch_unwind(AssertUnwindSafe(|| unsafe {
            drop(Box::<T>::from_raw(this.cast()));
        }));
    }
}

unsafe extern "C" fn factor<S: Schedule>(
    this: *mut c_void,
    report: *const LsReport,
    step: u64,
    out: *mut f64,
) -> Status {
    // SAFETY: `create_schedule` made `this`; the host passes a live report and a writable pointer.
    unsafe {
        guard_report(report, || {
            if this.is_null() || out.is_null() {
                return Err(Error::Host(BAD_ARGUMENT));
            }
            let running = &*this.cast::<Running<S>>();
            out.write(running.schedule.factor(&running.run, step));
            Ok(())
        })
    }
}

/// The callback of a step.
///
/// # Safety
/// As the header says of `step`.
pub unsafe extern "C" fn step<O: Optimizer>(
    this: *mut c_void,
    host: *const LsHost,
    step: *const LsStep,
) -> Status {
    // SAFETY: the caller vouches for the pointers.
    unsafe { call(this, host, step, O::step) }
}

/// The callback of an evaluation.
///
/// # Safety
/// As the header says of `eval`.
pub unsafe extern "C" fn eval<O: Optimizer>(
    this: *mut c_void,
    host: *const LsHost,
    step: *const LsStep,
) -> Status {
    // SAFETY: the caller vouches for the pointers.
    unsafe { call(this, host, step, O::eval) }
}

/// # Safety
/// As the header says of `step`.
unsafe fn call<O: Optimizer>(
    this: *mut c_void,
    host: *const LsHost,
    step: *const LsStep,
    body: impl FnOnce(&O, &Step<'_>) -> Result<()>,
) -> Status {
    if this.is_null() || host.is_null() || step.is_null() {
        return BAD_ARGUMENT;
    }
    // SAFETY: not null; the host keeps the table and the step alive until this returns. Its size comes first.
    unsafe {
        if host.cast::<u32>().read() < size_of::<LsHost>() as u32
            || step.cast::<u32>().read() < size_of::<LsStep>() as u32
        {
            return BAD_ARGUMENT;
        }
    }
    // SAFETY: as above; `create_optimizer` made `this` and one step runs at a time.
    let (this, host, step) = unsafe { (&*this.cast::<O>(), &*host, &*step) };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the host vouches for the parameters that it lists.
        body(this, &unsafe { read_step(host, step) }?)
    }));
    let fail = |message: &str| {
        // SAFETY: the table is alive and the text is copied.
        unsafe { (host.fail)(host.ctx, LsStr::new(message)) }
    };
    finish(outcome, fail)
}

/// # Safety
/// The step's pointers are live for `'h`.
unsafe fn read_step<'h>(host: &'h LsHost, step: &'h LsStep) -> Result<Step<'h>> {
    let mut params = Vec::with_capacity(step.param_count as usize);
    for index in 0..step.param_count as usize {
        let offset = index * step.param_size as usize;
        // SAFETY: entries lie `param_size` bytes apart, and there are `param_count` of them.
        let param: &'h LsParam = unsafe { &*step.params.byte_add(offset) };
        params.push(Param {
            host,
            id: param.id,
            // SAFETY: the name is live for the step.
            name: unsafe { text(param.name)? },
            value: param.value,
            grad: param.grad,
            lr: param.lr,
            weight_decay: param.weight_decay != 0,
        });
    }
    Ok(Step {
        global: Param::global(host),
        step: step.step,
        params,
    })
}

/// Runs a callback that reports through an [`LsReport`].
///
/// # Safety
/// A non-null `report` is live for the call.
unsafe fn guard_report(report: *const LsReport, body: impl FnOnce() -> Result<()>) -> Status {
    if report.is_null() {
        return BAD_ARGUMENT;
    }
    let outcome = catch_unwind(AssertUnwindSafe(body));
    finish(outcome, |message| {
        // SAFETY: the report is alive and the text is copied.
        unsafe { ((*report).fail)((*report).ctx, LsStr::new(message)) }
    })
}

/// A callback's status; leaves the message of an error or a panic with the host.
fn finish(outcome: std::thread::Result<Result<()>>, fail: impl FnOnce(&str) -> Status) -> Status {
    match outcome {
        Ok(Ok(())) => OK,
        Ok(Err(Error::Host(status))) => status,
        Ok(Err(Error::Message(message))) => fail(&message),
        Err(payload) => {
            let message = lorasmith_abi::host::panic_message(&*payload);
            fail(&format!("the plugin panicked: {message}"));
            PANIC
        }
    }
}

/// # Safety
/// The text is live for `'t`.
unsafe fn text<'t>(text: LsStr) -> Result<&'t str> {
    if text.len == 0 {
        return Ok("");
    }
    if text.ptr.is_null() {
        return Err(Error::Host(BAD_ARGUMENT));
    }
    // SAFETY: not null, and the caller vouches for the bytes.
    let bytes = unsafe { slice::from_raw_parts(text.ptr, text.len as usize) };
    std::str::from_utf8(bytes).map_err(|_| Error::Host(BAD_ARGUMENT))
}
