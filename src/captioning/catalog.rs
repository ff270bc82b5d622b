//! Captioners and their models: what lies below `captioners/` of the model folder, and what a model there lacks.

use std::path::{Path, PathBuf};

use super::blip::{self, Blip};
use super::taggers::TaggerKind;
use super::{CaptionError, MissingModel};

/// The folder below the model folder; base models are not looked for in it.
pub const FOLDER: &str = "captioners";
/// The most models of a captioner that are looked at.
const MAX_MODELS: usize = 1000;

/// What makes captions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Captioner {
    /// Sentences by BLIP.
    Blip,
    /// Tags by a WD tagger.
    Wd14,
    /// Tags by DeepDanbooru.
    DeepDanbooru,
}

impl Captioner {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Blip, Self::Wd14, Self::DeepDanbooru];

    /// The word in rows, on the wire, and of its folder.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Blip => "blip",
            Self::Wd14 => "wd14",
            Self::DeepDanbooru => "deepdanbooru",
        }
    }

    /// The captioner of a word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.as_str() == word)
    }

    /// Its family, when it is a tagger.
    pub const fn tagger(self) -> Option<TaggerKind> {
        match self {
            Self::Blip => None,
            Self::Wd14 => Some(TaggerKind::Wd14),
            Self::DeepDanbooru => Some(TaggerKind::DeepDanbooru),
        }
    }

    /// The files of a model.
    pub const fn files(self) -> &'static [&'static str] {
        match self.tagger() {
            Some(kind) => kind.files(),
            None => &blip::FILES,
        }
    }

    /// Where models can be had.
    pub const fn source(self) -> &'static str {
        match self.tagger() {
            Some(kind) => kind.source(),
            None => blip::SOURCE,
        }
    }

    fn missing(self, folder: &Path) -> Option<MissingModel> {
        match self.tagger() {
            Some(kind) => kind.missing(folder),
            None => Blip::missing(folder),
        }
    }
}

/// A folder in which a captioner's model is, or should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptionModel {
    /// The folder's name.
    pub name: String,
    /// The folder.
    pub folder: PathBuf,
    /// What is missing in it.
    pub missing: Option<MissingModel>,
}

/// Finds captioners' models. All functions block.
#[derive(Clone, Debug)]
pub struct CaptionerCatalog {
    folder: PathBuf,
}

impl CaptionerCatalog {
    /// Of the model folder.
    pub fn new(models: &Path) -> Self {
        Self {
            folder: models.join(FOLDER),
        }
    }

    /// Where the models of a captioner are, each in a folder of its own.
    pub fn folder_of(&self, captioner: Captioner) -> PathBuf {
        self.folder.join(captioner.as_str())
    }

    /// The folders of a captioner, by name; the first one is the captioner's own, if files lie in it.
    pub fn models(&self, captioner: Captioner) -> Vec<CaptionModel> {
        let root = self.folder_of(captioner);
        let entries = std::fs::read_dir(&root).into_iter().flatten().flatten();
        let mut folders: Vec<PathBuf> = entries
            .take(MAX_MODELS)
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect();
        folders.sort();
        if captioner
            .files()
            .iter()
            .any(|name| root.join(name).is_file())
        {
            folders.insert(0, root);
        }
        let models = folders.into_iter().filter_map(|folder| {
            let name = folder.file_name()?.to_str()?.to_owned();
            (!name.starts_with('.')).then(|| CaptionModel {
                name,
                missing: captioner.missing(&folder),
                folder,
            })
        });
        models.collect()
    }

    /// The model of a name; without one the first that is complete.
    ///
    /// # Errors
    /// [`CaptionError::Missing`] says which files belong where.
    pub fn find(
        &self,
        captioner: Captioner,
        name: Option<&str>,
    ) -> Result<CaptionModel, CaptionError> {
        let models = self.models(captioner);
        let found = match name {
            Some(name) => models.into_iter().find(|model| model.name == name),
            None => {
                let complete = models.iter().find(|model| model.missing.is_none());
                complete.or(models.first()).cloned()
            }
        };
        match found {
            Some(CaptionModel {
                missing: Some(missing),
                ..
            }) => Err(missing.into()),
            Some(model) => Ok(model),
            None => {
                let files = || captioner.files().iter().map(|name| (*name).to_owned());
                let name = name.unwrap_or("NAME");
                Err(MissingModel {
                    folder: self.folder_of(captioner).join(name),
                    expected: files().collect(),
                    missing: files().collect(),
                    source: captioner.source().to_owned(),
                }
                .into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_folders_and_what_they_lack_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let catalog = CaptionerCatalog::new(folder.path());
        let words = |name| catalog.find(Captioner::Wd14, name).unwrap_err().to_string();
        let root = catalog.folder_of(Captioner::Wd14);
        assert!(root.ends_with("captioners/wd14"));
        assert!(words(None).contains("wd14/NAME has no model.onnx, selected_tags.csv"));
        assert!(words(Some("../x")).contains("SmilingWolf"));
        let put = |name: &str, file: &str| {
            std::fs::create_dir_all(root.join(name)).unwrap();
            std::fs::write(root.join(name).join(file), "").unwrap();
        };
        put("vit", "model.onnx");
        assert!(words(None).contains("wd14/vit has no selected_tags.csv"));
        put("swin", "model.onnx");
        put("swin", "selected_tags.csv");
        assert_eq!(catalog.find(Captioner::Wd14, None).unwrap().name, "swin");
        assert!(words(Some("vit")).contains("selected_tags.csv"));
        assert_eq!(catalog.models(Captioner::Wd14).len(), 2);
        put("", "model.onnx");
        put("", "selected_tags.csv");
        assert_eq!(catalog.find(Captioner::Wd14, None).unwrap().name, "wd14");
        assert_eq!(catalog.models(Captioner::Blip), []);
    }
}
