//! Types of settings that many optimizers share: their ranges are in the schema.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The decay of a running average: 0 up to, but not including, 1.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline, extend("minimum" = 0.0, "exclusiveMaximum" = 1.0))]
pub struct Beta(pub f64);

/// A number above 0 that is added where a quotient could be one of zeros.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline, extend("minimum" = 0.0, "maximum" = 1.0))]
pub struct Epsilon(pub f64);
