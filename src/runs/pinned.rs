//! The dataset that a run was made with, and in what it differs from another, or from what the dataset is now.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::origin::Difference;
use super::service::{RunError, RunService};
use super::spec::{RunSpec, SnapshotDataset, SnapshotImage, SnapshotSubset};
use crate::store::runs::Run;

/// A dataset as it was when a run was made.
#[derive(Clone, Debug)]
pub struct PinnedDataset {
    /// The dataset that it was taken from.
    pub dataset_id: Uuid,
    /// What its owner called it; `None` of runs that were made before that was kept.
    pub name: Option<String>,
    /// Its revision, likewise.
    pub revision: Option<i64>,
    /// Its subsets; of older runs only those that images were in, without their prompts.
    pub subsets: Vec<SnapshotSubset>,
    /// Its images, in its order.
    pub images: Vec<SnapshotImage>,
}

/// What a dataset is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ComparedWith {
    /// What it is now.
    Current,
    /// What another run was made with.
    Run(Uuid),
}

/// In what two datasets differ.
#[derive(Clone, Debug, Default)]
pub struct DatasetDiff {
    /// Images that only the other one has.
    pub added: Vec<SnapshotImage>,
    /// Images that only this one has.
    pub removed: Vec<SnapshotImage>,
    /// Images of both whose captions differ: as they are here, and there.
    pub captions: Vec<(SnapshotImage, SnapshotImage)>,
    /// Subsets, by the name that they have here: `10_lumo/repeats`, or only the name when one has it.
    pub subsets: Vec<Difference>,
    /// Settings of the runs, where two were compared.
    pub settings: Vec<Difference>,
}

impl PinnedDataset {
    /// Tells what is trained on apart: contents, captions, subsets and their settings, in their order.
    pub fn sha256(&self) -> String {
        let images: Vec<Value> = self
            .images
            .iter()
            .map(|image| {
                let mut told = vec![
                    json!(image.sha256),
                    json!(image.caption),
                    json!(image.subset),
                    json!(image.repeats),
                    json!(image.regularization),
                    json!(image.training),
                ];
                told.extend(image.mask_sha256.as_deref().map(Value::from));
                Value::Array(told)
            })
            .collect();
        hex::encode(Sha256::digest(Value::Array(images).to_string()))
    }

    /// In what another differs from this one.
    pub fn diff(&self, other: &Self) -> DatasetDiff {
        let here = pair_subsets(&self.subsets, &other.subsets);
        let name_here = |image: &SnapshotImage| -> String {
            let name = here.get(image.subset.as_str()).copied();
            name.unwrap_or(&image.subset).to_owned()
        };
        let mut others: HashMap<(String, &str), &SnapshotImage> = HashMap::new();
        for image in &other.images {
            others.insert((name_here(image), &image.sha256), image);
        }
        let mut diff = DatasetDiff {
            subsets: subset_differences(&self.subsets, &other.subsets, &here),
            ..DatasetDiff::default()
        };
        for image in &self.images {
            match others.remove(&(image.subset.clone(), image.sha256.as_str())) {
                None => diff.removed.push(image.clone()),
                Some(same) if same.caption != image.caption => {
                    diff.captions.push((image.clone(), same.clone()));
                }
                Some(_) => {}
            }
        }
        let left: BTreeSet<&str> = others.values().map(|image| image.id.as_str()).collect();
        let added = other.images.iter();
        let added = added.filter(|image| left.contains(image.id.as_str()));
        diff.added = added.cloned().collect();
        diff
    }
}

impl RunService {
    /// The dataset that a run was made with.
    ///
    /// # Errors
    /// [`RunError::NotFound`].
    pub async fn pinned_dataset(&self, id: Uuid) -> Result<(Run, PinnedDataset), RunError> {
        let run = self.get(id).await?;
        let images: Vec<SnapshotImage> = serde_json::from_str(&self.store().run_images(id).await?)?;
        let kept = self.store().run_dataset(id).await?;
        let kept: Option<SnapshotDataset> =
            kept.as_deref().map(serde_json::from_str).transpose()?;
        let dataset_id = run.dataset_id;
        let pinned = match kept {
            Some(kept) => PinnedDataset {
                dataset_id,
                name: Some(kept.name),
                revision: Some(kept.revision),
                subsets: kept.subsets,
                images,
            },
            None => PinnedDataset {
                dataset_id,
                name: None,
                revision: None,
                subsets: subsets_of(&images),
                images,
            },
        };
        Ok((run, pinned))
    }

