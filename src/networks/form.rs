//! What an adapter consists of: its tensors with their names in files, shapes and first values, as sd-scripts and LyCORIS
//! write them.

use crate::networks::settings::{MAX_RANK, NetworkKind, NetworkSettings};
use crate::networks::targets::LayerShape;

/// How an adapter changes its layer's weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `up · down`; with a core `up · core · down`, where the core has the kernel.
    LowRank {
        /// Whether there is one.
        core: bool,
    },
    /// `(w1_a · w1_b) ⊙ (w2_a · w2_b)`; with cores in both halves.
    Hadamard {
        /// Whether there are.
        core: bool,
    },
    /// `w1 ⊗ w2`.
    Kronecker(Kronecker),
    /// `weight · W`, for each output or each input.
    Scale {
        /// Whether inputs are scaled.
        on_input: bool,
    },
}

/// The halves of a Kronecker product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kronecker {
    /// Rows and columns of the first.
    pub left: [usize; 2],
    /// Rows and columns of the second, without the kernel.
    pub right: [usize; 2],
    /// Whether the first is a product of two.
    pub left_is_product: bool,
    /// Whether the second is.
    pub right_is_product: bool,
    /// Whether that product has a core with the kernel.
    pub core: bool,
}

/// What a tensor begins with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Zeros.
    Zeros,
    /// `U(-1/√fan_in, 1/√fan_in)`, which is torch's `kaiming_uniform_(a=√5)`.
    KaimingUniform,
    /// `N(0, σ²)`.
    Normal(f32),
    /// The length of each row of the layer's own weight.
    RowNorms,
}

/// A tensor of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// What its key ends in, behind the adapter's name and a dot.
    pub suffix: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its first values.
    pub init: Init,
}

/// Every ending of a key, in the order in which an adapter's parameters are.
pub const SUFFIXES: [&str; 19] = [
    "lora_down.weight",
    "lora_mid.weight",
    "lora_up.weight",
    "hada_t1",
    "hada_w1_a",
    "hada_w1_b",
    "hada_t2",
    "hada_w2_a",
    "hada_w2_b",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_t2",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "weight",
    "dora_scale",
    "alpha",
];

impl Form {
    /// That of a layer's adapter by the settings.
    pub fn new(settings: &NetworkSettings, path: &str, layer: LayerShape, rank: usize) -> Self {
        let core = settings.tucker && layer.is_wide_conv();
        match settings.kind {
            NetworkKind::Lora | NetworkKind::Locon => Self::LowRank { core },
            NetworkKind::Loha => Self::Hadamard { core },
            NetworkKind::Lokr => Self::Kronecker(Kronecker::new(settings, layer, rank, core)),
            // As in LyCORIS' preset: what comes out of the wide part of a feed-forward is scaled before its last layer.
            NetworkKind::Ia3 => Self::Scale {
                on_input: path.ends_with("ff.net.2") || path.ends_with("mlp.fc2"),
            },
        }
    }

    /// That of the tensors that a file has of an adapter, and its rank. `shape_of` tells the shape of one by its ending.
    ///
    /// # Errors
    /// With the ending of the tensor that is wrong or missing, and what was expected of it.
    pub fn of_file<'a>(
        layer: LayerShape,
        on_input: bool,
        shape_of: impl Fn(&str) -> Option<&'a [usize]>,
    ) -> Result<(Self, usize), (&'static str, Option<String>)> {
        let size = |suffix: &'static str, axis: usize| {
            let shape = shape_of(suffix).ok_or((suffix, None))?;
            let size = shape.get(axis).copied().unwrap_or(0);
            if (1..=MAX_RANK).contains(&size) {
                Ok(size)
            } else {
                let place = ["first", "second"][axis];
                Err((suffix, Some(format!("1 to {MAX_RANK} {place}"))))
            }
        };
        let has = |suffix: &str| shape_of(suffix).is_some();
        if has("hada_w1_a") || has("hada_w1_b") || has("hada_w2_a") || has("hada_w2_b") {
            let core = has("hada_t1") || has("hada_t2");
            return Ok((Self::Hadamard { core }, size("hada_w1_b", 0)?));
        }
        if has("weight") {
            return Ok((Self::Scale { on_input }, 1));
        }
        let left = has("lokr_w1") || has("lokr_w1_a") || has("lokr_w1_b");
        if left || has("lokr_w2") || has("lokr_w2_a") || has("lokr_w2_b") {
            let (form, rank) = Kronecker::of_file(layer, &shape_of)?;
            return Ok((Self::Kronecker(form), rank));
        }
        let core = has("lora_mid.weight");
        Ok((Self::LowRank { core }, size("lora_down.weight", 0)?))
    }

    /// The tensors of an adapter of this form. `dora` adds the length of each row.
    pub fn tensors(&self, layer: LayerShape, rank: usize, dora: bool) -> Vec<TensorSpec> {
        let mut tensors = match *self {
            Self::LowRank { core } => low_rank(layer, rank, core),
            Self::Hadamard { core } => hadamard(layer, rank, core),
            Self::Kronecker(form) => form.tensors(layer, rank),
            Self::Scale { on_input } => vec![scale(layer, on_input)],
        };
        if dora {
            let mut shape = vec![1; layer.dims().len()];
            shape[0] = layer.dims()[0];
            tensors.push(spec("dora_scale", shape, Init::RowNorms));
        }
        tensors
    }

    /// Whether there is a core with the kernel.
    pub fn has_core(&self) -> bool {
        match *self {
            Self::LowRank { core } | Self::Hadamard { core } => core,
            Self::Kronecker(form) => form.core,
            Self::Scale { .. } => false,
        }
    }

    /// Whether it has a strength, `alpha / rank`.
    pub fn has_alpha(&self) -> bool {
        !matches!(self, Self::Scale { .. })
    }

    /// Whether its strength is 1 whatever alpha says: both halves are whole.
    pub fn is_unscaled(&self) -> bool {
        matches!(self, Self::Kronecker(form) if !form.left_is_product && !form.right_is_product)
    }
}

