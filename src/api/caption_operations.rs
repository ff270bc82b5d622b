//! One operation on captions, on the wire and on its way to the domain. What an operation does not use is refused.

use serde::Deserialize;
use utoipa::ToSchema;

use crate::datasets::caption_edits::MAX_TEXT_CHARS;
use crate::datasets::{InvalidField, Operation};

/// The most characters of a separator.
const MAX_SEPARATOR_CHARS: usize = 32;
/// The most tags of a caption that anybody speaks of.
const MAX_COUNT: u32 = 10_000;

/// What is done to captions. Those on tags read what is between commas, and write `, ` between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CaptionOperationKind {
    /// Puts `text` before every line, with `separator` between.
    Prepend,
    /// Puts `text` after every line, with `separator` between.
    Append,
    /// Puts `text` (or nothing) in every place of the text `find`.
    ReplaceText,
    /// Puts `text` (or nothing) in place of what the pattern `find` matches; `$1` and `${name}` are groups of it.
    ReplaceRegex,
    /// Adds `tag` at the end, where it is missing.
    AddTag,
    /// Removes `tag` everywhere, in capitals or not.
    RemoveTag,
    /// Keeps the first of equal tags, in capitals or not.
    DedupeTags,
    /// Sorts tags by name, but for the first `count`.
    SortTags,
    /// Keeps the first `count` tags.
    LimitTags,
    /// Writes spaces instead of underscores in tags of more than three characters (`>_<` is a face).
    UnderscoresToSpaces,
    /// Removes spaces around tags, double spaces, and empty tags.
    Clean,
    /// Puts the subset's instance prompt first, and once; images for regularization are skipped.
    InstancePromptFirst,
}

/// One operation; which fields it takes is said at `op`, others are refused.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"op": "prepend", "text": "lumo"}))]
pub struct CaptionOperation {
    pub op: CaptionOperationKind,
    #[schema(max_length = 1000)]
    pub text: Option<String>,
    /// Between text and caption, where neither is empty; `, ` when absent.
    #[schema(max_length = 32)]
    pub separator: Option<String>,
    #[schema(min_length = 1, max_length = 1000)]
    pub find: Option<String>,
    /// Whether `find` tells capitals apart; it does when absent.
    pub case_sensitive: Option<bool>,
    #[schema(min_length = 1, max_length = 1000)]
    pub tag: Option<String>,
    #[schema(minimum = 0, maximum = 10000)]
    pub count: Option<u32>,
}

impl TryFrom<CaptionOperation> for Operation {
    type Error = InvalidField;

    fn try_from(wire: CaptionOperation) -> Result<Self, InvalidField> {
        use CaptionOperationKind as Kind;
        wire.check()?;
        let CaptionOperation {
            op,
            text,
            separator,
            find,
            case_sensitive,
            tag,
            count,
        } = wire;
        let text = text.unwrap_or_default();
        let separator = separator.unwrap_or_else(|| ", ".to_owned());
        let (find, tag) = (find.unwrap_or_default(), tag.unwrap_or_default());
        let (sensitive, count) = (case_sensitive.unwrap_or(true), count.unwrap_or(0) as usize);
        Ok(match op {
            Kind::Prepend => Self::Prepend { text, separator },
            Kind::Append => Self::Append { text, separator },
            Kind::ReplaceText => Self::replace_text(&find, text, sensitive)?,
            Kind::ReplaceRegex => Self::replace_regex(&find, text, sensitive)?,
            Kind::AddTag => Self::AddTag(tag),
            Kind::RemoveTag => Self::RemoveTag(tag),
            Kind::DedupeTags => Self::DedupeTags,
            Kind::SortTags => Self::SortTags { keep_first: count },
            Kind::LimitTags => Self::LimitTags(count),
            Kind::UnderscoresToSpaces => Self::UnderscoresToSpaces,
            Kind::Clean => Self::Clean,
            Kind::InstancePromptFirst => Self::InstancePromptFirst,
        })
    }
}

impl CaptionOperation {
    /// Fields that an operation needs, and that it may have.
    fn fields(&self) -> (&'static [&'static str], &'static [&'static str]) {
        use CaptionOperationKind as Kind;
        match self.op {
            Kind::Prepend | Kind::Append => (&["text"], &["separator"]),
            Kind::ReplaceText | Kind::ReplaceRegex => (&["find"], &["text", "case_sensitive"]),
            Kind::AddTag | Kind::RemoveTag => (&["tag"], &[]),
            Kind::SortTags => (&[], &["count"]),
            Kind::LimitTags => (&["count"], &[]),
            Kind::DedupeTags
            | Kind::UnderscoresToSpaces
            | Kind::Clean
            | Kind::InstancePromptFirst => (&[], &[]),
        }
    }

    fn check(&self) -> Result<(), InvalidField> {
        let wrong = |field, code, message: String| InvalidField {
            field,
            code,
            message,
        };
        let (needed, allowed) = self.fields();
        for (field, given) in [
            ("text", self.text.is_some()),
            ("separator", self.separator.is_some()),
            ("find", self.find.is_some()),
            ("case_sensitive", self.case_sensitive.is_some()),
            ("tag", self.tag.is_some()),
            ("count", self.count.is_some()),
        ] {
            if needed.contains(&field) && !given {
                let message = format!("the field `{field}` is needed");
                return Err(wrong(field, "missing_field", message));
            }
            if given && !needed.contains(&field) && !allowed.contains(&field) {
                let message = "the operation does not use this field".to_owned();
                return Err(wrong(field, "unknown_field", message));
            }
        }
        for (field, text, most) in [
            ("text", &self.text, MAX_TEXT_CHARS),
            ("separator", &self.separator, MAX_SEPARATOR_CHARS),
            ("find", &self.find, MAX_TEXT_CHARS),
            ("tag", &self.tag, MAX_TEXT_CHARS),
        ] {
            let found = text.as_ref().map_or(0, |text| text.chars().count());
            if found > most {
                let message = format!("found {found} characters, expected at most {most}");
                return Err(wrong(field, "out_of_range", message));
            }
        }
        if self
            .tag
            .as_ref()
            .is_some_and(|tag| tag.trim().is_empty() || tag.contains([',', '\n']))
        {
            let message = "expected a tag: text without commas".to_owned();
            return Err(wrong("tag", "invalid_value", message));
        }
        match self.count {
            Some(count) if count > MAX_COUNT => {
                let message = format!("found {count}, expected 0 to {MAX_COUNT}");
                Err(wrong("count", "out_of_range", message))
            }
            _ => Ok(()),
        }
    }
}
