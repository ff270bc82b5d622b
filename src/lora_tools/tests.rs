//! The tools against plain formulas in torch and LyCORIS' own modules: `tests/fixtures/lora_tools/make.py`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;

use super::file::AdapterFile;
use super::matrix::{self, Matrix, from_rows, norm};
use super::resize::RuleName;
use super::*;
use crate::diffusion::{Family, Weights};

/// f32 sums of a few hundred products against f64; numbers are of the order of 1.
const TOLERANCE: f64 = 5e-6;

const LINEAR: &str = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k";
const CONV: &str = "lora_unet_down_blocks_0_resnets_0_conv1";

/// Files of a module of LyCORIS on a linear layer and on a convolution.
pub const KINDS: [&str; 12] = [
    "locon_tucker",
    "loha",
    "loha_tucker",
    "lokr",
    "lokr_full",
    "lokr_both",
    "lokr_tucker",
    "dora",
    "dora_loha",
    "dora_in",
    "ia3",
    "ia3_in",
];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

pub fn fixture(name: &str) -> PathBuf {
    fixtures()
        .join("lora_tools")
        .join(format!("{name}.safetensors"))
}

fn expected(key: &str) -> (Matrix, Vec<usize>) {
    let weights = Weights::open(&[fixture("expected")]).expect("a file");
    let (values, shape) = weights.read_f32(key).expect(key);
    (from_rows(&values, shape[0], values.len() / shape[0]), shape)
}

/// Adapter to what it adds.
fn deltas(path: &Path) -> BTreeMap<String, Matrix> {
    let file = AdapterFile::open_known(path).expect("a LoRA");
    let deltas = file.modules.iter().map(|module| {
        let change = change::read(&file, module).expect("an adapter");
        (module.name.clone(), change.whole().expect("a sum"))
    });
    deltas.collect()
}

fn assert_close(found: &Matrix, expected: &Matrix, what: &str) {
    let error = norm(&(found - expected));
    let bound = TOLERANCE * norm(expected).max(1.0);
    assert!(error <= bound, "{what}: {error:.2e} above {bound:.2e}");
}

fn ingredients() -> Vec<Ingredient> {
    let open = |name, strength| Ingredient::open(&fixture(name), strength).expect("a LoRA");
    vec![open("first", 0.8), open("second", -0.5)]
}

fn merged(method: Method, precision: Option<SavePrecision>, folder: &Path) -> PathBuf {
    let path = folder.join("merged.safetensors");
    let wish = Merge {
        method,
        precision,
        title: "merged".to_owned(),
    };
    merge(&ingredients(), &wish, &path, &mut ()).expect("merged");
    path
}

#[test]
fn a_concatenation_is_the_sum() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = merged(Method::Concatenate, None, folder.path());
    let found = deltas(&path);
    assert_eq!(found.len(), 5);
    for (name, delta) in &found {
        assert_close(delta, &expected(&format!("merge.{name}")).0, name);
    }
    let file = AdapterFile::open_known(&path).expect("a LoRA");
    let rank = |name: &str| {
        let module = file.modules.iter().find(|module| module.name == name);
        file.shape(module.expect("there"), file::Slot::Down)
            .expect("there")[0]
    };
    assert_eq!(
        (
            rank(LINEAR),
            rank("lora_te_text_model_encoder_layers_0_mlp_fc1")
        ),
        (10, 6)
    );
    let metadata = file.metadata();
    assert_eq!(metadata["modelspec.merged_from"], "first, second");
    assert_eq!(metadata["ss_base_model_version"], "sd_v1");
    let report = inspect(&path).expect("inspected");
    assert_eq!(report.hashes.model_hash_matches, Some(true));
    assert_eq!(report.hashes.legacy_hash_matches, Some(true));
}

#[test]
fn a_single_file_at_full_strength_stays_as_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("same.safetensors");
    let wish = Merge {
        method: Method::Concatenate,
        precision: None,
        title: "same".to_owned(),
    };
    let one = [Ingredient::open(&fixture("first"), 1.0).expect("a LoRA")];
    merge(&one, &wish, &path, &mut ()).expect("merged");
    let read = |path: &Path| Weights::open(&[path.to_owned()]).expect("a file");
    let (before, after) = (read(&fixture("first")), read(&path));
    for (key, shape, _) in before.stored() {
        assert_eq!(after.stored_shape(key), Some(shape), "{key}");
        assert_eq!(
            after.read_bytes(key).expect("there").0,
            before.read_bytes(key).expect("there").0,
            "{key}"
        );
    }
}

#[test]
fn a_merge_to_a_rank_is_the_best_approximation() {
    let folder = tempfile::tempdir().expect("a folder");
    let method = Method::Svd {
        rank: 3,
        conv_rank: 3,
    };
    for (name, delta) in deltas(&merged(method, None, folder.path())) {
        assert_close(&delta, &expected(&format!("merge_rank3.{name}")).0, &name);
    }
}

