//! Tools on LoRA files: upload, inspection, `:merge`, `:resize`, `:convert`.

use std::collections::BTreeMap;

use actix_web::http::header::{self, HeaderValue};
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, get, post};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::extract::Json;
use super::idempotency::{self, Created};
use super::loras::Lora;
use super::multipart;
use super::problem::{Problem, ProblemBody};
use crate::datasets::limits::Limits;
use crate::loras as domain;
use crate::loras::{LoraError, LoraService, MAX_UPLOAD_BYTES, MergeRequest, tools};
use crate::store::Store;

/// Seconds after which somebody who found all places taken may come back.
const RETRY_AFTER_S: u64 = 10;
/// Room of a form around its file.
const FORM_BYTES: u64 = 1 << 20;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(upload_lora)
        .service(inspect_lora)
        .service(merge_loras)
        .service(resize_lora)
        .service(convert_lora);
}

/// The form of an uploaded LoRA file.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents a body that is streamed")]
pub struct LoraUploadForm {
    /// One `.safetensors` file: LoRA, LoCon, LoHa, LoKr, DoRA or IA³ of sd-scripts, LyCORIS, diffusers or PEFT, of at
    /// most 4 GiB. Its file name becomes the LoRA's.
    #[schema(value_type = String, format = Binary)]
    file: String,
}

/// A LoRA file and how much of it is taken.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoraIngredient {
    pub lora_id: Uuid,
    /// Factor on what it does; may be negative.
    #[serde(default = "one")]
    #[schema(minimum = -100, maximum = 100, default = 1.0)]
    pub strength: f64,
}

fn one() -> f64 {
    1.0
}

/// Number formats of LoRA files.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoraPrecision {
    Fp32,
    Fp16,
    Bf16,
}

impl From<LoraPrecision> for tools::SavePrecision {
    fn from(wire: LoraPrecision) -> Self {
        match wire {
            LoraPrecision::Fp32 => Self::Fp32,
            LoraPrecision::Fp16 => Self::Fp16,
            LoraPrecision::Bf16 => Self::Bf16,
        }
    }
}

/// What to merge.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "loras": [{"lora_id": "019a9c20-1111-7c30-a4b2-3d1f2f6f0a11", "strength": 0.8},
              {"lora_id": "019a9c20-2222-7c30-a4b2-3d1f2f6f0a11", "strength": 0.5}],
    "rank": 32, "file_name": "both"
}))]
pub struct MergeLoras {
    #[schema(min_items = 1, max_items = 32)]
    pub loras: Vec<LoraIngredient>,
    /// Rank of the result, by the largest singular values of the sum. Without it factors are put behind one another:
    /// nothing is lost, and ranks add up; LoHa and LoKr need a rank.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 4096)]
    pub rank: Option<u32>,
    /// Rank of convolutions larger than 1×1; as `rank` without.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 4096)]
    pub conv_rank: Option<u32>,
    /// Number format of the result; that of the first file without.
    #[serde(default)]
    pub precision: Option<LoraPrecision>,
    /// Name of the result, without ending; `merged` without.
    #[serde(default)]
    #[schema(min_length = 1, max_length = 150)]
    pub file_name: Option<String>,
}

/// How the rank of each adapter is found, as in sd-scripts' `resize_lora.py`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::enum_variant_names, reason = "sd-scripts' names")]
pub enum ResizeMethod {
    /// Singular values above the largest divided by `value`, which is at least 2.
    SvRatio,
    /// As many as make up the part `value` of their sum.
    SvCumulative,
    /// As many as make up the part `value` of the Frobenius norm.
    SvFro,
}

/// What to resize.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "lora_id": "019a9c20-1111-7c30-a4b2-3d1f2f6f0a11", "rank": 64, "method": "sv_fro", "value": 0.95
}))]
pub struct ResizeLora {
    pub lora_id: Uuid,
    /// The new rank; with a method the largest one.
    #[schema(minimum = 1, maximum = 4096)]
    pub rank: u32,
    /// The rank of convolutions, 1×1 ones too; as `rank` without.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 4096)]
    pub conv_rank: Option<u32>,
    /// Without it every adapter gets `rank`.
    #[serde(default)]
    pub method: Option<ResizeMethod>,
    /// The method's number.
    #[serde(default)]
    pub value: Option<f64>,
    /// Number format of the result; that of the file without.
    #[serde(default)]
    pub precision: Option<LoraPrecision>,
    /// Name of the result, without ending.
    #[serde(default)]
    #[schema(min_length = 1, max_length = 150)]
    pub file_name: Option<String>,
}

