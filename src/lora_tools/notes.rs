//! What the tools write into a file's description.

use std::collections::BTreeMap;

use super::file::{AdapterFile, Slot};
use super::names::family_of;
use crate::diffusion::Family;
use crate::diffusion::ldm::UNetLayout;

/// The generation of the model that a file is for, as far as it can be told.
pub fn family_of_file(file: &AdapterFile) -> Option<Family> {
    let names: Vec<&str> = file
        .modules
        .iter()
        .map(|module| module.name.as_str())
        .collect();
    let metadata = file.metadata();
    let version = ["ss_base_model_version", "modelspec.architecture"]
        .iter()
        .find_map(|key| metadata.get(*key))
        .map(String::as_str);
    let reads_text = |name: &str| {
        let keys = ["attn2_to_k", "attn2.to_k", "attn2_to_v", "attn2.to_v"];
        keys.iter().any(|key| name.ends_with(key))
    };
    let text_width = file
        .modules
        .iter()
        .filter(|module| reads_text(&module.name))
        .find_map(|module| {
            let factor = file.shape(module, Slot::Down);
            let factor = factor.or_else(|| file.shape(module, Slot::HadaW1B));
            factor?.get(1).copied()
        });
    family_of(&names, version, text_width)
}

/// The layout of the UNet that a file's names are of: that of the published models, unless a model tells another.
pub fn layout_of(family: Option<Family>) -> UNetLayout {
    UNetLayout::published(family != Some(Family::Sd1) && family != Some(Family::Sd2))
}

/// The least that sd-scripts' readers want: whose adapters these are and how large.
pub fn network_entries(
    entries: &mut BTreeMap<String, String>,
    family: Option<Family>,
    dim: Option<usize>,
    alpha: Option<String>,
) {
    let mut put = |key: &str, value: String| entries.insert(key.to_owned(), value);
    put("ss_network_module", "networks.lora".to_owned());
    put(
        "ss_network_dim",
        dim.map_or_else(|| "Dynamic".to_owned(), |dim| dim.to_string()),
    );
    put(
        "ss_network_alpha",
        alpha.unwrap_or_else(|| "Dynamic".to_owned()),
    );
    if let Some(family) = family {
        put(
            "ss_v2",
            if family == Family::Sd2 {
                "True"
            } else {
                "False"
            }
            .to_owned(),
        );
        let version = match family {
            Family::Sd1 => "sd_v1",
            Family::Sd2 => "sd_v2",
            Family::Sdxl => "sdxl_base_v1-0",
        };
        put("ss_base_model_version", version.to_owned());
    }
}

/// Stability's entries of a LoRA file that no training has written.
pub fn modelspec_entries(
    entries: &mut BTreeMap<String, String>,
    family: Option<Family>,
    title: &str,
) {
    let mut put = |key: &str, value: &str| {
        entries.insert(format!("modelspec.{key}"), value.to_owned());
    };
    put("sai_model_spec", "1.0.1");
    put("title", title);
    put(
        "implementation_version",
        concat!("lorasmith/", env!("CARGO_PKG_VERSION")),
    );
    if let Some(family) = family {
        let (architecture, implementation) = match family {
            Family::Sd1 => ("stable-diffusion-v1/lora", "diffusers"),
            Family::Sd2 => ("stable-diffusion-v2-512/lora", "diffusers"),
            Family::Sdxl => (
                "stable-diffusion-xl-v1-base/lora",
                "https://github.com/Stability-AI/generative-models",
            ),
        };
        put("architecture", architecture);
        put("implementation", implementation);
    }
}

/// What sd-scripts calls a file that others are made of: its title, or else its name.
pub fn title_of(file: &AdapterFile) -> String {
    let metadata = file.metadata();
    let title = metadata
        .get("modelspec.title")
        .filter(|title| !title.is_empty());
    title.cloned().unwrap_or_else(|| file.title())
}

/// A number as Python would write it.
pub fn float(value: f64) -> String {
    format!("{value:?}")
}
