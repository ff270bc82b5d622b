//! The sizes and the crop of a run as query parameters, for all that shows what a run would see.

use super::codes::Code;
use super::problem::Problem;
use super::run_training::Crop;
use crate::runs::settings::BucketSettings;

/// A query with the sizes and the crop of a run, besides its own fields. Whatever is absent is as in a run.
macro_rules! framing_query {
    ($(#[$outer:meta])* $name:ident { $($(#[$meta:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$outer])*
        #[derive(serde::Deserialize, utoipa::IntoParams)]
        #[into_params(parameter_in = Query)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$meta])* pub $field: $kind,)*
            /// `resolution.width_px` of a run.
            #[param(minimum = 8, maximum = 8192, multiple_of = 8, default = 512)]
            pub width_px: Option<u32>,
            /// `resolution.height_px` of a run.
            #[param(minimum = 8, maximum = 8192, multiple_of = 8, default = 512)]
            pub height_px: Option<u32>,
            /// `buckets.enabled` of a run: without, every picture is cropped to the one size.
            #[param(default = true)]
            pub buckets: Option<bool>,
            /// `buckets.min_px` of a run.
            #[param(minimum = 8, maximum = 8192, multiple_of = 8, default = 256)]
            pub min_px: Option<u32>,
            /// `buckets.max_px` of a run.
            #[param(minimum = 8, maximum = 8192, multiple_of = 8, default = 1024)]
            pub max_px: Option<u32>,
            /// `buckets.step_px` of a run.
            #[param(minimum = 8, maximum = 8192, multiple_of = 8, default = 64)]
            pub step_px: Option<u32>,
            /// `buckets.no_upscale` of a run.
            #[param(default = false)]
            pub no_upscale: Option<bool>,
            /// `crop` of a run; of `random` the centre is shown.
            #[param(inline)]
            pub crop: Option<$crate::api::run_training::Crop>,
        }

        impl $name {
            fn framing(&self) -> $crate::runs::settings::BucketSettings {
                $crate::api::framing::Framing {
                    width_px: self.width_px,
                    height_px: self.height_px,
                    buckets: self.buckets,
                    min_px: self.min_px,
                    max_px: self.max_px,
                    step_px: self.step_px,
                    no_upscale: self.no_upscale,
                    crop: self.crop,
                }
                .into()
            }
        }
    };
}
pub(super) use framing_query;

/// The fields that such queries share.
pub(super) struct Framing {
    pub width_px: Option<u32>,
    pub height_px: Option<u32>,
    pub buckets: Option<bool>,
    pub min_px: Option<u32>,
    pub max_px: Option<u32>,
    pub step_px: Option<u32>,
    pub no_upscale: Option<bool>,
    pub crop: Option<Crop>,
}

impl From<Framing> for BucketSettings {
    fn from(wire: Framing) -> Self {
        let usual = Self::default();
        Self {
            width_px: wire.width_px.unwrap_or(usual.width_px),
            height_px: wire.height_px.unwrap_or(usual.height_px),
            enabled: wire.buckets.unwrap_or(usual.enabled),
            min_px: wire.min_px.unwrap_or(usual.min_px),
            max_px: wire.max_px.unwrap_or(usual.max_px),
            step_px: wire.step_px.unwrap_or(usual.step_px),
            no_upscale: wire.no_upscale.unwrap_or(usual.no_upscale),
            crop: wire.crop.map_or(usual.crop, Into::into),
        }
    }
}

/// The query string that says the same.
pub(super) fn query_string(settings: &BucketSettings) -> String {
    let crop = match settings.crop.into() {
        Crop::Centre => "centre",
        Crop::Random => "random",
        Crop::Smart => "smart",
    };
    format!(
        "width_px={}&height_px={}&buckets={}&min_px={}&max_px={}&step_px={}&no_upscale={}&crop={crop}",
        settings.width_px,
        settings.height_px,
        settings.enabled,
        settings.min_px,
        settings.max_px,
        settings.step_px,
        settings.no_upscale,
    )
}

/// A number of a query within its range.
///
/// # Errors
/// 422 `invalid_query`, naming the parameter.
pub(super) fn in_range(
    name: &str,
    value: Option<u32>,
    usual: u32,
    range: std::ops::RangeInclusive<u32>,
) -> Result<u32, Problem> {
    let value = value.unwrap_or(usual);
    if range.contains(&value) {
        return Ok(value);
    }
    let message = format!(
        "found {value}, expected {} to {}",
        range.start(),
        range.end()
    );
    Err(Problem::field(
        Code::InvalidQuery,
        &format!("/{name}"),
        "out_of_range",
        message,
    ))
}
