//! A shared library: opened, its descriptors checked and copied; and what it makes, called through its C functions.
#![expect(unsafe_code, reason = "crosses the C boundary of a plugin")]

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::path::Path;

use jsonschema::Validator;
use lorasmith_abi::host::{Report, Session, States, StepInput, text_from_plugin};
use lorasmith_abi::{
    ABI_MAJOR, ABI_MINOR, ENTRY_SYMBOL, EntryFn, LOG_ERROR, LOG_INFO, LOG_WARN, LsOptimizer,
    LsPlugin, LsReport, LsSchedule, LsStr, OPTIMIZER_ELEMENTWISE, STATE_BYTES_KEYWORD, Status,
    StepFn,
};
use serde_json::Value;

use super::ComponentInfo;
use super::lazy::{LazyTensor, LazyTensors};
use super::{names, settings};

/// More components than this in one plugin are a broken descriptor.
const MAX_COMPONENTS: u64 = 1024;
/// The longest id, in bytes.
const MAX_ID_BYTES: usize = 64;

/// A checked library.
pub struct Library {
    pub id: String,
    pub version: String,
    pub license: String,
    pub abi: (u32, u32),
    pub optimizers: Vec<OptimizerType>,
    pub schedules: Vec<ScheduleType>,
}

/// An optimizer that instances can be made of.
pub struct OptimizerType {
    pub info: ComponentInfo,
    pub validator: Validator,
    descriptor: LsOptimizer,
}

/// A schedule that instances can be made of.
pub struct ScheduleType {
    pub info: ComponentInfo,
    pub validator: Validator,
    descriptor: LsSchedule,
}

// SAFETY: descriptors are immutable for the life of the process, and the ABI demands that `create` may be called on
// any thread.
unsafe impl Send for OptimizerType {}
// SAFETY: as above.
unsafe impl Sync for OptimizerType {}
// SAFETY: as above.
unsafe impl Send for ScheduleType {}
// SAFETY: as above.
unsafe impl Sync for ScheduleType {}

impl Library {
    /// Opens a library for the life of the process.
    pub fn open(path: &Path) -> Result<Self, String> {
        // SAFETY: loading runs the library's initialisers. The operator has put it into a plugin folder, and
        // `folders` has checked who may write there.
        let library = unsafe { libloading::Library::new(path) }
            .map_err(|error| format!("cannot be loaded: {error}"))?;
        // What it makes may live as long as the process.
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        // SAFETY: the symbol has the type that the ABI gives it.
        let entry = unsafe { library.get::<EntryFn>(ENTRY_SYMBOL.as_bytes()) }
            .map_err(|_| format!("has no symbol `{ENTRY_SYMBOL}`: not a lorasmith plugin"))?;
        // SAFETY: the entry function takes any version and returns null or a descriptor that stays.
        let plugin = unsafe { entry(ABI_MAJOR) };
        if plugin.is_null() {
            return Err(format!(
                "was built for another ABI version than {ABI_MAJOR}.{ABI_MINOR}, which this program speaks"
            ));
        }
        // SAFETY: the entry function vouches for its descriptor, which begins with its size.
        Self::read(&unsafe { sized(plugin, "ls_plugin", size_of::<LsPlugin>())? })
    }

    fn read(plugin: &LsPlugin) -> Result<Self, String> {
        let abi = (plugin.abi_major, plugin.abi_minor);
        if abi.0 != ABI_MAJOR || abi.1 > ABI_MINOR {
            return Err(format!(
                "was built for ABI {}.{}, this program speaks {ABI_MAJOR}.{ABI_MINOR}",
                abi.0, abi.1
            ));
        }
        let id = id_of(plugin.id, "the plugin's id")?;
        let version = text(plugin.version, "the version")?;
        let mut library = Self {
            license: text(plugin.license, "the license")?,
            optimizers: Vec::new(),
            schedules: Vec::new(),
            id,
            version,
            abi,
        };
        for pointer in list(plugin.optimizers, plugin.optimizer_count, "optimizers")? {
            let optimizer = library.optimizer(pointer)?;
            library.optimizers.push(optimizer);
        }
        for pointer in list(plugin.schedules, plugin.schedule_count, "schedules")? {
            let schedule = library.schedule(pointer)?;
            library.schedules.push(schedule);
        }
        if library.optimizers.is_empty() && library.schedules.is_empty() {
            return Err("brings neither an optimizer nor a schedule".to_owned());
        }
        Ok(library)
    }

