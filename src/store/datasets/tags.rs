//! Captions as lists of tags, and images found by them.

use uuid::Uuid;

use super::Image;

/// The tags of a caption: what is between commas, without spaces around it.
pub fn tags_of(caption: &str) -> impl Iterator<Item = &str> {
    let tags = caption.split([',', '\n']).map(str::trim);
    tags.filter(|tag| !tag.is_empty())
}

/// Which images are meant; what is not given is not asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageFilter {
    /// Of this subset.
    pub subset_id: Option<Uuid>,
    /// With or without a caption.
    pub captioned: Option<bool>,
    /// With this tag, in capitals or not.
    pub tag: Option<String>,
    /// With this text in the caption or the file name, in capitals or not.
    pub text: Option<String>,
}

impl ImageFilter {
    /// Whether words are looked for, which databases do not do alike.
    pub(super) fn has_words(&self) -> bool {
        self.tag.is_some() || self.text.is_some()
    }

    /// Whether an image is meant.
    pub fn matches(&self, image: &Image) -> bool {
        let caption = image.caption.as_deref();
        let tag = |wanted: &String| {
            let wanted = wanted.trim().to_lowercase();
            tags_of(caption.unwrap_or_default()).any(|tag| tag.to_lowercase() == wanted)
        };
        let text = |wanted: &String| {
            let wanted = wanted.to_lowercase();
            let words = [caption.unwrap_or_default(), &image.file_name];
            words
                .iter()
                .any(|text| text.to_lowercase().contains(&wanted))
        };
        self.subset_id
            .is_none_or(|subset| subset == image.subset_id)
            && self
                .captioned
                .is_none_or(|wanted| wanted == caption.is_some())
            && self.tag.as_ref().is_none_or(tag)
            && self.text.as_ref().is_none_or(text)
    }
}
