//! The same adapters under the names of another program.
//!
//! diffusers reads `alpha` only beside sd-scripts' names, so that it is multiplied into the factors of a file for it:
//! the scale of every adapter is 1 then. A power of two is shared between the factors, which is exact and keeps small
//! numbers out of the range where f16 loses digits.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};
use serde::Deserialize;

use super::change::{self, Content, DeltaShape};
use super::error::ToolError;
use super::file::{AdapterFile, Kind, Module, Slot};
use super::matrix;
use super::merge::factor_shapes;
pub use super::names::Convention;
use super::names::{self, PartName, Place};
use super::notes;
use super::writer::{Planned, Writer, encode};
use super::{Progress, Written, batch};
use crate::diffusion::Family;
use crate::diffusion::ldm::UNetLayout;
use crate::networks::SavePrecision;

/// Where diffusers keeps the settings of the adapters.
const ADAPTER_METADATA: &str = "lora_adapter_metadata";

/// What is to be made.
#[derive(Clone, Debug)]
pub struct Conversion {
    pub to: Convention,
    /// Number format of the result; without, that of the file.
    pub precision: Option<SavePrecision>,
    /// Generation of the base model, where the file does not tell.
    pub family: Option<Family>,
    /// Layout of the base model's UNet, where it is not a published one.
    pub layout: Option<UNetLayout>,
}

/// Writes a file under other names.
///
/// # Errors
/// When the file cannot be read, an adapter's name is not known, or its kind has no place in the other format.
pub fn convert(
    file: &AdapterFile,
    wish: &Conversion,
    output: &Path,
    progress: &mut dyn Progress,
) -> Result<Written, ToolError> {
    let family = wish.family.or_else(|| notes::family_of_file(file));
    let Some(family) = family else {
        let message =
            "does not tell which generation it is for: expected `--family sd1`, `sd2` or `sdxl`";
        return Err(ToolError::kind(&file.path, message));
    };
    let layout = wish
        .layout
        .clone()
        .unwrap_or_else(|| notes::layout_of(Some(family)));
    let precision = wish.precision.unwrap_or_else(|| file.precision());
    let scales = Scales::of(file)?;
    let mut renamed = Vec::with_capacity(file.modules.len());
    for module in &file.modules {
        renamed.push(Renamed::of(file, module, wish.to, family, &layout)?);
    }
    renamed.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = renamed.windows(2).find(|pair| pair[0].name == pair[1].name) {
        let found = format!("the same layer as `{}`", pair[0].module.name);
        return Err(ToolError::tensor(
            &file.path,
            &pair[1].module.name,
            found,
            "each layer once",
        ));
    }

    let plan = renamed
        .iter()
        .flat_map(|one| one.plan(wish.to, precision))
        .collect();
    let metadata = description(file, wish.to, family);
    let mut writer = Writer::begin(output, plan, metadata, true)?;
    progress.total(renamed.len());
    for modules in renamed.chunks(batch()) {
        let done: Vec<Vec<Vec<u8>>> = modules
            .par_iter()
            .map(|one| one.tensors(file, wish.to, &scales, precision))
            .collect::<Result<_, _>>()?;
        for bytes in done.iter().flatten() {
            writer.push(bytes)?;
        }
        progress.done(modules.len());
    }
    Ok(Written {
        size_bytes: writer.finish()?,
        precision: Some(precision),
        modules: renamed.len(),
    })
}

/// An adapter under its new name.
struct Renamed<'a> {
    name: String,
    module: &'a Module,
    shape: DeltaShape,
    rank: usize,
    /// Elements of DoRA's magnitudes.
    magnitudes: Option<usize>,
}

impl<'a> Renamed<'a> {
    fn of(
        file: &AdapterFile,
        module: &'a Module,
        to: Convention,
        family: Family,
        layout: &UNetLayout,
    ) -> Result<Self, ToolError> {
        let found = change::outline(file, module)?;
        if !matches!(found.kind, Kind::Lora | Kind::Locon) || found.changes_bias {
            let message = format!(
                "`{}` is a {} or changes a bias, for which the other format has no place; expected LoRA, LoCon or DoRA",
                module.name, found.kind
            );
            return Err(ToolError::kind(&file.path, message));
        }
        let place = names::place_of(&module.name, layout).ok_or_else(|| {
            let expected = "a layer of Stable Diffusion (of a UNet of its own, with `--base`)";
            ToolError::tensor(
                &file.path,
                &module.name,
                "a name that is not known",
                expected,
            )
        })?;
        let magnitudes = file.shape(module, Slot::DoraScale);
        Ok(Self {
            name: names::name_of(&place, to, family, layout),
            module,
            shape: shape_for(to, family, &place, found.shape),
            rank: file.shape(module, Slot::Down).map_or(0, |shape| shape[0]),
            magnitudes: magnitudes.map(|shape| shape.iter().product()),
        })
    }

