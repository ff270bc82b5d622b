//! Starts a worker for each queued run, and notices when one is gone.
//!
//! The row is not trusted over the process. A run whose worker's lease has ended, or whose process has ended without
//! a result, becomes `interrupted` and is queued again, once.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::reporter::LEAVE;
use super::state;
use crate::store::runs::{Run, RunFailure, RunState};
use crate::store::{Store, StoreError};

/// How often rows are looked at when nothing wakes the supervisor.
const PERIOD: Duration = Duration::from_millis(500);
/// How many workers may begin a run: one, and one more after a crash.
const MAX_ATTEMPTS: u32 = 2;
/// How long workers have to leave when the service ends.
const FAREWELL: Duration = Duration::from_secs(15);
/// How much of a worker's log is told when it ends badly, in bytes.
const LOG_TAIL_BYTES: usize = 2000;

/// How a worker's process is started.
#[derive(Clone, Debug)]
pub struct WorkerCommand {
    /// The program.
    pub program: PathBuf,
    /// Arguments before `worker --run ID`.
    pub arguments: Vec<String>,
    /// Environment that carries the service's settings.
    pub environment: Vec<(String, String)>,
    /// Environment that a worker must not see.
    pub removed: Vec<String>,
    /// Where each worker's output is kept.
    pub log_dir: PathBuf,
    /// How many may run at once.
    pub max_workers: usize,
}

/// The running supervisor.
pub struct Supervisor {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Supervisor {
    /// Looks after the runs of `store` until it is stopped.
    pub fn start(store: Store, command: WorkerCommand, wake: Arc<Notify>) -> Self {
        let (stop, stopped) = watch::channel(false);
        let state = Loop {
            store,
            command,
            wake,
            children: HashMap::new(),
        };
        Self {
            stop,
            task: tokio::spawn(state.run(stopped)),
        }
    }

    /// Asks the workers to leave, waits for them, and ends. Their runs go on when the service is started again.
    pub async fn stop(self) {
        // An error says that the loop has ended already.
        let _ = self.stop.send(true);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the supervisor has failed");
        }
    }
}

struct Loop {
    store: Store,
    command: WorkerCommand,
    wake: Arc<Notify>,
    children: HashMap<Uuid, Child>,
}

impl Loop {
    async fn run(mut self, mut stopped: watch::Receiver<bool>) {
        loop {
            if let Err(error) = self.turn().await {
                tracing::error!(%error, "looking after the runs");
            }
            tokio::select! {
                () = tokio::time::sleep(PERIOD) => {}
                () = self.wake.notified() => {}
                _ = stopped.changed() => break,
            }
        }
        self.dismiss().await;
    }

    async fn turn(&mut self) -> Result<(), StoreError> {
        self.collect_ended().await?;
        self.reconcile().await?;
        self.start_queued().await
    }

