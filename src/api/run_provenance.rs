//! `/v1/runs/{run_id}/provenance`: where a run's files come from; and the run that repeats it.

use actix_web::http::header;
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, get, post};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::auth;
use super::captioning::SubsetTraining;
use super::colors::ColorCorrection;
use super::idempotency::{self, Created};
use super::problem::{Problem, ProblemBody};
use super::run_resource::Run;
use crate::runs::{self, RunService, state};
use crate::store::Store;
use crate::store::runs as rows;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(get_provenance).service(reproduce_run);
}

/// Everything that produced a run's files.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "format": 1, "run_id": "019a9c1f-0000-7c30-a4b2-3d1f2f6f0a11", "name": "lumo",
    "created_at": "2026-11-25T06:42:00Z", "continued_from": null, "reproduction_of": null, "complete": true,
    "inputs_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "inputs": {
        "settings": {"device": "cpu", "base_model_id": "6d2a1f8b0c9e4a57", "settings": {"output_name": "lumo", "seed": 42}},
        "images": [{
            "sha256": "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae", "width_px": 512, "height_px": 512,
            "caption": "lumo, a mascot", "subset": "10_lumo", "repeats": 10, "regularization": false
        }],
        "base_model": {
            "name": "v1-5-pruned-emaonly", "path": "v1-5-pruned-emaonly.safetensors", "family": "sd1",
            "layout": "single_file", "prediction_type": "epsilon",
            "sha256": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
            "files": [{
                "path": "v1-5-pruned-emaonly.safetensors", "size_bytes": 4265146304u64,
                "sha256": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"
            }]
        },
        "plugins": [{
            "role": "optimizer", "id": "adamw", "plugin_id": "lorasmith.adamw", "version": "0.1.0",
            "sha256": "fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9", "settings": {"weight_decay": 0.01}
        }]
    },
    "dataset_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11", "image_ids": ["019a9c1e-8000-7c30-a4b2-3d1f2f6f0a11"],
    "attempts": [{
        "attempt": 1, "begun_at": "2026-11-25T06:42:01Z", "from_step": null,
        "environment": {
            "program_version": "0.1.0", "commit": null, "build": "release", "os": "linux", "arch": "x86_64",
            "device": "cpu", "device_name": "CPU", "driver": "", "instructions": "avx512", "precision": "fp32", "threads": 16
        }
    }],
    "history": [{
        "id": 1, "event": "state", "created_at": "2026-11-25T06:42:00Z", "data": {"state": "queued", "previous": null}
    }],
    "result": {
        "steps": 400, "skipped_steps": 0,
        "losses_sha256": "baa5a0964d3320fbc0c6a922140453c8513ea24ab8fd0577034804a967248096",
        "verdict": null, "early_stop": null,
        "files": [{
            "lora_id": "019a9c20-0000-7c30-a4b2-3d1f2f6f0a11", "file_name": "lumo.safetensors", "step": 400, "final": true,
            "sha256": "486ea46224d1bb4fb680f34f7c9ad96a8f24ec88be73ea8e5a6c65260e9cb8a7", "size_bytes": 9876543
        }]
    }
}))]
pub struct Provenance {
    /// The form of the record; another number means other fields.
    pub format: u32,
    pub run_id: Uuid,
    pub name: String,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// The run that this one makes longer.
    pub continued_from: Option<Uuid>,
    /// The run that this one repeats.
    pub reproduction_of: Option<Uuid>,
    /// Whether the run has succeeded: then the record never changes again, and is a file of the service.
    pub complete: bool,
    /// SHA-256 of `inputs` as JSON without spaces, its fields in this order; the LoRA files name it as
    /// `lorasmith_inputs_sha256`. `null` before a worker has begun.
    pub inputs_sha256: Option<String>,
    pub inputs: ProvenanceInputs,
    pub dataset_id: Uuid,
    /// The images' ids, in the order of `inputs.images`.
    pub image_ids: Vec<String>,
    /// The workers of the run: more than one after a pause or a crash.
    pub attempts: Vec<ProvenanceAttempt>,
    /// Events that are no progress and no result: states, and whatever may have changed the numbers.
    pub history: Vec<ProvenanceEvent>,
    pub result: ProvenanceResult,
}

