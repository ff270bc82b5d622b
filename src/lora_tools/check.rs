//! Whether a LoRA file is what loaders of its base model expect, before it is handed out.
//!
//! It is read again from the disk: every key is one of an adapter of a layer of the model, every shape is the layer's,
//! every number is finite. Whether it has an effect is told; whether it may have none is for who trains to say: before
//! the first step it does not.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};
use serde::{Deserialize, Serialize};

use super::change::{self, Change, Content};
use super::error::ToolError;
use super::file::{AdapterFile, Module};
use crate::diffusion::StableDiffusion;
use crate::networks::{LayerShape, Naming, layer_shape};

/// The layers of a model by the names that their adapters have in files.
#[derive(Clone, Debug, Default)]
pub struct Layers(BTreeMap<String, LayerShape>);

impl Layers {
    /// Those of a model.
    pub fn of(model: &mut StableDiffusion) -> Self {
        let naming = Naming::of(model);
        let layers = model.layers_mut().into_iter().map(|(part, path, layer)| {
            let shape = naming.shape_in_files(part, &path, layer_shape(&layer));
            (naming.lora_name(part, &path), shape)
        });
        Self(layers.collect())
    }
}

/// What a file that has passed is like.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checked {
    /// Adapters that were found in the model.
    pub modules: usize,
    /// Tensors that were read.
    pub tensors: usize,
    /// Adapters that change something.
    pub with_effect: usize,
    /// Mean of the Frobenius norms of what is added to the weights; none of kinds that only scale them.
    pub norm_mean: Option<f64>,
    /// The largest of them.
    pub norm_max: Option<f64>,
}

/// Reads a file again and compares it with a model.
///
/// # Errors
/// The first thing that is wrong.
pub fn check_file(path: &Path, layers: &Layers) -> Result<Checked, ToolError> {
    let file = AdapterFile::open_known(path)?;
    let looked: Vec<(bool, Option<f64>)> = file
        .modules
        .par_iter()
        .map(|module| look(&file, module, layers))
        .collect::<Result<_, _>>()?;
    let norms: Vec<f64> = looked.iter().filter_map(|(_, norm)| *norm).collect();
    Ok(Checked {
        modules: file.modules.len(),
        tensors: file.modules.iter().map(|module| module.keys.len()).sum(),
        with_effect: looked.iter().filter(|(has_effect, _)| *has_effect).count(),
        norm_mean: (!norms.is_empty()).then(|| norms.iter().sum::<f64>() / norms.len() as f64),
        norm_max: norms.into_iter().reduce(f64::max),
    })
}

fn look(
    file: &AdapterFile,
    module: &Module,
    layers: &Layers,
) -> Result<(bool, Option<f64>), ToolError> {
    let Some(layer) = layers.0.get(&module.name) else {
        let found = "a name that no layer of the base model has";
        return Err(ToolError::tensor(
            &file.path,
            &module.name,
            found,
            "one of its layers",
        ));
    };
    let change = change::read(file, module)?;
    if let Some(found) = misfit(&change, *layer) {
        return Err(ToolError::tensor(
            &file.path,
            &module.name,
            found,
            format!("{layer:?}"),
        ));
    }
    Ok((!change.is_zero(), change.norm()))
}

/// What does not fit the layer.
fn misfit(change: &Change, layer: LayerShape) -> Option<String> {
    let (out, d_in, kernel) = match layer {
        LayerShape::Linear { d_in, d_out } => (d_out, d_in, [1, 1]),
        LayerShape::Conv {
            c_in,
            c_out,
            kernel,
        } => (c_out, c_in, kernel),
    };
    let columns = d_in * kernel[0] * kernel[1];
    if let Some(magnitudes) = &change.magnitudes {
        let expected = if magnitudes.on_input { d_in } else { out };
        if magnitudes.values.len() != expected {
            return Some(format!("{} magnitudes", magnitudes.values.len()));
        }
    }
    if let Content::Channels { factors, on_input } = &change.content {
        let expected = if *on_input { d_in } else { out };
        return (factors.len() != expected).then(|| format!("{} factors", factors.len()));
    }
    let shape = change.shape;
    let wrong_kernel = shape.kernel.is_some_and(|found| found != kernel);
    ((shape.out, shape.columns) != (out, columns) || wrong_kernel).then(|| {
        format!(
            "a change of {} × {} with kernel {:?}",
            shape.out, shape.columns, shape.kernel
        )
    })
}

