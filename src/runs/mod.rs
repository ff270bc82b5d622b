//! Training runs: what may be asked for, the queue, the process of each run, and its end.

mod reporter;
pub mod service;
pub mod spec;
pub mod state;
pub mod supervisor;
pub mod worker;

pub use service::{NewRunRequest, RunError, RunProblem, RunService};
pub use spec::{RunSpec, SnapshotImage};
pub use supervisor::{Supervisor, WorkerCommand};
pub use worker::{WorkerEnd, WorkerParts, work};