    /// In what the dataset of a run differs from another.
    ///
    /// # Errors
    /// [`RunError::NotFound`] of either run, [`RunError::DatasetNotFound`].
    pub async fn compare_dataset(
        &self,
        id: Uuid,
        with: ComparedWith,
    ) -> Result<DatasetDiff, RunError> {
        let (run, pinned) = self.pinned_dataset(id).await?;
        match with {
            ComparedWith::Current => {
                let (dataset, images) = self.snapshot(run.dataset_id).await?;
                Ok(pinned.diff(&PinnedDataset {
                    dataset_id: run.dataset_id,
                    name: Some(dataset.name),
                    revision: Some(dataset.revision),
                    subsets: dataset.subsets,
                    images,
                }))
            }
            ComparedWith::Run(other) => {
                let (other, its) = self.pinned_dataset(other).await?;
                let mut diff = pinned.diff(&its);
                let [ours, theirs] = [&run.spec, &other.spec].map(|spec| settings_of(spec));
                diff.settings = differences("", &ours?, &theirs?);
                Ok(diff)
            }
        }
    }
}

/// The settings of a run, whoever asked for it and when.
fn settings_of(spec: &str) -> Result<Value, RunError> {
    let spec: RunSpec = serde_json::from_str(spec)?;
    let mut settings = serde_json::to_value(&spec.settings)?;
    settings["buckets"] = serde_json::to_value(&spec.buckets)?;
    settings["base_model_id"] = spec.base_model_id.into();
    settings["vae_id"] = spec.vae_id.into();
    Ok(settings)
}

/// Of a run that has kept no subsets.
fn subsets_of(images: &[SnapshotImage]) -> Vec<SnapshotSubset> {
    let mut subsets: Vec<SnapshotSubset> = Vec::new();
    for image in images {
        if !subsets.iter().any(|subset| subset.name == image.subset) {
            subsets.push(SnapshotSubset {
                id: None,
                name: image.subset.clone(),
                repeats: image.repeats,
                is_reg: image.regularization,
                instance_prompt: None,
                class_prompt: None,
                training: image.training.clone(),
            });
        }
    }
    subsets
}

/// What each of the other subsets is called here: one of the same id, else of the same name.
fn pair_subsets<'a>(
    ours: &'a [SnapshotSubset],
    theirs: &'a [SnapshotSubset],
) -> HashMap<&'a str, &'a str> {
    let pair = |their: &'a SnapshotSubset| {
        let same_id = ours
            .iter()
            .find(|our| our.id.is_some() && our.id == their.id);
        let found = same_id.or_else(|| ours.iter().find(|our| our.name == their.name));
        found.map(|our| (their.name.as_str(), our.name.as_str()))
    };
    theirs.iter().filter_map(pair).collect()
}

fn subset_differences(
    ours: &[SnapshotSubset],
    theirs: &[SnapshotSubset],
    here: &HashMap<&str, &str>,
) -> Vec<Difference> {
    let mut found = Vec::new();
    for our in ours {
        let same = theirs
            .iter()
            .find(|their| here.get(their.name.as_str()) == Some(&our.name.as_str()));
        match same {
            None => found.push(Difference {
                what: our.name.clone(),
                before: Some("present".to_owned()),
                now: None,
            }),
            Some(their) => {
                // Structs of names and numbers always have a JSON.
                let [our_json, their_json] = [our, their].map(|subset| {
                    let mut json = serde_json::to_value(subset).unwrap_or_default();
                    json["id"] = Value::Null; // that of another dataset says nothing
                    json
                });
                found.extend(differences(&our.name, &our_json, &their_json));
            }
        }
    }
    let new = theirs
        .iter()
        .filter(|their| !here.contains_key(their.name.as_str()));
    found.extend(new.map(|their| Difference {
        what: their.name.clone(),
        before: None,
        now: Some("present".to_owned()),
    }));
    found
}

