//! sd-scripts' dataset settings (`--dataset_config`): which folder is which subset. What a dataset has no place for is
//! named, so that nobody believes it to be in force.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde_json::Map;
use toml::{Table, Value};

use super::report::Remark;
use super::rules::Checker;
use crate::store::datasets::SubsetTraining;

/// Bytes of a file of settings.
const MAX_BYTES: u64 = 1 << 20;
/// Subsets in one file.
const MAX_SUBSETS: usize = 1000;

/// Settings of a run, not of its pictures: what they are called there.
const OF_RUNS: [(&str, &str); 8] = [
    ("resolution", "resolution"),
    ("batch_size", "batch_size"),
    ("enable_bucket", "buckets.enabled"),
    ("min_bucket_reso", "buckets.min_px"),
    ("max_bucket_reso", "buckets.max_px"),
    ("bucket_reso_steps", "buckets.step_px"),
    ("bucket_no_upscale", "buckets.no_upscale"),
    ("validation_split", "validation"),
];

/// What is kept of a subset's training, and where.
const TRAINING: [(&str, &str, &str); 16] = [
    ("flip_aug", "augment", "flip_aug"),
    ("color_aug", "augment", "color_aug"),
    ("random_crop", "augment", "random_crop"),
    ("shuffle_caption", "captions", "shuffle_captions"),
    ("caption_separator", "captions", "caption_separator"),
    ("keep_tokens", "captions", "keep_tokens"),
    ("keep_tokens_separator", "captions", "keep_tokens_separator"),
    ("secondary_separator", "captions", "secondary_separator"),
    ("caption_dropout_rate", "captions", "caption_dropout_rate"),
    (
        "caption_dropout_every_n_epochs",
        "captions",
        "caption_dropout_every_n_epochs",
    ),
    (
        "caption_tag_dropout_rate",
        "captions",
        "caption_tag_dropout_rate",
    ),
    ("caption_prefix", "captions", "caption_prefix"),
    ("caption_suffix", "captions", "caption_suffix"),
    ("enable_wildcard", "captions", "enable_wildcards"),
    ("token_warmup_min", "captions", "token_warmup_min"),
    ("token_warmup_step", "captions", "token_warmup_step"),
];

/// What else a subset keeps; everything but these is remarked.
const KEPT: [&str; 5] = [
    "image_dir",
    "num_repeats",
    "is_reg",
    "class_tokens",
    "caption_extension",
];

/// One `[[datasets.subsets]]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SubsetEntry {
    /// Names of folders, the last one being that of the pictures.
    pub image_dir: Vec<String>,
    pub repeats: Option<u32>,
    pub is_reg: bool,
    pub class_tokens: Option<String>,
    /// Without its dot, in lower case.
    pub caption_extension: Option<String>,
    /// Where it says something of its training.
    pub training: Option<SubsetTraining>,
}

/// A file of settings.
#[derive(Debug, Default, PartialEq)]
pub struct DatasetToml {
    pub subsets: Vec<SubsetEntry>,
    pub remarks: Vec<Remark>,
}

/// Reads a file of settings.
///
/// # Errors
/// Why it is left out as a whole.
pub fn read(path: &Path) -> Result<DatasetToml, Remark> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text));
    read.map_err(|error| Remark::new("not_text", error))?;
    if text.len() as u64 > MAX_BYTES {
        let message = format!("found more than {MAX_BYTES} bytes");
        return Err(Remark::new("too_large", message));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let table: Table = text
        .parse()
        .map_err(|error: toml::de::Error| Remark::new("not_toml", error.message()))?;
    parse(&table)
}

