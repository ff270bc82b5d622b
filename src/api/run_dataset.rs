//! `/v1/runs/{run_id}/dataset`: what a run was made with, whatever has become of its dataset; and datasets as archives.

use actix_web::http::header::{self, ContentDisposition, DispositionParam, DispositionType};
use actix_web::web::{self, Bytes, Data};
use actix_web::{HttpResponse, get};
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio_stream::wrappers::ReceiverStream;
use utoipa::{IntoParams, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::captioning::{SubsetAugment, SubsetCaptions};
use super::codes::Code;
use super::extract::Query;
use super::problem::{Problem, ProblemBody};
use crate::datasets::{DatasetService, ExportSource};
use crate::runs::{self, ComparedWith, PinnedDataset, RunService};
use crate::store::Store;

/// The most entries of each list of a comparison.
const MAX_LISTED: usize = 2000;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(export_dataset)
        .service(get_run_dataset)
        .service(export_run_dataset)
        .service(diff_run_dataset);
}

/// The dataset of a run as it was when the run was made.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "run_id": "019a9c1f-0000-7c30-a4b2-3d1f2f6f0a11", "dataset_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11",
    "name": "lumo", "revision": 12, "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "subsets": [{
        "subset_id": "019a9c1e-7b5f-7d21-8c43-5e6f7a8b9c0d", "name": "10_lumo", "repeats": 10, "is_reg": false,
        "instance_prompt": "lumo", "class_prompt": null, "captions": {"keep_tokens": 1}, "augment": {"flip_aug": false},
        "images": 1
    }],
    "images": [{
        "image_id": "019a9c1e-8a01-7f12-9b34-1a2b3c4d5e6f", "file_name": "lumo_00.png",
        "sha256": "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae", "width_px": 512, "height_px": 512,
        "subset": "10_lumo", "caption": "lumo, a mascot", "captioned_by_prompt": false
    }]
}))]
pub struct RunDataset {
    pub run_id: Uuid,
    pub dataset_id: Uuid,
    /// `null` of runs that were made before it was kept.
    pub name: Option<String>,
    /// Of the dataset then, as its ETag told it; `null` of runs that were made before it was kept.
    pub revision: Option<i64>,
    /// Tells what is trained on apart: contents, captions, subsets and their settings.
    pub sha256: String,
    pub subsets: Vec<RunSubset>,
    /// In the order of the dataset.
    pub images: Vec<RunImage>,
}

/// A subset as it was when a run was made.
#[derive(Serialize, ToSchema)]
pub struct RunSubset {
    pub subset_id: Option<Uuid>,
    pub name: String,
    pub repeats: u32,
    pub is_reg: bool,
    pub instance_prompt: Option<String>,
    pub class_prompt: Option<String>,
    pub captions: SubsetCaptions,
    pub augment: SubsetAugment,
    pub images: usize,
}

/// An image as it was when a run was made.
#[derive(Serialize, ToSchema)]
pub struct RunImage {
    pub image_id: String,
    pub file_name: Option<String>,
    pub sha256: String,
    pub width_px: u32,
    pub height_px: u32,
    pub subset: String,
    /// What the run was told of it.
    pub caption: String,
    /// Whether that is the subset's prompt, as the image had no caption.
    pub captioned_by_prompt: bool,
}

/// What to compare with.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct DiffQuery {
    /// `current`, the dataset as it is now; or the id of another run.
    #[param(min_length = 1, max_length = 36, default = "current")]
    pub with: Option<String>,
}

/// In what the dataset of a run differs from another: added is what only the other has. Each list has 2000 entries at most.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "identical": false, "images_added": 0, "images_removed": 0, "captions_changed": 1, "added": [], "removed": [],
    "captions": [{
        "image_id": "019a9c1e-8a01-7f12-9b34-1a2b3c4d5e6f", "file_name": "lumo_00.png", "subset": "10_lumo",
        "before": "lumo", "after": "lumo, a mascot"
    }],
    "subsets": [{"what": "10_lumo/repeats", "before": "10", "after": "5"}], "settings": []
}))]
pub struct DatasetDiff {
    pub identical: bool,
    pub images_added: usize,
    pub images_removed: usize,
    pub captions_changed: usize,
    pub added: Vec<RunImage>,
    pub removed: Vec<RunImage>,
    pub captions: Vec<CaptionDiff>,
    /// Subsets and what they say.
    pub subsets: Vec<SettingDiff>,
    /// Settings of the two runs; none in a comparison with the dataset as it is now.
    pub settings: Vec<SettingDiff>,
}

/// An image that has another caption.
#[derive(Serialize, ToSchema)]
pub struct CaptionDiff {
    pub image_id: String,
    pub file_name: Option<String>,
    pub subset: String,
    pub before: String,
    pub after: String,
}

/// Something that has another value; `null` is none.
#[derive(Serialize, ToSchema)]
pub struct SettingDiff {
    /// A path, such as `10_lumo/repeats` or `captions/keep_tokens`; only a subset's name where just one has it.
    pub what: String,
    pub before: Option<String>,
    pub after: Option<String>,
}

