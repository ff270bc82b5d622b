//! Which subset a file of an upload goes to: by the upload's own words, and by what its folder says.

use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};

use super::dataset_toml::SubsetEntry;
use super::layout::{self, FolderSubset};
use crate::pictures::Background;
use crate::store::datasets::SubsetTraining;

/// Where files go whose folder says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubsetChoice {
    pub name: Option<String>,
    pub repeats: Option<u32>,
    pub is_reg: Option<bool>,
    pub instance_prompt: Option<String>,
    pub class_prompt: Option<String>,
    /// What transparent pictures of the upload are laid on.
    pub background: Option<Background>,
}

/// A subset that files go to. `None` leaves the value of an existing subset alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    pub name: String,
    pub repeats: Option<u32>,
    pub is_reg: Option<bool>,
    pub instance_prompt: Option<String>,
    pub class_prompt: Option<String>,
    pub training: Option<Training>,
}

/// What settings say of a subset's training. Its numbers were read from a file: none of them is not a number.
#[derive(Clone, Debug, PartialEq)]
pub struct Training(pub SubsetTraining);

impl Eq for Training {}

impl Hash for Training {
    /// Uploads have few subsets, which their names tell apart.
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

/// The subset of loose files when the upload names none.
pub const DEFAULT_SUBSET: &str = "default";

impl SubsetChoice {
    /// The subset of files in no folder. A name in kohya's form says repeats and concept, unless they are given.
    pub(super) fn target(&self) -> Target {
        let name = self
            .name
            .clone()
            .unwrap_or_else(|| DEFAULT_SUBSET.to_owned());
        let named = match layout::kohya_folder(&name) {
            Some(_) => layout::subset_of(std::slice::from_ref(&name)),
            None => None,
        };
        let is_reg = self.is_reg.or(named.as_ref().map(|subset| subset.is_reg));
        let tokens = named.as_ref().and_then(|subset| subset.tokens.clone());
        self.with_tokens(
            name,
            named.as_ref().and_then(|subset| subset.repeats),
            is_reg,
            tokens,
        )
    }

    /// The subset of files in a folder. What the folder's name says is more exact than what the upload says.
    pub(super) fn target_of(&self, folder: FolderSubset) -> Target {
        let FolderSubset {
            name,
            repeats,
            is_reg,
            tokens,
        } = folder;
        match repeats {
            Some(_) => Target {
                repeats,
                ..Self::default().with_tokens(name, repeats, Some(is_reg), tokens)
            },
            None => self.with_tokens(name, None, self.is_reg.or(is_reg.then_some(true)), tokens),
        }
    }

    /// The subset that settings speak of. They are as exact as a folder's name.
    pub(super) fn target_by(&self, name: String, entry: &SubsetEntry) -> Target {
        let tokens = entry.class_tokens.clone();
        Target {
            training: entry.training.clone().map(Training),
            ..Self::default().with_tokens(name, entry.repeats, Some(entry.is_reg), tokens)
        }
    }

    fn with_tokens(
        &self,
        name: String,
        repeats: Option<u32>,
        is_reg: Option<bool>,
        tokens: Option<String>,
    ) -> Target {
        let reg = is_reg.unwrap_or(false);
        let (instance, class) = if reg { (None, tokens) } else { (tokens, None) };
        Target {
            name,
            repeats: self.repeats.or(repeats),
            is_reg,
            instance_prompt: self.instance_prompt.clone().or(instance),
            class_prompt: self.class_prompt.clone().or(class),
            training: None,
        }
    }
}
