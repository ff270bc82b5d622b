//! Logs: one `tracing` subscriber for the whole process.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts logging to standard error.
///
/// `LORASMITH_LOG` takes a `tracing` filter such as `lorasmith=debug`; otherwise `default_filter` is in force.
/// Lines are JSON when standard error is not a terminal, so that a log collector can read them.
pub fn init(default_filter: &str) {
    let filter = EnvFilter::try_from_env("LORASMITH_LOG")
        .unwrap_or_else(|_| EnvFilter::new(default_filter));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A second call (tests) keeps the first subscriber.
    if std::io::stderr().is_terminal() {
        let _ = builder.try_init();
    } else {
        let _ = builder.json().flatten_event(true).try_init();
    }
}