/// Export a dataset.
///
/// A zip in kohya's layout, written as it is sent: `10_lumo/…`, `reg/1_robot/…`, with a `.txt` beside each captioned image.
/// sd-scripts trains on the unpacked folder as it is (`--train_data_dir . --reg_data_dir reg --caption_extension .txt`), or
/// with `--dataset_config lorasmith.toml`. `lorasmith.json` has what the layout cannot say; an upload of the zip brings
/// back the same subsets, order and captions. Names that not every system takes are changed, and restored by an upload.
#[utoipa::path(
    tag = "datasets",
    params(("dataset_id" = Uuid, Path, description = "The dataset's id")),
    responses(
        (status = 200, description = "The archive", content_type = "application/zip", body = Vec<u8>),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/export")]
pub async fn export_dataset(
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let source = datasets.export(*dataset_id).await?;
    Ok(archive(source, &format!("dataset-{dataset_id}.zip")))
}

/// Read what a run was made with.
///
/// Subsets with their settings, images with hash and caption, as they were when the run was made: what has become of the
/// dataset since changes nothing here.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The dataset of then", body = RunDataset),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/dataset")]
pub async fn get_run_dataset(
    runs: Data<RunService>,
    run_id: web::Path<Uuid>,
) -> Result<web::Json<RunDataset>, Problem> {
    let (run, pinned) = runs.pinned_dataset(*run_id).await?;
    Ok(web::Json(RunDataset::of(run.id, pinned)))
}

/// Export what a run was made with.
///
/// The archive of `/v1/datasets/{dataset_id}/export`, of the dataset as it was when the run was made; `lorasmith.toml` in
/// it has the run's sizes and settings of captions, too.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The archive", content_type = "application/zip", body = Vec<u8>),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/dataset/export")]
pub async fn export_run_dataset(
    runs: Data<RunService>,
    store: Data<Store>,
    run_id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let (run, pinned) = runs.pinned_dataset(*run_id).await?;
    let spec = serde_json::from_str(&run.spec).map_err(Problem::internal)?;
    let source = super::run_export::source(&store, &run, pinned, &spec);
    Ok(archive(source, &format!("run-{run_id}-dataset.zip")))
}

/// Compare what a run was made with.
///
/// With the dataset as it is now, or with what another run was made with: images that were added or removed, captions that
/// have changed, subsets and settings.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), DiffQuery),
    responses(
        (status = 200, description = "The differences", body = DatasetDiff),
        (status = 404, description = "`run_not_found`, `dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/dataset/diff")]
pub async fn diff_run_dataset(
    runs: Data<RunService>,
    run_id: web::Path<Uuid>,
    query: Query<DiffQuery>,
) -> Result<web::Json<DatasetDiff>, Problem> {
    let with = match query.into_inner().with.as_deref() {
        None | Some("current") => ComparedWith::Current,
        Some(id) => ComparedWith::Run(Uuid::parse_str(id).map_err(|_| {
            let message = format!("found `{id}`, expected `current` or the id of a run");
            Problem::field(Code::InvalidQuery, "/with", "invalid_value", message)
        })?),
    };
    let diff = runs.compare_dataset(*run_id, with).await?;
    Ok(web::Json(diff.into()))
}

fn archive(source: ExportSource, name: &str) -> HttpResponse {
    let bytes = ReceiverStream::new(source.stream()).map(|part| part.map(Bytes::from));
    HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, "application/zip"))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header(ContentDisposition {
            disposition: DispositionType::Attachment,
            parameters: vec![DispositionParam::Filename(name.to_owned())],
        })
        .streaming(bytes)
}

impl RunDataset {
    fn of(run_id: Uuid, pinned: PinnedDataset) -> Self {
        let sha256 = pinned.sha256();
        let images_of = |name: &str| {
            let images = pinned.images.iter();
            images.filter(|image| image.subset == name).count()
        };
        let subsets = pinned.subsets.iter().map(|subset| RunSubset {
            subset_id: subset.id,
            name: subset.name.clone(),
            repeats: subset.repeats,
            is_reg: subset.is_reg,
            instance_prompt: subset.instance_prompt.clone(),
            class_prompt: subset.class_prompt.clone(),
            captions: subset.training.captions.clone().into(),
            augment: subset.training.augment.into(),
            images: images_of(&subset.name),
        });
        Self {
            run_id,
            dataset_id: pinned.dataset_id,
            name: pinned.name.clone(),
            revision: pinned.revision,
            sha256,
            subsets: subsets.collect(),
            images: pinned.images.into_iter().map(RunImage::from).collect(),
        }
    }
}

impl From<runs::SnapshotImage> for RunImage {
    fn from(image: runs::SnapshotImage) -> Self {
        Self {
            image_id: image.id,
            file_name: image.file_name,
            sha256: image.sha256,
            width_px: image.width_px,
            height_px: image.height_px,
            subset: image.subset,
            caption: image.caption,
            captioned_by_prompt: image.captioned_by_prompt,
        }
    }
}

impl From<runs::DatasetDiff> for DatasetDiff {
    fn from(diff: runs::DatasetDiff) -> Self {
        let setting = |found: runs::Difference| SettingDiff {
            what: found.what,
            before: found.before,
            after: found.now,
        };
        let images = |images: Vec<runs::SnapshotImage>| {
            let images = images.into_iter().take(MAX_LISTED);
            images.map(RunImage::from).collect()
        };
        let captions = diff.captions.len();
        let identical = captions == 0
            && diff.added.is_empty()
            && diff.removed.is_empty()
            && diff.subsets.is_empty()
            && diff.settings.is_empty();
        Self {
            identical,
            images_added: diff.added.len(),
            images_removed: diff.removed.len(),
            captions_changed: captions,
            added: images(diff.added),
            removed: images(diff.removed),
            captions: diff
                .captions
                .into_iter()
                .take(MAX_LISTED)
                .map(|(before, after)| CaptionDiff {
                    image_id: before.id,
                    file_name: before.file_name,
                    subset: before.subset,
                    before: before.caption,
                    after: after.caption,
                })
                .collect(),
            subsets: diff
                .subsets
                .into_iter()
                .take(MAX_LISTED)
                .map(setting)
                .collect(),
            settings: diff.settings.into_iter().map(setting).collect(),
        }
    }
}