fn spec(suffix: &'static str, shape: Vec<usize>, init: Init) -> TensorSpec {
    TensorSpec {
        suffix,
        shape,
        init,
    }
}

fn low_rank(layer: LayerShape, rank: usize, core: bool) -> Vec<TensorSpec> {
    let up = spec("lora_up.weight", layer.up_shape(rank), Init::Zeros);
    let [height, width] = layer.kernel();
    if !core {
        let down = layer.down_shape(rank);
        return vec![spec("lora_down.weight", down, Init::KaimingUniform), up];
    }
    let (down, mid) = (
        vec![rank, layer.d_in(), 1, 1],
        vec![rank, rank, height, width],
    );
    vec![
        spec("lora_down.weight", down, Init::KaimingUniform),
        spec("lora_mid.weight", mid, Init::KaimingUniform),
        up,
    ]
}

fn hadamard(layer: LayerShape, rank: usize, core: bool) -> Vec<TensorSpec> {
    let ([height, width], d_in, d_out) = (layer.kernel(), layer.d_in(), layer.d_out());
    let half = |names: [&'static str; 3], first: Init| {
        let mut tensors = Vec::with_capacity(3);
        let [core_name, a, b] = names;
        if core {
            let shape = vec![rank, rank, height, width];
            tensors.push(spec(core_name, shape, Init::Normal(0.1)));
            tensors.push(spec(a, vec![rank, d_out], first));
            tensors.push(spec(b, vec![rank, d_in], Init::Normal(1.0)));
        } else {
            tensors.push(spec(a, vec![d_out, rank], first));
            let columns = d_in * height * width;
            tensors.push(spec(b, vec![rank, columns], Init::Normal(1.0)));
        }
        tensors
    };
    let mut tensors = half(["hada_t1", "hada_w1_a", "hada_w1_b"], Init::Normal(0.1));
    tensors.extend(half(["hada_t2", "hada_w2_a", "hada_w2_b"], Init::Zeros));
    tensors
}

fn scale(layer: LayerShape, on_input: bool) -> TensorSpec {
    let size = if on_input {
        layer.d_in()
    } else {
        layer.d_out()
    };
    let shape = match layer {
        LayerShape::Linear { .. } => vec![size],
        LayerShape::Conv { .. } => vec![1, size, 1, 1],
    };
    spec("weight", shape, Init::Zeros)
}

impl Kronecker {
    fn new(settings: &NetworkSettings, layer: LayerShape, rank: usize, core: bool) -> Self {
        let (out_left, out_right) = factorization(layer.d_out(), settings.factor);
        let (in_left, in_right) = factorization(layer.d_in(), settings.factor);
        let (left, right) = ([out_left, in_left], [out_right, in_right]);
        let worth = |sides: [usize; 2]| {
            let largest = sides[0].max(sides[1]);
            !settings.full_matrix && 2 * rank < largest
        };
        let right_is_product = worth(right);
        Self {
            left,
            right,
            left_is_product: settings.decompose_both && worth(left),
            right_is_product,
            core: core && right_is_product,
        }
    }

