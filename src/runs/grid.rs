//! Grids: checkpoint × prompt × strength of a run's LoRA files at fixed seeds, as one picture. A grid is a row of the
//! table of runs, so that it waits, uses the device, is cancelled and survives as a run does.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::service::{RunError, RunProblem, RunService};
use super::spec::RunSpec;
use crate::diffusion::PredictionType;
use crate::store::loras::Lora;
use crate::store::runs::{NewRun, Run};
use crate::training::{ComputePrecision, SamplePrompt, TrainSettings};

/// The most pictures of a grid.
pub const MAX_CELLS: usize = 200;
/// The most pixels of the sheet without its labels.
const MAX_PIXELS: u64 = 64 << 20;
/// How far from 0 a strength may be.
pub const MAX_STRENGTH: f64 = 4.0;

/// What is to be drawn; an empty list stands for all that the run has.
#[derive(Clone, Debug, Default)]
pub struct GridRequest {
    /// LoRA files of the run.
    pub lora_ids: Vec<Uuid>,
    /// Prompts with their seeds.
    pub prompts: Vec<SamplePrompt>,
    /// Factors on the LoRA.
    pub strengths: Vec<f64>,
}

/// A grid as its row keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GridSpec {
    /// Device of the run.
    pub device: String,
    /// Base model of the run.
    pub base_model_id: String,
    /// VAE of the run in place of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae_id: Option<String>,
    /// Precision of the run.
    pub precision: ComputePrecision,
    /// What the UNet predicts, if the run says so.
    pub prediction: Option<PredictionType>,
    /// Whether nothing of the picture is left at the last timestep, if the run says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_terminal_snr: Option<bool>,
    /// As the run has it.
    pub clip_skip: usize,
    /// As the run has it.
    pub max_token_length: usize,
    /// The files, in the order of their rows.
    pub loras: Vec<GridLora>,
    /// The prompts, each a block of rows.
    pub prompts: Vec<SamplePrompt>,
    /// The columns.
    pub strengths: Vec<f64>,
}

/// A LoRA file of a grid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GridLora {
    /// Its id.
    pub id: Uuid,
    /// Its name.
    pub file_name: String,
    /// Optimizer steps behind it.
    pub step: u64,
    /// Digest of its content.
    pub sha256: String,
}

impl GridSpec {
    /// How many pictures there are.
    pub fn cells(&self) -> usize {
        self.loras.len() * self.prompts.len() * self.strengths.len()
    }
}

impl RunService {
    /// Queues the drawing of a grid. `api_key_id` asks for it.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::Invalid`] with every wrong value.
    pub async fn draw_grid(
        &self,
        id: Uuid,
        request: GridRequest,
        api_key_id: Option<Uuid>,
    ) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        let spec: RunSpec = serde_json::from_str(&run.spec)?;
        let all = self.store().loras(Some(id), None, u64::from(u32::MAX));
        let (loras, mut problems) = choose(&all.await?, &request.lora_ids);
        let or = |given: Vec<_>, own: Vec<_>| if given.is_empty() { own } else { given };
        let grid = GridSpec {
            device: spec.device,
            base_model_id: spec.base_model_id,
            vae_id: spec.vae_id,
            precision: spec.settings.precision,
            prediction: spec.settings.prediction,
            zero_terminal_snr: spec.settings.zero_terminal_snr,
            clip_skip: spec.settings.clip_skip,
            max_token_length: spec.settings.max_token_length,
            loras,
            prompts: or(request.prompts, spec.settings.samples.prompts),
            strengths: match request.strengths.is_empty() {
                true => vec![1.0],
                false => request.strengths,
            },
        };
        problems.extend(problems_of(&grid));
        if !problems.is_empty() {
            return Err(RunError::Invalid(problems));
        }
        let row = NewRun {
            id: Uuid::now_v7(),
            name: run.name,
            spec: serde_json::to_string(&grid)?,
            images: "[]".to_owned(),
            dataset: None,
            dataset_id: run.dataset_id,
            base_model_id: run.base_model_id,
            grid_of: Some(id),
            api_key_id,
            wanted_device: self.wanted_device(&grid.device).await?,
            priority: run.priority,
            total_steps: Some(grid.cells() as u64),
            ..NewRun::default()
        };
        let row = self.store().create_run(row).await?;
        self.wake();
        Ok(row)
    }

    /// One grid of a run.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::GridNotFound`].
    pub async fn grid(&self, run: Uuid, id: Uuid) -> Result<Run, RunError> {
        self.get(run).await?;
        match self.row(id).await {
            Ok(row) if row.grid_of == Some(run) => Ok(row),
            Ok(_) | Err(RunError::NotFound(_)) => Err(RunError::GridNotFound(id)),
            Err(error) => Err(error),
        }
    }

    /// The grids of a run in the order in which they were asked for, after `after`.
    ///
    /// # Errors
    /// [`RunError::NotFound`].
    pub async fn grids(
        &self,
        run: Uuid,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Run>, RunError> {
        self.get(run).await?;
        Ok(self.store().grids(run, after, limit).await?)
    }

    /// Ends the drawing of a grid early. Asking twice is no mistake.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::GridNotFound`]; [`RunError::IllegalTransition`] when it has ended.
    pub async fn cancel_grid(&self, run: Uuid, id: Uuid) -> Result<Run, RunError> {
        let grid = self.grid(run, id).await?;
        self.cancel_row(grid).await
    }
}

