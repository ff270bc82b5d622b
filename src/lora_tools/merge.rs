//! Several LoRA files as one.
//!
//! `Σ mᵢ sᵢ upᵢ downᵢ` with strengths `mᵢ` and scales `sᵢ = alphaᵢ / rankᵢ` is one adapter whose factors are put behind
//! one another: exact, with the sum of the ranks. Or that sum's best approximation of a lower rank.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};
use serde_json::json;

use super::change::{self, Change, Content, DeltaShape};
use super::error::ToolError;
use super::file::{AdapterFile, Kind, Module};
use super::matrix::{self, Matrix};
use super::names::{self, Convention, Place};
use super::notes;
use super::writer::{Planned, Writer, encode, rounded};
use super::{Progress, Written, batch};
use crate::diffusion::Family;
use crate::diffusion::ldm::UNetLayout;
use crate::networks::SavePrecision;

/// Most files that are merged at once.
pub const MAX_FILES: usize = 32;
/// Largest rank that a result may have.
pub const MAX_RANK: usize = 4096;
/// Largest strength, in either direction.
pub const MAX_STRENGTH: f64 = 100.0;

/// A file and how much of it is taken.
#[derive(Debug)]
pub struct Ingredient {
    pub file: AdapterFile,
    /// Factor on what it does; may be negative.
    pub strength: f64,
    /// What it is called in the result's description.
    pub title: String,
}

impl Ingredient {
    /// Opens a file.
    ///
    /// # Errors
    /// When it is no LoRA file, or the strength makes no sense.
    pub fn open(path: &Path, strength: f64) -> Result<Self, ToolError> {
        if !strength.is_finite() || strength.abs() > MAX_STRENGTH {
            let message = format!("found {strength}, expected -{MAX_STRENGTH} to {MAX_STRENGTH}");
            return Err(ToolError::option("strength", message));
        }
        let file = AdapterFile::open_known(path)?;
        let title = notes::title_of(&file);
        Ok(Self {
            file,
            strength,
            title,
        })
    }
}

/// How factors become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Behind one another: nothing is lost, ranks add up.
    Concatenate,
    /// The largest singular values of the sum.
    Svd {
        /// Rank of linear layers and 1×1 convolutions.
        rank: usize,
        /// Rank of larger convolutions.
        conv_rank: usize,
    },
}

/// What is to be made.
#[derive(Clone, Debug)]
pub struct Merge {
    pub method: Method,
    /// Number format of the result; without, that of the first file.
    pub precision: Option<SavePrecision>,
    /// The result's title.
    pub title: String,
}