    fn optimizer(&self, pointer: *const LsOptimizer) -> Result<OptimizerType, String> {
        // SAFETY: the entry function vouches for the pointers of its lists.
        let descriptor = unsafe { sized(pointer, "ls_optimizer", LsOptimizer::SIZE_1_0)? };
        if descriptor.create.is_none() || descriptor.step.is_none() || descriptor.destroy.is_none()
        {
            return Err("an optimizer lacks create, step or destroy".to_owned());
        }
        let (id, summary, schema) = (
            descriptor.id,
            descriptor.summary,
            descriptor.settings_schema,
        );
        let elementwise = descriptor.flags & OPTIMIZER_ELEMENTWISE != 0;
        let (mut info, validator) = self.component(id, summary, schema, elementwise)?;
        info.aliases = names::aliases(&info.id);
        info.state_bytes_per_element = state_bytes(&info.settings_schema);
        let known = self.optimizers.iter().any(|known| known.info.id == info.id);
        unique(known, &info)?;
        Ok(OptimizerType {
            info,
            validator,
            descriptor,
        })
    }

    fn schedule(&self, pointer: *const LsSchedule) -> Result<ScheduleType, String> {
        // SAFETY: the entry function vouches for the pointers of its lists.
        let descriptor = unsafe { sized(pointer, "ls_schedule", size_of::<LsSchedule>())? };
        if descriptor.create.is_none()
            || descriptor.factor.is_none()
            || descriptor.destroy.is_none()
        {
            return Err("a schedule lacks create, factor or destroy".to_owned());
        }
        let (id, summary, schema) = (
            descriptor.id,
            descriptor.summary,
            descriptor.settings_schema,
        );
        let (info, validator) = self.component(id, summary, schema, false)?;
        let known = self.schedules.iter().any(|known| known.info.id == info.id);
        unique(known, &info)?;
        Ok(ScheduleType {
            info,
            validator,
            descriptor,
        })
    }

    fn component(
        &self,
        id: LsStr,
        summary: LsStr,
        schema: LsStr,
        elementwise: bool,
    ) -> Result<(ComponentInfo, Validator), String> {
        let id = id_of(id, "a component's id")?;
        let schema = text(schema, "a settings schema")?;
        let schema: Value = serde_json::from_str(&schema)
            .map_err(|error| format!("the settings schema of `{id}` is no JSON: {error}"))?;
        let validator = settings::validator(&schema).map_err(|error| format!("`{id}`: {error}"))?;
        let info = ComponentInfo {
            aliases: Vec::new(),
            summary: text(summary, "a summary")?,
            plugin_id: self.id.clone(),
            plugin_version: self.version.clone(),
            settings_schema: schema,
            elementwise,
            state_bytes_per_element: 0.0,
            id,
        };
        Ok((info, validator))
    }
}

fn state_bytes(schema: &Value) -> f64 {
    let said = schema.get(STATE_BYTES_KEYWORD).and_then(Value::as_f64);
    let sensible = said.filter(|bytes| (0.0..=1024.0).contains(bytes));
    sensible.unwrap_or(super::DEFAULT_STATE_BYTES)
}

fn unique(known: bool, info: &ComponentInfo) -> Result<(), String> {
    if known {
        return Err(format!("has two components with the id `{}`", info.id));
    }
    Ok(())
}

/// Copies a struct that begins with its size. Members that a plugin of an older minor version does not have are zero;
/// those that a newer one adds are left out.
///
/// # Safety
/// A non-null `pointer` points to as many bytes as its first four say, and zeros are a valid `T` beyond `least` bytes.
unsafe fn sized<T: Copy>(pointer: *const T, name: &str, least: usize) -> Result<T, String> {
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(format!("a null or misaligned pointer to {name}"));
    }
    // SAFETY: not null and aligned; the caller vouches for the bytes.
    let size = unsafe { pointer.cast::<u32>().read() } as usize;
    if size < least {
        return Err(format!(
            "struct_size of {name} is {size}, expected at least {least}"
        ));
    }
    let mut copy = MaybeUninit::<T>::zeroed();
    // SAFETY: both sides have that many bytes, and the rest stays zero, as the caller allows.
    unsafe {
        let bytes = size.min(size_of::<T>());
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), copy.as_mut_ptr().cast(), bytes);
        Ok(copy.assume_init())
    }
}

fn list<T>(first: *const *const T, count: u64, what: &str) -> Result<Vec<*const T>, String> {
    if count == 0 {
        return Ok(Vec::new());
    }
    if first.is_null() || !first.is_aligned() || count > MAX_COMPONENTS {
        return Err(format!(
            "its list of {count} {what} is null or longer than {MAX_COMPONENTS}"
        ));
    }
    // SAFETY: not null, aligned, bounded; the descriptor vouches for the entries.
    Ok(unsafe { std::slice::from_raw_parts(first, count as usize) }.to_vec())
}

fn text(text: LsStr, what: &str) -> Result<String, String> {
    // SAFETY: the descriptor vouches for its texts.
    unsafe { text_from_plugin(text, what) }.map_err(|fault| fault.message)
}

fn id_of(id: LsStr, what: &str) -> Result<String, String> {
    let id = text(id, what)?;
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
    if id.is_empty() || id.len() > MAX_ID_BYTES || !id.chars().all(plain) {
        return Err(format!(
            "{what} is {id:?}, expected 1 to {MAX_ID_BYTES} of a-z, 0-9, `_` and `-`"
        ));
    }
    Ok(id)
}

