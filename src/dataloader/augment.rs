//! Which changes a picture may go through each time it is shown.

use serde::{Deserialize, Serialize};

/// What may be changed about a picture from one showing to the next; nothing by default. As sd-scripts' `flip_aug`,
/// `color_aug` and `random_crop` of a subset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Mirror it left to right every other time.
    pub flip: bool,
    /// Shift its hue or its brightness a little, one time in three.
    pub color: bool,
    /// Cut it anywhere instead of around its centre.
    pub random_crop: bool,
}