/// A resized file, and what is left in it.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "lora": {
        "id": "019a9c20-3333-7c30-a4b2-3d1f2f6f0a11", "run_id": null, "file_name": "lumo-resized.safetensors", "step": 0,
        "epoch": 0, "final": false, "best": false, "validation_loss": null, "validation_error": null,
        "size_bytes": 4876543, "sha256": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
        "origin": {"kind": "resized", "sources": [{
            "lora_id": "019a9c20-1111-7c30-a4b2-3d1f2f6f0a11", "file_name": "lumo.safetensors",
            "sha256": "6f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef", "strength": null
        }]},
        "self_check": null, "created_at": "2026-11-28T06:44:00Z"
    },
    "fro_retained_mean": 0.96, "fro_retained_std": 0.01,
    "modules": [{"name": "lora_unet_mid_block_attentions_0_proj_in", "old_rank": 16, "new_rank": 7, "new_alpha": 3.5,
                 "sum_retained": 0.91, "fro_retained": 0.96}]
}))]
pub struct ResizedLora {
    pub lora: Lora,
    /// Mean of the parts of the adapters' Frobenius norms that are kept.
    pub fro_retained_mean: f64,
    /// Their standard deviation.
    pub fro_retained_std: f64,
    pub modules: Vec<ResizedAdapter>,
}

/// What became of one adapter.
#[derive(Serialize, ToSchema)]
pub struct ResizedAdapter {
    pub name: String,
    pub old_rank: usize,
    pub new_rank: usize,
    /// `alpha / rank` is what it was.
    pub new_alpha: f64,
    /// Part of the sum of the singular values that is kept.
    pub sum_retained: f64,
    /// Part of the Frobenius norm that is kept.
    pub fro_retained: f64,
}

/// Ways of naming adapters.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoraConvention {
    /// `lora_unet_….lora_down.weight`: sd-scripts, A1111, ComfyUI.
    Kohya,
    /// `unet.….lora_A.weight`: diffusers and PEFT. They read no alpha: it is multiplied into the factors.
    Diffusers,
}

/// Generations of base models.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoraFamily {
    Sd1,
    Sd2,
    Sdxl,
}

/// What to convert.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"lora_id": "019a9c20-1111-7c30-a4b2-3d1f2f6f0a11", "to": "diffusers"}))]
pub struct ConvertLora {
    pub lora_id: Uuid,
    pub to: LoraConvention,
    /// Generation of the base model, for a file that does not tell.
    #[serde(default)]
    pub family: Option<LoraFamily>,
    /// Number format of the result; that of the file without.
    #[serde(default)]
    pub precision: Option<LoraPrecision>,
    /// Name of the result, without ending.
    #[serde(default)]
    #[schema(min_length = 1, max_length = 150)]
    pub file_name: Option<String>,
}

