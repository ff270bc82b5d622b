//! Captioning jobs: a captioner goes through images of a dataset. A job is a row of the table of runs, so that it waits,
//! uses the device, is cancelled and survives as a run does.

mod work;

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::service::{RunError, RunProblem, RunService, check_device};
use super::state;
use crate::captioning::blip::{BlipSettings, Decoding, EarlyStopping};
use crate::captioning::compose::MAX_AFFIX_CHARS;
use crate::captioning::taggers::TaggerSettings;
use crate::captioning::{CaptionError, CaptionMode, Captioner, CaptionerCatalog};
use crate::store::StoreError;
use crate::store::runs::{NewRun, Run, RunState, StillNeeded};

pub(super) use work::work;

/// The most problems of a list that are told.
const MAX_TOLD: usize = 20;

/// What is to be captioned, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct CaptioningRequest {
    /// What captions.
    pub captioner: Captioner,
    /// With which of its models; the first that is complete when absent.
    pub model: Option<String>,
    /// What happens with captions that are there.
    pub mode: CaptionMode,
    /// Only images of this subset.
    pub subset_id: Option<Uuid>,
    /// Only these images; all when empty.
    pub image_ids: Vec<Uuid>,
    /// Comes before each caption.
    pub prefix: String,
    /// Comes after it.
    pub suffix: String,
    /// Whether captions stay as they are and only results are kept.
    pub dry_run: bool,
    /// Device of BLIP.
    pub device: Option<String>,
    /// Of taggers.
    pub tagger: TaggerSettings,
    /// Of BLIP.
    pub blip: BlipChoice,
}

/// A job as its row keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptioningSpec {
    /// Device: `cpu` for taggers.
    pub device: String,
    /// The model's name.
    pub model: String,
    /// See [`CaptioningRequest::mode`].
    pub mode: CaptionMode,
    /// See [`CaptioningRequest::subset_id`].
    pub subset_id: Option<Uuid>,
    /// See [`CaptioningRequest::prefix`].
    pub prefix: String,
    /// See [`CaptioningRequest::suffix`].
    pub suffix: String,
    /// See [`CaptioningRequest::dry_run`].
    pub dry_run: bool,
    /// Of taggers.
    pub tagger: TaggerSettings,
    /// Of BLIP.
    pub blip: BlipChoice,
}

/// How BLIP chooses tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// The most probable caption that a search finds.
    #[default]
    Beam,
    /// Drawn from the most probable tokens.
    Nucleus,
}

/// Settings of BLIP as rows keep them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BlipChoice {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Of a beam search.
    pub beams: usize,
    /// Of a beam search.
    pub length_penalty: f32,
    /// Of nucleus sampling.
    pub top_p: f32,
    /// Of nucleus sampling.
    pub top_k: Option<usize>,
    /// Of nucleus sampling.
    pub temperature: f32,
    /// Of nucleus sampling.
    pub seed: u64,
    /// In tokens.
    pub min_length: usize,
    /// In tokens.
    pub max_length: usize,
    /// Above 1 for fewer repetitions.
    pub repetition_penalty: f32,
    /// What captions begin with.
    pub prompt: String,
    /// Whether that is part of the caption.
    pub keep_prompt: bool,
}

impl Default for BlipChoice {
    fn default() -> Self {
        let own = BlipSettings::default();
        Self {
            sampling: Sampling::Beam,
            beams: 3,
            length_penalty: 1.0,
            top_p: 0.9,
            top_k: None,
            temperature: 1.0,
            seed: 0,
            min_length: own.min_length,
            max_length: own.max_length,
            repetition_penalty: own.repetition_penalty,
            prompt: own.prefix,
            keep_prompt: own.keep_prefix,
        }
    }
}

impl From<&BlipChoice> for BlipSettings {
    fn from(choice: &BlipChoice) -> Self {
        Self {
            decoding: match choice.sampling {
                Sampling::Beam => Decoding::Beam {
                    beams: choice.beams,
                    length_penalty: choice.length_penalty,
                    early_stopping: EarlyStopping::default(),
                },
                Sampling::Nucleus => Decoding::Nucleus {
                    top_p: choice.top_p,
                    top_k: choice.top_k,
                    temperature: choice.temperature,
                    seed: choice.seed,
                },
            },
            min_length: choice.min_length,
            max_length: choice.max_length,
            repetition_penalty: choice.repetition_penalty,
            prefix: choice.prompt.clone(),
            keep_prefix: choice.keep_prompt,
        }
    }
}