fn parse(table: &Table) -> Result<DatasetToml, Remark> {
    let datasets = tables(table, "datasets");
    if datasets.is_empty() {
        return Err(Remark::new(
            "not_a_dataset_config",
            "found no [[datasets]]; a TOML file is taken as sd-scripts' dataset settings",
        ));
    }
    let empty = Table::new();
    let general = table.get("general").and_then(Value::as_table);
    let general = general.unwrap_or(&empty);
    let mut left = LeftOut::default();
    left.look_at(general, &[]);
    for key in table.keys() {
        if !["general", "datasets"].contains(&key.as_str()) {
            left.count(key);
        }
    }
    let mut found = DatasetToml::default();
    for dataset in datasets {
        left.look_at(dataset, &["subsets"]);
        for subset in tables(dataset, "subsets") {
            left.look_at(subset, &[]);
            if found.subsets.len() == MAX_SUBSETS {
                let message = format!("found more than {MAX_SUBSETS} subsets");
                return Err(Remark::new("too_large", message));
            }
            match entry(&[subset, dataset, general]) {
                Ok(entry) => found.subsets.push(entry),
                Err(message) => found.remarks.push(Remark::new("invalid_subset", message)),
            }
        }
    }
    found.remarks.extend(left.remarks());
    Ok(found)
}

fn tables<'a>(table: &'a Table, key: &str) -> Vec<&'a Table> {
    let list = table.get(key).and_then(Value::as_array);
    let list = list.map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(Value::as_table).collect()
}

/// A subset; each value is of the innermost table that has it.
fn entry(levels: &[&Table; 3]) -> Result<SubsetEntry, String> {
    let value = |key: &str| levels.iter().find_map(|table| table.get(key));
    let own = levels[0];
    let image_dir = own.get("image_dir").and_then(Value::as_str);
    let image_dir = image_dir.ok_or("found a subset without `image_dir`")?;
    let wrong = |key: &str, found: &Value, expected: &str| {
        format!("`{image_dir}`: found {key} = {found}, expected {expected}")
    };
    let repeats = match value("num_repeats") {
        None => None,
        Some(found) => {
            let number = found.as_integer().and_then(|n| u32::try_from(n).ok());
            Some(number.ok_or_else(|| wrong("num_repeats", found, "a number from 1"))?)
        }
    };
    let is_reg = match own.get("is_reg") {
        None => false,
        Some(found) => found
            .as_bool()
            .ok_or_else(|| wrong("is_reg", found, "true or false"))?,
    };
    let text = |key: &str| match value(key) {
        None => Ok(None),
        Some(found) => match found.as_str() {
            Some(text) => Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty())),
            None => Err(wrong(key, found, "a text")),
        },
    };
    Ok(SubsetEntry {
        image_dir: parts(image_dir),
        repeats,
        is_reg,
        class_tokens: text("class_tokens")?,
        caption_extension: text("caption_extension")?
            .map(|text| text.trim_start_matches('.').to_ascii_lowercase()),
        training: training(levels).map_err(|message| format!("`{image_dir}`: {message}"))?,
    })
}

/// What the tables say of a subset's training, the innermost first.
fn training(levels: &[&Table; 3]) -> Result<Option<SubsetTraining>, String> {
    let mut given = [("augment", Map::new()), ("captions", Map::new())];
    for (theirs, part, ours) in TRAINING {
        let Some(found) = levels.iter().find_map(|table| table.get(theirs)) else {
            continue;
        };
        let value = serde_json::to_value(found).map_err(|error| format!("{theirs}: {error}"))?;
        for (name, values) in &mut given {
            if *name == part {
                values.insert(ours.to_owned(), value.clone());
            }
        }
    }
    if given.iter().all(|(_, values)| values.is_empty()) {
        return Ok(None);
    }
    let given: Map<_, _> = given
        .into_iter()
        .map(|(name, values)| (name.to_owned(), values.into()))
        .collect();
    let training: SubsetTraining =
        serde_json::from_value(given.into()).map_err(|error| error.to_string())?;
    match Checker::default().training(&training).finish() {
        Ok(()) => Ok(Some(training)),
        Err(fields) => {
            let each = fields.iter().map(|f| format!("{}: {}", f.field, f.message));
            Err(each.collect::<Vec<_>>().join("; "))
        }
    }
}

/// Names of folders, of a path on whatever machine the settings were written for.
fn parts(path: &str) -> Vec<String> {
    path.split(['/', '\\'])
        .filter(|part| !matches!(*part, "" | "." | ".."))
        .map(str::to_owned)
        .collect()
}

/// Settings that have no place, and how often they were found.
#[derive(Default)]
struct LeftOut(BTreeMap<String, usize>);