/// Merges files into one with sd-scripts' names.
///
/// # Errors
/// When a file cannot be read, adapters of one layer do not fit together, or a kind cannot be merged in this way.
pub fn merge(
    ingredients: &[Ingredient],
    wish: &Merge,
    output: &Path,
    progress: &mut dyn Progress,
) -> Result<Written, ToolError> {
    check(ingredients, wish)?;
    let family = common_family(ingredients)?;
    let layout = notes::layout_of(family);
    let groups = group(ingredients, family, &layout);
    let precision = wish
        .precision
        .unwrap_or_else(|| ingredients[0].file.precision());

    let sketches: Vec<Sketch> = groups
        .iter()
        .map(|group| group.sketch(ingredients, wish.method, family))
        .collect::<Result<_, _>>()?;
    let mut plan = Vec::with_capacity(3 * groups.len());
    for (group, sketch) in groups.iter().zip(&sketches) {
        plan.extend(planned(&group.name, sketch.shape, sketch.rank, precision));
    }
    let metadata = description(ingredients, wish, family, &sketches);
    let mut writer = Writer::begin(output, plan, metadata, true)?;

    progress.total(groups.len());
    let pairs: Vec<(&Group<'_>, &Sketch)> = groups.iter().zip(&sketches).collect();
    for pairs in pairs.chunks(batch()) {
        let done: Vec<[Vec<u8>; 3]> = pairs
            .par_iter()
            .map(|(group, sketch)| {
                let adapter = group.merge(ingredients, wish.method, sketch)?;
                adapter.encode(precision).ok_or_else(|| {
                    let expected = format!("numbers that {precision:?} can hold");
                    ToolError::tensor(output, &group.name, "larger ones", expected)
                })
            })
            .collect::<Result<_, ToolError>>()?;
        for tensors in done {
            for bytes in tensors {
                writer.push(&bytes)?;
            }
        }
        progress.done(pairs.len());
    }
    Ok(Written {
        size_bytes: writer.finish()?,
        precision: Some(precision),
        modules: groups.len(),
    })
}

fn check(ingredients: &[Ingredient], wish: &Merge) -> Result<(), ToolError> {
    if ingredients.is_empty() || ingredients.len() > MAX_FILES {
        let message = format!("found {}, expected 1 to {MAX_FILES}", ingredients.len());
        return Err(ToolError::option("files", message));
    }
    if let Method::Svd { rank, conv_rank } = wish.method {
        for (field, rank) in [("rank", rank), ("conv_rank", conv_rank)] {
            if !(1..=MAX_RANK).contains(&rank) {
                let message = format!("found {rank}, expected 1 to {MAX_RANK}");
                return Err(ToolError::option(field, message));
            }
        }
    }
    Ok(())
}

/// The generation that all files are for; files that do not tell go with the others.
fn common_family(ingredients: &[Ingredient]) -> Result<Option<Family>, ToolError> {
    let mut known: Option<(Family, &AdapterFile)> = None;
    for Ingredient { file, .. } in ingredients {
        let Some(family) = notes::family_of_file(file) else {
            continue;
        };
        match known {
            Some((first, of)) if first != family => {
                let of = of.path.display();
                let message = format!("is for {family:?}, but {of} is for {first:?}");
                return Err(ToolError::kind(&file.path, message));
            }
            _ => known = Some((family, file)),
        }
    }
    Ok(known.map(|(family, _)| family))
}

/// The adapters of one layer.
struct Group<'a> {
    /// What the result calls it.
    name: String,
    place: Option<Place>,
    /// Which file, and its adapter.
    members: Vec<(usize, &'a Module)>,
}

/// Size of a result.
struct Sketch {
    shape: DeltaShape,
    rank: usize,
}

/// Adapters by layer, in the order of the result's names. Names that are not known stay as they are.
fn group<'a>(
    ingredients: &'a [Ingredient],
    family: Option<Family>,
    layout: &UNetLayout,
) -> Vec<Group<'a>> {
    let mut groups: Vec<Group<'a>> = Vec::new();
    let mut known: HashMap<(Option<Place>, String), usize> = HashMap::new();
    for (index, ingredient) in ingredients.iter().enumerate() {
        let stays = ingredient.file.convention == Some(Convention::Kohya);
        for module in &ingredient.file.modules {
            let place = names::place_of(&module.name, layout);
            let identity = match &place {
                Some(place) => (Some(place.clone()), String::new()),
                None => (None, module.name.clone()),
            };
            let at = *known.entry(identity).or_insert_with(|| {
                let name = match (&place, family) {
                    (Some(place), Some(family)) if !stays => {
                        names::name_of(place, Convention::Kohya, family, layout)
                    }
                    (Some(place), None) if !stays => {
                        names::name_of(place, Convention::Kohya, Family::Sd1, layout)
                    }
                    _ => module.name.clone(),
                };
                groups.push(Group {
                    name,
                    place,
                    members: Vec::new(),
                });
                groups.len() - 1
            });
            groups[at].members.push((index, module));
        }
    }
    groups.sort_by(|a, b| a.name.cmp(&b.name));
    groups
}

