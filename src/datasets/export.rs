//! A dataset as a zip in kohya's layout, written as it is read: `10_lumo/…`, `reg/1_robot/…`, captions beside the images,
//! sd-scripts' description of it, and [`manifest`](super::manifest) with what these cannot say.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use tokio::sync::mpsc::{self, Receiver, Sender};
use toml::{Table, Value};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::group::{MASK, MASKS};
use super::layout::Place;
use super::manifest::{self, FORMAT, Manifest, ManifestImage, ManifestSubset};
use crate::store::datasets::{SubsetCaptions, SubsetTraining};

/// Bytes that are handed on at once, and how many such pieces may wait.
const CHUNK_BYTES: usize = 256 << 10;
const CHUNKS_WAITING: usize = 4;
/// The most characters of a file's or folder's name.
const MAX_NAME_CHARS: usize = 120;
/// Names of devices on Windows, with any extension.
const DEVICES: [&str; 4] = ["con", "prn", "aux", "nul"];

/// A dataset to be exported.
#[derive(Clone, Debug)]
pub struct ExportSource {
    /// What its owner calls it.
    pub dataset: String,
    /// Oldest first.
    pub subsets: Vec<ExportSubset>,
    /// In their order.
    pub images: Vec<ExportImage>,
    /// Settings of sd-scripts' `[general]` and `[[datasets]]`, where they are known: of a run.
    pub general: Vec<(&'static str, Value)>,
    /// See `general`.
    pub datasets: Vec<(&'static str, Value)>,
}

/// A subset of it.
#[derive(Clone, Debug)]
pub struct ExportSubset {
    pub name: String,
    pub repeats: u32,
    pub is_reg: bool,
    pub instance_prompt: Option<String>,
    pub class_prompt: Option<String>,
    pub training: SubsetTraining,
}

/// An image of it.
#[derive(Clone, Debug)]
pub struct ExportImage {
    /// Where its content is.
    pub content: PathBuf,
    pub sha256: String,
    pub file_name: String,
    /// The name of its subset.
    pub subset: String,
    pub caption: Option<String>,
    /// Where the content of its mask is.
    pub mask: Option<PathBuf>,
}

/// A file of the archive.
#[derive(Debug)]
enum Entry {
    Text { path: String, text: String },
    Content { path: String, file: PathBuf },
}

impl ExportSource {
    /// Writes the archive in the background; what is received are its bytes, or the error that ends it.
    pub fn stream(self) -> Receiver<io::Result<Vec<u8>>> {
        let (sender, receiver) = mpsc::channel(CHUNKS_WAITING);
        tokio::task::spawn_blocking(move || {
            let pipe = BufWriter::with_capacity(CHUNK_BYTES, Pipe(sender.clone()));
            if let Err(error) = self.write(pipe) {
                tracing::warn!(%error, "an export has ended early");
                let _ = sender.blocking_send(Err(error)); // the receiver may be gone
            }
        });
        receiver
    }

    /// Writes the archive. Memory does not grow with its content.
    ///
    /// # Errors
    /// When a file cannot be read or the archive not be written.
    pub fn write(self, output: impl Write) -> io::Result<()> {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .unix_permissions(0o644);
        let mut zip = ZipWriter::new_stream(output);
        for entry in self.entries()? {
            match entry {
                Entry::Text { path, text } => {
                    zip.start_file(path, options).map_err(io::Error::other)?;
                    zip.write_all(text.as_bytes())?;
                }
                Entry::Content { path, file } => {
                    let mut content = File::open(&file)?;
                    zip.start_file(path, options).map_err(io::Error::other)?;
                    io::copy(&mut content, &mut zip)?;
                }
            }
        }
        let output = zip.finish().map_err(io::Error::other)?;
        output.into_inner().flush()
    }

    /// Everything but content of images.
    fn entries(self) -> io::Result<Vec<Entry>> {
        let folders = folders(&self.subsets);
        let mut names: HashMap<&str, HashSet<String>> = HashMap::new();
        let mut files = Vec::with_capacity(2 * self.images.len());
        let mut images = Vec::with_capacity(self.images.len());
        for image in &self.images {
            let Some(folder) = folders.get(image.subset.as_str()) else {
                continue; // every image has a subset
            };
            let taken = names.entry(&image.subset).or_default();
            let name = file_name(&image.file_name, taken);
            let path = format!("{}/{name}", folder.path);
            let caption = image.caption.as_deref().or(folder.caption.as_deref());
            if let Some(caption) = caption {
                files.push(Entry::Text {
                    path: format!("{}/{}.txt", folder.path, Place::stem_of(&name)),
                    text: caption.to_owned(),
                });
            }
            files.push(Entry::Content {
                path: path.clone(),
                file: image.content.clone(),
            });
            if let Some(mask) = &image.mask {
                files.push(Entry::Content {
                    // Not beside the image, where sd-scripts would train on it.
                    path: format!("{MASKS}/{}/{}.png", folder.path, Place::stem_of(&name)),
                    file: mask.clone(),
                });
            }
            images.push(ManifestImage {
                path,
                file_name: image.file_name.clone(),
                subset: image.subset.clone(),
                sha256: image.sha256.clone(),
                caption: image.caption.clone(),
            });
        }
        let description = description(&self, &folders).map_err(io::Error::other)?;
        let subsets = self.subsets.into_iter().map(|subset| ManifestSubset {
            folder: folders
                .get(&subset.name)
                .map(|f| f.path.clone())
                .unwrap_or_default(),
            name: subset.name,
            repeats: subset.repeats,
            is_reg: subset.is_reg,
            instance_prompt: subset.instance_prompt,
            class_prompt: subset.class_prompt,
            training: subset.training,
        });
        let manifest = Manifest {
            format: FORMAT,
            dataset: self.dataset,
            subsets: subsets.collect(),
            images,
        };
        let mut entries = vec![
            Entry::Text {
                path: manifest::NAME.to_owned(),
                text: serde_json::to_string_pretty(&manifest)?,
            },
            Entry::Text {
                path: manifest::SD_SCRIPTS_NAME.to_owned(),
                text: description,
            },
        ];
        entries.append(&mut files);
        Ok(entries)
    }
}

/// Where the images of a subset are.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Folder {
    path: String,
    /// What images without a caption are described by, where the folder's name does not say it.
    caption: Option<String>,
}

/// A folder for each subset, by name. sd-scripts reads repeats and class tokens from its name.
fn folders(subsets: &[ExportSubset]) -> HashMap<String, Folder> {
    let mut taken = HashSet::new();
    let mut folders = HashMap::new();
    for subset in subsets {
        let prompt = match subset.is_reg {
            true => subset.class_prompt.as_deref(),
            false => subset.instance_prompt.as_deref(),
        };
        let tokens = prompt.filter(|prompt| !prompt.trim().is_empty());
        let words = safe_name(tokens.unwrap_or(&subset.name));
        let root = if subset.is_reg { "reg/" } else { "" };
        let name = unused(&mut taken, |number| {
            let more = number.map_or(String::new(), |number| format!(" {number}"));
            format!("{root}{}_{words}{more}", subset.repeats)
        });
        let says = name.split_once('_').map(|(_, tokens)| tokens);
        let caption = tokens.filter(|tokens| says != Some(*tokens));
        folders.insert(
            subset.name.clone(),
            Folder {
                caption: caption.map(str::to_owned),
                path: name,
            },
        );
    }
    folders
}

/// A name whose stem no other file of the folder has, as `a.png` and `a.jpg` would share a caption.
fn file_name(name: &str, taken: &mut HashSet<String>) -> String {
    let safe = safe_name(name);
    let (stem, extension) = match safe.rsplit_once('.') {
        Some((stem, extension)) if !stem.is_empty() => (stem, format!(".{extension}")),
        _ => (safe.as_str(), String::new()),
    };
    // Beside `a.png` the picture `a.mask.png` would come back as its mask.
    let picture = stem.to_lowercase();
    let picture = picture.strip_suffix(MASK).map(str::len);
    let renamed = picture.and_then(|length| Some(format!("{}_mask", stem.get(..length)?)));
    let stem = renamed.as_deref().unwrap_or(stem);
    let stem = unused(taken, |number| match number {
        None => stem.to_owned(),
        Some(number) => format!("{stem}_{number}"),
    });
    format!("{stem}{extension}")
}

/// The first name that is not taken, whatever its capitals.
fn unused(taken: &mut HashSet<String>, name: impl Fn(Option<u32>) -> String) -> String {
    let names = std::iter::once(None).chain((2..).map(Some)).map(name);
    let mut names = names.filter(|name| taken.insert(name.to_lowercase()));
    names.next().unwrap_or_default() // there is always another number
}

/// A name that file systems take, Windows' too.
fn safe_name(name: &str) -> String {
    let plain = |c: char| {
        if c.is_control() || "<>:\"/\\|?*".contains(c) {
            '_'
        } else {
            c
        }
    };
    let (stem, extension) = match name.rsplit_once('.') {
        Some((stem, extension)) if !stem.is_empty() && extension.len() <= 5 => {
            (stem, format!(".{extension}"))
        }
        _ => (name, String::new()),
    };
    let stem: String = stem.chars().map(plain).take(MAX_NAME_CHARS).collect();
    let extension: String = extension.chars().map(plain).collect();
    let name = format!("{stem}{extension}");
    let name = name.trim_matches(' ').trim_end_matches(['.', ' ']);
    let first = name.split('.').next().unwrap_or_default().to_lowercase();
    let numbered = first.strip_prefix("com").or(first.strip_prefix("lpt"));
    let is_device = DEVICES.contains(&first.as_str())
        || numbered.is_some_and(|rest| rest.len() == 1 && rest != "0");
    if name.is_empty() || is_device || name.starts_with('.') {
        format!("_{name}")
    } else {
        name.to_owned()
    }
}

/// sd-scripts' `--dataset_config`, for a working directory that is the archive's root.
fn description(
    source: &ExportSource,
    folders: &HashMap<String, Folder>,
) -> Result<String, toml::ser::Error> {
    let table = |pairs: &[(&'static str, Value)]| -> Table {
        let pairs = pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone()));
        pairs.collect()
    };
    let used: HashSet<&str> = source
        .images
        .iter()
        .map(|image| image.subset.as_str())
        .collect();
    let subsets = source
        .subsets
        .iter()
        .filter(|subset| used.contains(subset.name.as_str()));
    let subsets = subsets.filter_map(|subset| {
        let folder = folders.get(&subset.name)?;
        Some(Value::Table(subset_table(subset, &folder.path)))
    });
    let mut dataset = table(&source.datasets);
    dataset.insert("subsets".to_owned(), Value::Array(subsets.collect()));
    let mut root = Table::new();
    let mut general = table(&source.general);
    general.insert("caption_extension".to_owned(), ".txt".into());
    root.insert("general".to_owned(), Value::Table(general));
    root.insert(
        "datasets".to_owned(),
        Value::Array(vec![Value::Table(dataset)]),
    );
    let text = toml::to_string(&root)?;
    Ok(format!(
        "# For sd-scripts, started in this folder: --dataset_config lorasmith.toml\n{text}"
    ))
}