/// What is in a LoRA file.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "size_bytes": 9876543, "sha256": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
    "kinds": ["lora"], "convention": "kohya", "family": "sd1", "described_by": ["sd-scripts", "modelspec"],
    "module_count": 1, "parameters": 18433, "dtypes": {"F16": 3},
    "ranks": [{"kind": "lora", "rank": 16, "alpha": 8.0, "modules": 1}],
    "blocks": [{"block": "unet.mid_block.attentions.0", "modules": 1, "ranks": [16], "alphas": [8.0],
                "norms": {"mean": 0.41, "max": 0.41}}],
    "norms": {"mean": 0.41, "max": 0.41},
    "modules": [{"name": "lora_unet_mid_block_attentions_0_proj_in", "layer": "unet.mid_block.attentions.0.proj_in",
                 "block": "unet.mid_block.attentions.0", "kind": "lora", "dora": false, "rank": 16, "alpha": 8.0,
                 "shape": [1280, 1280], "norm": 0.41}],
    "hashes": {"sshs_model_hash": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
               "sshs_legacy_hash": "5f70bf18", "model_hash_matches": true, "legacy_hash_matches": null},
    "problems": [], "metadata": {"ss_network_dim": "16"}
}))]
pub struct LoraInspection {
    pub size_bytes: u64,
    pub sha256: String,
    /// `lora`, `locon`, `loha`, `lokr`, `dora`, `ia3`, `full`.
    pub kinds: Vec<String>,
    /// How its adapters are called; `null` when nothing is known of the names.
    pub convention: Option<LoraConvention>,
    /// Generation of the base model; `null` when the file does not tell.
    pub family: Option<LoraFamily>,
    /// Whose description it has: `sd-scripts`, `modelspec`, `lorasmith`, `peft`, `other`.
    pub described_by: Vec<String>,
    pub module_count: usize,
    /// Numbers in all tensors.
    pub parameters: u64,
    /// Number formats, and how many tensors have them.
    pub dtypes: BTreeMap<String, usize>,
    /// Ranks and alphas, and how many adapters have them.
    pub ranks: Vec<LoraRankCount>,
    /// By block of the UNet and layer of the text encoders.
    pub blocks: Vec<LoraBlock>,
    pub norms: LoraNorms,
    pub modules: Vec<LoraModule>,
    pub hashes: LoraHashes,
    /// What is wrong with it.
    pub problems: Vec<String>,
    /// The description in the file's header.
    pub metadata: BTreeMap<String, String>,
}

/// How many adapters have a rank and an alpha.
#[derive(Serialize, ToSchema)]
pub struct LoraRankCount {
    pub kind: String,
    pub rank: Option<usize>,
    pub alpha: Option<f32>,
    pub modules: usize,
}

/// The adapters of one block.
#[derive(Serialize, ToSchema)]
pub struct LoraBlock {
    pub block: String,
    pub modules: usize,
    pub ranks: Vec<usize>,
    pub alphas: Vec<f32>,
    pub norms: LoraNorms,
}

/// Frobenius norms of what adapters add to their weights at strength 1.
#[derive(Serialize, ToSchema)]
pub struct LoraNorms {
    /// `null` of kinds that only scale weights.
    pub mean: Option<f64>,
    pub max: Option<f64>,
}

/// One adapter.
#[derive(Serialize, ToSchema)]
pub struct LoraModule {
    pub name: String,
    /// The layer, as diffusers calls it.
    pub layer: Option<String>,
    pub block: String,
    pub kind: String,
    /// Whether it has DoRA's magnitudes.
    pub dora: bool,
    pub rank: Option<usize>,
    pub alpha: Option<f32>,
    /// Outputs, and inputs × kernel; 0 where it hangs on the base.
    #[schema(min_items = 2, max_items = 2)]
    pub shape: Vec<usize>,
    /// Frobenius norm; `null` where it hangs on the base.
    pub norm: Option<f64>,
}

/// sd-scripts' hashes, computed, and whether the description tells the same; `null` where it tells nothing.
#[derive(Serialize, ToSchema)]
pub struct LoraHashes {
    pub sshs_model_hash: String,
    pub sshs_legacy_hash: String,
    pub model_hash_matches: Option<bool>,
    pub legacy_hash_matches: Option<bool>,
}

impl From<tools::Norms> for LoraNorms {
    fn from(norms: tools::Norms) -> Self {
        Self {
            mean: norms.mean,
            max: norms.max,
        }
    }
}