/// A line of a plugin in this program's log.
pub fn log(level: u32, message: &str) {
    match level {
        LOG_ERROR => tracing::error!(target: "lorasmith::plugin", "{message}"),
        LOG_WARN => tracing::warn!(target: "lorasmith::plugin", "{message}"),
        LOG_INFO => tracing::info!(target: "lorasmith::plugin", "{message}"),
        _ => tracing::debug!(target: "lorasmith::plugin", "{message}"),
    }
}

/// What a plugin has made for a run; destroyed with it.
struct Instance {
    this: *mut c_void,
    destroy: unsafe extern "C" fn(*mut c_void),
}

// SAFETY: the ABI demands that an instance may move between threads, as long as one call is made at a time.
unsafe impl Send for Instance {}

impl Instance {
    fn new(
        destroy: Option<unsafe extern "C" fn(*mut c_void)>,
        create: impl FnOnce(*const LsReport, *mut *mut c_void) -> Status,
    ) -> Result<Self, String> {
        let mut this = std::ptr::null_mut();
        Report::run(&log, |report| create(report, &raw mut this))?;
        match destroy {
            Some(destroy) if !this.is_null() => Ok(Self { this, destroy }),
            _ => Err("the plugin has made nothing".to_owned()),
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: `this` was made by the same plugin and is destroyed once.
        unsafe { (self.destroy)(self.this) };
    }
}

/// An optimizer of a run.
pub struct OptimizerInstance {
    instance: Instance,
    step: StepFn,
    eval: Option<StepFn>,
}

impl OptimizerType {
    /// Makes one with settings that fit the schema.
    pub fn create(&self, settings: &str) -> Result<OptimizerInstance, String> {
        let LsOptimizer {
            create: Some(create),
            step: Some(step),
            destroy,
            eval,
            ..
        } = self.descriptor
        else {
            return Err("the optimizer lacks create or step".to_owned());
        };
        let settings = LsStr::new(settings);
        let instance = Instance::new(destroy, |report, this| {
            // SAFETY: report, text and pointer live for the call.
            unsafe { create(report, settings, this) }
        })?;
        Ok(OptimizerInstance {
            instance,
            step,
            eval,
        })
    }
}

impl OptimizerInstance {
    /// One step; new values in the order of the parameters.
    pub fn step(
        &mut self,
        input: StepInput<'_, LazyTensor>,
        states: &mut States<LazyTensors>,
        backend: LazyTensors,
    ) -> Result<Vec<Option<LazyTensor>>, String> {
        let (this, step) = (self.instance.this, self.step);
        Session::run(backend, input, states, |host, now| {
            // SAFETY: the session keeps host and step alive during the call; `self` is borrowed mutably, so that no
            // other call runs.
            unsafe { step(this, host, now) }
        })
    }

    /// Whether other values are saved and measured than those that are trained on.
    pub fn has_eval(&self) -> bool {
        self.eval.is_some()
    }

    /// The values to save and measure with; `None` where they are those that are trained on.
    pub fn eval(
        &mut self,
        input: StepInput<'_, LazyTensor>,
        states: &mut States<LazyTensors>,
        backend: LazyTensors,
    ) -> Result<Vec<Option<LazyTensor>>, String> {
        let (this, Some(eval)) = (self.instance.this, self.eval) else {
            return Ok(input.params.iter().map(|_| None).collect());
        };
        Session::eval(backend, input, states, |host, now| {
            // SAFETY: as in `step`.
            unsafe { eval(this, host, now) }
        })
    }
}

/// A schedule of a run.
pub struct ScheduleInstance {
    instance: Instance,
    factor: unsafe extern "C" fn(*mut c_void, *const LsReport, u64, *mut f64) -> Status,
}

impl ScheduleType {
    /// Makes one with settings that fit the schema.
    pub fn create(
        &self,
        settings: &str,
        base_lr: f64,
        warmup_steps: u64,
        total_steps: u64,
    ) -> Result<ScheduleInstance, String> {
        let LsSchedule {
            create: Some(create),
            factor: Some(factor),
            destroy,
            ..
        } = self.descriptor
        else {
            return Err("the schedule lacks create or factor".to_owned());
        };
        let settings = LsStr::new(settings);
        let instance = Instance::new(destroy, |report, this| {
            // SAFETY: report, text and pointer live for the call.
            unsafe { create(report, settings, base_lr, warmup_steps, total_steps, this) }
        })?;
        Ok(ScheduleInstance { instance, factor })
    }
}

impl ScheduleInstance {
    /// The factor after a number of steps.
    pub fn factor(&self, step: u64) -> Result<f64, String> {
        let mut value = f64::NAN;
        Report::run(&log, |report| {
            // SAFETY: report and pointer live for the call; a schedule is not shared between threads.
            unsafe { (self.factor)(self.instance.this, report, step, &raw mut value) }
        })?;
        Ok(value)
    }
}