fn subset_table(subset: &ExportSubset, folder: &str) -> Table {
    let mut table = Table::new();
    let mut put = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            table.insert(key.to_owned(), value);
        }
    };
    put("image_dir", Some(folder.into()));
    put("num_repeats", Some(i64::from(subset.repeats).into()));
    put("is_reg", subset.is_reg.then_some(true.into()));
    let prompt = match subset.is_reg {
        true => &subset.class_prompt,
        false => &subset.instance_prompt,
    };
    put("class_tokens", prompt.clone().map(Value::from));
    let augment = subset.training.augment;
    put("flip_aug", augment.flip_aug.map(Value::from));
    put("color_aug", augment.color_aug.map(Value::from));
    put("random_crop", augment.random_crop.map(Value::from));
    for (key, value) in caption_options(&subset.training.captions) {
        put(key, Some(value));
    }
    table
}

/// What is given of settings of captions, by sd-scripts' names.
pub fn caption_options(captions: &SubsetCaptions) -> Vec<(&'static str, Value)> {
    let c = captions;
    let flag = |value: Option<bool>| value.map(Value::from);
    let count = |value: Option<u32>| value.map(|value| Value::from(i64::from(value)));
    let share = |value: Option<f64>| value.map(Value::from);
    let text = |value: &Option<String>| value.clone().map(Value::from);
    [
        ("shuffle_caption", flag(c.shuffle_captions)),
        ("caption_separator", text(&c.caption_separator)),
        ("keep_tokens", count(c.keep_tokens)),
        ("keep_tokens_separator", text(&c.keep_tokens_separator)),
        ("secondary_separator", text(&c.secondary_separator)),
        ("caption_dropout_rate", share(c.caption_dropout_rate)),
        (
            "caption_dropout_every_n_epochs",
            count(c.caption_dropout_every_n_epochs),
        ),
        (
            "caption_tag_dropout_rate",
            share(c.caption_tag_dropout_rate),
        ),
        ("caption_prefix", text(&c.caption_prefix)),
        ("caption_suffix", text(&c.caption_suffix)),
        ("enable_wildcard", flag(c.enable_wildcards)),
        ("token_warmup_min", count(c.token_warmup_min)),
        ("token_warmup_step", share(c.token_warmup_step)),
    ]
    .into_iter()
    .filter_map(|(key, value)| Some((key, value?)))
    .collect()
}

