//! Starts a worker for each queued run, and notices when one is gone.
//!
//! The row is not trusted over the process. A run whose worker gives no sign of life, or whose process has ended without
//! a result, becomes `interrupted` and is queued again, as long as its workers come further.

mod lost;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::queue::Used;
use super::reporter::LEAVE;
use super::{queue, state};
use crate::store::runs::{HeldBy, Room, Run, RunFailure, RunState, Wish};
use crate::store::{Store, StoreError};

/// How often rows are looked at when nothing wakes the supervisor.
const PERIOD: Duration = Duration::from_millis(500);

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
    pub room: Room,
    /// How long workers have to leave when the service ends.
    pub farewell: Duration,
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
            seen: HashMap::new(),
            false_starts: HashMap::new(),
            begun: HashMap::new(),
            looked_for_room: None,
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
    /// The last sign of life of other services' workers, and when it was new, by this process's own clock: what their
    /// clocks say, and whether ours is set, does not matter.
    seen: HashMap<Uuid, (HeldBy, Instant)>,
    false_starts: HashMap<Uuid, u32>,
    /// Each child's run when its process was started.
    begun: HashMap<Uuid, Begun>,
    looked_for_room: Option<Instant>,
}

/// A run when a process was started for it.
struct Begun {
    attempt: u32,
    device: Option<String>,
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

    async fn fail(&self, run: &Run, code: &str, message: &str) -> Result<(), StoreError> {
        let failure = RunFailure::new(code, message);
        let from = state::before(RunState::Failed);
        self.store
            .move_run(run.id, from, RunState::Failed, Some(&failure))
            .await?;
        Ok(())
    }

    async fn start_queued(&mut self) -> Result<(), StoreError> {
        let waiting = self.store.runs_in(&[RunState::Queued]).await?;
        if waiting.is_empty() {
            return Ok(());
        }
        // Workers of an earlier service count too: they still use their devices.
        let held = self.store.runs_in(&state::HELD).await?;
        let mut used = Used::new(self.command.room);
        for run in &held {
            used.take(run.used_device());
        }
        // So do workers that are about to take their run, or to end.
        for (id, begun) in &self.begun {
            if held.iter().all(|run| run.id != *id) {
                used.take(begun.device.as_deref());
            }
        }
        let mut turns = self.store.turns().await?;
        let (begun, waiting): (Vec<Run>, Vec<Run>) = waiting
            .into_iter()
            .partition(|run| self.children.contains_key(&run.id));
        for run in begun {
            turns.give(run.api_key_id);
        }
        for run in queue::order(waiting, turns) {
            let device = run.wanted_device.as_deref();
            if !used.has_room(device) {
                continue;
            }
            match self.spawn(run.id) {
                Ok(child) => {
                    used.take(device);
                    let begun = Begun {
                        attempt: run.attempt,
                        device: run.wanted_device.clone(),
                    };
                    self.begun.insert(run.id, begun);
                    self.children.insert(run.id, child);
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

    /// Asks all workers to leave, those of earlier services too, and waits for them.
    async fn dismiss(&mut self) {
        for child in self.children.values_mut() {
            ask_to_leave(child).await;
        }
        let farewell = self.command.farewell;
        let everyone = async {
            self.dismiss_others().await;
            for child in self.children.values_mut() {
                let _ = child.wait().await; // gone either way
            }
        };
        if tokio::time::timeout(farewell, everyone).await.is_err() {
            for child in self.children.values_mut() {
                let _ = child.kill().await; // the next service goes on from the last resume point
            }
        }
    }

    /// Other services' workers hear it through the database.
    async fn dismiss_others(&self) {
        loop {
            let Ok(mut others) = self.store.runs_in(&state::HELD).await else {
                return;
            };
            others.retain(|run| !self.children.contains_key(&run.id));
            if others.is_empty() {
                return;
            }
            for run in others {
                if let Err(error) = self.store.request(run.id, Wish::Leave).await {
                    tracing::warn!(%error, "a worker could not be asked to leave");
                }
            }
            tokio::time::sleep(PERIOD).await;
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
