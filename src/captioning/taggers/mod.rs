//! Taggers: networks that give a probability to each tag of a list. ONNX files, run by tract on the CPU.

mod labels;
mod onnx;
mod prepare;
mod select;

use std::path::{Path, PathBuf};

use image::RgbImage;
use serde::Deserialize;

use self::onnx::Network;
use super::{CaptionError, MissingModel};

pub use labels::{Category, Label};
pub use select::{MAX_EXCLUDED, Order, RatingPlace, TaggerSettings};

/// The side of pictures where a network takes any: that of the WD taggers, and of DeepDanbooru.
const WD_SIDE: usize = 448;
const DANBOORU_SIDE: usize = 512;
/// Tags below this probability are not kept.
const KEPT_FROM: f32 = 0.05;
/// The most tags that are kept of a picture.
const MAX_KEPT: usize = 200;

/// Families of taggers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaggerKind {
    /// `SmilingWolf`'s WD taggers: ViT, SwinV2, ConvNeXt, EVA-02.
    Wd14,
    /// DeepDanbooru's ResNets.
    DeepDanbooru,
}

impl TaggerKind {
    /// The files of a model.
    pub const fn files(self) -> &'static [&'static str] {
        match self {
            Self::Wd14 => &["model.onnx", "selected_tags.csv"],
            Self::DeepDanbooru => &["model.onnx", "tags.txt"],
        }
    }

    /// Where published models are.
    pub const fn source(self) -> &'static str {
        match self {
            Self::Wd14 => {
                "a WD tagger of https://huggingface.co/SmilingWolf, such as wd-vit-tagger-v3 or wd-v1-4-swinv2-tagger-v2"
            }
            Self::DeepDanbooru => {
                "a project of https://github.com/KichangKim/DeepDanbooru whose Keras model was converted with \
                 `python -m tf2onnx.convert --keras model-resnet_custom_v3.h5 --output model.onnx`"
            }
        }
    }

    /// The files that `folder` lacks; `None` when it is complete.
    pub fn missing(self, folder: &Path) -> Option<MissingModel> {
        let mut missing = MissingModel::look(folder, self.files(), self.source())?;
        // Another name will do where there is only one network.
        if network_of(folder).is_some() {
            missing.missing.retain(|name| name != "model.onnx");
        }
        let keras = entries(folder, &["h5", "keras"]).into_iter().next();
        if let (Some(keras), true) = (
            keras,
            missing.missing.iter().any(|name| name == "model.onnx"),
        ) {
            let name = keras
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            missing.source = format!(
                "the Keras model that is there, which cannot be run itself: \
                 `pip install tensorflow tf2onnx && python -m tf2onnx.convert --keras {name} --output model.onnx`"
            );
        }
        (!missing.missing.is_empty()).then_some(missing)
    }
}

/// The network of a folder: `model.onnx`, or the only one.
fn network_of(folder: &Path) -> Option<PathBuf> {
    let usual = folder.join("model.onnx");
    if usual.is_file() {
        return Some(usual);
    }
    match entries(folder, &["onnx"]).as_slice() {
        [only] => Some(only.clone()),
        _ => None,
    }
}

fn entries(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let found = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = found.map(|entry| entry.path()).filter(|path| {
        let ending = path.extension().and_then(|ending| ending.to_str());
        path.is_file() && ending.is_some_and(|ending| endings.contains(&ending))
    });
    paths.collect()
}

/// A tag with its probability.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredTag {
    /// With underscores, as the network's list has it.
    pub name: String,
    /// What it is about.
    pub category: Category,
    /// From 0 to 1.
    pub confidence: f32,
}

/// A tagger that is ready.
#[derive(Debug)]
pub struct Tagger {
    kind: TaggerKind,
    network: Network,
    labels: Vec<Label>,
}