    /// The tensors in the order in which they are written.
    fn plan(&self, to: Convention, precision: SavePrecision) -> Vec<Planned> {
        let (down, up) = factor_shapes(self.shape, self.rank);
        let planned =
            |ending: &str, shape| Planned::new(format!("{}.{ending}", self.name), precision, shape);
        let mut plan = Vec::with_capacity(4);
        match to {
            Convention::Kohya => {
                plan.push(planned("alpha", Vec::new()));
                if let Some(count) = self.magnitudes {
                    // `[out, 1]`, `[out, 1, 1, 1]`
                    let ones = if self.shape.kernel.is_some() { 3 } else { 1 };
                    let shape = std::iter::once(count).chain(std::iter::repeat_n(1, ones));
                    plan.push(planned("dora_scale", shape.collect()));
                }
                plan.push(planned("lora_down.weight", down));
                plan.push(planned("lora_up.weight", up));
            }
            Convention::Diffusers => {
                plan.push(planned("lora_A.weight", down));
                plan.push(planned("lora_B.weight", up));
                if let Some(count) = self.magnitudes {
                    let shape = if self.shape.kernel.is_some() {
                        vec![1, count, 1, 1]
                    } else {
                        vec![count]
                    };
                    plan.push(planned("lora_magnitude_vector", shape));
                }
            }
        }
        plan
    }

    fn tensors(
        &self,
        file: &AdapterFile,
        to: Convention,
        scales: &Scales,
        precision: SavePrecision,
    ) -> Result<Vec<Vec<u8>>, ToolError> {
        let change = change::read(file, self.module)?;
        let Content::LowRank { up, down, scale } = &change.content else {
            let expected = "LoRA or LoCon";
            return Err(ToolError::tensor(
                &file.path,
                &self.module.name,
                "another kind",
                expected,
            ));
        };
        if let Some(magnitudes) = &change.magnitudes
            && (magnitudes.values.len() != change.shape.out || magnitudes.on_input)
        {
            let found = format!("{} magnitudes", magnitudes.values.len());
            let expected = format!("{}: one for each output", change.shape.out);
            return Err(ToolError::tensor(
                &file.path,
                &self.module.name,
                found,
                expected,
            ));
        }
        let scale = scale * scales.of_module(self.module, self.rank);
        let mut up = matrix::to_rows(up.as_ref());
        let mut down = matrix::to_rows(down.as_ref());
        let mut tensors = Vec::with_capacity(4);
        match to {
            Convention::Kohya => {
                let exact = scale * self.rank as f32;
                let alpha = super::writer::rounded(exact, precision);
                let factor = if alpha == 0.0 { 0.0 } else { exact / alpha };
                multiply(&mut up, factor);
                tensors.push(encode(&[alpha], precision));
                if let Some(magnitudes) = &change.magnitudes {
                    tensors.push(encode(&magnitudes.values, precision));
                }
                tensors.push(encode(&down, precision));
                tensors.push(encode(&up, precision));
            }
            Convention::Diffusers => {
                multiply(&mut up, scale);
                let shared = balance(&up, &down);
                multiply(&mut up, shared);
                multiply(&mut down, 1.0 / shared);
                tensors.push(encode(&down, precision));
                tensors.push(encode(&up, precision));
                if let Some(magnitudes) = &change.magnitudes {
                    tensors.push(encode(&magnitudes.values, precision));
                }
            }
        }
        let tensors: Option<Vec<_>> = tensors.into_iter().collect();
        tensors.ok_or_else(|| {
            let expected = format!("numbers that {precision:?} can hold");
            ToolError::tensor(&file.path, &self.module.name, "larger ones", expected)
        })
    }
}

/// Stable Diffusion 2's projections are linear in diffusers and convolutions in sd-scripts' files.
fn shape_for(to: Convention, family: Family, place: &Place, shape: DeltaShape) -> DeltaShape {
    let last = place.path.rsplit('.').next().unwrap_or_default();
    let projection = place.part == PartName::UNet && matches!(last, "proj_in" | "proj_out");
    let kernel = match (family, to, shape.kernel) {
        (Family::Sd2, Convention::Diffusers, Some([1, 1])) if projection => None,
        (Family::Sd2, Convention::Kohya, None) if projection => Some([1, 1]),
        (_, _, kernel) => kernel,
    };
    DeltaShape { kernel, ..shape }
}

