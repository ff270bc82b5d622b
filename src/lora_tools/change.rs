//! What an adapter of any kind does to the weight of its layer.
//!
//! A weight is seen as a matrix `[out, in·kh·kw]`. Formulas are those of LyCORIS' modules and sd-scripts' LoRA; `s` is
//! `alpha / rank`.

use super::error::ToolError;
use super::file::{AdapterFile, Kind, Module, Slot};
use super::matrix::{self, Matrix, from_rows, norm, norm_of_product, product};

/// Largest rank that is worked on.
const MAX_RANK: usize = 4096;
/// Elements of the largest change; SDXL's largest layer has 30 million.
const MAX_ELEMENTS: usize = 1 << 25;
/// Largest number that an adapter may hold: what f16 can. Products of a few of them stay finite in f32.
const MAX_VALUE: f32 = 65504.0;

/// What an adapter does.
#[derive(Debug)]
pub struct Change {
    pub kind: Kind,
    /// Rank of its factors; none where there is none.
    pub rank: Option<usize>,
    /// Numerator of its strength, as the file has it.
    pub alpha: Option<f32>,
    pub shape: DeltaShape,
    pub content: Content,
    /// DoRA's magnitudes: the changed weight is scaled to these norms.
    pub magnitudes: Option<Magnitudes>,
    /// Whether it changes the layer's bias as well.
    pub changes_bias: bool,
}

/// Norms of the rows of the changed weight, or of what belongs to each input.
#[derive(Debug)]
pub struct Magnitudes {
    pub values: Vec<f32>,
    /// Whether they are of the inputs: an old option of LyCORIS.
    pub on_input: bool,
}

/// Size of the weight that is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaShape {
    pub out: usize,
    /// `in·kh·kw`
    pub columns: usize,
    /// Height and width of the kernel, where the file tells them: adapters of convolutions have four dimensions.
    pub kernel: Option<[usize; 2]>,
}

/// What is added to the weight, or how it is scaled.
#[derive(Debug)]
pub enum Content {
    /// `s · up · down`
    LowRank {
        /// `[out, rank]`
        up: Matrix,
        /// `[rank, in·kh·kw]`
        down: Matrix,
        /// Strength.
        scale: f32,
    },
    /// `s · w1 ⊗ w2`
    Kronecker {
        /// `[out₁, in₁]`
        w1: Matrix,
        /// `[out₂, in₂·kh·kw]`
        w2: Matrix,
        /// Strength.
        scale: f32,
    },
    /// The difference itself.
    Full(Matrix),
    /// IA³: `w_ij f_i`, or `w_ij f_j` with factors of the inputs.
    Channels {
        /// One for each channel.
        factors: Vec<f32>,
        /// Whether the channels are those of the input.
        on_input: bool,
    },
}

/// The kind that an adapter's tensors say it is.
pub fn kind_of(file: &AdapterFile, module: &Module) -> Option<Kind> {
    let has = |slot| module.has(slot);
    if has(Slot::Down) || has(Slot::Up) {
        let wide = file.shape(module, Slot::Down).is_some_and(|shape| {
            shape
                .get(2..)
                .is_some_and(|kernel| kernel.iter().any(|&k| k > 1))
        });
        return Some(if wide || has(Slot::Mid) {
            Kind::Locon
        } else {
            Kind::Lora
        });
    }
    let any = |slots: &[Slot]| slots.iter().any(|slot| has(*slot));
    if any(&[Slot::HadaW1A, Slot::HadaW1B, Slot::HadaW2A, Slot::HadaW2B]) {
        Some(Kind::Loha)
    } else if any(&[Slot::LokrW1, Slot::LokrW1A, Slot::LokrW2, Slot::LokrW2A]) {
        Some(Kind::Lokr)
    } else if has(Slot::Ia3Weight) {
        Some(Kind::Ia3)
    } else if has(Slot::Diff) || has(Slot::DiffBias) {
        Some(Kind::Full)
    } else {
        None
    }
}