impl Tagger {
    /// Reads a tagger.
    ///
    /// # Errors
    /// [`CaptionError::Missing`] names the files that are not there; [`CaptionError::Model`] says what is wrong with one.
    pub fn load(folder: &Path, kind: TaggerKind) -> Result<Self, CaptionError> {
        if let Some(missing) = kind.missing(folder) {
            return Err(missing.into());
        }
        let path = network_of(folder).unwrap_or_else(|| folder.join("model.onnx"));
        let (labels, size) = match kind {
            TaggerKind::Wd14 => (
                labels::selected_tags(&folder.join("selected_tags.csv"))?,
                (WD_SIDE, WD_SIDE),
            ),
            TaggerKind::DeepDanbooru => (labels::danbooru_tags(folder)?, project_size(folder)?),
        };
        let network = Network::load(&path, size)?;
        if network.outputs != labels.len() {
            let reason = format!(
                "gives {} probabilities, and the list beside it has {} tags: they do not belong together",
                network.outputs,
                labels.len()
            );
            return Err(CaptionError::model(&path, reason));
        }
        Ok(Self {
            kind,
            network,
            labels,
        })
    }

    /// The network's input for a picture, with the channels last.
    ///
    /// # Errors
    /// [`CaptionError::Picture`] when it is empty.
    pub fn prepare(&self, picture: &RgbImage) -> Result<Vec<f32>, CaptionError> {
        let (width, height) = (self.network.input.width, self.network.input.height);
        if picture.width() == 0 || picture.height() == 0 {
            return Err(CaptionError::Picture("it is empty".to_owned()));
        }
        Ok(match self.kind {
            TaggerKind::Wd14 => prepare::for_wd(picture, width, height),
            TaggerKind::DeepDanbooru => prepare::for_deepdanbooru(picture, width, height),
        })
    }

    /// The probability of every tag, in the order of the list.
    ///
    /// # Errors
    /// [`CaptionError::Model`] when the network fails.
    pub fn probabilities(&self, picture: &RgbImage) -> Result<Vec<f32>, CaptionError> {
        self.network.run(&self.prepare(picture)?)
    }

    /// The probabilities with their tags, the most probable ones; in the order of the list.
    ///
    /// # Errors
    /// [`CaptionError::Model`] when the network fails.
    pub fn tag(&self, picture: &RgbImage) -> Result<Vec<ScoredTag>, CaptionError> {
        let probabilities = self.probabilities(picture)?;
        let mut rows: Vec<(usize, f32)> = probabilities.into_iter().enumerate().collect();
        let rating = |index: &usize| self.labels[*index].category == Category::Rating;
        rows.retain(|(index, confidence)| *confidence >= KEPT_FROM || rating(index));
        rows.sort_by(|a, b| rating(&b.0).cmp(&rating(&a.0)).then(b.1.total_cmp(&a.1)));
        rows.truncate(MAX_KEPT);
        rows.sort_by_key(|(index, _)| *index);
        let tags = rows.into_iter().map(|(index, confidence)| {
            let Label { name, category } = self.labels[index].clone();
            ScoredTag {
                name,
                category,
                confidence,
            }
        });
        Ok(tags.collect())
    }
}

/// The size of pictures that a DeepDanbooru project names.
fn project_size(folder: &Path) -> Result<(usize, usize), CaptionError> {
    #[derive(Deserialize)]
    struct Project {
        image_width: Option<usize>,
        image_height: Option<usize>,
    }
    let path = folder.join("project.json");
    if !path.is_file() {
        return Ok((DANBOORU_SIDE, DANBOORU_SIDE));
    }
    let failed = |error: String| CaptionError::model(&path, error);
    let text = std::fs::read_to_string(&path).map_err(|error| failed(error.to_string()))?;
    let project: Project =
        serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
    Ok((
        project.image_width.unwrap_or(DANBOORU_SIDE),
        project.image_height.unwrap_or(DANBOORU_SIDE),
    ))
}

#[cfg(test)]
mod tests;
