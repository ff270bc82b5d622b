//! Colour correction on the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::twins::same_variants;
use crate::store::datasets::Correction;

/// What is done to an image's colours, each time it is decoded: the file stays as it is, and `null` takes it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ColorCorrection {
    /// Nothing, also where the dataset says something else.
    Off,
    /// The values are spread to the whole range, all channels alike, with 0.5 % clipped at either end.
    AutoLevels,
    /// White balance: the channels are scaled to the same mean, by 2 at most.
    GreyWorld,
    /// Each channel is bent so that its median is that of the set, regularization aside.
    MatchMedian,
}

same_variants!(ColorCorrection, Correction: Off, AutoLevels, GreyWorld, MatchMedian);