/// Alpha is rounded to what the format holds; the strength is right all the same.
#[test]
fn strengths_are_right_in_every_format() {
    let folder = tempfile::tempdir().expect("a folder");
    for (precision, digits) in [(SavePrecision::Fp16, 11), (SavePrecision::Bf16, 8)] {
        let path = merged(Method::Concatenate, Some(precision), folder.path());
        let bound = 2.0 * 0.5_f64.powi(digits);
        for (name, delta) in deltas(&path) {
            let exact = expected(&format!("merge.{name}")).0;
            // Projected on what it should be, rounding errors of single numbers cancel out.
            let along: f64 = matrix::to_rows(delta.as_ref())
                .iter()
                .zip(matrix::to_rows(exact.as_ref()))
                .map(|(a, b)| f64::from(a * b))
                .sum();
            let ratio = along / norm(&exact).powi(2);
            assert!(
                (ratio - 1.0).abs() < bound / 2.0,
                "{precision:?} {name}: {ratio}"
            );
            assert!(
                norm(&(&delta - &exact)) < bound * norm(&exact),
                "{precision:?} {name}"
            );
        }
    }
}

#[test]
fn ranks_are_those_of_the_reference() {
    let text = std::fs::read_to_string(fixtures().join("lora_tools/expected.json")).expect("there");
    let record: Value = serde_json::from_str(&text).expect("JSON");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("resized.safetensors");
    let file = AdapterFile::open_known(&fixture("first")).expect("a LoRA");
    for (index, case) in record["resize"]
        .as_array()
        .expect("a list")
        .iter()
        .enumerate()
    {
        let rule = match (case["method"].as_str(), case["value"].as_f64()) {
            (Some(name), Some(value)) => {
                let name: RuleName = name.parse().expect("a rule");
                Rule::named(name, value).expect("a rule")
            }
            _ => Rule::Rank,
        };
        let number = |key: &str| case[key].as_u64().expect("a number") as usize;
        let wish = Resizing {
            rule,
            rank: number("rank"),
            conv_rank: Some(number("conv_rank")),
            precision: None,
        };
        let report = resize(&file, &wish, &path, &mut ()).expect("resized");
        for module in &report.modules {
            let told = &case["modules"][&module.name];
            let what = format!("case {index}, {}", module.name);
            assert_eq!(
                module.new_rank as u64,
                told["new_rank"].as_u64().expect("a rank"),
                "{what}"
            );
            for (key, found) in [
                ("new_alpha", Some(module.new_alpha)),
                ("sum_retained", Some(module.sum_retained)),
                ("fro_retained", Some(module.fro_retained)),
                ("max_ratio", module.max_ratio),
            ] {
                let (found, told) = (found.expect(key), told[key].as_f64().expect(key));
                assert!(
                    (found - told).abs() < 2e-5 * told.abs(),
                    "{what}: {key} {found}, {told}"
                );
            }
        }
        for (name, delta) in deltas(&path) {
            assert_close(
                &delta,
                &expected(&format!("resize.{index}.{name}")).0,
                &name,
            );
        }
    }
}

/// A base of two layers, in a file that looks like a single-file checkpoint as far as the tools read it.
fn base_of(kind: &str, folder: &Path) -> PathBuf {
    let bases = Weights::open(&[fixture("bases")]).expect("a file");
    let bytes = |name: &str| bases.read_bytes(&format!("{kind}.{name}")).expect("there");
    let under = "model.diffusion_model.";
    let marker = 1.0_f32.to_le_bytes();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, &[u8])> = vec![(
        "cond_stage_model.transformer.text_model.final_layer_norm.weight".to_owned(),
        Dtype::F32,
        vec![1],
        &marker,
    )];
    for (name, key) in [
        (
            LINEAR,
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        ),
        (CONV, "input_blocks.1.0.in_layers.2.weight"),
    ] {
        let (data, dtype, shape) = bytes(name);
        tensors.push((format!("{under}{key}"), dtype, shape.to_vec(), data));
    }
    let path = folder.join(format!("{kind}-base.safetensors"));
    let views = tensors.iter().map(|(key, dtype, shape, data)| {
        (
            key.as_str(),
            TensorView::new(*dtype, shape.clone(), data).expect("a tensor"),
        )
    });
    std::fs::write(&path, safetensors::serialize(views, None).expect("bytes")).expect("written");
    path
}

#[test]
fn kinds_of_lycoris_do_what_its_modules_do() {
    let folder = tempfile::tempdir().expect("a folder");
    for kind in KINDS {
        let output = folder.path().join("out.safetensors");
        let lora = [Ingredient::open(&fixture(kind), 1.0).expect(kind)];
        merge_into_base(
            &base_of(kind, folder.path()),
            &lora,
            &BaseMerge::default(),
            &output,
            &mut (),
        )
        .expect(kind);
        let merged = Weights::open(&[output]).expect("a file");
        for (name, key) in [
            (
                LINEAR,
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
            ),
            (
                CONV,
                "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
            ),
        ] {
            let (values, shape) = merged.read_f32(key).expect("there");
            let (expected, told) = expected(&format!("merged.{kind}.{name}"));
            assert_eq!(shape, told, "{kind} {name}");
            let found = from_rows(&values, shape[0], values.len() / shape[0]);
            assert_close(&found, &expected, &format!("{kind} {name}"));
        }
    }
}