fn multiply(values: &mut [f32], factor: f32) {
    if factor != 1.0 {
        for value in values {
            *value *= factor;
        }
    }
}

/// The power of two by which `up` grows and `down` shrinks so that their numbers are about as large.
fn balance(up: &[f32], down: &[f32]) -> f32 {
    let size = |values: &[f32]| {
        let squares: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
        (squares / values.len() as f64).sqrt()
    };
    let (up, down) = (size(up), size(down));
    if up == 0.0 || down == 0.0 {
        return 1.0;
    }
    let exponent = ((down / up).log2() / 2.0).round().clamp(-24.0, 24.0);
    exponent.exp2() as f32
}

/// `lora_alpha / r` of PEFT's settings, which newer versions of diffusers write into the header.
#[derive(Default)]
struct Scales(BTreeMap<String, PartScale>);

/// The settings of one network.
#[derive(Default, Deserialize)]
#[serde(default)]
struct PartScale {
    r: Option<f64>,
    lora_alpha: Option<f64>,
    rank_pattern: BTreeMap<String, f64>,
    alpha_pattern: BTreeMap<String, f64>,
    use_rslora: bool,
}

impl Scales {
    fn of(file: &AdapterFile) -> Result<Self, ToolError> {
        let metadata = file.metadata();
        let Some(text) = metadata.get(ADAPTER_METADATA) else {
            return Ok(Self::default());
        };
        let broken = |error: &dyn std::fmt::Display| {
            ToolError::tensor(
                &file.path,
                ADAPTER_METADATA,
                error.to_string(),
                "PEFT's settings as JSON",
            )
        };
        let all: BTreeMap<String, serde_json::Value> =
            serde_json::from_str(text).map_err(|error| broken(&error))?;
        let mut parts: BTreeMap<String, serde_json::Map<String, serde_json::Value>> =
            BTreeMap::new();
        for (key, value) in all {
            if let Some((part, setting)) = key.split_once('.') {
                parts
                    .entry(part.to_owned())
                    .or_default()
                    .insert(setting.to_owned(), value);
            }
        }
        let mut scales = BTreeMap::new();
        for (part, settings) in parts {
            let settings =
                serde_json::from_value(settings.into()).map_err(|error| broken(&error))?;
            scales.insert(part, settings);
        }
        Ok(Self(scales))
    }

    /// 1 where nothing is told, or the file has an alpha of its own.
    fn of_module(&self, module: &Module, rank: usize) -> f32 {
        if module.has(Slot::Alpha) {
            return 1.0;
        }
        let Some((part, path)) = module.name.split_once('.') else {
            return 1.0;
        };
        let Some(settings) = self.0.get(part) else {
            return 1.0;
        };
        // A pattern is the end of a path, as PEFT matches it.
        let matching = |patterns: &BTreeMap<String, f64>| {
            let mut all = patterns.iter();
            all.find(|(pattern, _)| path == *pattern || path.ends_with(&format!(".{pattern}")))
                .map(|(_, value)| *value)
        };
        let Some(alpha) = matching(&settings.alpha_pattern).or(settings.lora_alpha) else {
            return 1.0;
        };
        let rank = matching(&settings.rank_pattern)
            .or(settings.r)
            .unwrap_or(rank as f64);
        let scale = if settings.use_rslora {
            alpha / rank.sqrt()
        } else {
            alpha / rank
        };
        if scale.is_finite() { scale as f32 } else { 1.0 }
    }
}

fn description(file: &AdapterFile, to: Convention, family: Family) -> BTreeMap<String, String> {
    let mut entries = file.metadata();
    entries.remove(ADAPTER_METADATA);
    if to == Convention::Kohya {
        let known = entries.contains_key("ss_network_module");
        if !known {
            notes::network_entries(&mut entries, Some(family), None, None);
        }
    } else {
        entries.insert("format".to_owned(), "pt".to_owned());
    }
    if !entries.contains_key("modelspec.architecture") {
        let title = notes::title_of(file);
        notes::modelspec_entries(&mut entries, Some(family), &title);
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_balanced_by_a_power_of_two() {
        let factor = balance(&[1e-4, -1e-4], &[1e-1, 1e-1]);
        assert_eq!(factor, 32.0); // √1000 ≈ 31.6
        assert_eq!(balance(&[0.0], &[1.0]), 1.0);
        assert_eq!(balance(&[4.0], &[1.0]), 0.5);
    }
}
