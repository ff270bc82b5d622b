//! What becomes of a run that is there: cancelled, paused, resumed, deleted; what is wished of one that trains.

use uuid::Uuid;

use super::error::illegal;
use super::{RunError, RunService};
use crate::runs::spec::RunSpec;
use crate::runs::{folders, state};
use crate::store::StoreError;
use crate::store::runs::{Run, RunState, Wish};

impl RunService {
    /// Ends a run early: at once when it waits, after the current step when it trains. Asking twice is no mistake.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::IllegalTransition`] when it has succeeded or failed.
    pub async fn cancel(&self, id: Uuid) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        self.cancel_row(run).await
    }

    pub(in crate::runs) async fn cancel_row(&self, run: Run) -> Result<Run, RunError> {
        let id = run.id;
        if run.state == RunState::Cancelled {
            return Ok(run);
        }
        if state::has_ended(run.state) {
            return Err(illegal(&run, RunState::Cancelled));
        }
        self.store.request(id, Wish::Cancel).await?;
        let at_once = [RunState::Queued, RunState::Paused, RunState::Interrupted];
        if !self
            .store
            .move_run(id, &at_once, RunState::Cancelled, None)
            .await?
        {
            let from = state::before(RunState::Cancelling);
            self.store
                .move_run(id, from, RunState::Cancelling, None)
                .await?;
        }
        self.wake.notify_one();
        let run = self.row(id).await?;
        match run.state {
            RunState::Succeeded | RunState::Failed => Err(illegal(&run, RunState::Cancelled)),
            _ => Ok(run),
        }
    }

    /// Lets a run rest: at once when it waits, after the current step when it trains. Its worker leaves a resume point
    /// behind, and the device. Asking twice is no mistake.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::IllegalTransition`] when it is about to end, or has ended.
    pub async fn pause(&self, id: Uuid) -> Result<Run, RunError> {
        let at_once = [RunState::Queued, RunState::Interrupted];
        let mut run = self.get(id).await?;
        // Its worker may take it, or leave it, between the two.
        for _ in 0..3 {
            if matches!(run.state, RunState::Pausing | RunState::Paused) {
                return Ok(run);
            }
            let waits = at_once.contains(&run.state);
            let to = if waits {
                RunState::Paused
            } else {
                RunState::Pausing
            };
            let from = if waits { &at_once } else { state::before(to) };
            if !from.contains(&run.state) {
                return Err(illegal(&run, RunState::Pausing));
            }
            if !waits {
                self.store.request(id, Wish::Pause).await?;
            }
            self.store.move_run(id, from, to, None).await?;
            run = self.get(id).await?;
        }
        match run.state {
            RunState::Pausing | RunState::Paused => Ok(run),
            _ => Err(illegal(&run, RunState::Pausing)),
        }
    }

    /// Queues a run that rests; it goes on where it was.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::IllegalTransition`] when it does not rest.
    pub async fn resume(&self, id: Uuid) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        let from = [RunState::Paused];
        if !self
            .store
            .move_run(id, &from, RunState::Queued, None)
            .await?
        {
            return Err(illegal(&run, RunState::Queued));
        }
        self.wake.notify_one();
        self.get(id).await
    }

    /// Has a LoRA file written after the current step.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::NotTraining`] when no worker is at it.
    pub async fn save(&self, id: Uuid) -> Result<Run, RunError> {
        self.wish(id, Wish::Save).await
    }

    /// Has the run's prompts drawn after the current step.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::NotTraining`] when no worker is at it; [`RunError::NoPrompts`].
    pub async fn sample(&self, id: Uuid) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        let spec: RunSpec = serde_json::from_str(&run.spec)?;
        if spec.settings.samples.prompts.is_empty() {
            return Err(RunError::NoPrompts);
        }
        self.wish(id, Wish::Sample).await
    }

    async fn wish(&self, id: Uuid, wish: Wish) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        if !matches!(run.state, RunState::Preparing | RunState::Running) {
            return Err(RunError::NotTraining(run.state.as_str()));
        }
        self.store.request(id, wish).await?;
        Ok(run)
    }

    /// Deletes a run that has ended, with everything that it has on disk; with its LoRA files when that is wanted.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::StillNeeded`].
    pub async fn delete(&self, id: Uuid, with_loras: bool) -> Result<(), RunError> {
        let deleted = self.store.delete_run(id, &state::ENDED, with_loras).await;
        match deleted {
            Err(StoreError::NotFound) => return Err(RunError::NotFound(id)),
            Err(error) => return Err(error.into()),
            Ok(Some(needed)) => return Err(RunError::StillNeeded(needed)),
            Ok(None) => {}
        }
        let folder = self.store.run_folder(id);
        let log = self.store.data_dir().join("logs");
        let log = log.join(format!("run-{id}.log"));
        tokio::task::spawn_blocking(move || {
            folders::remove(&folder);
            let _ = std::fs::remove_file(log); // a run that no worker has begun has none
        })
        .await?;
        Ok(())
    }

    /// A run that has not ended and needs this base model or VAE.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn that_needs_model(&self, id: &str) -> Result<Option<Uuid>, RunError> {
        Ok(self.store.run_that_needs(id, &state::ENDED).await?)
    }

    /// Deletes a LoRA file.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`RunError::StillNeeded`].
    pub async fn delete_lora(&self, id: Uuid) -> Result<(), RunError> {
        match self.store.delete_lora(id, &state::ENDED).await? {
            Some(needed) => Err(RunError::StillNeeded(needed)),
            None => Ok(()),
        }
    }
}
