//! The end of a worker in words: what the system said, what it wrote last, its memory, and what may help.

use std::path::Path;
use std::process::ExitStatus;

use super::memory::SystemMemory;
use crate::store::runs::Run;
use crate::training::memory::in_gib;

/// How much of a worker's log is told, in bytes and lines.
const LOG_TAIL_BYTES: usize = 2000;
const LOG_TAIL_LINES: usize = 3;

/// The exit status of a worker that had no room to write to: `EX_TEMPFAIL`.
pub const STORAGE_FULL: u8 = 75;

/// How a worker's process has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
    /// It was another service's, and gives no sign of life.
    Silent,
    /// The system does not say.
    Unknown(String),
}

impl Exit {
    /// What the system says.
    pub fn of(status: ExitStatus) -> Self {
        #[cfg(unix)]
        if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
            return Self::Signal(signal);
        }
        status
            .code()
            .map_or_else(|| Self::Unknown(status.to_string()), Self::Code)
    }

    /// The system could not be asked.
    pub fn unknown(error: &std::io::Error) -> Self {
        Self::Unknown(error.to_string())
    }

    /// Whether it was for want of room.
    pub fn is_storage_full(&self) -> bool {
        *self == Self::Code(i32::from(STORAGE_FULL))
    }

    /// Whether it has done what it could.
    pub fn is_success(&self) -> bool {
        *self == Self::Code(0)
    }

    fn words(&self) -> String {
        let signal = |name: &str, meaning: &str| format!("was ended by {name}: {meaning}");
        match self {
            Self::Code(code) => format!("ended with exit status {code} and without a result"),
            Self::Signal(9) => signal(
                "SIGKILL (signal 9)",
                "somebody has killed it, or the system was short of memory",
            ),
            Self::Signal(15) => signal("SIGTERM (signal 15)", "somebody has ended it"),
            Self::Signal(6) => signal("SIGABRT (signal 6)", "a library has given up"),
            Self::Signal(7) => signal(
                "SIGBUS (signal 7)",
                "a file that was being read, such as the base model, has become shorter, or the memory is faulty",
            ),
            Self::Signal(11) => signal(
                "SIGSEGV (signal 11)",
                "a fault of a driver, a plugin or the program",
            ),
            Self::Signal(4) => signal(
                "SIGILL (signal 4)",
                "the processor does not know an instruction of the program or of a plugin",
            ),
            Self::Signal(number) => format!("was ended by signal {number}"),
            Self::Silent => "gives no sign of life any more".to_owned(),
            Self::Unknown(text) => format!("has ended ({text})"),
        }
    }

    fn advice(&self) -> Option<&'static str> {
        match self {
            Self::Signal(9) => Some(
                "if memory was short, `gradient_checkpointing: blocks`, a smaller `batch_size` or smaller pictures \
                 take less",
            ),
            Self::Signal(4 | 6 | 11) => Some(
                "another device, an update of its driver, or a run without plugins of your own shows where the fault is",
            ),
            _ => None,
        }
    }
}

/// What happened to the worker of a run.
pub fn describe(run: &Run, exit: &Exit, log: &Path) -> String {
    let mut text = format!("the worker process {} at step {}", exit.words(), run.step);
    if let Some(bytes) = run.memory_bytes {
        text += &format!("; its memory was {} then", in_gib(bytes));
        if let Some(system) = SystemMemory::now() {
            let (free, limit) = (in_gib(system.available_bytes), in_gib(system.limit_bytes));
            text += &format!(", and {free} of {limit} are free now");
        }
    }
    if let Some(words) = tail(log).filter(|words| !words.is_empty()) {
        text += &format!("; its last words: {words}");
    }
    if let Some(advice) = exit.advice() {
        text += &format!("; {advice}");
    }
    text
}

/// Why a run is not gone on with.
pub fn given_up(how: &str, run: &Run, stalls: u32) -> String {
    let begun = match run.kept_step {
        Some(step) => format!("from step {step}"),
        None => "from its beginning".to_owned(),
    };
    format!(
        "{how}. The run was gone on with {stalls} times {begun} and did not come further than step {}",
        run.furthest_step
    )
}

fn tail(file: &Path) -> Option<String> {
    let bytes = std::fs::read(file).ok()?;
    let start = bytes.len().saturating_sub(LOG_TAIL_BYTES);
    let text = String::from_utf8_lossy(&bytes[start..]);
    let lines: Vec<&str> = text.lines().rev().take(LOG_TAIL_LINES).collect();
    Some(lines.into_iter().rev().collect::<Vec<_>>().join(" / "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_in_words() {
        let killed = Exit::Signal(9);
        assert!(killed.words().contains("SIGKILL"));
        assert!(killed.words().contains("memory"));
        assert!(killed.advice().is_some_and(|text| text.contains("blocks")));
        assert!(Exit::Code(1).words().contains("exit status 1"));
        assert!(Exit::Code(75).is_storage_full());
        assert!(Exit::Signal(63).words().contains("63"));
        #[cfg(unix)]
        {
            use std::os::unix::process::ExitStatusExt as _;
            assert_eq!(Exit::of(ExitStatus::from_raw(9)), killed);
            assert_eq!(Exit::of(ExitStatus::from_raw(75 << 8)), Exit::Code(75));
        }
    }

    #[test]
    fn the_last_lines_of_a_log_are_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("log");
        assert_eq!(tail(&log), None);
        std::fs::write(&log, "one\ntwo\nthree\nfour\n").expect("written");
        assert_eq!(tail(&log).as_deref(), Some("two / three / four"));
    }
}