    fn of_file<'a>(
        layer: LayerShape,
        shape_of: &impl Fn(&str) -> Option<&'a [usize]>,
    ) -> Result<(Self, usize), (&'static str, Option<String>)> {
        let at = |suffix: &'static str, axis: usize| {
            let shape = shape_of(suffix).ok_or((suffix, None))?;
            match shape.get(axis).copied().unwrap_or(1) {
                0 => Err((suffix, Some("sizes above 0".to_owned()))),
                size => Ok(size),
            }
        };
        let left_is_product = shape_of("lokr_w1").is_none();
        let right_is_product = shape_of("lokr_w2").is_none();
        let core = right_is_product && shape_of("lokr_t2").is_some();
        let left = if left_is_product {
            [at("lokr_w1_a", 0)?, at("lokr_w1_b", 1)?]
        } else {
            [at("lokr_w1", 0)?, at("lokr_w1", 1)?]
        };
        let (suffix, rank_at) = if left_is_product {
            ("lokr_w1_b", 0)
        } else {
            ("lokr_w2_b", 0)
        };
        let rank = if left_is_product || right_is_product {
            at(suffix, rank_at)?
        } else {
            1
        };
        if rank > MAX_RANK {
            return Err((suffix, Some(format!("1 to {MAX_RANK} first"))));
        }
        // The second half is what the first leaves of the layer.
        let (d_out, d_in) = (layer.d_out(), layer.d_in());
        if !d_out.is_multiple_of(left[0]) || !d_in.is_multiple_of(left[1]) {
            let suffix = if left_is_product {
                "lokr_w1_a"
            } else {
                "lokr_w1"
            };
            let expected = format!("sides that divide {d_out} and {d_in}");
            return Err((suffix, Some(expected)));
        }
        let form = Self {
            left,
            right: [d_out / left[0], d_in / left[1]],
            left_is_product,
            right_is_product,
            core,
        };
        Ok((form, rank))
    }

    fn tensors(&self, layer: LayerShape, rank: usize) -> Vec<TensorSpec> {
        let [height, width] = layer.kernel();
        let ([left_rows, left_columns], [right_rows, right_columns]) = (self.left, self.right);
        let mut tensors = Vec::with_capacity(5);
        let mut put = |suffix, shape, init| tensors.push(spec(suffix, shape, init));
        if self.left_is_product {
            put("lokr_w1_a", vec![left_rows, rank], Init::KaimingUniform);
            put("lokr_w1_b", vec![rank, left_columns], Init::KaimingUniform);
        } else {
            put(
                "lokr_w1",
                vec![left_rows, left_columns],
                Init::KaimingUniform,
            );
        }
        if !self.right_is_product {
            let mut shape = vec![right_rows, right_columns];
            if matches!(layer, LayerShape::Conv { .. }) {
                shape.extend([height, width]);
            }
            put("lokr_w2", shape, Init::Zeros);
        } else if self.core {
            let core = vec![rank, rank, height, width];
            put("lokr_t2", core, Init::KaimingUniform);
            put("lokr_w2_a", vec![rank, right_rows], Init::KaimingUniform);
            put("lokr_w2_b", vec![rank, right_columns], Init::Zeros);
        } else {
            put("lokr_w2_a", vec![right_rows, rank], Init::KaimingUniform);
            let columns = right_columns * height * width;
            put("lokr_w2_b", vec![rank, columns], Init::Zeros);
        }
        tensors
    }
}

/// A number as a product of two, the smaller first: as near to each other as the factor allows, which is the most that
/// the smaller may be; `factor` itself where it divides. LyCORIS' `factorization`.
pub fn factorization(number: usize, factor: Option<usize>) -> (usize, usize) {
    if let Some(factor) = factor.filter(|&factor| factor > 0 && number.is_multiple_of(factor)) {
        let other = number / factor;
        return (factor.min(other), factor.max(other));
    }
    let most = factor.unwrap_or(number);
    let (mut small, mut large) = (1, number);
    while small < large {
        let Some(next) = (small + 1..=number).find(|&next| number.is_multiple_of(next)) else {
            break;
        };
        let other = number / next;
        if next + other > small + large || next > most {
            break;
        }
        (small, large) = (next, other);
    }
    (small.min(large), small.max(large))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table in LyCORIS' `factorization`.
    #[test]
    fn factors_are_those_of_lycoris() {
        for (number, expected) in [
            (127, [(1, 127), (1, 127), (1, 127), (1, 127), (1, 127)]),
            (128, [(8, 16), (2, 64), (4, 32), (8, 16), (8, 16)]),
            (250, [(10, 25), (2, 125), (2, 125), (5, 50), (10, 25)]),
            (360, [(8, 45), (2, 180), (4, 90), (8, 45), (12, 30)]),
            (512, [(16, 32), (2, 256), (4, 128), (8, 64), (16, 32)]),
            (1024, [(32, 32), (2, 512), (4, 256), (8, 128), (16, 64)]),
        ] {
            let factors = [None, Some(2), Some(4), Some(8), Some(16)];
            for (factor, expected) in factors.into_iter().zip(expected) {
                // Two entries of that table are not what the function computes.
                let expected = match (number, factor) {
                    (360, None) => (18, 20),
                    (360, Some(16)) => (15, 24),
                    _ => expected,
                };
                assert_eq!(
                    factorization(number, factor),
                    expected,
                    "{number} {factor:?}"
                );
            }
        }
    }
}
