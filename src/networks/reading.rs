//! A file's tensors as adapters of a model's layers.

use std::collections::{BTreeMap, HashMap};

use crate::diffusion::Part;
use crate::networks::NetworkError;
use crate::networks::form::{Form, SUFFIXES};
use crate::networks::format::HostTensor;
use crate::networks::settings::MAX_RANK;
use crate::networks::targets::{LayerShape, Target};

/// The tensors of one adapter by the endings of their keys.
#[derive(Debug, Default)]
pub struct AdapterTensors(BTreeMap<&'static str, HostTensor>);

/// Which of an adapter's inputs and outputs is scaled; a number without gradient.
const ON_INPUT: &str = "on_input";

/// A layer that a file may have an adapter for.
#[derive(Debug, Clone)]
pub struct KnownLayer {
    /// Half of the model.
    pub part: Part,
    /// Its path.
    pub path: String,
    /// Its shape in files.
    pub shape: LayerShape,
}

/// Sorts a file's tensors by adapter; every key must be one of an adapter of the model.
///
/// # Errors
/// With the key of a tensor that belongs to no layer, or that no adapter has.
pub fn group_by_adapter(
    tensors: BTreeMap<String, HostTensor>,
    layers: &HashMap<String, KnownLayer>,
) -> Result<HashMap<String, AdapterTensors>, NetworkError> {
    let mut groups: HashMap<String, AdapterTensors> = HashMap::new();
    for (key, tensor) in tensors {
        let (name, suffix) = key.split_once('.').unwrap_or((&key, ""));
        if !layers.contains_key(name) {
            return Err(NetworkError::UnknownModule { key });
        }
        let known = SUFFIXES.iter().copied().chain([ON_INPUT]);
        let Some(suffix) = known.into_iter().find(|known| *known == suffix) else {
            return Err(NetworkError::UnknownKey { key });
        };
        let group = groups.entry(name.to_owned()).or_default();
        group.0.insert(suffix, tensor);
    }
    Ok(groups)
}

impl AdapterTensors {
    /// The adapter and the values of its tensors, in the order of [`Target::tensors`]. Shapes are checked against the
    /// layer; a 1×1 convolution's tensors may have rank 2.
    ///
    /// # Errors
    /// With the key of a tensor that is missing, of another shape, or of another kind than the rest.
    pub fn into_adapter(
        mut self,
        name: &str,
        layer: KnownLayer,
    ) -> Result<(Target, Vec<Vec<f32>>), NetworkError> {
        let key = |suffix: &str| format!("{name}.{suffix}");
        let wrong = |suffix: &str, found: &[usize], expected: String| NetworkError::Shape {
            key: key(suffix),
            found: found.to_vec(),
            expected,
        };
        let on_input = self.scalar(ON_INPUT, &wrong)?.is_some_and(|v| v != 0.0);
        let alpha = self.scalar("alpha", &wrong)?;
        let KnownLayer { part, path, shape } = layer;
        let shape_of = |suffix: &str| self.0.get(suffix).map(|tensor| tensor.shape.as_slice());
        let (form, rank) = Form::of_file(shape, on_input, shape_of).map_err(
            |(suffix, expected)| match expected {
                None => NetworkError::Incomplete { key: key(suffix) },
                Some(expected) => wrong(suffix, shape_of(suffix).unwrap_or(&[]), expected),
            },
        )?;
        // Two whole matrices do not tell their rank; LyCORIS writes it as their alpha, and their strength is 1.
        let rank = match alpha {
            Some(told) if form.is_unscaled() && (1.0..=MAX_RANK as f64).contains(&told) => {
                told as usize
            }
            _ => rank,
        };
        // As sd-scripts has it, 0 means the rank.
        let alpha = alpha.filter(|alpha| *alpha != 0.0 && !form.is_unscaled());
        let target = Target {
            part,
            path,
            name: name.to_owned(),
            shape,
            form,
            dora: self.0.contains_key("dora_scale"),
            rank,
            alpha: alpha.unwrap_or(rank as f64),
            lr_weight: 1.0,
        };
        let mut values = Vec::new();
        for spec in target.tensors() {
            let tensor = self
                .0
                .remove(spec.suffix)
                .ok_or_else(|| NetworkError::Incomplete {
                    key: key(spec.suffix),
                })?;
            if without_trailing_ones(&tensor.shape) != without_trailing_ones(&spec.shape) {
                let expected = format!("{:?}", spec.shape);
                return Err(wrong(spec.suffix, &tensor.shape, expected));
            }
            values.push(tensor.values);
        }
        match self.0.keys().next() {
            Some(suffix) => Err(NetworkError::UnknownKey { key: key(suffix) }),
            None => Ok((target, values)),
        }
    }

    fn scalar(
        &mut self,
        suffix: &str,
        wrong: &impl Fn(&str, &[usize], String) -> NetworkError,
    ) -> Result<Option<f64>, NetworkError> {
        let Some(tensor) = self.0.remove(suffix) else {
            return Ok(None);
        };
        match tensor.values[..] {
            [value] if value.is_finite() => Ok(Some(f64::from(value))),
            _ => Err(wrong(suffix, &tensor.shape, "one finite number".to_owned())),
        }
    }
}

fn without_trailing_ones(shape: &[usize]) -> &[usize] {
    let kept = shape.len().min(2);
    let wide = shape
        .iter()
        .rposition(|&size| size != 1)
        .map_or(0, |i| i + 1);
    &shape[..kept.max(wide)]
}