impl Group<'_> {
    /// Size of the result, from the headers alone where that is enough.
    fn sketch(
        &self,
        ingredients: &[Ingredient],
        method: Method,
        family: Option<Family>,
    ) -> Result<Sketch, ToolError> {
        let mut total = 0_usize;
        let mut known: Option<(DeltaShape, &Path)> = None;
        let mut kernel = None;
        for (index, module) in &self.members {
            let file = &ingredients[*index].file;
            let found = change::outline(file, module)?;
            refuse(file, module, &found, method)?;
            total = total.saturating_add(found.rank);
            kernel = kernel.or(found.shape.kernel);
            match known {
                Some((first, of))
                    if (first.out, first.columns) != (found.shape.out, found.shape.columns) =>
                {
                    let of = of.display();
                    let expected = format!("{} × {} as in {of}", first.out, first.columns);
                    let found =
                        format!("a change of {} × {}", found.shape.out, found.shape.columns);
                    return Err(ToolError::tensor(&file.path, &module.name, found, expected));
                }
                _ => known = Some((found.shape, &file.path)),
            }
        }
        let (mut shape, _) = known.unwrap_or((
            DeltaShape {
                out: 1,
                columns: 1,
                kernel: None,
            },
            Path::new(""),
        ));
        shape.kernel = kernel.or_else(|| {
            let side = names::kernel_of(self.place.as_ref()?, family)?;
            shape
                .columns
                .is_multiple_of(side * side)
                .then_some([side, side])
        });
        let wide = shape.kernel.is_some_and(|kernel| kernel != [1, 1]);
        let rank = match method {
            Method::Concatenate => total,
            Method::Svd { conv_rank, .. } if wide => conv_rank.min(total),
            Method::Svd { rank, .. } => rank.min(total),
        };
        let most = if method == Method::Concatenate {
            MAX_RANK
        } else {
            shape.out.min(shape.columns)
        };
        if method == Method::Concatenate && rank > most {
            let message = format!(
                "the ranks of `{}` add up to {rank}, expected at most {most}",
                self.name
            );
            return Err(ToolError::option("files", message));
        }
        Ok(Sketch {
            shape,
            rank: rank.min(most).max(1),
        })
    }

    fn merge(
        &self,
        ingredients: &[Ingredient],
        method: Method,
        sketch: &Sketch,
    ) -> Result<LowRank, ToolError> {
        let mut changes = Vec::with_capacity(self.members.len());
        for (index, module) in &self.members {
            let Ingredient { file, strength, .. } = &ingredients[*index];
            changes.push((change::read(file, module)?, *strength as f32));
        }
        let not_converged = || {
            let first = &ingredients[self.members[0].0].file.path;
            ToolError::tensor(first, &self.name, "no singular values", "some")
        };
        let sum = match concatenated(&changes) {
            Some(both) if method == Method::Concatenate => {
                return Ok(LowRank {
                    shape: sketch.shape,
                    ..both
                });
            }
            Some(both) if 2 * both.rank() <= sketch.shape.out.min(sketch.shape.columns) => {
                let found =
                    matrix::svd_of_product(&both.up, &both.down).ok_or_else(not_converged)?;
                let (up, down) = matrix::split(&found, sketch.rank);
                return Ok(LowRank {
                    up,
                    down,
                    scale: both.scale,
                    shape: sketch.shape,
                });
            }
            _ => {
                let mut sum = Matrix::zeros(sketch.shape.out, sketch.shape.columns);
                for (change, strength) in &changes {
                    change.add_to(&mut sum, *strength);
                }
                sum
            }
        };
        let found = matrix::first_of(&sum, sketch.rank).ok_or_else(not_converged)?;
        let (up, down) = matrix::split(&found, sketch.rank);
        Ok(LowRank {
            up,
            down,
            scale: 1.0,
            shape: sketch.shape,
        })
    }
}

fn refuse(
    file: &AdapterFile,
    module: &Module,
    found: &change::Outline,
    method: Method,
) -> Result<(), ToolError> {
    let name = &module.name;
    let problem = if found.has_magnitudes {
        format!(
            "`{name}` is a DoRA: what it does hangs on the base model, so that it can be merged into that \
             (`lora merge-into-base`) but not into a LoRA"
        )
    } else if found.kind == Kind::Ia3 {
        format!(
            "`{name}` is an IA³: it scales the base's weights, which no LoRA can; merge it into the base model"
        )
    } else if found.changes_bias {
        format!(
            "`{name}` changes a bias (`.diff_b`), which a LoRA cannot; merge it into the base model"
        )
    } else if !matches!(found.kind, Kind::Lora | Kind::Locon) && method == Method::Concatenate {
        format!(
            "`{name}` is a {}: its factors cannot be put behind others, expected a rank to approximate it with",
            found.kind
        )
    } else {
        return Ok(());
    };
    Err(ToolError::kind(&file.path, problem))
}

/// An adapter that is to be written: `scale · up · down`.
pub struct LowRank {
    pub up: Matrix,
    pub down: Matrix,
    pub scale: f32,
    pub shape: DeltaShape,
}

impl LowRank {
    fn rank(&self) -> usize {
        self.down.nrows()
    }