impl From<tools::Inspection> for LoraInspection {
    fn from(found: tools::Inspection) -> Self {
        let ranks = found.ranks.into_iter().map(|count| LoraRankCount {
            kind: count.kind.to_string(),
            rank: count.rank,
            alpha: count.alpha,
            modules: count.modules,
        });
        let blocks = found.blocks.into_iter().map(|block| LoraBlock {
            block: block.block,
            modules: block.modules,
            ranks: block.ranks,
            alphas: block.alphas,
            norms: block.norms.into(),
        });
        let modules = found.modules.into_iter().map(|module| LoraModule {
            name: module.name,
            layer: module.layer,
            block: module.block,
            kind: module.kind.to_string(),
            dora: module.dora,
            rank: module.rank,
            alpha: module.alpha,
            shape: module.shape.to_vec(),
            norm: module.norm,
        });
        Self {
            size_bytes: found.size_bytes,
            sha256: found.sha256,
            kinds: found.kinds,
            convention: found.convention.map(|convention| match convention {
                tools::Convention::Kohya => LoraConvention::Kohya,
                tools::Convention::Diffusers => LoraConvention::Diffusers,
            }),
            family: found.family.map(|family| match family {
                tools::Family::Sd1 => LoraFamily::Sd1,
                tools::Family::Sd2 => LoraFamily::Sd2,
                tools::Family::Sdxl => LoraFamily::Sdxl,
            }),
            described_by: found.described_by.into_iter().map(str::to_owned).collect(),
            module_count: found.module_count,
            parameters: found.parameters,
            dtypes: found.dtypes,
            ranks: ranks.collect(),
            blocks: blocks.collect(),
            norms: found.norms.into(),
            modules: modules.collect(),
            hashes: LoraHashes {
                sshs_model_hash: found.hashes.sshs_model_hash,
                sshs_legacy_hash: found.hashes.sshs_legacy_hash,
                model_hash_matches: found.hashes.model_hash_matches,
                legacy_hash_matches: found.hashes.legacy_hash_matches,
            },
            problems: found.problems,
            metadata: found.metadata,
        }
    }
}

impl From<LoraError> for Problem {
    fn from(error: LoraError) -> Self {
        let text = error.to_string();
        match error {
            LoraError::NotFound(_) => Self::new(Code::LoraNotFound, text),
            LoraError::Busy => Self::new(Code::Overloaded, text)
                .with_header(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S)),
            LoraError::Unusable(_) => Self::new(Code::LoraUnusable, text),
            LoraError::Option { field, message } => {
                let pointer = format!("/{field}");
                Self::field(Code::InvalidLoraRequest, &pointer, "invalid_value", message)
            }
            LoraError::StorageFull => Self::new(Code::StorageFull, text),
            LoraError::Store(error) if error.is_storage_full() => Self::new(
                Code::StorageFull,
                "there is no room left in the data folder",
            ),
            LoraError::Store(_) | LoraError::Failed(_) => Self::internal(text),
        }
    }
}

impl TryFrom<&MergeLoras> for MergeRequest {
    type Error = Problem;

    fn try_from(wire: &MergeLoras) -> Result<Self, Problem> {
        let wrong = |pointer: &str, message: String| {
            Problem::field(Code::InvalidLoraRequest, pointer, "out_of_range", message)
        };
        let count = wire.loras.len();
        if !(1..=tools::MAX_FILES).contains(&count) {
            let message = format!("found {count}, expected 1 to {}", tools::MAX_FILES);
            return Err(wrong("/loras", message));
        }
        let most = tools::MAX_STRENGTH;
        for (index, one) in wire.loras.iter().enumerate() {
            if !(-most..=most).contains(&one.strength) {
                let message = format!("found {}, expected -{most} to {most}", one.strength);
                return Err(wrong(&format!("/loras/{index}/strength"), message));
            }
        }
        let method = match (wire.rank, wire.conv_rank) {
            (None, None) => tools::Method::Concatenate,
            (None, Some(_)) => {
                let message = "is given without `rank`";
                return Err(Problem::field(
                    Code::InvalidLoraRequest,
                    "/conv_rank",
                    "invalid_value",
                    message,
                ));
            }
            (Some(rank), conv_rank) => tools::Method::Svd {
                rank: rank as usize,
                conv_rank: conv_rank.unwrap_or(rank) as usize,
            },
        };
        Ok(Self {
            sources: wire
                .loras
                .iter()
                .map(|one| (one.lora_id, one.strength))
                .collect(),
            method,
            precision: wire.precision.map(Into::into),
            file_name: checked_name(wire.file_name.as_deref())?,
        })
    }
}

impl TryFrom<&ResizeLora> for tools::Resizing {
    type Error = Problem;