/// Where two values differ, by path.
fn differences(name: &str, before: &Value, now: &Value) -> Vec<Difference> {
    let [before, now] = [before, now].map(|value| {
        let mut leaves = BTreeMap::new();
        flatten(name, value, &mut leaves);
        leaves
    });
    let names: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let difference = |name: &String| {
        let (was, is) = (before.get(name).cloned(), now.get(name).cloned());
        (was != is).then(|| Difference {
            what: name.clone(),
            before: was,
            now: is,
        })
    };
    names.into_iter().filter_map(difference).collect()
}

/// Values that hold no others, as text. `null` is nothing.
fn flatten(name: &str, value: &Value, leaves: &mut BTreeMap<String, String>) {
    match value {
        Value::Null => {}
        Value::Object(fields) => {
            for (field, value) in fields {
                let below = match name {
                    "" => field.clone(),
                    name => format!("{name}/{field}"),
                };
                flatten(&below, value, leaves);
            }
        }
        Value::String(text) => _ = leaves.insert(name.to_owned(), text.clone()),
        other => _ = leaves.insert(name.to_owned(), other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::datasets::SubsetTraining;

    fn subset(number: u128, name: &str, repeats: u32) -> SnapshotSubset {
        SnapshotSubset {
            id: Some(Uuid::from_u128(number)),
            name: name.to_owned(),
            repeats,
            is_reg: false,
            instance_prompt: None,
            class_prompt: None,
            training: SubsetTraining::default(),
        }
    }

    fn image(id: &str, subset: &str, caption: &str) -> SnapshotImage {
        SnapshotImage {
            id: id.to_owned(),
            sha256: format!("sha of {id}"),
            width_px: 1,
            height_px: 1,
            caption: caption.to_owned(),
            subset: subset.to_owned(),
            repeats: 1,
            regularization: false,
            background: None,
            mask_sha256: None,
            color_correction: None,
            training: SubsetTraining::default(),
            file_name: None,
            captioned_by_prompt: false,
        }
    }

    fn dataset(subsets: Vec<SnapshotSubset>, images: Vec<SnapshotImage>) -> PinnedDataset {
        PinnedDataset {
            dataset_id: Uuid::nil(),
            name: None,
            revision: None,
            subsets,
            images,
        }
    }

    #[test]
    fn what_has_changed_is_told_whatever_subsets_are_called_now() {
        let before = dataset(
            vec![subset(1, "10_lumo", 10), subset(2, "gone", 1)],
            vec![
                image("a", "10_lumo", "x"),
                image("b", "10_lumo", "y"),
                image("c", "gone", "z"),
            ],
        );
        let now = dataset(
            vec![subset(1, "lumo", 5), subset(3, "new", 1)],
            vec![
                image("a", "lumo", "x"),
                image("b", "lumo", "y, more"),
                image("d", "new", ""),
            ],
        );
        let diff = before.diff(&now);
        let ids = |images: &[SnapshotImage]| -> Vec<String> {
            images.iter().map(|image| image.id.clone()).collect()
        };
        assert_eq!(
            (ids(&diff.added), ids(&diff.removed)),
            (vec!["d".into()], vec!["c".into()])
        );
        let captions: Vec<_> = diff
            .captions
            .iter()
            .map(|(a, b)| (&*a.caption, &*b.caption))
            .collect();
        assert_eq!(captions, [("y", "y, more")]);
        let told: Vec<String> = diff.subsets.iter().map(ToString::to_string).collect();
        let expected = [
            "10_lumo/name was 10_lumo and is lumo",
            "10_lumo/repeats was 10 and is 5",
            "gone was present and is none",
            "new was none and is present",
        ];
        assert_eq!(told, expected);
        let same = before.diff(&before.clone());
        assert!(same.added.is_empty() && same.captions.is_empty() && same.subsets.is_empty());
        assert_ne!(before.sha256(), now.sha256());
    }
}