    /// Children whose process has ended.
    async fn collect_ended(&mut self) -> Result<(), StoreError> {
        let mut ended = Vec::new();
        for (id, child) in &mut self.children {
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => ended.push((*id, status.to_string())),
                Err(error) => ended.push((*id, error.to_string())),
            }
        }
        for (id, status) in ended {
            self.children.remove(&id);
            let run = self.store.run(id).await?;
            let how = format!("the worker process ended ({status}){}", self.log_tail(id));
            if state::HELD.contains(&run.state) {
                self.worker_gone(&run, &how).await?;
            } else if run.state == RunState::Queued && run.attempt == 0 {
                // It has not even taken the run: starting it again would fail again.
                self.fail(&run, "worker_not_started", &how).await?;
            }
        }
        Ok(())
    }

    /// Runs that nobody works on: the lease has ended, or a crash came between two changes of the row.
    async fn reconcile(&mut self) -> Result<(), StoreError> {
        let now = OffsetDateTime::now_utc();
        for run in self.store.runs_in(&state::HELD).await? {
            let gone = run.lease_until.is_none_or(|until| until < now);
            if gone && !self.children.contains_key(&run.id) {
                self.worker_gone(&run, "the worker gave no sign of life")
                    .await?;
            }
        }
        for run in self.store.runs_in(&[RunState::Interrupted]).await? {
            self.requeue(&run, "the worker was interrupted").await?;
        }
        Ok(())
    }

    async fn worker_gone(&self, run: &Run, how: &str) -> Result<(), StoreError> {
        tracing::warn!(run = %run.id, attempt = run.attempt, how, "a run has lost its worker");
        if run.state == RunState::Cancelling || run.cancel_requested {
            let from = state::before(RunState::Cancelling);
            self.store
                .move_run(run.id, from, RunState::Cancelling, None)
                .await?;
            let from = state::before(RunState::Cancelled);
            self.store
                .move_run(run.id, from, RunState::Cancelled, None)
                .await?;
            return Ok(());
        }
        let from = state::before(RunState::Interrupted);
        if self
            .store
            .move_run(run.id, from, RunState::Interrupted, None)
            .await?
        {
            self.requeue(run, how).await?;
        }
        Ok(())
    }

    async fn requeue(&self, run: &Run, how: &str) -> Result<(), StoreError> {
        if run.attempt >= MAX_ATTEMPTS {
            let message = format!("{how}; it was started {} times", run.attempt);
            return self.fail(run, "worker_lost", &message).await;
        }
        let from = state::before(RunState::Queued);
        self.store
            .move_run(run.id, from, RunState::Queued, None)
            .await?;
        Ok(())
    }

    async fn fail(&self, run: &Run, code: &str, message: &str) -> Result<(), StoreError> {
        let failure = RunFailure::new(code, message);
        let from = state::before(RunState::Failed);
        self.store
            .move_run(run.id, from, RunState::Failed, Some(&failure))
            .await?;
        Ok(())
    }

    async fn start_queued(&mut self) -> Result<(), StoreError> {
        let mut waiting = self.store.runs_in(&[RunState::Queued]).await?;
        waiting.retain(|run| !self.children.contains_key(&run.id));
        if waiting.is_empty() {
            return Ok(());
        }
        let held = self.store.runs_in(&state::HELD).await?;
        // Workers of an earlier service count too: they still use the device.
        let foreign = held
            .iter()
            .filter(|run| !self.children.contains_key(&run.id))
            .count();
        let mut free = self
            .command
            .max_workers
            .saturating_sub(self.children.len() + foreign);
        for run in waiting {
            if free == 0 {
                break;
            }
            match self.spawn(run.id) {
                Ok(child) => {
                    self.children.insert(run.id, child);
                    free -= 1;
                }
                Err(error) => {
                    let program = self.command.program.display();
                    let message = format!("starting {program}: {error}");
                    self.fail(&run, "worker_not_started", &message).await?;
                }
            }
        }
        Ok(())
    }

    fn spawn(&self, id: Uuid) -> std::io::Result<Child> {
        std::fs::create_dir_all(&self.command.log_dir)?;
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_file(id))?;
        let mut command = Command::new(&self.command.program);
        command
            .args(&self.command.arguments)
            .args(["worker", "--run", &id.to_string()])
            .envs(self.command.environment.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log);
        for name in &self.command.removed {
            command.env_remove(name);
        }
        // Ctrl-C in a terminal is for the service; it tells its workers itself.
        #[cfg(unix)]
        command.process_group(0);
        command.spawn()
    }

    fn log_file(&self, id: Uuid) -> PathBuf {
        self.command.log_dir.join(format!("run-{id}.log"))
    }

    fn log_tail(&self, id: Uuid) -> String {
        match tail(&self.log_file(id)) {
            Some(text) if !text.is_empty() => format!(", its last words: {text}"),
            _ => String::new(),
        }
    }

    async fn dismiss(&mut self) {
        for child in self.children.values_mut() {
            ask_to_leave(child).await;
        }
        let everyone = async {
            for child in self.children.values_mut() {
                let _ = child.wait().await; // gone either way
            }
        };
        if tokio::time::timeout(FAREWELL, everyone).await.is_err() {
            for child in self.children.values_mut() {
                let _ = child.kill().await; // its lease tells the next service
            }
        }
    }
}

/// By its standard input: that works on every system, and a closed one (the service has crashed) means nothing.
async fn ask_to_leave(child: &mut Child) {
    if let Some(mut input) = child.stdin.take()
        && let Err(error) = input.write_all(LEAVE.as_bytes()).await
        && error.kind() != ErrorKind::BrokenPipe
    // it has just left by itself
    {
        tracing::warn!(%error, "a worker could not be asked to leave");
    }
}

fn tail(file: &Path) -> Option<String> {
    let bytes = std::fs::read(file).ok()?;
    let start = bytes.len().saturating_sub(LOG_TAIL_BYTES);
    let text = String::from_utf8_lossy(&bytes[start..]);
    let lines: Vec<&str> = text.lines().rev().take(3).collect();
    Some(lines.into_iter().rev().collect::<Vec<_>>().join(" / "))
}
