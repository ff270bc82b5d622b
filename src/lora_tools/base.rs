//! LoRA files merged into the weights of a base model: a single file, or a diffusers folder.
//!
//! `W ← W + m Δ`; of a DoRA `W ← W + m (W' − W)` with `W' = (W + Δ) · magnitude / ‖W + Δ‖`, of an IA³
//! `W ← W · (1 + m f)`. Tensor by tensor: neither model is ever in memory as a whole.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use faer::MatMut;
use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};
use safetensors::Dtype;
use serde_json::json;

use super::change::{self, Change, Content, Magnitudes};
use super::error::ToolError;
use super::file::{AdapterFile, Module, Slot};
use super::matrix::{self, Matrix};
use super::merge::Ingredient;
use super::names::{self, PartName, Place};
use super::writer::{Planned, Writer, encode};
use super::{Progress, Written, batch};
use crate::diffusion::ldm::{self, KeyMap, UNetLayout};
use crate::diffusion::source::{family_of_file, family_of_folder, weight_files};
use crate::diffusion::weights::StoredView;
use crate::diffusion::{Family, KeySource, LoadError, Weights};
use crate::networks::SavePrecision;

/// What is to be made.
#[derive(Clone, Copy, Debug, Default)]
pub struct BaseMerge {
    /// Number format of all float tensors; without, each keeps its own.
    pub precision: Option<SavePrecision>,
}

/// Merges files into a copy of a base model. Names of tensors and the description stay.
///
/// # Errors
/// When the base is no model, an adapter's layer is not in it, or shapes do not fit.
pub fn merge_into_base(
    base: &Path,
    ingredients: &[Ingredient],
    wish: &BaseMerge,
    output: &Path,
    progress: &mut dyn Progress,
) -> Result<Written, ToolError> {
    if output.exists() && same_file(base, output) {
        let message = format!(
            "{} is the base model itself, expected another path",
            output.display()
        );
        return Err(ToolError::option("output", message));
    }
    let model = Base::open(base)?;
    let changes = Changes::of(ingredients, &model)?;
    let tensors: usize = model
        .files
        .iter()
        .map(|file| file.weights.stored().count())
        .sum();
    progress.total(tensors);
    let merge = Merging {
        ingredients,
        changes: &changes,
        model: &model,
        wish: *wish,
    };
    let mut size_bytes = 0;
    if model.is_folder {
        let parent = output
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        if output.exists() {
            return Err(ToolError::option(
                "output",
                format!("{} exists", output.display()),
            ));
        }
        fs::create_dir_all(parent).map_err(|error| ToolError::io(parent, error))?;
        let unfinished = tempfile::Builder::new()
            .prefix(".merging-")
            .tempdir_in(parent);
        let unfinished = unfinished.map_err(|error| ToolError::io(parent, error))?;
        copy_rest(base, unfinished.path(), 0)?;
        for file in &model.files {
            let below = file.path.strip_prefix(base).unwrap_or(&file.path);
            size_bytes += merge.file(file, &unfinished.path().join(below), progress)?;
        }
        let unfinished = unfinished.keep();
        fs::rename(&unfinished, output).map_err(|error| ToolError::io(output, error))?;
    } else {
        for file in &model.files {
            size_bytes += merge.file(file, output, progress)?;
        }
    }
    Ok(Written {
        size_bytes,
        precision: wish.precision,
        modules: changes.0.len(),
    })
}

/// The layout of a base model's UNet, and its generation.
///
/// # Errors
/// When it is no model.
pub fn layout_of_base(base: &Path) -> Result<(Family, UNetLayout), ToolError> {
    let model = Base::open(base)?;
    Ok((model.family, model.layout))
}

/// The weights of a base model.
struct Base {
    family: Family,
    layout: UNetLayout,
    is_folder: bool,
    files: Vec<BaseFile>,
}

/// One file of it, and what its tensors are.
struct BaseFile {
    path: PathBuf,
    weights: Weights,
    /// Stored name to what is seen in it.
    seen: HashMap<String, Vec<Seen>>,
}

/// The weight or bias of a layer.
struct Seen {
    place: Place,
    is_bias: bool,
    view: StoredView,
}

