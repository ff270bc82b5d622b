//! Starts a worker for each queued run, and notices when one is gone.
//!
//! The row is not trusted over the process. A run whose worker gives no sign of life, or whose process has ended without
//! a result, becomes `interrupted` and is queued again, as long as its workers come further.

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

use super::crash::{self, Exit};
use super::queue::Used;
use super::reporter::LEAVE;
use super::worker::{LEASE, storage_wait};
use super::{liveness, queue, room, state};
use crate::store::runs::{HeldBy, Room, Run, RunFailure, RunState, Wish};
use crate::store::{Store, StoreError};

/// How often rows are looked at when nothing wakes the supervisor.
const PERIOD: Duration = Duration::from_millis(500);
/// How many workers in a row may go on with a run without coming further than those before.
const MAX_STALLS: u32 = 3;
/// How many processes in a row may end before they take the run.
const MAX_FALSE_STARTS: u32 = 3;
/// How often it is looked whether there is room again.
const ROOM_PERIOD: Duration = Duration::from_secs(2);

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

    /// Children whose process has ended.
    async fn collect_ended(&mut self) -> Result<(), StoreError> {
        let mut ended = Vec::new();
        for (id, child) in &mut self.children {
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => ended.push((*id, Exit::of(status))),
                Err(error) => ended.push((*id, Exit::unknown(&error))),
            }
        }
        for (id, exit) in ended {
            // A child is forgotten when its end was written down: the database may fail, or be full.
            self.child_ended(id, &exit).await?;
            self.children.remove(&id);
            self.begun.remove(&id);
        }
        Ok(())
    }

    async fn child_ended(&mut self, id: Uuid, exit: &Exit) -> Result<(), StoreError> {
        let run = match self.store.run(id).await {
            Err(StoreError::NotFound) => return Ok(()), // it had ended, and was deleted
            run => run?,
        };
        if state::HELD.contains(&run.state) {
            self.false_starts.remove(&id);
            if exit.is_storage_full() {
                return self.wait_for_room(&run).await;
            }
            let log = self.log_file(id);
            return self
                .worker_gone(&run, &crash::describe(&run, exit, &log))
                .await;
        }
        if run.state == RunState::Queued && !self.was_taken(&run) && !exit.is_success() {
            // It has not even tried to take the run.
            let starts = self.false_starts.entry(id).or_default();
            *starts += 1;
            if *starts >= MAX_FALSE_STARTS {
                self.false_starts.remove(&id);
                let how = crash::describe(&run, exit, &self.log_file(id));
                self.fail(&run, "worker_not_started", &how).await?;
            }
        } else {
            self.false_starts.remove(&id);
        }
        Ok(())
    }

    /// Whether the process that was started last has taken the run; it may be queued again by now.
    fn was_taken(&self, run: &Run) -> bool {
        let begun = self.begun.get(&run.id);
        begun.is_some_and(|begun| run.attempt > begun.attempt)
    }

    /// Runs that nobody works on: no sign of life, or a crash came between two changes of the row.
    async fn reconcile(&mut self) -> Result<(), StoreError> {
        let held = self.store.runs_in(&state::HELD).await?;
        self.seen
            .retain(|id, _| held.iter().any(|run| run.id == *id));
        for run in held {
            if !self.children.contains_key(&run.id) && self.is_abandoned(&run) {
                self.seen.remove(&run.id);
                let log = self.log_file(run.id);
                self.worker_gone(&run, &crash::describe(&run, &Exit::Silent, &log))
                    .await?;
            }
        }
        let interrupted = self.store.runs_in(&[RunState::Interrupted]).await?;
        let looks = interrupted.iter().any(|run| run.wait.is_some())
            && self
                .looked_for_room
                .is_none_or(|at| at.elapsed() >= ROOM_PERIOD);
        if looks {
            self.looked_for_room = Some(Instant::now());
        }
        for run in interrupted {
            let may_go_on = match &run.wait {
                None => true,
                Some(wait) => looks && room::is_enough(self.store.data_dir(), wait.needed_bytes),
            };
            if may_go_on {
                self.requeue(&run).await?;
            }
        }
        Ok(())
    }

    /// Whether the worker of another service is gone: its lock is free, or it was silent for the whole lease.
    fn is_abandoned(&mut self, run: &Run) -> bool {
        let Some(worker) = &run.lease else {
            return true;
        };
        if liveness::is_gone(&self.store.run_folder(run.id), worker) {
            return true;
        }
        match self.seen.get(&run.id) {
            Some((known, since)) if known == worker => since.elapsed() >= LEASE,
            _ => {
                self.seen.insert(run.id, (worker.clone(), Instant::now()));
                false
            }
        }
    }

    async fn wait_for_room(&self, run: &Run) -> Result<(), StoreError> {
        let from = state::before(RunState::Interrupted);
        let store = &self.store;
        store
            .move_run(run.id, from, RunState::Interrupted, None)
            .await?;
        let wait = storage_wait("the worker had no room left to write to".to_owned());
        store.set_wait(run.id, &wait).await
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
        if run.state == RunState::Pausing {
            // Nothing is lost but the steps since the last resume point.
            let from = state::before(RunState::Paused);
            self.store
                .move_run(run.id, from, RunState::Paused, None)
                .await?;
            return Ok(());
        }
        let stalls = self.store.judge_lost_worker(run.id).await?;
        if stalls >= MAX_STALLS {
            let message = crash::given_up(how, run, stalls);
            return self.fail(run, "worker_lost", &message).await;
        }
        let from = state::before(RunState::Interrupted);
        if self
            .store
            .move_run(run.id, from, RunState::Interrupted, None)
            .await?
        {
            self.requeue(run).await?;
        }
        Ok(())
    }

    async fn requeue(&self, run: &Run) -> Result<(), StoreError> {
        let from = [RunState::Interrupted];
        self.store
            .move_run(run.id, &from, RunState::Queued, None)
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

#[cfg(test)]
mod tests;