impl RunService {
    /// Captioners and their models.
    pub fn captioners(&self) -> CaptionerCatalog {
        CaptionerCatalog::new(self.models().folder())
    }

    /// Queues the captioning of images of a dataset. `api_key_id` asks for it.
    ///
    /// # Errors
    /// [`RunError::DatasetNotFound`]; [`RunError::Invalid`] with every wrong value; [`RunError::Captioner`] when files of
    /// the model are missing.
    pub async fn caption(
        &self,
        dataset_id: Uuid,
        request: CaptioningRequest,
        api_key_id: Option<Uuid>,
    ) -> Result<Run, RunError> {
        self.dataset_exists(dataset_id).await?;
        let device = match (request.captioner.tagger(), &request.device) {
            (Some(_), _) => "cpu".to_owned(),
            (None, Some(device)) => device.clone(),
            (None, None) => self.default_device().to_owned(),
        };
        let mut problems = problems_of(&request);
        problems.extend(check_device(device.clone()).await?);
        let images = self
            .chosen_images(dataset_id, &request, &mut problems)
            .await?;
        if !problems.is_empty() {
            return Err(RunError::Invalid(problems));
        }
        let (catalog, captioner, name) = (self.captioners(), request.captioner, request.model);
        let model =
            tokio::task::spawn_blocking(move || catalog.find(captioner, name.as_deref())).await??;
        let spec = CaptioningSpec {
            device,
            model: model.name,
            mode: request.mode,
            subset_id: request.subset_id,
            prefix: request.prefix,
            suffix: request.suffix,
            dry_run: request.dry_run,
            tagger: request.tagger,
            blip: request.blip,
        };
        let row = NewRun {
            id: Uuid::now_v7(),
            name: format!("captions by {}", captioner.as_str()),
            spec: serde_json::to_string(&spec)?,
            images: serde_json::to_string(&images)?,
            dataset_id,
            captioner: Some(captioner.as_str().to_owned()),
            api_key_id,
            wanted_device: self.wanted_device(&spec.device).await?,
            total_steps: Some(images.len() as u64),
            ..NewRun::default()
        };
        let row = self.store().create_run(row).await?;
        self.wake();
        Ok(row)
    }

    /// The images that are asked for, in the order of the dataset.
    async fn chosen_images(
        &self,
        dataset_id: Uuid,
        request: &CaptioningRequest,
        problems: &mut Vec<RunProblem>,
    ) -> Result<Vec<Uuid>, RunError> {
        let all = self.store().image_names(dataset_id).await?;
        if let Some(subset) = request.subset_id {
            let subsets = self.store().list_subsets(dataset_id).await?;
            if subsets.iter().all(|known| known.id != subset) {
                let message = format!("found {subset}, expected a subset of the dataset");
                problems.push(RunProblem::new("/subset_id", "not_found", message));
            }
        }
        let known: HashSet<Uuid> = all.iter().map(|image| image.id).collect();
        let unknown = request.image_ids.iter().enumerate();
        let unknown = unknown.filter(|(_, id)| !known.contains(id)).take(MAX_TOLD);
        for (index, id) in unknown {
            let message = format!("found {id}, expected an image of the dataset");
            problems.push(RunProblem::new(
                format!("/image_ids/{index}"),
                "not_found",
                message,
            ));
        }
        let wanted: HashSet<Uuid> = request.image_ids.iter().copied().collect();
        let chosen = all.into_iter().filter(|image| {
            let of_subset = request
                .subset_id
                .is_none_or(|subset| image.subset_id == subset);
            of_subset && (wanted.is_empty() || wanted.contains(&image.id))
        });
        let chosen: Vec<Uuid> = chosen.map(|image| image.id).collect();
        if chosen.is_empty() && problems.is_empty() {
            let message = "there are no such images, expected one or more";
            problems.push(RunProblem::new("/image_ids", "not_found", message));
        }
        Ok(chosen)
    }

    async fn dataset_exists(&self, id: Uuid) -> Result<(), RunError> {
        match self.store().dataset(id).await {
            Ok(_) => Ok(()),
            Err(StoreError::NotFound) => Err(RunError::DatasetNotFound(id)),
            Err(error) => Err(error.into()),
        }
    }

