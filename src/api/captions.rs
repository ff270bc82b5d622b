//! `/v1/datasets/{dataset_id}/captions:batch`, `…/captions:undo`, `…/tags` and the history of an image's caption.

use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, get, post};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::auth;
use super::caption_operations::CaptionOperation;
use super::codes::Code;
use super::extract::{Json, Query};
use super::page::{Page, PageQuery, PageRequest};
use super::patch::insisted_revision;
use super::problem::{FieldError, Problem, ProblemBody};
use super::twins::same_variants;
use crate::datasets::caption_edits::{MAX_OPERATIONS, MAX_TEXT_CHARS};
use crate::datasets::{BatchImage, BatchResult, CaptionBatch, DatasetService, Operation};
use crate::store::datasets as rows;
use crate::store::datasets::ImageFilter;

/// The most images that a batch names.
const MAX_IMAGE_IDS: usize = 10_000;
/// The most images that an answer lists.
const MAX_LISTED: usize = 2000;
/// How many tags are listed if nobody says.
const DEFAULT_TAGS: u32 = 200;
const MAX_TAGS: u32 = 2000;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(edit_captions)
        .service(undo_captions)
        .service(list_caption_changes)
        .service(list_tags);
}

/// Changes of many captions.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "operations": [
        {"op": "replace_text", "find": "blurry", "text": ""}, {"op": "clean"}, {"op": "instance_prompt_first"}
    ],
    "filter": {"tag": "robot", "captioned": true}, "dry_run": true
}))]
pub struct EditCaptions {
    /// What is to be done, in this order. An image that one of them cannot be done to stays as it is.
    #[schema(min_items = 1, max_items = 50)]
    pub operations: Vec<CaptionOperation>,
    /// Which images; all of them when absent.
    #[serde(default)]
    pub filter: CaptionFilter,
    /// Whether nothing is written, and the answer says what would be.
    #[serde(default)]
    pub dry_run: bool,
}

/// Which images; what is absent is not asked for.
#[derive(Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CaptionFilter {
    /// Of this subset.
    pub subset_id: Option<Uuid>,
    /// Of these.
    #[schema(max_items = 10000)]
    pub image_ids: Option<Vec<Uuid>>,
    /// With this tag, in capitals or not.
    #[schema(max_length = 1000)]
    pub tag: Option<String>,
    /// With this text in the caption or the file name, in capitals or not.
    #[schema(max_length = 1000)]
    pub text: Option<String>,
    /// With, or without, a caption.
    pub captioned: Option<bool>,
}

/// What was done with captions, or would be.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "revision": 42, "dry_run": false, "matched": 20, "changed": 1, "skipped": 1,
    "images": [
        {"image_id": "019a9c1e-8a01-7f12-9b34-1a2b3c4d5e6f", "file_name": "lumo_00.png", "subset": "10_lumo",
         "before": "a robot", "after": "lumo, a robot", "skipped": null},
        {"image_id": "019a9c1e-8a02-7f12-9b34-1a2b3c4d5e6f", "file_name": "robot.png", "subset": "1_robot_reg",
         "before": "a robot", "after": "a robot", "skipped": {"code": "regularization",
         "message": "the image is for regularization: it has to do without the instance prompt"}}
    ],
    "left_off": 0
}))]
pub struct CaptionEdits {
    /// What `captions:undo` takes this back by; `null` when nothing was written.
    pub revision: Option<i64>,
    pub dry_run: bool,
    /// Images that the filter means.
    pub matched: usize,
    /// Images whose captions change.
    pub changed: usize,
    /// Images that were left out, each with its reason.
    pub skipped: usize,
    /// Images that change or were left out, in the order of the dataset; 2000 at most.
    pub images: Vec<CaptionEdit>,
    /// How many more there are.
    pub left_off: usize,
}

/// An image whose caption changes, or was left out.
#[derive(Serialize, ToSchema)]
pub struct CaptionEdit {
    pub image_id: Uuid,
    pub file_name: String,
    /// The subset's name.
    pub subset: String,
    pub before: Option<String>,
    pub after: Option<String>,
    /// Why it was left out; `null` when it was not.
    pub skipped: Option<SkippedCaption>,
}