/// What the header alone says of an adapter.
#[derive(Debug)]
pub struct Outline {
    pub kind: Kind,
    /// What the rank of its change is at most.
    pub rank: usize,
    pub shape: DeltaShape,
    /// Whether it is a DoRA.
    pub has_magnitudes: bool,
    /// Whether it changes the layer's bias as well.
    pub changes_bias: bool,
}

/// Looks at the shapes of an adapter; whether they fit together is seen when it is read.
///
/// # Errors
/// When a tensor that tells its size is missing or has another number of dimensions.
pub fn outline(file: &AdapterFile, module: &Module) -> Result<Outline, ToolError> {
    let empty = |slot: &Slot| {
        file.shape(module, *slot)
            .is_some_and(|shape| shape.contains(&0))
    };
    if let Some((_, key)) = module.keys.iter().find(|(slot, _)| empty(slot)) {
        return Err(ToolError::tensor(
            &file.path,
            key,
            "no elements",
            "at least one",
        ));
    }
    let found = kind_of(file, module).and_then(|kind| {
        let side = |slot, index: usize| -> Option<usize> {
            let shape = file.shape(module, slot)?;
            (shape.len() >= 2).then(|| shape[index])
        };
        let columns = |slot| -> Option<usize> {
            let shape = file.shape(module, slot)?;
            (shape.len() >= 2).then(|| shape[1..].iter().product())
        };
        let kernel_in = |slot| -> Option<[usize; 2]> {
            match file.shape(module, slot)? {
                [_, _, height, width] => Some([*height, *width]),
                _ => None,
            }
        };
        let times = |kernel: Option<[usize; 2]>| {
            kernel.map_or(1, |kernel| kernel[0].saturating_mul(kernel[1]))
        };
        let (rank, out, columns, kernel) = match kind {
            Kind::Lora | Kind::Locon => {
                let core = kernel_in(Slot::Mid);
                let kernel = core.or_else(|| kernel_in(Slot::Down));
                (
                    side(Slot::Down, 0)?,
                    side(Slot::Up, 0)?,
                    columns(Slot::Down)?.saturating_mul(times(core)),
                    kernel,
                )
            }
            Kind::Loha => {
                let core = kernel_in(Slot::HadaT1);
                let out = side(Slot::HadaW1A, usize::from(core.is_some()))?;
                let (first, second) = (side(Slot::HadaW1B, 0)?, side(Slot::HadaW2B, 0)?);
                let columns = columns(Slot::HadaW1B)?.saturating_mul(times(core));
                let rank = first.saturating_mul(second).min(out).min(columns);
                let kernel = core.or_else(|| kernel_in(Slot::HadaW1B));
                (rank, out, columns, kernel)
            }
            Kind::Lokr => {
                let core = kernel_in(Slot::LokrT2);
                let whole = |slot, a, b, core: Option<[usize; 2]>| {
                    let out = side(slot, 0).or_else(|| side(a, usize::from(core.is_some())))?;
                    let across =
                        columns(slot).or_else(|| Some(columns(b)?.saturating_mul(times(core))))?;
                    Some((out, across))
                };
                let first = whole(Slot::LokrW1, Slot::LokrW1A, Slot::LokrW1B, None)?;
                let second = whole(Slot::LokrW2, Slot::LokrW2A, Slot::LokrW2B, core)?;
                let kernel = core
                    .or_else(|| kernel_in(Slot::LokrW2))
                    .or_else(|| kernel_in(Slot::LokrW2B));
                let out = first.0.saturating_mul(second.0);
                let columns = first.1.saturating_mul(second.1);
                (out.min(columns), out, columns, kernel)
            }
            Kind::Full => {
                let shape = file.shape(module, Slot::Diff)?;
                let out = *shape.first()?;
                let columns = shape[1..].iter().product();
                (out.min(columns), out, columns, kernel_in(Slot::Diff))
            }
            Kind::Ia3 => (0, 0, 0, None),
        };
        let elements = out.checked_mul(columns)?;
        (elements <= MAX_ELEMENTS).then_some(())?;
        Some(Outline {
            kind,
            rank,
            shape: DeltaShape {
                out,
                columns,
                kernel,
            },
            has_magnitudes: module.has(Slot::DoraScale),
            changes_bias: module.has(Slot::DiffBias),
        })
    });
    found.ok_or_else(|| {
        let found = "no tensors that tell its size, or a size that no layer has";
        ToolError::tensor(&file.path, &module.name, found, "a complete adapter")
    })
}

