//! Workers that are gone, and what becomes of their runs: queued again, given up, or left to wait for room.

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::Loop;
use crate::runs::crash::{self, Exit};
use crate::runs::worker::{LEASE, storage_wait};
use crate::runs::{liveness, room, state};
use crate::store::StoreError;
use crate::store::runs::{Run, RunState};

/// How many workers in a row may go on with a run without coming further than those before.
const MAX_STALLS: u32 = 3;
/// How many processes in a row may end before they take the run.
const MAX_FALSE_STARTS: u32 = 3;
/// How often it is looked whether there is room again.
const ROOM_PERIOD: Duration = Duration::from_secs(2);

impl Loop {
    /// Children whose process has ended.
    pub(super) async fn collect_ended(&mut self) -> Result<(), StoreError> {
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
    pub(super) async fn reconcile(&mut self) -> Result<(), StoreError> {
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
}