/// Hands bytes to an asynchronous reader.
struct Pipe(Sender<io::Result<Vec<u8>>>);

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.0.blocking_send(Ok(bytes.to_vec())).map_err(gone)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_possible_everywhere_and_told_apart() {
        for (name, expected) in [
            ("a.png", "a.png"),
            ("a?b:c.png", "a_b_c.png"),
            ("CON.png", "_CON.png"),
            ("com1", "_com1"),
            ("company.png", "company.png"),
            ("end. ", "end"),
            ("...", "_"),
            ("größe 1.webp", "größe 1.webp"),
        ] {
            assert_eq!(safe_name(name), expected, "{name:?}");
        }
        let mut taken = HashSet::new();
        let names = ["a.png", "A.jpg", "a_2.png", "b"].map(|name| file_name(name, &mut taken));
        assert_eq!(names, ["a.png", "A_2.jpg", "a_2_2.png", "b"]);
    }

    #[test]
    fn folders_say_what_sd_scripts_reads() {
        let subset = |name: &str, is_reg, prompt: Option<&str>| ExportSubset {
            name: name.to_owned(),
            repeats: 3,
            is_reg,
            instance_prompt: prompt.filter(|_| !is_reg).map(str::to_owned),
            class_prompt: prompt.filter(|_| is_reg).map(str::to_owned),
            training: SubsetTraining::default(),
        };
        let found = folders(&[
            subset("3_lumo", false, Some("lumo")),
            subset("more", false, Some("lumo")),
            subset("odd", false, Some("a: b")),
            subset("plain", false, None),
            subset("class", true, Some("robot")),
        ]);
        let of = |name: &str| (found[name].path.as_str(), found[name].caption.as_deref());
        assert_eq!(of("3_lumo"), ("3_lumo", None));
        assert_eq!(of("more"), ("3_lumo 2", Some("lumo")));
        assert_eq!(of("odd"), ("3_a_ b", Some("a: b")));
        assert_eq!(of("plain"), ("3_plain", None));
        assert_eq!(of("class"), ("reg/3_robot", None));
    }
}