/// The files that were asked for, all when none was.
fn choose(all: &[Lora], wanted: &[Uuid]) -> (Vec<GridLora>, Vec<RunProblem>) {
    let of = |lora: &Lora| GridLora {
        id: lora.id,
        file_name: lora.file_name.clone(),
        step: lora.step,
        sha256: lora.sha256.clone(),
    };
    let problem = |pointer: String, message: String| RunProblem {
        pointer,
        code: "not_found",
        message,
    };
    if all.is_empty() {
        let message = "the run has no LoRA files, expected one or more".to_owned();
        return (Vec::new(), vec![problem("/lora_ids".to_owned(), message)]);
    }
    if wanted.is_empty() {
        return (all.iter().map(of).collect(), Vec::new());
    }
    let (mut chosen, mut problems) = (Vec::new(), Vec::new());
    for (index, id) in wanted.iter().enumerate() {
        match all.iter().find(|lora| lora.id == *id) {
            Some(lora) => chosen.push(of(lora)),
            None => {
                let message = format!("found {id}, expected a LoRA file of this run");
                problems.push(problem(format!("/lora_ids/{index}"), message));
            }
        }
    }
    (chosen, problems)
}

fn problems_of(grid: &GridSpec) -> Vec<RunProblem> {
    let mut problems = Vec::new();
    let mut report = |pointer: String, message: String| {
        problems.push(RunProblem {
            pointer,
            code: "out_of_range",
            message,
        });
    };
    for (index, strength) in grid.strengths.iter().enumerate() {
        if !(-MAX_STRENGTH..=MAX_STRENGTH).contains(strength) {
            let message = format!("is {strength}, expected -{MAX_STRENGTH} to {MAX_STRENGTH}");
            report(format!("/strengths/{index}"), message);
        }
    }
    if grid.prompts.is_empty() {
        let message = "found none, and the run has none, expected one or more";
        report("/prompts".to_owned(), message.to_owned());
    }
    // The rules of a run's own prompts.
    let mut settings = TrainSettings::default();
    settings.samples.prompts.clone_from(&grid.prompts);
    for problem in settings.problems() {
        if let Some(pointer) = problem.pointer.strip_prefix("/samples") {
            report(pointer.to_owned(), problem.message);
        }
    }
    let cells = grid.cells();
    if cells > MAX_CELLS {
        let message = format!(
            "{} LoRA files × {} prompts × {} strengths are {cells} pictures, expected at most {MAX_CELLS}",
            grid.loras.len(),
            grid.prompts.len(),
            grid.strengths.len()
        );
        report(String::new(), message);
    }
    // Every column is as wide as the widest picture.
    let widest = grid.prompts.iter().map(|prompt| prompt.width_px).max();
    let heights = grid
        .prompts
        .iter()
        .map(|prompt| u64::from(prompt.height_px));
    let width = u64::from(widest.unwrap_or(0)).saturating_mul(grid.strengths.len() as u64);
    let height = heights.sum::<u64>().saturating_mul(grid.loras.len() as u64);
    let pixels = width.saturating_mul(height);
    if pixels > MAX_PIXELS {
        let message =
            format!("the sheet has {width} × {height} pixels, expected at most {MAX_PIXELS}");
        report(String::new(), message);
    }
    problems
}