/// What decides a result.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenanceInputs {
    /// What was asked for, every default filled in; as the service keeps it, `settings` of the run is how to send it.
    #[schema(value_type = Object)]
    pub settings: Value,
    /// The images as they were when the run was made: later changes of the dataset change nothing here.
    pub images: Vec<ProvenanceImage>,
    /// `null` before a worker has begun.
    pub base_model: Option<ProvenanceModel>,
    /// The VAE in place of the base model's own; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub vae: Option<ProvenanceVae>,
    /// None before a worker has begun.
    pub plugins: Vec<ProvenancePlugin>,
}

/// An image as it was when the run was made.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenanceImage {
    pub sha256: String,
    pub width_px: u32,
    pub height_px: u32,
    pub caption: String,
    pub subset: String,
    pub repeats: u32,
    pub regularization: bool,
    /// What it was laid on where it is transparent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background: Option<String>,
    /// Of its mask; absent where it had none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub mask_sha256: Option<String>,
    /// What was done to its colours; absent where nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub color_correction: Option<ColorCorrection>,
    /// Where its subset differs from `settings`; absent where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub training: Option<SubsetTraining>,
}

/// The base model of a run.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenanceModel {
    pub name: String,
    /// Below the model folder.
    pub path: String,
    pub family: Option<String>,
    pub layout: Option<String>,
    /// What its files say; `settings.settings.prediction` may say otherwise.
    pub prediction_type: Option<String>,
    /// As `sha256` of `/v1/models/{model_id}`.
    pub sha256: String,
    pub files: Vec<ProvenanceModelFile>,
}

/// The VAE of a run in place of the base model's own.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenanceVae {
    pub name: String,
    /// Below the model folder.
    pub path: String,
    /// As `sha256` of `/v1/vaes/{vae_id}`.
    pub sha256: String,
    pub files: Vec<ProvenanceModelFile>,
}

/// A file of a base model.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenanceModelFile {
    /// Below the model's folder; of a single file its name.
    pub path: String,
    pub size_bytes: u64,
    pub sha256: String,
}

/// A plugin of a run.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenancePlugin {
    /// `optimizer` or `scheduler`.
    pub role: String,
    pub id: String,
    pub plugin_id: Option<String>,
    pub version: Option<String>,
    /// Digest of its library.
    pub sha256: Option<String>,
    #[schema(value_type = Object)]
    pub settings: Value,
}

/// A worker of a run.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenanceAttempt {
    pub attempt: u32,
    #[serde(with = "time::serde::rfc3339")]
    pub begun_at: OffsetDateTime,
    /// The step that it went on from; `null` for the first worker of a run.
    pub from_step: Option<u64>,
    pub environment: ProvenanceEnvironment,
}

/// What a worker computed with.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenanceEnvironment {
    pub program_version: String,
    /// Where whoever built the program has told it.
    pub commit: Option<String>,
    pub build: String,
    pub os: String,
    pub arch: String,
    pub device: String,
    pub device_name: String,
    pub driver: String,
    /// On the CPU: `amx`, `avx512`, `avx2` or `portable`. Their results differ in the last bits.
    pub instructions: Option<String>,
    pub precision: String,
    /// Results do not depend on it.
    pub threads: u64,
}

/// Something that has happened to a run.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenanceEvent {
    pub id: u64,
    pub event: String,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[schema(value_type = Object)]
    pub data: Value,
}

/// What came of a run.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenanceResult {
    pub steps: u64,
    /// Updates that were left out, as gradients were not finite in the compute precision.
    pub skipped_steps: Option<u64>,
    /// SHA-256 over step and loss of every step, as unsigned integer and float of 8 bytes, little-endian; `null` before
    /// the end.
    pub losses_sha256: Option<String>,
    pub verdict: Option<String>,
    pub early_stop: Option<String>,
    pub files: Vec<ProvenanceFile>,
}

/// A LoRA file of a run.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenanceFile {
    pub lora_id: Uuid,
    pub file_name: String,
    pub step: u64,
    #[serde(rename = "final")]
    pub is_final: bool,
    pub sha256: String,
    pub size_bytes: u64,
}

/// How far a repetition is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReproductionState {
    /// It has not ended.
    Pending,
    /// Every loss and the final file are the same to the bit.
    Identical,
    /// They are not; `differences` says in what.
    Different,
    /// It has ended without a result.
    Unfinished,
}

