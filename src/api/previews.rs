//! What a run would see of a dataset's images: in numbers, and as pictures.

use actix_web::http::header;
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, get};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::colors::ColorCorrection;
use super::download::matches_any;
use super::extract::Query;
use super::framing::{framing_query, in_range, query_string};
use super::page::{Page, PageQuery, PageRequest};
use super::problem::{Problem, ProblemBody};
use crate::preparation::{
    MAX_SIDE_PX, MIN_SIDE_PX, Planned, PreparationError, PreparationService, Rendering, Seen,
};
use crate::runs::settings::{BucketSettings, ColorCorrection as Recipe};

/// The longest side of a picture when nobody says one.
const USUAL_SIDE_PX: u32 = 256;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(preview_dataset)
        .service(get_image_preview)
        .service(get_image_thumbnail);
}

framing_query! {
    /// Which images, and how a run would be set.
    PreviewQuery {
        /// How many at most.
        #[param(minimum = 1, maximum = 200, default = 50)]
        limit: Option<u32>,
        /// `next_cursor` of the page before.
        cursor: Option<String>,
        /// As if all images had this one.
        #[param(inline)]
        color_correction: Option<ColorCorrection>,
    }
}

framing_query! {
    /// How a run would be set, and how large the picture is to be.
    ImagePreviewQuery {
        /// The longest side of the answer; it is never larger than the bucket.
        #[param(minimum = 16, maximum = 1024, default = 256)]
        size_px: Option<u32>,
        /// As if the image had this one.
        #[param(inline)]
        color_correction: Option<ColorCorrection>,
        /// Whether what does not count in a run with `loss.masked` is darkened: by the image's mask, or by its transparency
        /// where it has none.
        #[param(default = false)]
        masked: Option<bool>,
    }
}

/// How large a thumbnail is to be.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ThumbnailQuery {
    /// The longest side; a smaller image is not enlarged.
    #[param(minimum = 16, maximum = 1024, default = 256)]
    pub size_px: Option<u32>,
}

/// An image as a run would see it: resized to `resized_*`, then cut to the bucket.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "image_id": "019a9c1e-8a01-7f12-9b34-1a2b3c4d5e6f", "file_name": "lumo_00.png", "subset": "10_lumo",
    "width_px": 1920, "height_px": 1080, "bucket_width_px": 640, "bucket_height_px": 384,
    "resized_width_px": 683, "resized_height_px": 384,
    "crop": {"left_px": 21, "top_px": 0, "width_px": 640, "height_px": 384},
    "crop_loss": 0.063, "upscaled": false, "color_correction": null,
    "preview_url": "/v1/datasets/019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11/images/019a9c1e-8a01-7f12-9b34-1a2b3c4d5e6f/preview?width_px=512&height_px=512",
    "thumbnail_url": "/v1/datasets/019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11/images/019a9c1e-8a01-7f12-9b34-1a2b3c4d5e6f/thumbnail"
}))]
pub struct ImagePreview {
    pub image_id: Uuid,
    pub file_name: String,
    pub subset: String,
    /// Of the file, after the EXIF orientation.
    pub width_px: u32,
    pub height_px: u32,
    /// What it is trained at.
    pub bucket_width_px: u32,
    pub bucket_height_px: u32,
    pub resized_width_px: u32,
    pub resized_height_px: u32,
    /// What is kept of the resized picture; with `crop=random` the centre, one of the possible places.
    pub crop: CropBox,
    /// The share of the resized picture that is cut off, 0 to 1.
    pub crop_loss: f64,
    /// Whether it is enlarged.
    pub upscaled: bool,
    /// What is done to its colours.
    pub color_correction: Option<ColorCorrection>,
    /// The picture of all this.
    pub preview_url: String,
    /// The file, made smaller.
    pub thumbnail_url: String,
}

/// A part of a picture.
#[derive(Serialize, ToSchema)]
pub struct CropBox {
    pub left_px: u32,
    pub top_px: u32,
    pub width_px: u32,
    pub height_px: u32,
}

/// Preview what a run would see.
///
/// Bucket, size and crop of each image, with the settings of a run; `preview_url` is the picture of it. Oldest first, page
/// by page.
#[utoipa::path(
    tag = "datasets",
    params(("dataset_id" = Uuid, Path, description = "The dataset's id"), PreviewQuery),
    responses(
        (status = 200, description = "A page of previews", body = Page<ImagePreview>),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/preview")]
pub async fn preview_dataset(
    preparation: Data<PreparationService>,
    dataset_id: web::Path<Uuid>,
    query: Query<PreviewQuery>,
) -> Result<HttpResponse, Problem> {
    let query = query.into_inner();
    let settings = query.framing();
    let correction = query.color_correction;
    let page = PageRequest::try_from(PageQuery {
        limit: query.limit,
        cursor: query.cursor,
    })?;
    let rows = preparation
        .preview(
            *dataset_id,
            &settings,
            correction.map(Into::into),
            page.after_id()?,
            page.rows(),
        )
        .await?;
    let wire = |seen| ImagePreview::of(seen, *dataset_id, &settings, correction);
    Ok(HttpResponse::Ok().json(page.page(rows, |seen| seen.image_id.to_string(), wire)))
}

/// Show what a run would see of an image.
///
/// Resized, cropped and colour-corrected as a run does it, then made smaller: a JPEG. With `color_correction` a recipe is
/// shown before it is stored. `match_median` shows the median of the images that are measured so far.
#[utoipa::path(
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("image_id" = Uuid, Path, description = "The image's id"),
        ImagePreviewQuery,
        ("If-None-Match" = Option<String>, Header, description = "ETags the client has already"),
    ),
    responses(
        (status = 200, description = "The picture", content_type = "image/jpeg", headers(("ETag" = String))),
        (status = 304, description = "The client has it already"),
        (status = 404, description = "`dataset_not_found`, `image_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`image_unreadable`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/images/{image_id}/preview")]