/// LoHa and LoKr as LoRA: with a rank that is enough, nothing is lost.
#[test]
fn other_kinds_become_loras_by_their_singular_values() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("out.safetensors");
    for kind in [
        "locon_tucker",
        "loha",
        "loha_tucker",
        "lokr",
        "lokr_full",
        "lokr_both",
    ] {
        let one = [Ingredient::open(&fixture(kind), 1.0).expect(kind)];
        let mut wish = Merge {
            method: Method::Svd {
                rank: 12,
                conv_rank: 12,
            },
            precision: None,
            title: kind.to_owned(),
        };
        merge(&one, &wish, &path, &mut ()).expect(kind);
        let whole = deltas(&fixture(kind));
        for (name, delta) in deltas(&path) {
            assert_close(&delta, &whole[&name], &format!("{kind} {name}"));
        }
        if kind != "locon_tucker" {
            wish.method = Method::Concatenate;
            let refused = merge(&one, &wish, &path, &mut ())
                .expect_err(kind)
                .to_string();
            assert!(refused.contains("expected a rank"), "{refused}");
        }
    }
    for kind in ["dora", "dora_loha", "ia3"] {
        let one = [Ingredient::open(&fixture(kind), 1.0).expect(kind)];
        let wish = Merge {
            method: Method::Svd {
                rank: 4,
                conv_rank: 4,
            },
            precision: None,
            title: kind.to_owned(),
        };
        let refused = merge(&one, &wish, &path, &mut ())
            .expect_err(kind)
            .to_string();
        assert!(refused.contains("base"), "{refused}");
        assert!(
            refused.contains(&format!("{kind}.safetensors")),
            "{refused}"
        );
    }
}

/// To diffusers' names and back: the same sum, the same names.
#[test]
fn a_conversion_comes_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let (there, back) = (
        folder.path().join("a.safetensors"),
        folder.path().join("b.safetensors"),
    );
    for (name, family) in [("first", None), ("second", Some(Family::Sd1))] {
        let mut wish = Conversion {
            to: Convention::Diffusers,
            precision: None,
            family,
            layout: None,
        };
        let file = AdapterFile::open_known(&fixture(name)).expect("a LoRA");
        convert(&file, &wish, &there, &mut ()).expect("converted");
        let middle = AdapterFile::open_known(&there).expect("a LoRA");
        assert!(
            middle
                .modules
                .iter()
                .all(|module| !module.has(file::Slot::Alpha))
        );
        assert!(
            middle
                .modules
                .iter()
                .any(|module| module.name == "unet.down_blocks.0.resnets.0.conv1")
        );
        wish.to = Convention::Kohya;
        wish.family = Some(Family::Sd1);
        convert(&middle, &wish, &back, &mut ()).expect("converted");
        let (before, after) = (deltas(&fixture(name)), deltas(&back));
        assert_eq!(
            before.keys().collect::<Vec<_>>(),
            after.keys().collect::<Vec<_>>()
        );
        for (name, delta) in &after {
            assert_close(delta, &before[name], name);
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = folder.path().join("out.safetensors");
    let base = fixtures().join("tiny-sdxl/tiny-sdxl-ldm.safetensors");
    let lora = [Ingredient::open(&fixture("first"), 1.0).expect("a LoRA")];
    let refused = merge_into_base(&base, &lora, &BaseMerge::default(), &output, &mut ())
        .expect_err("another generation")
        .to_string();
    assert!(
        refused.contains("first.safetensors") && refused.contains("lora_"),
        "{refused}"
    );
    assert!(!output.exists());
    let strength = Ingredient::open(&fixture("first"), f64::NAN).expect_err("no number");
    assert!(strength.to_string().contains("NaN"), "{strength}");
}

#[test]
fn an_inspection_tells_kinds_and_norms() {
    let found = inspect(&fixture("first")).expect("inspected");
    assert_eq!(
        (found.kinds.join(" ").as_str(), found.family),
        ("locon lora", Some(Family::Sd1))
    );
    assert_eq!(found.described_by, ["sd-scripts", "modelspec"]);
    assert!(found.problems.is_empty(), "{:?}", found.problems);
    let deltas = deltas(&fixture("first"));
    for module in &found.modules {
        let expected = norm(&deltas[&module.name]);
        assert!((module.norm.expect("a norm") - expected).abs() < 1e-5 * expected);
    }
    assert_eq!(
        found.ranks.iter().map(|count| count.modules).sum::<usize>(),
        4
    );
    for (kind, words) in [
        ("dora", "dora"),
        ("loha", "loha"),
        ("lokr", "lokr"),
        ("ia3", "ia3"),
    ] {
        let found = inspect(&fixture(kind)).expect("inspected");
        assert!(
            found.kinds.iter().any(|kind| kind == words),
            "{kind}: {:?}",
            found.kinds
        );
        assert!(found.problems.is_empty(), "{kind}: {:?}", found.problems);
    }
}
