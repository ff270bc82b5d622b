//! Why a call about runs has failed: wrong values, a state that does not allow it, or something that is missing.

use uuid::Uuid;

use crate::captioning::CaptionError;
use crate::models::ModelFolderError;
use crate::runs::reproduction::Mismatch;
use crate::store::StoreError;
use crate::store::runs::{Run, RunState, StillNeeded};
use crate::training::ResumeError;

/// One wrong value of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunProblem {
    /// Where: a pointer into [`TrainSettings`](crate::training::TrainSettings),
    /// [`BucketSettings`](crate::dataloader::BucketSettings) (below `/buckets`), or a field of the request.
    pub pointer: String,
    /// `out_of_range`, `invalid_value`, `unknown_field`, `wrong_type` or `not_found`.
    pub code: &'static str,
    /// What was found and what was expected.
    pub message: String,
}

impl RunProblem {
    pub(in crate::runs) fn new(
        pointer: impl Into<String>,
        code: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            pointer: pointer.into(),
            code,
            message: message.into(),
        }
    }
}

/// Why a call has failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no such run.
    #[error("there is no run {0}")]
    NotFound(Uuid),
    /// There is no such dataset.
    #[error("there is no dataset {0}")]
    DatasetNotFound(Uuid),
    /// There is no such base model.
    #[error(
        "there is no base model `{0}` in the model folder; GET /v1/models lists those that are there"
    )]
    ModelNotFound(String),
    /// Values are wrong.
    #[error("{} values are wrong", .0.len())]
    Invalid(Vec<RunProblem>),
    /// The run's state does not allow it.
    #[error("a run that is {from} cannot become {to}")]
    IllegalTransition {
        /// Where it is.
        from: &'static str,
        /// Where it should go.
        to: &'static str,
    },
    /// Only a run that trains can do this.
    #[error("the run is {0}, expected preparing or running")]
    NotTraining(&'static str),
    /// There is nothing to draw.
    #[error("the run has no prompts to draw")]
    NoPrompts,
    /// The run cannot be made longer.
    #[error("the run cannot be extended: {0}")]
    NotExtendable(String),
    /// The run cannot be repeated.
    #[error("the run cannot be repeated: {0}")]
    NotReproducible(String),
    /// What it was made with has changed.
    #[error("{} of what the run was made with is not what it was", .0.len())]
    InputsChanged(Vec<Mismatch>),
    /// There is no such grid.
    #[error("the run has no grid {0}")]
    GridNotFound(Uuid),
    /// There is no such captioning job.
    #[error("the dataset has no captioning job {0}")]
    CaptioningJobNotFound(Uuid),
    /// A captioner cannot be used.
    #[error(transparent)]
    Captioner(#[from] CaptionError),
    /// It cannot be deleted yet.
    #[error("{}", why(.0))]
    StillNeeded(StillNeeded),
    /// A resume point cannot be copied.
    #[error(transparent)]
    Resume(ResumeError),
    /// The model folder cannot be read.
    #[error(transparent)]
    Models(#[from] ModelFolderError),
    /// A background task has failed.
    #[error("a background task has failed: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// What was asked for cannot be written down.
    #[error("writing down the run: {0}")]
    Spec(#[from] serde_json::Error),
    /// Rows or files.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn why(needed: &StillNeeded) -> String {
    match needed {
        StillNeeded::NotEnded(found) => {
            let found = found.as_str();
            format!("the run is {found}, expected succeeded, failed or cancelled")
        }
        StillNeeded::ContinuedBy(run) => format!("run {run} goes on from it and has not ended"),
        StillNeeded::DrawnBy(grid) => format!("grid {grid} draws its LoRA files and has not ended"),
        StillNeeded::ReproducedBy(run) => format!("run {run} repeats it and has not ended"),
        StillNeeded::HasLoras(1) => {
            "it has a LoRA file; `with_loras=true` deletes it too".to_owned()
        }
        StillNeeded::HasLoras(n) => {
            format!("it has {n} LoRA files; `with_loras=true` deletes them too")
        }
    }
}

/// The run cannot go from where it is to `to`.
pub(super) fn illegal(run: &Run, to: RunState) -> RunError {
    RunError::IllegalTransition {
        from: run.state.as_str(),
        to: to.as_str(),
    }
}
