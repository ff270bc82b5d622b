//! A run that goes on where a succeeded one has ended.

use uuid::Uuid;

use super::{RunError, RunProblem, RunService, recorded_at};
use crate::runs::spec::{RESUME, RunSpec};
use crate::store::runs::{NewRun, Run, RunState};
use crate::training::{ResumeFolder, TrainLength, TrainSettings};

/// How much longer a run is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// By optimizer steps.
    Steps(u64),
    /// By epochs.
    Epochs(u64),
}

impl Extension {
    fn pointer(self) -> &'static str {
        match self {
            Self::Steps(_) => "/steps",
            Self::Epochs(_) => "/epochs",
        }
    }
}

impl RunService {
    /// Makes a run that goes on where a succeeded one has ended, which itself stays as it is. `api_key_id` asks for it.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::NotExtendable`] when it has not succeeded, or its last resume point is gone.
    pub async fn extend(
        &self,
        id: Uuid,
        extension: Extension,
        api_key_id: Option<Uuid>,
    ) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        let refused = |why: String| RunError::NotExtendable(why);
        if run.state != RunState::Succeeded {
            let found = run.state.as_str();
            return Err(refused(format!("it is {found}, expected succeeded")));
        }
        if let Some(why) = &run.early_stop {
            let message = format!("it was {why}; a longer run would stop there, too");
            return Err(refused(message));
        }
        let mut spec: RunSpec = serde_json::from_str(&run.spec)?;
        let images = self.store.run_images(id).await?;
        spec.settings.length = self.longer(&spec, &images, extension)?;
        spec.recorded_at = recorded_at();
        if let Some(problem) = spec.settings.problems().into_iter().next() {
            let problem = RunProblem::new(extension.pointer(), "out_of_range", problem.message);
            return Err(RunError::Invalid(vec![problem]));
        }
        let total_steps = self.total_steps(&spec, serde_json::from_str(&images)?).ok();
        let new = Uuid::now_v7();
        self.copy_resume_point(id, new).await?;
        let run = self
            .store
            .create_run(NewRun {
                id: new,
                name: run.name,
                spec: serde_json::to_string(&spec)?,
                images,
                dataset: self.store.run_dataset(id).await?,
                dataset_id: run.dataset_id,
                base_model_id: run.base_model_id,
                continued_from: Some(id),
                reproduction_of: None,
                grid_of: None,
                captioner: None,
                priority: run.priority,
                api_key_id,
                wanted_device: self.wanted_device(&spec.device).await?,
                total_steps,
            })
            .await?;
        self.wake.notify_one();
        Ok(run)
    }

    /// Gives `to` the newest resume point of `from`.
    async fn copy_resume_point(&self, from: Uuid, to: Uuid) -> Result<(), RunError> {
        let (from, new) = (self.store.run_folder(from), self.store.run_folder(to));
        let to = new.join(RESUME);
        let copied = tokio::task::spawn_blocking(move || {
            let from = ResumeFolder::open(&from.join(RESUME))?;
            from.copy_newest_to(&ResumeFolder::open(&to)?)
        });
        match copied.await? {
            Ok(true) => Ok(()),
            Ok(false) => {
                let _ = std::fs::remove_dir_all(new); // an empty one
                let message = "its last resume point is gone".to_owned();
                Err(RunError::NotExtendable(message))
            }
            Err(error) => Err(RunError::Resume(error)),
        }
    }

    /// The length of a run that is to be longer, in its own unit where that is possible.
    fn longer(
        &self,
        spec: &RunSpec,
        images: &str,
        extension: Extension,
    ) -> Result<TrainLength, RunError> {
        let in_steps = |length| -> Result<u64, RunError> {
            let settings = TrainSettings {
                length,
                ..spec.settings.clone()
            };
            let spec = RunSpec {
                settings,
                ..spec.clone()
            };
            let planned = self.total_steps(&spec, serde_json::from_str(images)?);
            planned.map_err(|error| RunError::NotExtendable(error.to_string()))
        };
        Ok(match (spec.settings.length, extension) {
            (TrainLength::Steps(n), Extension::Steps(more)) => {
                TrainLength::Steps(n.saturating_add(more))
            }
            (TrainLength::Epochs(n), Extension::Epochs(more)) => {
                TrainLength::Epochs(n.saturating_add(more))
            }
            (TrainLength::Steps(n), Extension::Epochs(more)) => {
                let more = in_steps(TrainLength::Epochs(more))?;
                TrainLength::Steps(n.saturating_add(more))
            }
            (length @ TrainLength::Epochs(_), Extension::Steps(more)) => {
                TrainLength::Steps(in_steps(length)?.saturating_add(more))
            }
        })
    }
}
