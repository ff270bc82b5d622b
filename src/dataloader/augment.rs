//! Which changes a picture's pixels may undergo from one showing to the next.

use serde::{Deserialize, Serialize};

/// Random changes of a picture, as sd-scripts has them. Everything is off by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Every second showing is mirrored left to right (`flip_aug`). It harms what is not symmetric: faces, letters.
    pub flip: bool,
    /// Hue or gamma of every third showing are shifted a little (`color_aug`).
    pub color: bool,
    /// What does not fit into the bucket is cropped at a random place instead of evenly on both sides (`random_crop`).
    pub random_crop: bool,
}