    /// Alpha, `lora_down` and `lora_up` as a file holds them.
    ///
    /// Alpha is rounded to what the file can hold, and `up` makes up for it, so that the strength is right.
    pub fn encode(&self, precision: SavePrecision) -> Option<[Vec<u8>; 3]> {
        let exact = self.scale * self.rank() as f32;
        let alpha = rounded(exact, precision);
        let mut up = matrix::to_rows(self.up.as_ref());
        if alpha != exact {
            let factor = exact / alpha;
            for value in &mut up {
                *value *= factor;
            }
        }
        Some([
            encode(&[alpha], precision)?,
            encode(&matrix::to_rows(self.down.as_ref()), precision)?,
            encode(&up, precision)?,
        ])
    }
}

/// What is written for an adapter, in the order in which it is.
pub fn planned(
    name: &str,
    shape: DeltaShape,
    rank: usize,
    precision: SavePrecision,
) -> [Planned; 3] {
    let (down, up) = factor_shapes(shape, rank);
    [
        Planned::new(format!("{name}.alpha"), precision, Vec::new()),
        Planned::new(format!("{name}.lora_down.weight"), precision, down),
        Planned::new(format!("{name}.lora_up.weight"), precision, up),
    ]
}

/// Shapes of `down` and `up`.
pub fn factor_shapes(shape: DeltaShape, rank: usize) -> (Vec<usize>, Vec<usize>) {
    match shape.kernel {
        Some([height, width]) => (
            vec![rank, shape.columns / (height * width), height, width],
            vec![shape.out, rank, 1, 1],
        ),
        None => (vec![rank, shape.columns], vec![shape.out, rank]),
    }
}

/// Factors behind one another, with the largest of the scales as the common one: of one file at strength 1 nothing
/// changes, and no factor grows. `None` where one is not of low rank.
fn concatenated(changes: &[(Change, f32)]) -> Option<LowRank> {
    let mut parts = Vec::with_capacity(changes.len());
    for (change, strength) in changes {
        let Content::LowRank { up, down, scale } = &change.content else {
            return None;
        };
        parts.push((up, down, scale * strength));
    }
    let largest = parts.iter().map(|part| part.2.abs()).fold(0.0, f32::max);
    let common = if largest > 0.0 { largest } else { 1.0 };
    let total = parts.iter().map(|part| part.1.nrows()).sum();
    let shape = changes.first()?.0.shape;
    let mut up = Matrix::zeros(shape.out, total);
    let mut down = Matrix::zeros(total, shape.columns);
    let mut at = 0;
    for (part_up, part_down, scale) in parts {
        let (rank, factor) = (part_down.nrows(), scale / common);
        for column in 0..rank {
            for row in 0..shape.out {
                up[(row, at + column)] = part_up[(row, column)] * factor;
            }
        }
        down.subrows_mut(at, rank).copy_from(part_down);
        at += rank;
    }
    Some(LowRank {
        up,
        down,
        scale: common,
        shape,
    })
}

fn description(
    ingredients: &[Ingredient],
    wish: &Merge,
    family: Option<Family>,
    sketches: &[Sketch],
) -> BTreeMap<String, String> {
    let mut entries = BTreeMap::new();
    let first = sketches.first().map(|sketch| sketch.rank);
    let dim = first.filter(|rank| sketches.iter().all(|sketch| sketch.rank == *rank));
    let alpha = dim.filter(|_| wish.method != Method::Concatenate);
    let alpha = alpha.map(|alpha| notes::float(alpha as f64));
    notes::network_entries(&mut entries, family, dim, alpha);
    notes::modelspec_entries(&mut entries, family, &wish.title);
    let titles: Vec<&str> = ingredients.iter().map(|one| one.title.as_str()).collect();
    entries.insert("modelspec.merged_from".to_owned(), titles.join(", "));
    let parts: Vec<_> = ingredients
        .iter()
        .map(|one| json!({"title": one.title, "strength": one.strength}))
        .collect();
    let method = match wish.method {
        Method::Concatenate => json!({"method": "concatenate"}),
        Method::Svd { rank, conv_rank } => {
            json!({"method": "svd", "rank": rank, "conv_rank": conv_rank})
        }
    };
    let record = json!({"files": parts, "how": method});
    entries.insert("lorasmith_merge".to_owned(), record.to_string());
    // sd-scripts' own word for it.
    let comment = format!("merged from {}", titles.join(", "));
    entries.insert("ss_training_comment".to_owned(), comment);
    entries
}