/// Reads an adapter.
///
/// # Errors
/// When tensors are missing, do not fit together or are not finite.
pub fn read(file: &AdapterFile, module: &Module) -> Result<Change, ToolError> {
    let reader = Reader { file, module };
    let Some(kind) = kind_of(file, module) else {
        let found = "no tensor of LoRA, LoHa, LoKr or IA³";
        return Err(ToolError::tensor(
            &file.path,
            &module.name,
            found,
            "an adapter",
        ));
    };
    let alpha = reader.number(Slot::Alpha)?;
    let scalar = reader.number(Slot::Scalar)?.unwrap_or(1.0);
    let (rank, shape, content) = match kind {
        Kind::Lora | Kind::Locon => reader.low_rank(alpha, scalar)?,
        Kind::Loha => reader.hadamard(alpha, scalar)?,
        Kind::Lokr => reader.kronecker(alpha, scalar)?,
        Kind::Ia3 => reader.channels()?,
        Kind::Full => reader.full()?,
    };
    let magnitudes = file.read(module, Slot::DoraScale)?;
    if let Some((values, shape)) = &magnitudes {
        reader.finite(Slot::DoraScale, values, shape)?;
    }
    Ok(Change {
        kind,
        rank,
        alpha,
        shape,
        content,
        magnitudes: magnitudes.map(|(values, tensor)| Magnitudes {
            // PEFT's `[1, out, 1, 1]` are rows all the same.
            on_input: tensor[0] == 1
                && values.len() > 1
                && module
                    .keys
                    .get(&Slot::DoraScale)
                    .is_some_and(|key| key.ends_with(".dora_scale")),
            values,
        }),
        changes_bias: module.has(Slot::DiffBias),
    })
}

impl Change {
    /// Frobenius norm of what is added at strength 1; none of IA³ and DoRA, where it hangs on the base.
    pub fn norm(&self) -> Option<f64> {
        if self.magnitudes.is_some() {
            return None;
        }
        match &self.content {
            Content::LowRank { up, down, scale } => {
                Some(norm_of_product(up, down) * f64::from(scale.abs()))
            }
            Content::Kronecker { w1, w2, scale } => {
                Some(norm(w1) * norm(w2) * f64::from(scale.abs()))
            }
            Content::Full(delta) => Some(norm(delta)),
            Content::Channels { .. } => None,
        }
    }

    /// Whether nothing changes at any strength. Magnitudes alone change something as soon as they are not the base's.
    pub fn is_zero(&self) -> bool {
        match &self.content {
            Content::Channels { factors, .. } => factors.iter().all(|factor| *factor == 0.0),
            Content::LowRank { up, down, scale } => {
                *scale == 0.0 || norm_of_product(up, down) == 0.0
            }
            Content::Kronecker { w1, w2, scale } => {
                *scale == 0.0 || norm(w1) == 0.0 || norm(w2) == 0.0
            }
            Content::Full(delta) => norm(delta) == 0.0,
        }
    }

    /// What is added, whole; `None` of IA³.
    pub fn whole(&self) -> Option<Matrix> {
        let mut sum = Matrix::zeros(self.shape.out, self.shape.columns);
        self.add_to(&mut sum, 1.0).then_some(sum)
    }

    /// `sum ← sum + strength · change`; `false` of IA³, which is no sum.
    pub fn add_to(&self, sum: &mut Matrix, strength: f32) -> bool {
        match &self.content {
            Content::LowRank { up, down, scale } => {
                matrix::add_product(sum.as_mut(), up.as_ref(), down.as_ref(), scale * strength);
            }
            Content::Kronecker { w1, w2, scale } => {
                let (rows, columns) = (w2.nrows(), w2.ncols());
                for j in 0..sum.ncols() {
                    for i in 0..sum.nrows() {
                        sum[(i, j)] += scale
                            * strength
                            * w1[(i / rows, j / columns)]
                            * w2[(i % rows, j % columns)];
                    }
                }
            }
            Content::Full(delta) => {
                for j in 0..sum.ncols() {
                    for i in 0..sum.nrows() {
                        sum[(i, j)] += strength * delta[(i, j)];
                    }
                }
            }
            Content::Channels { .. } => return false,
        }
        true
    }
}