impl LeftOut {
    fn look_at(&mut self, table: &Table, known: &[&str]) {
        for (key, value) in table {
            let is_off = match value {
                Value::Boolean(on) => !on,
                Value::Integer(number) => *number == 0,
                Value::Float(number) => *number == 0.0,
                Value::String(text) => text.is_empty(),
                _ => false,
            };
            let is_training = TRAINING.iter().any(|(theirs, ..)| theirs == key);
            let is_known =
                is_training || KEPT.contains(&key.as_str()) || known.contains(&key.as_str());
            if !is_known && !is_off {
                self.count(key);
            }
        }
    }

    fn count(&mut self, key: &str) {
        *self.0.entry(key.to_owned()).or_default() += 1;
    }

    fn remarks(self) -> impl Iterator<Item = Remark> {
        self.0.into_iter().map(|(key, times)| {
            let of_run = OF_RUNS.iter().find(|(theirs, _)| *theirs == key);
            match of_run {
                Some((_, ours)) => Remark::new(
                    "setting_of_runs",
                    format!("`{key}` is a setting of a run: give `{ours}` to POST /v1/runs"),
                ),
                None => Remark::new(
                    "setting_not_kept",
                    format!("`{key}` ({times} times) is not kept; the pictures are trained on without it"),
                ),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_from_the_innermost_table() {
        let text = r#"
            [general]
            num_repeats = 3
            caption_extension = ".txt"
            shuffle_caption = true
            color_aug = false
            [[datasets]]
            resolution = 512
            class_tokens = "robot"
            [[datasets.subsets]]
            image_dir = 'C:\data\lumo'
            num_repeats = 10
            class_tokens = "lumo robot"
            [[datasets.subsets]]
            image_dir = "/data/reg"
            is_reg = true
            caption_extension = ".Tags"
            flip_aug = true
            [[datasets.subsets]]
            num_repeats = 2
            [[datasets.subsets]]
            image_dir = "/data/x"
            num_repeats = "many"
            face_crop_aug_range = "1.0,3.0"
            [[datasets.subsets]]
            image_dir = "/data/y"
            keep_tokens = -1
        "#;
        let found = parse(&text.parse().expect("TOML")).expect("settings");
        let subset = |dir: [&str; 2], repeats, is_reg, tokens: &str, extension: &str| SubsetEntry {
            image_dir: dir.map(str::to_owned).to_vec(),
            repeats: Some(repeats),
            is_reg,
            class_tokens: Some(tokens.to_owned()),
            caption_extension: Some(extension.to_owned()),
            training: None,
        };
        let training = |flip_aug| {
            let mut training = SubsetTraining::default();
            training.captions.shuffle_captions = Some(true);
            training.augment.color_aug = Some(false);
            training.augment.flip_aug = flip_aug;
            Some(training)
        };
        let mut first = subset(["data", "lumo"], 10, false, "lumo robot", "txt");
        first.image_dir.insert(0, "C:".to_owned());
        first.training = training(None);
        let mut second = subset(["data", "reg"], 3, true, "robot", "tags");
        second.training = training(Some(true));
        let expected = [first, second];
        assert_eq!(found.subsets, expected);
        let remarks: Vec<_> = found
            .remarks
            .iter()
            .map(|r| (r.code, &*r.message))
            .collect();
        let named = |code, word: &str| {
            assert!(
                remarks.iter().any(|(c, m)| *c == code && m.contains(word)),
                "{remarks:?}"
            );
        };
        named("setting_of_runs", "`resolution`");
        named("setting_not_kept", "`face_crop_aug_range`");
        named("invalid_subset", "/data/y");
        named("invalid_subset", "without `image_dir`");
        named("invalid_subset", "\"many\"");
        assert_eq!(remarks.len(), 5);
    }

    #[test]
    fn other_files_are_refused() {
        let code = |text: &str| {
            let file = tempfile::NamedTempFile::new().expect("a file");
            std::fs::write(file.path(), text).expect("written");
            read(file.path()).expect_err("refused").code
        };
        assert_eq!(code("[package]\nname = \"x\""), "not_a_dataset_config");
        assert_eq!(code("= ="), "not_toml");
    }
}
