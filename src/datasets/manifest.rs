//! `lorasmith.json`, the file of an export that says what folders and caption files cannot: settings of subsets, names that
//! no file system takes, images without a caption. An upload that has it comes out as what was exported.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read as _};
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::archive;
use super::captions;
use super::error::DatasetError;
use super::layout::Place;
use super::limits::Limits;
use super::prepare::StagedFile;
use super::report::{FileReport, Outcome, Remark};
use super::rules::{Checker, SubsetWords};
use crate::store::datasets::{SubsetHints, SubsetSettings, SubsetTraining};
use crate::store::{Store, StoreError};

/// The name of the file, in the root of an archive.
pub const NAME: &str = "lorasmith.json";
/// The name of sd-scripts' description of the same, beside it.
pub const SD_SCRIPTS_NAME: &str = "lorasmith.toml";
/// The form of the file; another number means other fields.
pub const FORMAT: u32 = 1;
/// Above what any dataset within the limits has.
const MAX_BYTES: u64 = 256 << 20;

/// What an export holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// What its owner called the dataset.
    pub dataset: String,
    /// Oldest first.
    pub subsets: Vec<ManifestSubset>,
    /// In the order of the dataset.
    pub images: Vec<ManifestImage>,
}

/// A subset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestSubset {
    /// Its name.
    pub name: String,
    /// Its folder in the archive.
    pub folder: String,
    /// How often an epoch shows each image.
    pub repeats: u32,
    /// Whether it is for regularization.
    pub is_reg: bool,
    /// The caption of images that have none.
    pub instance_prompt: Option<String>,
    /// The caption of regularization images that have none.
    pub class_prompt: Option<String>,
    /// Where it differs from a run's settings.
    #[serde(default, skip_serializing_if = "SubsetTraining::is_default")]
    pub training: SubsetTraining,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestImage {
    /// Its path in the archive.
    pub path: String,
    /// Its name in the dataset.
    pub file_name: String,
    /// Its subset's name.
    pub subset: String,
    /// Digest of its content.
    pub sha256: String,
    /// Its caption, word for word; `None` where it has none, whatever its caption file says.
    pub caption: Option<String>,
}

/// The manifest of an upload that is a single archive with one in its root. Blocks.
pub fn find(files: &[StagedFile]) -> Option<Result<Manifest, Remark>> {
    let [only] = files else { return None };
    let text = text_of(&only.path)?;
    let wrong = |message: String| Remark::new("invalid_manifest", message);
    let read = serde_json::from_slice::<Manifest>(&text).map_err(|error| wrong(error.to_string()));
    Some(read.and_then(|manifest| match manifest.format {
        FORMAT => Ok(manifest),
        found => Err(wrong(format!(
            "found the format {found}, expected {FORMAT}"
        ))),
    }))
}

fn text_of(path: &Path) -> Option<Vec<u8>> {
    let mut head = [0; 4];
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut head))
        .ok()?;
    if archive::Kind::of(&head) != Some(archive::Kind::Zip) {
        return None;
    }
    let file = BufReader::new(File::open(path).ok()?);
    let mut zip = zip::ZipArchive::new(file).ok()?;
    let mut text = Vec::new();
    let entry = zip.by_name(NAME).ok()?;
    entry.take(MAX_BYTES + 1).read_to_end(&mut text).ok()?;
    (text.len() as u64 <= MAX_BYTES).then_some(text)
}

/// Gives subsets and images what the manifest says, once they have been stored. What it says of images that are not in the
/// upload is not looked at.
///
/// # Errors
/// When the database fails.
pub async fn apply(
    store: &Store,
    limits: &Limits,
    dataset_id: Uuid,
    found: Result<Manifest, Remark>,
    files: &mut [FileReport],
) -> Result<(), DatasetError> {
    let outcome = match found.and_then(|manifest| check(&manifest, limits).map(|()| manifest)) {
        Ok(manifest) => match restore(store, dataset_id, &manifest, files).await {
            Err(DatasetError::Store(StoreError::Exists)) => Outcome::Refused(Remark::new(
                "invalid_manifest",
                "another subset of the dataset has the name of one in the manifest",
            )),
            restored => {
                restored?;
                Outcome::Accepted {
                    image_id: None,
                    subset: None,
                }
            }
        },
        Err(remark) => Outcome::Refused(remark),
    };
    for file in files.iter_mut() {
        match file.name.as_str() {
            NAME => file.outcome = outcome.clone(),
            SD_SCRIPTS_NAME => file.outcome = Outcome::Ignored,
            _ => {}
        }
    }
    Ok(())
}

/// A manifest is a stranger's, too.
fn check(manifest: &Manifest, limits: &Limits) -> Result<(), Remark> {
    let wrong = |message: String| Remark::new("invalid_manifest", message);
    for subset in &manifest.subsets {
        let words = SubsetWords {
            name: Some(("name", &subset.name)),
            repeats: Some(subset.repeats),
            instance_prompt: subset.instance_prompt.as_deref(),
            class_prompt: subset.class_prompt.as_deref(),
        };
        let checked = words
            .check()
            .and_then(|()| Checker::default().training(&subset.training).finish());
        checked.map_err(|fields| {
            let each = fields
                .iter()
                .map(|field| format!("{}: {}", field.field, field.message));
            wrong(each.collect::<Vec<_>>().join("; "))
        })?;
    }
    for image in &manifest.images {
        if let Some(caption) = &image.caption {
            captions::check(caption, limits.caption_bytes)
                .map_err(|error| wrong(format!("{}: {error}", image.path)))?;
        }
        let plain = Place::parse(&image.file_name).is_ok_and(|place| place.folders.is_empty());
        if !plain {
            return Err(wrong(format!(
                "{}: `{}` names no file",
                image.path, image.file_name
            )));
        }
    }
    Ok(())
}

async fn restore(
    store: &Store,
    dataset_id: Uuid,
    manifest: &Manifest,
    files: &[FileReport],
) -> Result<(), DatasetError> {
    let mut stored = HashMap::new();
    let mut subset_names: HashMap<&str, &str> = HashMap::new(); // by folder, as the upload has named them
    for file in files {
        if let Outcome::Accepted {
            image_id: Some(id),
            subset: Some(subset),
        } = &file.outcome
        {
            stored.insert(file.name.as_str(), *id);
            if let Some((folder, _)) = file.name.rsplit_once('/') {
                subset_names.insert(folder, subset);
            }
        }
    }
    for subset in &manifest.subsets {
        let made = subset_names.get(subset.folder.as_str());
        let name = made.map_or(subset.name.as_str(), |name| *name);
        let hints = SubsetHints::default();
        let row = store.ensure_subset(dataset_id, name, &hints).await?;
        let settings = SubsetSettings {
            name: subset.name.clone(),
            repeats: subset.repeats,
            is_reg: subset.is_reg,
            instance_prompt: subset.instance_prompt.clone(),
            class_prompt: subset.class_prompt.clone(),
            training: subset.training.clone(),
        };
        store.update_subset(row.id, &settings, row.revision).await?;
    }
    let restored = manifest.images.iter().filter_map(|image| {
        let id = *stored.get(image.path.as_str())?;
        Some((id, image.file_name.clone(), image.caption.clone()))
    });
    let restored: Vec<_> = restored.collect();
    Ok(store.restore_images(dataset_id, restored).await?)
}