    fn try_from(wire: &ResizeLora) -> Result<Self, Problem> {
        let rule = match (wire.method, wire.value) {
            (None, None) => tools::Rule::Rank,
            (Some(method), Some(value)) => {
                let name = match method {
                    ResizeMethod::SvRatio => tools::RuleName::SvRatio,
                    ResizeMethod::SvCumulative => tools::RuleName::SvCumulative,
                    ResizeMethod::SvFro => tools::RuleName::SvFro,
                };
                tools::Rule::named(name, value).map_err(LoraError::from)?
            }
            _ => {
                let message = "`method` and `value` belong together";
                return Err(Problem::field(
                    Code::InvalidLoraRequest,
                    "/value",
                    "invalid_value",
                    message,
                ));
            }
        };
        Ok(Self {
            rule,
            rank: wire.rank as usize,
            conv_rank: wire.conv_rank.map(|rank| rank as usize),
            precision: wire.precision.map(Into::into),
        })
    }
}

impl From<&ConvertLora> for tools::Conversion {
    fn from(wire: &ConvertLora) -> Self {
        Self {
            to: match wire.to {
                LoraConvention::Kohya => tools::Convention::Kohya,
                LoraConvention::Diffusers => tools::Convention::Diffusers,
            },
            precision: wire.precision.map(Into::into),
            family: wire.family.map(|family| match family {
                LoraFamily::Sd1 => tools::Family::Sd1,
                LoraFamily::Sd2 => tools::Family::Sd2,
                LoraFamily::Sdxl => tools::Family::Sdxl,
            }),
            layout: None,
        }
    }
}

fn checked_name(name: Option<&str>) -> Result<Option<String>, Problem> {
    let Some(name) = name else {
        return Ok(None);
    };
    let length = name.chars().count();
    if !(1..=150).contains(&length) {
        let message = format!("found {length} characters, expected 1 to 150");
        return Err(Problem::field(
            Code::InvalidLoraRequest,
            "/file_name",
            "invalid_value",
            message,
        ));
    }
    Ok(Some(name.to_owned()))
}

/// Upload a LoRA file.
///
/// A `.safetensors` file from elsewhere, streamed to disk, of any kind and naming that the tools know: its keys, shapes
/// and numbers are read before it is taken. It is listed, downloaded and deleted like those of runs; `origin` tells that
/// no run has made it.
#[utoipa::path(
    tag = "loras",
    request_body(content = LoraUploadForm, content_type = "multipart/form-data"),
    responses(
        (status = 201, description = "The file is kept", body = Lora, headers(("Location" = String))),
        (status = 400, description = "`malformed_multipart`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 413, description = "`payload_too_large`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 415, description = "`unsupported_media_type`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`nothing_uploaded`, `lora_unusable`, `invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "`overloaded`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 507, description = "`storage_full`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/loras")]
pub async fn upload_lora(
    request: HttpRequest,
    loras: Data<LoraService>,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let scratch = loras.scratch()?;
    let limits = Limits {
        request_bytes: MAX_UPLOAD_BYTES + FORM_BYTES,
        files: 1,
        archive_bytes: MAX_UPLOAD_BYTES,
        ..Limits::default()
    };
    let form = multipart::receive(&request, payload, scratch.path(), &limits).await?;
    if let Some((name, _)) = form.fields.first() {
        let message = "is no field of this form";
        return Err(Problem::field(
            Code::InvalidBody,
            &format!("/{name}"),
            "unknown_field",
            message,
        ));
    }
    let Some(file) = form.files.into_iter().next() else {
        return Err(Problem::new(Code::NothingUploaded, "the form has no file"));
    };
    let lora = Lora::other(loras.upload(file.path, &file.name).await?);
    Ok(HttpResponse::Created()
        .insert_header((header::LOCATION, format!("/v1/loras/{}", lora.id)))
        .json(lora))
}