/// Why a caption stays as it is: `regularization`, `no_instance_prompt`, `instance_prompt_in_regularization`,
/// `invalid_caption`.
#[derive(Serialize, ToSchema)]
pub struct SkippedCaption {
    pub code: String,
    pub message: String,
}

/// Which change to take back.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"revision": 42}))]
pub struct UndoCaptions {
    /// The `revision` of a batch, or of a change in an image's history.
    #[schema(minimum = 1)]
    pub revision: i64,
}

/// What was taken back.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"revision": 43, "images": ["019a9c1e-8a01-7f12-9b34-1a2b3c4d5e6f"], "changed_since": []}))]
pub struct UndoneCaptions {
    /// What takes this back in turn; `null` when nothing was changed.
    pub revision: Option<i64>,
    /// Images that have their old captions again.
    pub images: Vec<Uuid>,
    /// Images whose captions were changed since: they stay as they are.
    pub changed_since: Vec<Uuid>,
}

/// Where a change of a caption comes from.
#[derive(Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CaptionChangeKind {
    /// Somebody has written this one caption.
    Edit,
    /// A caption file was uploaded.
    Upload,
    /// One of a batch.
    Batch,
    /// A captioning job has written it.
    Captioner,
    /// An earlier change was undone.
    Undo,
}

same_variants!(CaptionChangeKind, rows::ChangeKind: Edit, Upload, Batch, Captioner, Undo);

/// A change of a caption.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c1e-9000-7c30-a4b2-3d1f2f6f0a11", "revision": 42, "kind": "batch", "before": "a robot",
    "after": "lumo, a robot", "api_key_id": null, "undone": false, "changed_at": "2026-11-25T06:45:00Z"
}))]
pub struct CaptionChange {
    pub id: Uuid,
    /// What `captions:undo` takes it back by, with all other changes of the same call.
    pub revision: i64,
    pub kind: CaptionChangeKind,
    pub before: Option<String>,
    pub after: Option<String>,
    /// The API key that asked for it; `null` without keys, and for uploads.
    pub api_key_id: Option<Uuid>,
    /// Whether it was undone.
    pub undone: bool,
    #[serde(with = "time::serde::rfc3339")]
    pub changed_at: OffsetDateTime,
}

/// Which tags.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct TagQuery {
    /// Only captions of this subset.
    pub subset_id: Option<Uuid>,
    /// Only captions that have this tag, too: what it occurs with.
    #[param(max_length = 1000)]
    pub with: Option<String>,
    /// How many tags at most, frequent ones first.
    #[param(minimum = 1, maximum = 2000, default = 200)]
    pub limit: Option<u32>,
}

/// The tags of captions.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "captions": 20, "distinct": 2, "tags": [
        {"tag": "lumo", "captions": 20, "subsets": [{"subset_id": "019a9c1e-7b5f-7d21-8c43-5e6f7a8b9c0d", "captions": 20}]},
        {"tag": "smiling", "captions": 7, "subsets": [{"subset_id": "019a9c1e-7b5f-7d21-8c43-5e6f7a8b9c0d", "captions": 7}]}
    ]
}))]
pub struct Tags {
    /// Captions that were looked at.
    pub captions: u64,
    /// How many different tags they have.
    pub distinct: usize,
    /// Frequent ones first, then by name.
    pub tags: Vec<Tag>,
}

/// A tag.
#[derive(Serialize, ToSchema)]
pub struct Tag {
    /// As the first caption has it; capitals are not told apart.
    pub tag: String,
    /// Captions that have it.
    pub captions: u64,
    pub subsets: Vec<TagOfSubset>,
}

/// How often a subset has a tag.
#[derive(Serialize, ToSchema)]
pub struct TagOfSubset {
    pub subset_id: Uuid,
    pub captions: u64,
}

