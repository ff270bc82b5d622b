//! The host's side of `ls_report`: collects the message of a plugin that gives up outside of a step.
#![expect(unsafe_code, reason = "functions that a plugin calls")]

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::memory::text_from_plugin;
use crate::{BAD_ARGUMENT, FAILED, LsReport, LsStr, OK, PANIC, Status};

/// Runs a callback with an [`LsReport`] and turns its status into a result.
pub struct Report<'a> {
    message: Option<String>,
    log: &'a dyn Fn(u32, &str),
}

impl<'a> Report<'a> {
    /// Runs `call`, which passes the pointer on to a plugin.
    ///
    /// # Errors
    /// What the plugin said, or that it said nothing, when the status is not [`OK`] or a message was left.
    pub fn run(
        log: &'a dyn Fn(u32, &str),
        call: impl FnOnce(*const LsReport) -> Status,
    ) -> Result<(), String> {
        let mut report = Self { message: None, log };
        let table = LsReport {
            struct_size: size_of::<LsReport>() as u32,
            reserved: 0,
            ctx: (&raw mut report).cast(),
            fail,
            log: self::log,
        };
        let status = call(&raw const table);
        match (status, report.message) {
            (OK, None) => Ok(()),
            (_, Some(message)) => Err(message),
            (status, None) => Err(format!("status {status} without a message")),
        }
    }
}

unsafe extern "C" fn fail(ctx: *mut c_void, message: LsStr) -> Status {
    // SAFETY: as in `with`; the plugin vouches for the text.
    unsafe {
        with(ctx, |report| {
            let message =
                text_from_plugin(message, "message").unwrap_or_else(|fault| fault.message);
            report.message.get_or_insert(message);
            FAILED
        })
    }
}

unsafe extern "C" fn log(ctx: *mut c_void, level: u32, message: LsStr) -> Status {
    // SAFETY: as in `with`; the plugin vouches for the text.
    unsafe {
        with(ctx, |report| match text_from_plugin(message, "log line") {
            Ok(message) => {
                (report.log)(level, &message);
                OK
            }
            Err(fault) => fault.status,
        })
    }
}

/// # Safety
/// A non-null `ctx` is the one that [`Report::run`] made, and its callback has not returned.
unsafe fn with(ctx: *mut c_void, body: impl FnOnce(&mut Report<'_>) -> Status) -> Status {
    let report: *mut Report<'_> = ctx.cast();
    if report.is_null() {
        return BAD_ARGUMENT;
    }
    // SAFETY: `run` holds the report in place and does not touch it meanwhile.
    let report = unsafe { &mut *report };
    catch_unwind(AssertUnwindSafe(|| body(report))).unwrap_or(PANIC)
}