impl Base {
    fn open(path: &Path) -> Result<Self, ToolError> {
        if path.is_dir() {
            return Self::open_folder(path);
        }
        let weights = Weights::open(&[path.to_owned()])?;
        let family = family_of_file(&weights).ok_or_else(|| LoadError::NotAModel {
            path: path.to_owned(),
            reason: "no tensor below `model.diffusion_model.` and a known text encoder's name"
                .to_owned(),
        })?;
        let mut maps = vec![(PartName::UNet, ldm::unet(&weights))];
        let text = PartName::TextEncoder;
        maps.push(match family {
            Family::Sd1 => (text, ldm::text_encoder(&weights, ldm::TEXT_ENCODER_PREFIX)),
            Family::Sd2 => (text, ldm::open_clip(&weights, ldm::SD2_TEXT_ENCODER_PREFIX)),
            Family::Sdxl => (
                text,
                ldm::text_encoder(&weights, ldm::SDXL_TEXT_ENCODER_PREFIX),
            ),
        });
        if family == Family::Sdxl {
            let second = ldm::open_clip(&weights, ldm::SDXL_TEXT_ENCODER_2_PREFIX);
            maps.push((PartName::TextEncoder2, second));
        }
        let layout = UNetLayout::of_names(maps[0].1.keys().map(String::as_str));
        Ok(Self {
            family,
            layout: layout.unwrap_or_else(|| UNetLayout::published(family == Family::Sdxl)),
            is_folder: false,
            files: vec![BaseFile::new(path.to_owned(), weights, maps)],
        })
    }

    fn open_folder(path: &Path) -> Result<Self, ToolError> {
        let family = family_of_folder(path)?;
        let mut files = Vec::new();
        let mut layout = None;
        for (component, part) in [
            ("unet", Some(PartName::UNet)),
            ("text_encoder", Some(PartName::TextEncoder)),
            ("text_encoder_2", Some(PartName::TextEncoder2)),
            ("vae", None),
        ] {
            let folder = path.join(component);
            if !folder.is_dir() {
                continue;
            }
            for file in weight_files(&folder)? {
                let weights = Weights::open(std::slice::from_ref(&file))?;
                let map = match part {
                    Some(PartName::UNet) => plain(&weights),
                    Some(_) => ldm::text_encoder_of_folder(&weights),
                    None => KeyMap::new(),
                };
                let maps = part.map(|part| (part, map)).into_iter().collect();
                files.push(BaseFile::new(file, weights, maps));
            }
            if part == Some(PartName::UNet) {
                let names = files
                    .iter()
                    .flat_map(|file| file.weights.stored().map(|(key, ..)| key));
                layout = UNetLayout::of_names(names);
            }
        }
        Ok(Self {
            family,
            layout: layout.unwrap_or_else(|| UNetLayout::published(family == Family::Sdxl)),
            is_folder: true,
            files,
        })
    }

    fn has(&self, place: &Place) -> bool {
        let seen = self
            .files
            .iter()
            .flat_map(|file| file.seen.values().flatten());
        seen.into_iter().any(|seen| seen.place == *place)
    }
}

fn plain(weights: &Weights) -> KeyMap {
    let keys = weights.stored().map(|(key, ..)| key.to_owned());
    keys.map(|key| (key.clone(), KeySource::whole(key)))
        .collect()
}

impl BaseFile {
    fn new(path: PathBuf, weights: Weights, maps: Vec<(PartName, KeyMap)>) -> Self {
        let mut seen: HashMap<String, Vec<Seen>> = HashMap::new();
        for (part, map) in maps {
            for (name, KeySource { key, view }) in map {
                let (path, is_bias) =
                    match (name.strip_suffix(".weight"), name.strip_suffix(".bias")) {
                        (Some(path), _) => (path, false),
                        (None, Some(path)) => (path, true),
                        (None, None) => continue,
                    };
                let place = Place {
                    part,
                    path: path.to_owned(),
                };
                seen.entry(key).or_default().push(Seen {
                    place,
                    is_bias,
                    view,
                });
            }
        }
        Self {
            path,
            weights,
            seen,
        }
    }
}

/// Adapters by layer: which file, and its adapter.
struct Changes<'a>(HashMap<Place, Vec<(usize, &'a Module)>>);

