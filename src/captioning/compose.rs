//! What becomes of an image's caption when a captioner has something to say of it.

use serde::{Deserialize, Serialize};

/// The longest caption, as uploads have it.
const MAX_CAPTION_BYTES: usize = 64 << 10;
/// The longest words before and after captions, in characters.
pub const MAX_AFFIX_CHARS: usize = 1000;

/// What happens with captions that are there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptionMode {
    /// They stay, and only images without one get one.
    #[default]
    OnlyEmpty,
    /// They are replaced.
    Overwrite,
    /// They are continued; tags that are there are not written again.
    Append,
}

/// What a captioner says of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Made {
    /// A sentence.
    Text(String),
    /// Tags as they are written.
    Tags(Vec<String>),
}

/// What is to be done with a caption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Composed {
    /// Write this.
    Write(String),
    /// Leave it; the reason.
    Keep(&'static str),
    /// It cannot be written; the reason.
    Fail(String),
}

/// How captions are put together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Composer<'a> {
    /// With what is there.
    pub mode: CaptionMode,
    /// Comes before what was made, as it is.
    pub prefix: &'a str,
    /// Comes after it, as it is.
    pub suffix: &'a str,
    /// Between tags, and between what was there and what is appended.
    pub separator: &'a str,
}

impl Composer<'_> {
    /// Whether a caption that is there decides already that nothing is written.
    pub fn keeps(&self, present: Option<&str>) -> bool {
        self.mode == CaptionMode::OnlyEmpty && present.is_some_and(|text| !text.trim().is_empty())
    }

    /// The caption after `made` was said of an image that has `present`.
    pub fn compose(&self, present: Option<&str>, made: &Made) -> Composed {
        if self.keeps(present) {
            return Composed::Keep("it has a caption");
        }
        let present = present.map(str::trim).filter(|text| !text.is_empty());
        let appended = present.filter(|_| self.mode == CaptionMode::Append);
        let made = match (made, appended) {
            (Made::Tags(tags), Some(present)) => self.new_tags(present, tags).join(self.separator),
            (Made::Tags(tags), None) => tags.join(self.separator),
            (Made::Text(text), _) => text.trim().to_owned(),
        };
        let whole = format!("{}{made}{}", self.prefix, self.suffix);
        let caption = match appended {
            Some(_) if made.is_empty() => return Composed::Keep("it has all these tags"),
            Some(present) if present.ends_with(whole.trim()) => {
                return Composed::Keep("it ends with this caption");
            }
            Some(present) => format!("{present}{}{whole}", self.separator),
            None => whole,
        };
        // A caption is one line of text, whatever a list of tags holds.
        let caption: String = caption
            .chars()
            .map(|letter| if letter.is_control() { ' ' } else { letter })
            .collect();
        let caption = caption.trim();
        if caption.len() > MAX_CAPTION_BYTES {
            let found = caption.len();
            return Composed::Fail(format!(
                "the caption would have {found} bytes, expected at most {MAX_CAPTION_BYTES}"
            ));
        }
        Composed::Write(caption.to_owned())
    }

    /// Those that are not there, as sd-scripts tells.
    fn new_tags(&self, present: &str, tags: &[String]) -> Vec<String> {
        let there: Vec<&str> = present
            .split(self.separator.trim())
            .map(str::trim)
            .collect();
        let new = tags.iter().filter(|tag| !there.contains(&tag.as_str()));
        new.cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn composer(mode: CaptionMode) -> Composer<'static> {
        Composer {
            mode,
            prefix: "lumo, ",
            suffix: "",
            separator: ", ",
        }
    }

    fn tags(words: &[&str]) -> Made {
        Made::Tags(words.iter().map(|word| (*word).to_owned()).collect())
    }

    #[test]
    fn each_mode_does_what_it_says() {
        use CaptionMode::{Append, OnlyEmpty, Overwrite};
        let made = tags(&["solo", "hat"]);
        let write = |text: &str| Composed::Write(text.to_owned());
        for (mode, present, expected) in [
            (Overwrite, Some("old"), write("lumo, solo, hat")),
            (OnlyEmpty, Some("old"), Composed::Keep("it has a caption")),
            (OnlyEmpty, Some("  "), write("lumo, solo, hat")),
            (OnlyEmpty, None, write("lumo, solo, hat")),
            (Append, None, write("lumo, solo, hat")),
            (Append, Some("old ,solo"), write("old ,solo, lumo, hat")),
            (
                Append,
                Some("hat,solo"),
                Composed::Keep("it has all these tags"),
            ),
        ] {
            assert_eq!(
                composer(mode).compose(present, &made),
                expected,
                "{mode:?}, {present:?}"
            );
        }
    }

    /// What a worker does again after a crash changes nothing.
    #[test]
    fn appending_a_sentence_twice_appends_it_once() {
        let made = Made::Text(" a cat\non a mat ".to_owned());
        let composer = composer(CaptionMode::Append);
        let Composed::Write(once) = composer.compose(Some("old"), &made) else {
            panic!("written");
        };
        assert_eq!(once, "old, lumo, a cat on a mat");
        let short = Made::Text("a mat".to_owned());
        let plain = Composer {
            prefix: "",
            ..composer
        };
        assert_eq!(
            plain.compose(Some(&once), &short),
            Composed::Keep("it ends with this caption")
        );
        let long = Made::Text("a".repeat(70_000));
        assert!(matches!(plain.compose(None, &long), Composed::Fail(_)));
    }
}