/// Reads every adapter of a file once, without a model: whether its tensors fit together and are finite.
///
/// # Errors
/// The first thing that is wrong.
pub fn read_all(path: &Path) -> Result<usize, ToolError> {
    let file = AdapterFile::open_known(path)?;
    let read = |module: &Module| change::read(&file, module).map(|_| ());
    file.modules
        .par_iter()
        .map(read)
        .collect::<Result<(), _>>()?;
    Ok(file.modules.len())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{KINDS, fixture};
    use super::*;
    use crate::networks::{HostTensor, LoraFile, SavePrecision};

    const LINEAR: &str = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k";
    const CONV: &str = "lora_unet_down_blocks_0_resnets_0_conv1";

    fn layers() -> Layers {
        let linear = LayerShape::Linear {
            d_in: 20,
            d_out: 12,
        };
        let conv = LayerShape::Conv {
            c_in: 8,
            c_out: 12,
            kernel: [3, 3],
        };
        Layers(BTreeMap::from([
            (LINEAR.to_owned(), linear),
            (CONV.to_owned(), conv),
        ]))
    }

    #[test]
    fn files_of_every_kind_pass() {
        for kind in KINDS {
            let checked = check_file(&fixture(kind), &layers()).expect(kind);
            assert_eq!((checked.modules, checked.with_effect), (2, 2), "{kind}");
            let is_sum = !kind.starts_with("dora") && !kind.starts_with("ia3");
            assert_eq!(checked.norm_max.is_some(), is_sum, "{kind}");
        }
    }

    /// A file of one adapter, changed.
    fn changed(change: impl FnOnce(&mut BTreeMap<String, HostTensor>)) -> Result<Checked, String> {
        let tensor = |shape: &[usize]| HostTensor {
            shape: shape.to_vec(),
            values: vec![0.5; shape.iter().product()],
        };
        let mut file = LoraFile::default();
        for (key, shape) in [
            ("alpha", vec![]),
            ("lora_down.weight", vec![2, 20]),
            ("lora_up.weight", vec![12, 2]),
        ] {
            file.tensors
                .insert(format!("{LINEAR}.{key}"), tensor(&shape));
        }
        change(&mut file.tensors);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("lora.safetensors");
        file.write(&path, SavePrecision::Fp32).expect("written");
        check_file(&path, &layers()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_wrong_is_named() {
        let up = format!("{LINEAR}.lora_up.weight");
        // 12 · 20 elements of 2 · 0.5 · 0.5 · 0.5 / 2.
        let checked = changed(|_| ()).expect("right");
        assert!((checked.norm_mean.expect("a norm") - 240_f64.sqrt() / 8.0).abs() < 1e-6);
        assert_eq!((checked.tensors, checked.with_effect), (3, 1));
        let zero = changed(|tensors| {
            if let Some(up) = tensors.get_mut(&up) {
                up.values.fill(0.0);
            }
        });
        assert_eq!(zero.expect("right").with_effect, 0);

        let wrong = |change: &dyn Fn(&mut BTreeMap<String, HostTensor>), words: &[&str]| {
            let error = changed(change).expect_err("wrong");
            for word in words {
                assert!(error.contains(word), "{error}");
            }
        };
        wrong(
            &|tensors| {
                if let Some(up) = tensors.get_mut(&up) {
                    up.values[3] = f32::NAN;
                }
            },
            &[
                "lora.safetensors",
                LINEAR,
                "lora_up.weight",
                "NaN at element 3",
            ],
        );
        wrong(
            &|tensors| {
                if let Some(up) = tensors.get_mut(&up) {
                    up.shape = vec![6, 4];
                }
            },
            &["4 columns, expected 2"],
        );
        wrong(
            &|tensors| {
                tensors.remove(&up);
            },
            &[LINEAR, "no `lora_up.weight`"],
        );
        wrong(
            &|tensors| {
                let moved = std::mem::take(tensors).into_iter();
                let elsewhere = |key: String| key.replace(LINEAR, "lora_unet_nowhere");
                tensors.extend(moved.map(|(key, tensor)| (elsewhere(key), tensor)));
            },
            &["lora_unet_nowhere"],
        );
        wrong(
            &|tensors| {
                let tensor = HostTensor {
                    shape: vec![1],
                    values: vec![1.0],
                };
                tensors.insert("emb_params".to_owned(), tensor);
            },
            &["emb_params"],
        );
        wrong(
            &|tensors| {
                if let Some(up) = tensors.get_mut(&up) {
                    up.shape = vec![8, 2];
                    up.values.truncate(16);
                }
            },
            &["8 × 20", "d_out: 12"],
        );
    }
}