impl<'a> Changes<'a> {
    fn of(ingredients: &'a [Ingredient], model: &Base) -> Result<Self, ToolError> {
        let mut changes: HashMap<Place, Vec<(usize, &'a Module)>> = HashMap::new();
        for (index, Ingredient { file, .. }) in ingredients.iter().enumerate() {
            for module in &file.modules {
                let place = names::place_of(&module.name, &model.layout);
                let place = place.filter(|place| changes.contains_key(place) || model.has(place));
                let Some(place) = place else {
                    let expected = format!("a layer of this {:?} model", model.family);
                    let found = "a name that the base model does not have";
                    return Err(ToolError::tensor(&file.path, &module.name, found, expected));
                };
                changes.entry(place).or_default().push((index, module));
            }
        }
        Ok(Self(changes))
    }
}

/// The work on one model.
struct Merging<'a> {
    ingredients: &'a [Ingredient],
    changes: &'a Changes<'a>,
    model: &'a Base,
    wish: BaseMerge,
}

impl Merging<'_> {
    fn file(
        &self,
        file: &BaseFile,
        output: &Path,
        progress: &mut dyn Progress,
    ) -> Result<u64, ToolError> {
        let mut tensors: Vec<(&str, &[usize], Dtype)> = file.weights.stored().collect();
        // As the safetensors library orders them.
        tensors.sort_by(|a, b| b.2.cmp(&a.2).then(a.0.cmp(b.0)));
        let plan: Vec<Planned> = tensors
            .iter()
            .map(|(key, shape, dtype)| self.planned(file, key, shape, *dtype))
            .collect::<Result<_, _>>()?;
        let mut writer = Writer::begin(output, plan, self.description(file), false)?;
        for tensors in tensors.chunks(batch()) {
            let computed: Vec<Option<Vec<u8>>> = tensors
                .par_iter()
                .map(|(key, shape, dtype)| self.tensor(file, key, shape, *dtype))
                .collect::<Result<_, _>>()?;
            for ((key, ..), bytes) in tensors.iter().zip(computed) {
                match bytes {
                    Some(bytes) => writer.push(&bytes)?,
                    None => writer.push(file.weights.read_bytes(key)?.0)?,
                }
                file.weights.release(key);
            }
            progress.done(tensors.len());
        }
        writer.finish()
    }

    /// The format that a tensor is written in; none of those that stay as they are.
    fn precision(&self, dtype: Dtype, is_changed: bool) -> Option<SavePrecision> {
        let own = match dtype {
            Dtype::F16 => SavePrecision::Fp16,
            Dtype::BF16 => SavePrecision::Bf16,
            Dtype::F32 | Dtype::F64 => SavePrecision::Fp32,
            _ => return None,
        };
        let wanted = self.wish.precision.unwrap_or(own);
        (is_changed || (wanted != own) || (self.wish.precision.is_some() && dtype == Dtype::F64))
            .then_some(wanted)
    }

    fn planned(
        &self,
        file: &BaseFile,
        key: &str,
        shape: &[usize],
        dtype: Dtype,
    ) -> Result<Planned, ToolError> {
        let shape = shape.to_vec();
        let is_changed = self.seen_changes(file, key).next().is_some();
        match self.precision(dtype, is_changed) {
            Some(precision) => Ok(Planned::new(key.to_owned(), precision, shape)),
            None if is_changed => {
                let found = format!("{dtype:?}");
                Err(ToolError::tensor(
                    &file.path,
                    key,
                    found,
                    "F16, BF16, F32 or F64",
                ))
            }
            None => Ok(Planned {
                key: key.to_owned(),
                dtype,
                size_bytes: file.weights.read_bytes(key)?.0.len(),
                shape,
            }),
        }
    }

    fn seen_changes<'s>(
        &'s self,
        file: &'s BaseFile,
        key: &str,
    ) -> impl Iterator<Item = (&'s Seen, &'s [(usize, &'s Module)])> {
        let seen = file.seen.get(key).map(Vec::as_slice).unwrap_or_default();
        seen.iter().filter_map(|seen| {
            let changes = self.changes.0.get(&seen.place)?;
            let changes_it = |(_, module): &(usize, &Module)| {
                let only_bias = module.has(Slot::DiffBias) && module.keys.len() == 1;
                if seen.is_bias {
                    module.has(Slot::DiffBias)
                } else {
                    !only_bias
                }
            };
            changes
                .iter()
                .any(changes_it)
                .then_some((seen, changes.as_slice()))
        })
    }

    /// The tensor as it is written; none if it stays as it is.
    fn tensor(
        &self,
        file: &BaseFile,
        key: &str,
        shape: &[usize],
        dtype: Dtype,
    ) -> Result<Option<Vec<u8>>, ToolError> {
        let changes: Vec<_> = self.seen_changes(file, key).collect();
        let Some(precision) = self.precision(dtype, !changes.is_empty()) else {
            return Ok(None);
        };
        let (mut values, _) = file.weights.read_f32(key)?;
        for (seen, changes) in changes {
            let rows = shape.first().copied().unwrap_or(1).max(1);
            let columns = values.len() / rows;
            match seen.view {
                StoredView::Whole => self.change(file, key, seen, changes, &mut values, rows)?,
                StoredView::Rows { index, of } => {
                    let part = rows / of.max(1) * columns;
                    let part = &mut values[index * part..(index + 1) * part];
                    self.change(file, key, seen, changes, part, rows / of.max(1))?;
                }
                StoredView::Transposed => {
                    let stored = matrix::from_rows(&values, rows, columns);
                    let mut turned = matrix::to_rows(stored.transpose());
                    self.change(file, key, seen, changes, &mut turned, columns)?;
                    let turned = matrix::from_rows(&turned, columns, rows);
                    values = matrix::to_rows(turned.transpose());
                }
            }
        }
        let bytes = encode(&values, precision).ok_or_else(|| {
            let expected = format!("numbers that {precision:?} can hold");
            ToolError::tensor(&file.path, key, "larger ones, or none", expected)
        })?;
        Ok(Some(bytes))
    }

    fn change(
        &self,
        file: &BaseFile,
        key: &str,
        seen: &Seen,
        changes: &[(usize, &Module)],
        values: &mut [f32],
        rows: usize,
    ) -> Result<(), ToolError> {
        for (index, module) in changes {
            let Ingredient {
                file: lora,
                strength,
                ..
            } = &self.ingredients[*index];
            let strength = *strength as f32;
            if seen.is_bias {
                add_bias(lora, module, values, strength)?;
                continue;
            }
            let change = change::read(lora, module)?;
            let columns = values.len() / rows;
            fits(&change, rows, columns).map_err(|(found, expected)| {
                ToolError::tensor(&lora.path, &module.name, found, expected)
            })?;
            apply(&change, values, rows, strength).ok_or_else(|| {
                let found = format!("an adapter that does not fit `{key}`");
                ToolError::tensor(
                    &lora.path,
                    &module.name,
                    found,
                    file.path.display().to_string(),
                )
            })?;
        }
        Ok(())
    }

    fn description(&self, file: &BaseFile) -> BTreeMap<String, String> {
        let entries = file.weights.metadata().iter();
        let mut entries: BTreeMap<String, String> = entries
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        entries.remove("modelspec.hash_sha256"); // it is another file
        if !self.model.is_folder {
            let loras: Vec<_> = self
                .ingredients
                .iter()
                .map(|one| json!({"title": one.title, "strength": one.strength}))
                .collect();
            entries.insert(
                "lorasmith_merged_loras".to_owned(),
                json!(loras).to_string(),
            );
        }
        entries
    }
}

/// What was found and expected, when an adapter's size is not the layer's.
fn fits(change: &Change, rows: usize, columns: usize) -> Result<(), (String, String)> {
    let expected = format!("{rows} × {columns} as in the base model");
    match &change.content {
        Content::Channels { factors, on_input } => {
            let fits = if *on_input {
                columns.is_multiple_of(factors.len())
            } else {
                factors.len() == rows
            };
            if fits {
                Ok(())
            } else {
                Err((format!("{} factors", factors.len()), expected))
            }
        }
        _ if (change.shape.out, change.shape.columns) == (rows, columns) => Ok(()),
        _ => {
            let found = format!(
                "a change of {} × {}",
                change.shape.out, change.shape.columns
            );
            Err((found, expected))
        }
    }
}

/// Changes a weight `[rows, columns]`; `None` where magnitudes do not fit.
fn apply(change: &Change, values: &mut [f32], rows: usize, strength: f32) -> Option<()> {
    let columns = values.len() / rows;
    if let Some(magnitudes) = &change.magnitudes {
        let mut changed = matrix::from_rows(values, rows, columns);
        change.add_to(&mut changed, 1.0).then_some(())?;
        decompose(&mut changed, magnitudes)?;
        for (i, row) in values.chunks_exact_mut(columns).enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                *value += strength * (changed[(i, j)] - *value);
            }
        }
        return Some(());
    }
    match &change.content {
        Content::Channels { factors, on_input } => {
            let kernel = if *on_input {
                columns / factors.len()
            } else {
                1
            };
            for (i, row) in values.chunks_exact_mut(columns).enumerate() {
                for (j, value) in row.iter_mut().enumerate() {
                    let factor = if *on_input {
                        factors[j / kernel]
                    } else {
                        factors[i]
                    };
                    *value *= 1.0 + strength * factor;
                }
            }
        }
        Content::LowRank { up, down, scale } => {
            let weight = MatMut::from_row_major_slice_mut(values, rows, columns);
            matrix::add_product(weight, up.as_ref(), down.as_ref(), scale * strength);
        }
        Content::Kronecker { .. } | Content::Full(_) => {
            let mut sum = Matrix::zeros(rows, columns);
            change.add_to(&mut sum, strength);
            for (value, delta) in values.iter_mut().zip(matrix::to_rows(sum.as_ref())) {
                *value += delta;
            }
        }
    }
    Some(())
}