/// Change many captions.
///
/// Prepend, append, replace, add, remove, dedupe, sort, limit: in the order given, for the images that the filter means, in
/// one transaction and one revision of the dataset. With `dry_run` nothing is written, and the answer says what would
/// change. `instance_prompt_first` leaves regularization images out, and no operation writes an instance prompt into a
/// regularization caption: such images are listed as skipped, with the reason. Runs keep the captions they were made with.
#[utoipa::path(
    tag = "captions",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("If-Match" = Option<String>, Header, description = "The dataset's ETag that the change is based on"),
    ),
    request_body = EditCaptions,
    responses(
        (status = 200, description = "What was done, or would be", body = CaptionEdits),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`: also when others keep changing the dataset", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_operations`, `invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/datasets/{dataset_id}/captions:batch")]
pub async fn edit_captions(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
    body: Json<EditCaptions>,
) -> Result<web::Json<CaptionEdits>, Problem> {
    let (dataset, _) = datasets.get(*dataset_id).await?;
    let expected = insisted_revision(&request, dataset.revision)?;
    let batch = CaptionBatch::try_from(body.into_inner())
        .map_err(|errors| Problem::fields(Code::InvalidOperations, errors))?;
    let dry_run = batch.dry_run;
    let key = auth::key_of(&request);
    let done = datasets
        .edit_captions(*dataset_id, batch, expected, key)
        .await?;
    Ok(web::Json(CaptionEdits::of(done, dry_run)))
}

/// Undo a change of captions.
///
/// All changes of one call at once: those of a batch, or one caption's. Captions that were changed since stay as they are,
/// and are listed. An undo is a change like others, and can be undone.
#[utoipa::path(
    tag = "captions",
    params(("dataset_id" = Uuid, Path, description = "The dataset's id")),
    request_body = UndoCaptions,
    responses(
        (status = 200, description = "What was taken back", body = UndoneCaptions),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`nothing_to_undo`: the dataset has no such change, or it was undone", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/datasets/{dataset_id}/captions:undo")]
pub async fn undo_captions(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
    body: Json<UndoCaptions>,
) -> Result<web::Json<UndoneCaptions>, Problem> {
    let UndoCaptions { revision } = body.into_inner();
    let key = auth::key_of(&request);
    let undone = datasets.undo_captions(*dataset_id, revision, key).await?;
    Ok(web::Json(UndoneCaptions {
        revision: undone.revision,
        images: undone.images,
        changed_since: undone.changed_since,
    }))
}

/// List the changes of an image's caption.
///
/// Oldest first, page by page: what it was, what it became, when, and by which API key. What an image was uploaded with is
/// `before` of the first change.
#[utoipa::path(
    tag = "captions",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("image_id" = Uuid, Path, description = "The image's id"),
        PageQuery,
    ),
    responses(
        (status = 200, description = "A page of changes", body = Page<CaptionChange>),
        (status = 404, description = "`dataset_not_found`, `image_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/images/{image_id}/captions")]
pub async fn list_caption_changes(
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, image_id) = path.into_inner();
    let page = PageRequest::try_from(query.into_inner())?;
    let changes = datasets
        .caption_history(dataset_id, image_id, page.after_id()?, page.rows())
        .await?;
    Ok(HttpResponse::Ok().json(page.page(
        changes,
        |change| change.id.to_string(),
        CaptionChange::from,
    )))
}