/// What became of repeating a run.
#[derive(Serialize, ToSchema)]
pub struct Reproduction {
    pub of_run_id: Uuid,
    pub state: ReproductionState,
    /// `null` without a result.
    pub identical: Option<bool>,
    /// The first step whose loss is another; `null` when all are the same.
    pub first_differing_step: Option<u64>,
    /// Losses, files and fields of the environment. One in the environment alone leaves the result identical.
    pub differences: Vec<ReproductionDifference>,
    /// A sentence about the result.
    pub message: Option<String>,
}

/// Something in which a repetition differs.
#[derive(Serialize, ToSchema)]
pub struct ReproductionDifference {
    /// `loss of step …`, `file …`, or a field of the environment.
    pub what: String,
    /// What it is in the original.
    pub original: Option<String>,
    /// What it is in the repetition.
    pub reproduction: Option<String>,
}

impl Reproduction {
    /// What the row of a run says of it; `None` for a run that repeats no other.
    pub(super) fn of(run: &rows::Run) -> Result<Option<Self>, Problem> {
        let Some(of_run_id) = run.reproduction_of else {
            return Ok(None);
        };
        let kept = run.reproduction.as_deref().map(serde_json::from_str);
        let found: Option<runs::Reproduction> = kept.transpose().map_err(Problem::internal)?;
        let state = match (&found, run.state) {
            (Some(found), rows::RunState::Succeeded) if found.identical => {
                ReproductionState::Identical
            }
            (Some(_), rows::RunState::Succeeded) => ReproductionState::Different,
            (_, state) if state::has_ended(state) => ReproductionState::Unfinished,
            _ => ReproductionState::Pending,
        };
        let found = found.filter(|_| run.state == rows::RunState::Succeeded);
        let differences = found
            .iter()
            .flat_map(|found| found.differences.clone())
            .map(|found| ReproductionDifference {
                what: found.what,
                original: found.before,
                reproduction: found.now,
            });
        Ok(Some(Self {
            of_run_id,
            state,
            identical: found.as_ref().map(|found| found.identical),
            first_differing_step: found.as_ref().and_then(|found| found.first_differing_step),
            differences: differences.collect(),
            message: found.map(|found| found.message),
        }))
    }
}

/// Read where a run's files come from.
///
/// Settings, images with captions, base model, plugins, program, device, what has happened, and the files with their
/// digests. Of a run that has succeeded it is complete: the answer is always the same, and its `ETag` is its SHA-256.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The record", body = Provenance),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/provenance")]
pub async fn get_provenance(
    runs: Data<RunService>,
    id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let (record, sha256) = runs.provenance(id.into_inner()).await?;
    let mut answer = HttpResponse::Ok();
    if let Some(sha256) = sha256 {
        answer.insert_header((header::ETAG, format!("\"{sha256}\"")));
    }
    Ok(answer.content_type("application/json").body(record))
}

/// Repeat a run.
///
/// Makes a run of the same settings, seed, images and captions as one that has succeeded, however its dataset has changed
/// since. Base model and plugins have to be those of then: by digest, not by name. When it ends, `reproduction` of the
/// new run says whether losses and files are the same to the bit, and in what the environment differs. A base model
/// that has not been read since it changed is found out by the worker: the run then ends as `failed` with the code
/// `inputs_changed`.
#[utoipa::path(
    tag = "runs",
    params(
        ("run_id" = Uuid, Path),
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters that name this attempt"),
    ),
    responses(
        (status = 201, description = "The new run, queued", body = Run, headers(("Location" = String))),
        (status = 400, description = "`invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`not_reproducible`: it has not succeeded, or goes on from another run; `inputs_changed`: the base model or a plugin has changed or is missing; `idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_settings`: its device is gone; `idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/runs/{run_id}/reproduce")]
pub async fn reproduce_run(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let id = id.into_inner();
    let key = auth::key_of(&request);
    let make = async move {
        let run = runs.reproduce(id, key).await?;
        let location = format!("/v1/runs/{}", run.id);
        let run = Run::of(run, None)?.placed(&runs.places().await?);
        Created::new(location, &run)
    };
    let scope = format!("POST /v1/runs/{id}/reproduce");
    idempotency::once(&store, &request, &scope, &Value::Null, make).await
}