/// `W · magnitude / ‖W‖` by rows, or by what belongs to each input.
fn decompose(weight: &mut Matrix, magnitudes: &Magnitudes) -> Option<()> {
    let count = magnitudes.values.len();
    let kernel = if magnitudes.on_input {
        weight.ncols() / count
    } else {
        1
    };
    let fits = if magnitudes.on_input {
        kernel * count == weight.ncols()
    } else {
        count == weight.nrows()
    };
    if !fits || kernel == 0 {
        return None;
    }
    let group = |i: usize, j: usize| if magnitudes.on_input { j / kernel } else { i };
    let mut squares = vec![0.0_f64; count];
    for j in 0..weight.ncols() {
        for i in 0..weight.nrows() {
            squares[group(i, j)] += f64::from(weight[(i, j)]).powi(2);
        }
    }
    let factors: Vec<f32> = squares
        .iter()
        .zip(&magnitudes.values)
        .map(|(squares, magnitude)| magnitude / (squares.sqrt() as f32 + f32::EPSILON))
        .collect();
    for j in 0..weight.ncols() {
        for i in 0..weight.nrows() {
            weight[(i, j)] *= factors[group(i, j)];
        }
    }
    Some(())
}

fn add_bias(
    lora: &AdapterFile,
    module: &Module,
    values: &mut [f32],
    strength: f32,
) -> Result<(), ToolError> {
    let Some((bias, shape)) = lora.read(module, Slot::DiffBias)? else {
        return Ok(());
    };
    if bias.len() != values.len() {
        let expected = format!("{} elements", values.len());
        return Err(ToolError::tensor(
            &lora.path,
            &module.name,
            format!("a bias of {shape:?}"),
            expected,
        ));
    }
    for (value, change) in values.iter_mut().zip(bias) {
        *value += strength * change;
    }
    Ok(())
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (fs::canonicalize(a), fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

/// Copies configurations and vocabularies of a diffusers folder: everything but weights.
fn copy_rest(from: &Path, to: &Path, depth: usize) -> Result<(), ToolError> {
    const WEIGHTS: [&str; 6] = ["safetensors", "bin", "ckpt", "pt", "onnx", "msgpack"];
    let io = |error| ToolError::io(from, error);
    for entry in fs::read_dir(from).map_err(io)? {
        let entry = entry.map_err(io)?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() && depth < 4 {
            fs::create_dir_all(&target).map_err(|error| ToolError::io(&target, error))?;
            copy_rest(&path, &target, depth + 1)?;
        } else if path.is_file() {
            let ending = path
                .extension()
                .and_then(|end| end.to_str())
                .unwrap_or_default();
            let part_of_model =
                depth > 0 && WEIGHTS.contains(&ending) && !from.ends_with("safety_checker");
            let single_beside = depth == 0 && WEIGHTS.contains(&ending);
            if !part_of_model && !single_beside {
                fs::copy(&path, &target).map_err(|error| ToolError::io(&path, error))?;
            }
        }
    }
    Ok(())
}