pub async fn get_image_preview(
    request: HttpRequest,
    preparation: Data<PreparationService>,
    path: web::Path<(Uuid, Uuid)>,
    query: Query<ImagePreviewQuery>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, image_id) = path.into_inner();
    let query = query.into_inner();
    let rendering = Rendering {
        settings: query.framing(),
        correction: query.color_correction.map(Into::into),
        masked: query.masked.unwrap_or(false),
        side_px: side(query.size_px)?,
    };
    let planned = preparation.plan_preview(dataset_id, image_id, &rendering);
    picture(&request, &preparation, planned.await?).await
}

/// Show an image as a thumbnail.
///
/// The file as it is, upright, made smaller: a JPEG.
#[utoipa::path(
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("image_id" = Uuid, Path, description = "The image's id"),
        ThumbnailQuery,
        ("If-None-Match" = Option<String>, Header, description = "ETags the client has already"),
    ),
    responses(
        (status = 200, description = "The picture", content_type = "image/jpeg", headers(("ETag" = String))),
        (status = 304, description = "The client has it already"),
        (status = 404, description = "`dataset_not_found`, `image_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`image_unreadable`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/images/{image_id}/thumbnail")]
pub async fn get_image_thumbnail(
    request: HttpRequest,
    preparation: Data<PreparationService>,
    path: web::Path<(Uuid, Uuid)>,
    query: Query<ThumbnailQuery>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, image_id) = path.into_inner();
    let side_px = side(query.into_inner().size_px)?;
    let planned = preparation.plan_thumbnail(dataset_id, image_id, side_px);
    picture(&request, &preparation, planned.await?).await
}

fn side(asked: Option<u32>) -> Result<u32, Problem> {
    in_range("size_px", asked, USUAL_SIDE_PX, MIN_SIDE_PX..=MAX_SIDE_PX)
}

/// The name of a picture says all that decides it, so that nothing has to be made to know what the client has.
async fn picture(
    request: &HttpRequest,
    preparation: &PreparationService,
    planned: Planned,
) -> Result<HttpResponse, Problem> {
    let etag = format!("\"{}\"", planned.name);
    if matches_any(request, &etag) {
        return Ok(HttpResponse::NotModified()
            .insert_header((header::ETAG, etag))
            .insert_header((header::CACHE_CONTROL, "private, no-cache"))
            .finish());
    }
    let made = preparation.render(planned).await?;
    Ok(HttpResponse::Ok()
        .insert_header((header::ETAG, etag))
        .insert_header((header::CACHE_CONTROL, "private, no-cache"))
        .insert_header((header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .content_type("image/jpeg")
        .body(made.bytes))
}

impl ImagePreview {
    fn of(
        seen: Seen,
        dataset_id: Uuid,
        settings: &BucketSettings,
        correction: Option<ColorCorrection>,
    ) -> Self {
        let image = format!("/v1/datasets/{dataset_id}/images/{}", seen.image_id);
        let correction = correction.map_or_else(String::new, |correction| {
            format!("&color_correction={}", correction.word())
        });
        Self {
            image_id: seen.image_id,
            file_name: seen.file_name,
            subset: seen.subset,
            width_px: seen.size_px.0,
            height_px: seen.size_px.1,
            bucket_width_px: seen.bucket.0,
            bucket_height_px: seen.bucket.1,
            resized_width_px: seen.resized.0,
            resized_height_px: seen.resized.1,
            crop: CropBox {
                left_px: seen.origin.0,
                top_px: seen.origin.1,
                width_px: seen.bucket.0,
                height_px: seen.bucket.1,
            },
            crop_loss: seen.crop_loss,
            upscaled: seen.upscaled,
            color_correction: seen.correction.map(ColorCorrection::of),
            preview_url: format!("{image}/preview?{}{correction}", query_string(settings)),
            thumbnail_url: format!("{image}/thumbnail"),
        }
    }
}

impl ColorCorrection {
    fn of(recipe: Recipe) -> Self {
        match recipe {
            Recipe::AutoLevels => Self::AutoLevels,
            Recipe::GreyWorld => Self::GreyWorld,
            Recipe::MatchMedian => Self::MatchMedian,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::AutoLevels => "auto_levels",
            Self::GreyWorld => "grey_world",
            Self::MatchMedian => "match_median",
        }
    }
}

impl From<PreparationError> for Problem {
    fn from(error: PreparationError) -> Self {
        let detail = error.to_string();
        match error {
            PreparationError::DatasetNotFound(_) => Self::new(Code::DatasetNotFound, detail),
            PreparationError::ImageNotFound(_) => Self::new(Code::ImageNotFound, detail),
            PreparationError::Settings(field, message) => Self::field(
                Code::InvalidQuery,
                &format!("/{field}"),
                "out_of_range",
                message,
            ),
            PreparationError::Picture(_) | PreparationError::Encode(_) => {
                tracing::warn!(error = %detail, "a picture cannot be shown");
                Self::new(Code::ImageUnreadable, "the image's file cannot be decoded")
            }
            error => Self::internal(error),
        }
    }
}