/// Count tags.
///
/// What is between commas in captions, and how many captions have it; with `with`, only captions that have that tag, so
/// that the counts are of what it occurs with.
#[utoipa::path(
    tag = "captions",
    params(("dataset_id" = Uuid, Path, description = "The dataset's id"), TagQuery),
    responses(
        (status = 200, description = "The tags", body = Tags),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/tags")]
pub async fn list_tags(
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
    query: Query<TagQuery>,
) -> Result<web::Json<Tags>, Problem> {
    let TagQuery {
        subset_id,
        with,
        limit,
    } = query.into_inner();
    let limit = limit.unwrap_or(DEFAULT_TAGS);
    if !(1..=MAX_TAGS).contains(&limit) {
        let message = format!("found {limit}, expected 1 to {MAX_TAGS}");
        let code = "out_of_range";
        return Err(Problem::field(Code::InvalidQuery, "/limit", code, message));
    }
    let chars = with.as_ref().map_or(0, |tag| tag.chars().count());
    if chars > MAX_TEXT_CHARS {
        let message = format!("found {chars} characters, expected at most {MAX_TEXT_CHARS}");
        let code = "out_of_range";
        return Err(Problem::field(Code::InvalidQuery, "/with", code, message));
    }
    let filter = ImageFilter {
        subset_id,
        tag: with,
        ..ImageFilter::default()
    };
    let counts = datasets.count_tags(*dataset_id, &filter).await?;
    let distinct = counts.tags.len();
    let tags = counts.tags.into_iter().take(limit as usize);
    let tags = tags.map(|tag| Tag {
        tag: tag.tag,
        captions: tag.captions,
        subsets: tag
            .subsets
            .into_iter()
            .map(|(subset_id, captions)| TagOfSubset {
                subset_id,
                captions,
            })
            .collect(),
    });
    Ok(web::Json(Tags {
        captions: counts.captions,
        distinct,
        tags: tags.collect(),
    }))
}

impl TryFrom<EditCaptions> for CaptionBatch {
    type Error = Vec<FieldError>;

    fn try_from(wire: EditCaptions) -> Result<Self, Vec<FieldError>> {
        let EditCaptions {
            operations,
            filter,
            dry_run,
        } = wire;
        let mut errors = Vec::new();
        let range = |pointer: &str, found: usize, least: usize, most: usize| {
            let message = format!("found {found}, expected {least} to {most}");
            let wrong = !(least..=most).contains(&found);
            wrong.then(|| FieldError::new(pointer, "out_of_range", message))
        };
        errors.extend(range("/operations", operations.len(), 1, MAX_OPERATIONS));
        let ids = filter.image_ids.as_ref().map_or(0, Vec::len);
        errors.extend(range("/filter/image_ids", ids, 0, MAX_IMAGE_IDS));
        for (pointer, words) in [("/filter/tag", &filter.tag), ("/filter/text", &filter.text)] {
            let chars = words.as_ref().map_or(0, |words| words.chars().count());
            errors.extend(range(pointer, chars, 0, MAX_TEXT_CHARS));
        }
        let mut known = Vec::new();
        for (index, operation) in operations.into_iter().take(MAX_OPERATIONS).enumerate() {
            match Operation::try_from(operation) {
                Ok(operation) => known.push(operation),
                Err(error) => errors.push(FieldError::new(
                    format!("/operations/{index}/{}", error.field),
                    error.code,
                    error.message,
                )),
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Self {
            operations: known,
            filter: ImageFilter {
                subset_id: filter.subset_id,
                captioned: filter.captioned,
                tag: filter.tag,
                text: filter.text,
            },
            image_ids: filter.image_ids.map(|ids| ids.into_iter().collect()),
            dry_run,
        })
    }
}

impl CaptionEdits {
    fn of(result: BatchResult, dry_run: bool) -> Self {
        Self {
            revision: result.revision,
            dry_run,
            matched: result.matched,
            changed: result.changed(),
            skipped: result.skipped(),
            left_off: result.images.len().saturating_sub(MAX_LISTED),
            images: result
                .images
                .into_iter()
                .take(MAX_LISTED)
                .map(CaptionEdit::from)
                .collect(),
        }
    }
}

impl From<BatchImage> for CaptionEdit {
    fn from(done: BatchImage) -> Self {
        Self {
            image_id: done.image.id,
            file_name: done.image.file_name,
            subset: done.image.subset_name,
            before: done.image.caption,
            after: done.after,
            skipped: done.skipped.map(|skipped| SkippedCaption {
                code: skipped.code().to_owned(),
                message: skipped.to_string(),
            }),
        }
    }
}

impl From<rows::CaptionChange> for CaptionChange {
    fn from(row: rows::CaptionChange) -> Self {
        Self {
            id: row.id,
            revision: row.revision,
            kind: row.kind.into(),
            before: row.before,
            after: row.after,
            api_key_id: row.api_key_id,
            undone: row.undone,
            changed_at: row.changed_at,
        }
    }
}