/// One adapter being read.
struct Reader<'a> {
    file: &'a AdapterFile,
    module: &'a Module,
}

/// A matrix, the kernel that its tensor tells, and its rank where it was a product.
type Factor = (Matrix, Option<[usize; 2]>, Option<usize>);

/// Rank, size and content.
type Read = (Option<usize>, DeltaShape, Content);

impl Reader<'_> {
    fn wrong(
        &self,
        slot: Slot,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> ToolError {
        let key = self.module.keys.get(&slot).unwrap_or(&self.module.name);
        ToolError::tensor(&self.file.path, key, found, expected)
    }

    fn finite(&self, slot: Slot, values: &[f32], shape: &[usize]) -> Result<(), ToolError> {
        if shape.contains(&0) {
            return Err(self.wrong(slot, format!("the shape {shape:?}"), "at least one element"));
        }
        let wrong = |value: &f32| !value.is_finite() || value.abs() > MAX_VALUE;
        match values.iter().position(wrong) {
            Some(at) => {
                let found = format!("{} at element {at}", values[at]);
                Err(self.wrong(slot, found, format!("numbers up to {MAX_VALUE}")))
            }
            None => Ok(()),
        }
    }

    /// Values and shape of a tensor that must be there, finite.
    fn tensor(&self, slot: Slot) -> Result<(Vec<f32>, Vec<usize>), ToolError> {
        let (values, shape) = self.file.need(self.module, slot)?;
        self.finite(slot, &values, &shape)?;
        Ok((values, shape))
    }

    /// A tensor of 2 to 4 dimensions as a matrix of its first, and the kernel of the last two.
    fn matrix(&self, slot: Slot) -> Result<(Matrix, Option<[usize; 2]>), ToolError> {
        let (values, shape) = self.tensor(slot)?;
        let kernel = match shape[..] {
            [_, _] => None,
            [_, _, height, width] => Some([height, width]),
            _ => return Err(self.wrong(slot, format!("the shape {shape:?}"), "2 or 4 dimensions")),
        };
        Ok((
            from_rows(&values, shape[0], values.len() / shape[0]),
            kernel,
        ))
    }

    fn number(&self, slot: Slot) -> Result<Option<f32>, ToolError> {
        let number = self.file.number(self.module, slot)?;
        match number.filter(|value| !value.is_finite() || value.abs() > MAX_VALUE) {
            Some(value) => Err(self.wrong(slot, value.to_string(), format!("at most {MAX_VALUE}"))),
            None => Ok(number),
        }
    }

    fn fits(&self, slot: Slot, what: &str, found: usize, expected: usize) -> Result<(), ToolError> {
        if found == expected {
            return Ok(());
        }
        Err(self.wrong(slot, format!("{found} {what}"), format!("{expected}")))
    }

    fn rank(&self, slot: Slot, rank: usize) -> Result<usize, ToolError> {
        if rank > MAX_RANK {
            return Err(self.wrong(slot, format!("rank {rank}"), format!("at most {MAX_RANK}")));
        }
        Ok(rank)
    }

    fn bounded(&self, slot: Slot, out: usize, columns: usize) -> Result<(), ToolError> {
        match out.checked_mul(columns) {
            Some(elements) if elements <= MAX_ELEMENTS => Ok(()),
            _ => {
                let found = format!("a change of {out} × {columns}");
                Err(self.wrong(slot, found, format!("at most {MAX_ELEMENTS} elements")))
            }
        }
    }

    /// `s · up · down`; with LyCORIS' core in the middle it is one factor with `down`.
    fn low_rank(&self, alpha: Option<f32>, scalar: f32) -> Result<Read, ToolError> {
        let (up, up_kernel) = self.matrix(Slot::Up)?;
        let (mut down, mut kernel) = self.matrix(Slot::Down)?;
        if up_kernel.is_some_and(|kernel| kernel != [1, 1]) {
            let found = format!("a kernel of {up_kernel:?}");
            return Err(self.wrong(Slot::Up, found, "1 × 1"));
        }
        let rank = self.rank(Slot::Down, down.nrows())?;
        if self.module.has(Slot::Mid) {
            (down, kernel) = self.through_core(Slot::Mid, &down)?;
        }
        self.fits(Slot::Up, "columns", up.ncols(), rank)?;
        let shape = DeltaShape {
            out: up.nrows(),
            columns: down.ncols(),
            kernel,
        };
        self.bounded(Slot::Up, shape.out, shape.columns)?;
        let scale = scalar * strength(alpha, rank);
        Ok((Some(rank), shape, Content::LowRank { up, down, scale }))
    }

    /// `[rank, in]` through a core `[rank, rank, kh, kw]`: `Σ_q core_pqk down_qi`, as `[rank, in·kh·kw]`.
    fn through_core(
        &self,
        slot: Slot,
        down: &Matrix,
    ) -> Result<(Matrix, Option<[usize; 2]>), ToolError> {
        let (values, shape) = self.tensor(slot)?;
        let [p, q, height, width] = shape[..] else {
            return Err(self.wrong(slot, format!("the shape {shape:?}"), "4 dimensions"));
        };
        self.fits(slot, "columns", q, down.nrows())?;
        let (d_in, kernel) = (down.ncols(), height * width);
        self.bounded(slot, p, d_in.saturating_mul(kernel))?;
        let flat = Matrix::from_fn(p * kernel, q, |row, q_at| {
            values[((row / kernel) * q + q_at) * kernel + row % kernel]
        });
        let wide = product(flat.as_ref(), down.as_ref()); // [p·k, in]
        let down = Matrix::from_fn(p, d_in * kernel, |row, column| {
            wide[(row * kernel + column % kernel, column / kernel)]
        });
        Ok((down, Some([height, width])))
    }

    /// The two factors `[out, rank]` and `[rank, in·kh·kw]` of one of LoHa's halves.
    fn half(
        &self,
        a: Slot,
        b: Slot,
        core: Slot,
    ) -> Result<(Matrix, Matrix, Option<[usize; 2]>), ToolError> {
        let (left, _) = self.matrix(a)?;
        let (right, mut kernel) = self.matrix(b)?;
        let (left, right) = if self.module.has(core) {
            let (right, found) = self.through_core(core, &right)?;
            kernel = found;
            (left.transpose().to_owned(), right)
        } else {
            (left, right)
        };
        self.rank(b, right.nrows())?;
        self.fits(a, "columns", left.ncols(), right.nrows())?;
        self.bounded(a, left.nrows(), right.ncols())?;
        Ok((left, right, kernel))
    }

    /// `s · (a₁ b₁) ∘ (a₂ b₂)`
    fn hadamard(&self, alpha: Option<f32>, scalar: f32) -> Result<Read, ToolError> {
        let (a1, b1, kernel) = self.half(Slot::HadaW1A, Slot::HadaW1B, Slot::HadaT1)?;
        let (a2, b2, _) = self.half(Slot::HadaW2A, Slot::HadaW2B, Slot::HadaT2)?;
        self.fits(Slot::HadaW2A, "rows", a2.nrows(), a1.nrows())?;
        self.fits(Slot::HadaW2B, "columns", b2.ncols(), b1.ncols())?;
        let rank = b1.nrows();
        let scale = scalar * strength(alpha, rank);
        let (first, second) = (
            product(a1.as_ref(), b1.as_ref()),
            product(a2.as_ref(), b2.as_ref()),
        );
        let shape = DeltaShape {
            out: a1.nrows(),
            columns: b1.ncols(),
            kernel,
        };
        let delta = Matrix::from_fn(shape.out, shape.columns, |i, j| {
            scale * first[(i, j)] * second[(i, j)]
        });
        Ok((Some(rank), shape, Content::Full(delta)))
    }

    /// One of LoKr's factors, whole or of low rank; and that rank.
    fn factor(
        &self,
        whole: Slot,
        a: Slot,
        b: Slot,
        core: Option<Slot>,
    ) -> Result<Factor, ToolError> {
        if self.module.has(whole) {
            let (matrix, kernel) = self.matrix(whole)?;
            return Ok((matrix, kernel, None));
        }
        let (left, _) = self.matrix(a)?;
        let (right, kernel) = self.matrix(b)?;
        let rank = self.rank(b, right.nrows())?;
        let (left, right, kernel) = match core.filter(|core| self.module.has(*core)) {
            Some(core) => {
                let (right, kernel) = self.through_core(core, &right)?;
                (left.transpose().to_owned(), right, kernel)
            }
            None => (left, right, kernel),
        };
        self.fits(a, "columns", left.ncols(), right.nrows())?;
        self.bounded(a, left.nrows(), right.ncols())?;
        Ok((product(left.as_ref(), right.as_ref()), kernel, Some(rank)))
    }

    /// `s · w₁ ⊗ w₂`; the strength of two whole factors is 1, whatever `alpha` says.
    fn kronecker(&self, alpha: Option<f32>, scalar: f32) -> Result<Read, ToolError> {
        let (w1, _, rank1) = self.factor(Slot::LokrW1, Slot::LokrW1A, Slot::LokrW1B, None)?;
        let core = Some(Slot::LokrT2);
        let (w2, kernel, rank2) = self.factor(Slot::LokrW2, Slot::LokrW2A, Slot::LokrW2B, core)?;
        let rank = rank2.or(rank1);
        let scale = scalar * rank.map_or(1.0, |rank| strength(alpha, rank));
        let out = w1.nrows().saturating_mul(w2.nrows());
        let columns = w1.ncols().saturating_mul(w2.ncols());
        self.bounded(Slot::LokrW2, out, columns)?;
        let shape = DeltaShape {
            out,
            columns,
            kernel,
        };
        Ok((rank, shape, Content::Kronecker { w1, w2, scale }))
    }

    fn channels(&self) -> Result<Read, ToolError> {
        let (factors, tensor) = self.tensor(Slot::Ia3Weight)?;
        let on_input = self
            .number(Slot::Ia3OnInput)?
            .is_some_and(|value| value != 0.0);
        let longest = tensor.iter().copied().max().unwrap_or(0);
        self.fits(Slot::Ia3Weight, "elements", factors.len(), longest)?;
        let shape = DeltaShape {
            out: if on_input { 0 } else { factors.len() },
            columns: if on_input { factors.len() } else { 0 },
            kernel: None,
        };
        Ok((None, shape, Content::Channels { factors, on_input }))
    }

    fn full(&self) -> Result<Read, ToolError> {
        if !self.module.has(Slot::Diff) {
            let found = "a change of the bias alone";
            return Err(self.wrong(Slot::DiffBias, found, "one of the weight"));
        }
        let (values, shape) = self.tensor(Slot::Diff)?;
        let (rows, kernel) = match shape[..] {
            [rows, _] | [rows] => (rows, None),
            [rows, _, height, width] => (rows, Some([height, width])),
            _ => {
                let found = format!("the shape {shape:?}");
                return Err(self.wrong(Slot::Diff, found, "1, 2 or 4 dimensions"));
            }
        };
        let columns = values.len() / rows;
        self.bounded(Slot::Diff, rows, columns)?;
        let delta = from_rows(&values, rows, columns);
        let shape = DeltaShape {
            out: rows,
            columns,
            kernel,
        };
        Ok((None, shape, Content::Full(delta)))
    }
}

/// `alpha / rank`; an alpha of 0, or none, is the rank.
fn strength(alpha: Option<f32>, rank: usize) -> f32 {
    match alpha {
        Some(alpha) if alpha != 0.0 => alpha / rank as f32,
        _ => 1.0,
    }
}
