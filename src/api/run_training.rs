//! Settings of a run about how is trained and in what form, and their way to the domain: plugins, sizes of pictures,
//! number formats.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::twins::same_variants;
use crate::runs::settings::{self as domain, BucketSettings, PredictionType};

/// A plugin's component and its settings.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PluginChoice)] // `Plugin` is what `GET /v1/plugins` lists
pub struct Plugin {
    /// Its id.
    pub id: String,
    /// Its settings, by the schema that it is listed with; defaults for what is absent.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub settings: Map<String, Value>,
}

impl From<Plugin> for domain::PluginChoice {
    fn from(wire: Plugin) -> Self {
        Self {
            id: wire.id,
            settings: Value::Object(wire.settings),
        }
    }
}

impl From<domain::PluginChoice> for Plugin {
    fn from(domain: domain::PluginChoice) -> Self {
        let settings = match domain.settings {
            Value::Object(settings) => settings,
            _ => Map::new(),
        };
        Self {
            id: domain.id,
            settings,
        }
    }
}

/// Width and height.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Resolution {
    /// A multiple of 8.
    #[schema(minimum = 8)]
    pub width_px: u32,
    /// A multiple of 8.
    #[schema(minimum = 8)]
    pub height_px: u32,
}

impl Default for Resolution {
    fn default() -> Self {
        Self::of(&BucketSettings::default())
    }
}

impl Resolution {
    pub(super) fn of(domain: &BucketSettings) -> Self {
        Self {
            width_px: domain.width_px,
            height_px: domain.height_px,
        }
    }
}

/// Sizes for other aspect ratios, by sd-scripts' rule.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Buckets {
    /// Off, every picture is cropped to `resolution`.
    pub enabled: bool,
    /// Shortest side.
    pub min_px: u32,
    /// Longest side.
    pub max_px: u32,
    /// Sides are multiples of this.
    pub step_px: u32,
    /// Leave small pictures as they are.
    pub no_upscale: bool,
}

impl Default for Buckets {
    fn default() -> Self {
        BucketSettings::default().into()
    }
}

impl Buckets {
    /// With the size that they are around: the domain has both in one.
    pub(super) fn around(self, resolution: Resolution, crop: Crop) -> BucketSettings {
        let Resolution {
            width_px,
            height_px,
        } = resolution;
        let Self {
            enabled,
            min_px,
            max_px,
            step_px,
            no_upscale,
        } = self;
        BucketSettings {
            width_px,
            height_px,
            enabled,
            min_px,
            max_px,
            step_px,
            no_upscale,
            crop: crop.into(),
        }
    }
}

impl From<BucketSettings> for Buckets {
    fn from(domain: BucketSettings) -> Self {
        let BucketSettings {
            enabled,
            min_px,
            max_px,
            step_px,
            no_upscale,
            ..
        } = domain;
        Self {
            enabled,
            min_px,
            max_px,
            step_px,
            no_upscale,
        }
    }
}

/// Where pictures are cut to the size of their bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Crop {
    /// Evenly on both sides.
    #[default]
    Centre,
    /// Anywhere, each time elsewhere; latents are then not cached.
    Random,
    /// So that most edges stay in the picture; needs no model and gives the same crop each time.
    Smart,
}

/// Targets of the UNet.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity.
    VPrediction,
}

/// What the model multiplies in.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ComputePrecision {
    /// 24 significant bits.
    #[default]
    Fp32,
    /// 11 significant bits.
    Fp16,
    /// 8 significant bits, the range of fp32.
    Bf16,
}

/// What is kept between forward and backward.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GradientCheckpointing {
    /// Every activation that a gradient needs.
    #[default]
    None,
    /// The inputs of each block, which runs again in the backward.
    Blocks,
}

same_variants!(Crop, domain::CropMode: Centre, Random, Smart);
same_variants!(Prediction, PredictionType: Epsilon, VPrediction);
same_variants!(ComputePrecision, domain::ComputePrecision: Fp32, Fp16, Bf16);
same_variants!(GradientCheckpointing, domain::GradientCheckpointing: None, Blocks);