/// Look into a LoRA file.
///
/// Kind, names, ranks and alphas, number formats, norms of what each adapter adds, the description, and whether
/// sd-scripts' hashes in it are right. The file is read for it; of a large one that takes seconds.
#[utoipa::path(
    tag = "loras",
    params(("lora_id" = Uuid, Path)),
    responses(
        (status = 200, description = "What is in it", body = LoraInspection),
        (status = 404, description = "`lora_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`lora_unusable`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "`overloaded`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/loras/{lora_id}/inspection")]
pub async fn inspect_lora(
    loras: Data<LoraService>,
    id: web::Path<Uuid>,
) -> Result<web::Json<LoraInspection>, Problem> {
    Ok(web::Json(loras.inspect(id.into_inner()).await?.into()))
}

/// Merge LoRA files.
///
/// The sum of what they do, each times its strength, as a new file with sd-scripts' names: exactly, or down to a rank.
/// Adapters that only some of the files have are kept. A DoRA or an IA³ cannot be merged into a LoRA.
#[utoipa::path(
    tag = "loras",
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters that name this attempt")),
    request_body = MergeLoras,
    responses(
        (status = 201, description = "The new file", body = Lora, headers(("Location" = String))),
        (status = 400, description = "`invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`lora_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_body`, `invalid_lora_request`, `lora_unusable`: files for different base models, adapters that do not fit together, a kind that cannot be merged; `idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "`overloaded`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 507, description = "`storage_full`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/loras:merge")]
pub async fn merge_loras(
    request: HttpRequest,
    loras: Data<LoraService>,
    store: Data<Store>,
    body: Json<MergeLoras>,
) -> Result<HttpResponse, Problem> {
    let wire = body.into_inner();
    let asked = MergeRequest::try_from(&wire)?;
    let make = async move { created(Lora::other(loras.merge(asked).await?)) };
    idempotency::once(&store, &request, "POST /v1/loras:merge", &wire, make).await
}

/// Give a LoRA file other ranks.
///
/// As sd-scripts' `resize_lora.py`: a fixed rank, or one that a rule finds for each adapter. The result is a new file.
#[utoipa::path(
    tag = "loras",
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters that name this attempt")),
    request_body = ResizeLora,
    responses(
        (status = 201, description = "The new file, and what is left", body = ResizedLora, headers(("Location" = String))),
        (status = 400, description = "`invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`lora_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_body`, `invalid_lora_request`, `lora_unusable`: neither LoRA nor LoCon; `idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "`overloaded`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 507, description = "`storage_full`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/loras:resize")]
pub async fn resize_lora(
    request: HttpRequest,
    loras: Data<LoraService>,
    store: Data<Store>,
    body: Json<ResizeLora>,
) -> Result<HttpResponse, Problem> {
    let wire = body.into_inner();
    let (id, wish) = (wire.lora_id, tools::Resizing::try_from(&wire)?);
    let file_name = checked_name(wire.file_name.as_deref())?;
    let make = async move {
        let domain::Work { lora, report } = loras.resize(id, wish, file_name).await?;
        let modules = report.modules.into_iter().map(|module| ResizedAdapter {
            name: module.name,
            old_rank: module.old_rank,
            new_rank: module.new_rank,
            new_alpha: module.new_alpha,
            sum_retained: module.sum_retained,
            fro_retained: module.fro_retained,
        });
        let location = format!("/v1/loras/{}", lora.id);
        let resized = ResizedLora {
            lora: Lora::other(lora),
            fro_retained_mean: report.fro_retained_mean,
            fro_retained_std: report.fro_retained_std,
            modules: modules.collect(),
        };
        Created::new(location, &resized)
    };
    idempotency::once(&store, &request, "POST /v1/loras:resize", &wire, make).await
}

/// Convert a LoRA file to other names.
///
/// Between sd-scripts' names and those of diffusers and PEFT, of Stable Diffusion 1, 2 and XL. The result is a new file.
#[utoipa::path(
    tag = "loras",
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters that name this attempt")),
    request_body = ConvertLora,
    responses(
        (status = 201, description = "The new file", body = Lora, headers(("Location" = String))),
        (status = 400, description = "`invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`lora_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_body`, `invalid_lora_request`, `lora_unusable`: a name that is not known, a kind that the other format does not know; `idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "`overloaded`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 507, description = "`storage_full`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/loras:convert")]
pub async fn convert_lora(
    request: HttpRequest,
    loras: Data<LoraService>,
    store: Data<Store>,
    body: Json<ConvertLora>,
) -> Result<HttpResponse, Problem> {
    let wire = body.into_inner();
    let (id, wish) = (wire.lora_id, tools::Conversion::from(&wire));
    let file_name = checked_name(wire.file_name.as_deref())?;
    let make = async move { created(Lora::other(loras.convert(id, wish, file_name).await?)) };
    idempotency::once(&store, &request, "POST /v1/loras:convert", &wire, make).await
}

fn created(lora: Lora) -> Result<Created, Problem> {
    Created::new(format!("/v1/loras/{}", lora.id), &lora)
}