    /// One captioning job of a dataset.
    ///
    /// # Errors
    /// [`RunError::DatasetNotFound`]; [`RunError::CaptioningJobNotFound`].
    pub async fn captioning_job(&self, dataset_id: Uuid, id: Uuid) -> Result<Run, RunError> {
        self.dataset_exists(dataset_id).await?;
        match self.row(id).await {
            Ok(row) if row.captioner.is_some() && row.dataset_id == dataset_id => Ok(row),
            Ok(_) | Err(RunError::NotFound(_)) => Err(RunError::CaptioningJobNotFound(id)),
            Err(error) => Err(error),
        }
    }

    /// The captioning jobs of a dataset in the order in which they were asked for, after `after`.
    ///
    /// # Errors
    /// [`RunError::DatasetNotFound`].
    pub async fn captioning_jobs(
        &self,
        dataset_id: Uuid,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Run>, RunError> {
        self.dataset_exists(dataset_id).await?;
        Ok(self
            .store()
            .captioning_jobs(dataset_id, after, limit)
            .await?)
    }

    /// The image that a job is at, while a worker captions.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn captioning_now(&self, job: &Run) -> Result<Option<Uuid>, RunError> {
        if job.state != RunState::Running {
            return Ok(None);
        }
        let images: Vec<Uuid> = serde_json::from_str(&self.store().run_images(job.id).await?)?;
        let at = usize::try_from(job.step).ok();
        Ok(at.and_then(|at| images.get(at)).copied())
    }

    /// Ends a captioning job early; captions that are written stay. Asking twice is no mistake.
    ///
    /// # Errors
    /// Those of [`RunService::captioning_job`]; [`RunError::IllegalTransition`] when it has ended.
    pub async fn cancel_captioning(&self, dataset_id: Uuid, id: Uuid) -> Result<Run, RunError> {
        let job = self.captioning_job(dataset_id, id).await?;
        self.cancel_row(job).await
    }

    /// Deletes a captioning job that has ended, with its results; captions stay.
    ///
    /// # Errors
    /// Those of [`RunService::captioning_job`]; [`RunError::StillNeeded`].
    pub async fn delete_captioning(&self, dataset_id: Uuid, id: Uuid) -> Result<(), RunError> {
        let job = self.captioning_job(dataset_id, id).await?;
        if !state::has_ended(job.state) {
            let needed = StillNeeded::NotEnded(job.state);
            return Err(RunError::StillNeeded(needed));
        }
        self.delete(id, false).await
    }
}

fn problems_of(request: &CaptioningRequest) -> Vec<RunProblem> {
    let mut problems = Vec::new();
    let checked = match request.captioner.tagger() {
        Some(_) => request.tagger.check().map_err(|error| ("/tagger", error)),
        None => BlipSettings::from(&request.blip)
            .check()
            .map_err(|error| ("/blip", error)),
    };
    if let Err((below, error)) = checked {
        let pointer = match &error {
            CaptionError::Setting { setting, .. } => format!("{below}/{}", on_the_wire(setting)),
            _ => below.to_owned(),
        };
        problems.push(RunProblem::new(pointer, "out_of_range", error.to_string()));
    }
    for (pointer, text) in [("/prefix", &request.prefix), ("/suffix", &request.suffix)] {
        let letters = text.chars().count();
        if letters > MAX_AFFIX_CHARS {
            let message = format!("has {letters} characters, expected at most {MAX_AFFIX_CHARS}");
            problems.push(RunProblem::new(pointer, "out_of_range", message));
        }
        if text.chars().any(char::is_control) {
            let message = "has control characters, expected one line of text";
            problems.push(RunProblem::new(pointer, "invalid_value", message));
        }
    }
    if request.captioner.tagger().is_some()
        && request
            .device
            .as_deref()
            .is_some_and(|device| device != "cpu")
    {
        let message = "taggers run on the CPU: expected `cpu` or nothing";
        problems.push(RunProblem::new("/device", "invalid_value", message));
    }
    problems
}

/// BLIP's own name of a setting, as clients know it: `prefix` is what comes before every caption of a job.
fn on_the_wire(setting: &str) -> &str {
    match setting {
        "prefix" => "prompt",
        same => same,
    }
}
