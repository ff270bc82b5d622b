//! What can be done to a caption: operations on text and on tags. Nothing here knows images or rows.

use std::collections::HashSet;

use regex::{NoExpand, Regex, RegexBuilder};

use super::error::InvalidField;
use crate::store::datasets::tags_of;

/// The most operations of one call.
pub const MAX_OPERATIONS: usize = 50;
/// The most characters of a text or pattern.
pub const MAX_TEXT_CHARS: usize = 1000;
/// What a compiled pattern may take.
const MAX_PATTERN_BYTES: usize = 1 << 20;
/// Tags up to this length may be faces, such as `>_<`: their underscores stay.
const MAX_FACE_CHARS: usize = 3;

/// One change of captions.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Puts text before each line, with a separator where the line is not empty.
    Prepend { text: String, separator: String },
    /// Puts text after each line.
    Append { text: String, separator: String },
    /// Replaces every place of a text, or what a pattern matches.
    Replace { pattern: Regex, with: Replacement },
    /// Adds a tag at the end of each line that does not have it.
    AddTag(String),
    /// Removes a tag wherever it is.
    RemoveTag(String),
    /// Keeps the first of equal tags.
    DedupeTags,
    /// Sorts tags but for the first ones.
    SortTags { keep_first: usize },
    /// Keeps so many tags.
    LimitTags(usize),
    /// Writes spaces instead of underscores.
    UnderscoresToSpaces,
    /// Removes spaces around tags, and empty tags.
    Clean,
    /// Puts the subset's instance prompt first.
    InstancePromptFirst,
}

/// What takes the place of a match.
#[derive(Clone, Debug)]
pub enum Replacement {
    /// This text.
    Text(String),
    /// This text, `$1` and `$name` being groups of the match.
    Template(String),
}

impl Operation {
    /// Replaces a text.
    ///
    /// # Errors
    /// When the text is empty.
    pub fn replace_text(
        find: &str,
        with: String,
        case_sensitive: bool,
    ) -> Result<Self, InvalidField> {
        let pattern = pattern(&regex::escape(find), case_sensitive)?;
        let with = Replacement::Text(with);
        Ok(Self::Replace { pattern, with })
    }

    /// Replaces what a pattern matches. Matching takes time linear in the caption.
    ///
    /// # Errors
    /// When the pattern cannot be compiled, or only to something too large.
    pub fn replace_regex(
        find: &str,
        with: String,
        case_sensitive: bool,
    ) -> Result<Self, InvalidField> {
        let pattern = pattern(find, case_sensitive)?;
        let with = Replacement::Template(with);
        Ok(Self::Replace { pattern, with })
    }

    /// Whether an image without a caption gets one.
    pub fn makes_captions(&self) -> bool {
        matches!(
            self,
            Self::Prepend { .. }
                | Self::Append { .. }
                | Self::AddTag(_)
                | Self::InstancePromptFirst
        )
    }

    /// The caption after the operation; `prompt` is the instance prompt of its subset.
    pub fn apply(&self, caption: &str, prompt: Option<&str>) -> String {
        match self {
            Self::Replace { pattern, with } => match with {
                Replacement::Text(text) => pattern.replace_all(caption, NoExpand(text)),
                Replacement::Template(text) => pattern.replace_all(caption, text.as_str()),
            }
            .into_owned(),
            on_lines => {
                let lines = caption
                    .split('\n')
                    .map(|line| on_lines.on_line(line, prompt));
                lines.collect::<Vec<_>>().join("\n")
            }
        }
    }

    fn on_line(&self, line: &str, prompt: Option<&str>) -> String {
        let equal = |a: &str, b: &str| a.to_lowercase() == b.trim().to_lowercase();
        match self {
            Self::Prepend { text, separator } => joined(text, separator, line),
            Self::Append { text, separator } => joined(line, separator, text),
            Self::AddTag(tag) if tags_of(line).any(|found| equal(found, tag)) => line.to_owned(),
            Self::AddTag(tag) => joined(line.trim_end(), ", ", tag.trim()),
            Self::RemoveTag(tag) => {
                if tags_of(line).any(|found| equal(found, tag)) {
                    join(tags_of(line).filter(|found| !equal(found, tag)))
                } else {
                    line.to_owned()
                }
            }
            Self::DedupeTags => {
                let mut seen = HashSet::new();
                join(tags_of(line).filter(|tag| seen.insert(tag.to_lowercase())))
            }
            Self::SortTags { keep_first } => {
                let mut tags: Vec<&str> = tags_of(line).collect();
                let first = tags.len().min(*keep_first);
                tags[first..].sort_by_cached_key(|tag| tag.to_lowercase());
                join(tags.into_iter())
            }
            Self::LimitTags(count) => join(tags_of(line).take(*count)),
            Self::UnderscoresToSpaces => {
                let spaced = |part: &str| match part.trim().chars().count() > MAX_FACE_CHARS {
                    true => part.replace('_', " "),
                    false => part.to_owned(),
                };
                line.split(',').map(spaced).collect::<Vec<_>>().join(",")
            }
            Self::Clean => {
                let words = |tag: &str| tag.split_whitespace().collect::<Vec<_>>().join(" ");
                tags_of(line).map(words).collect::<Vec<_>>().join(", ")
            }
            Self::InstancePromptFirst => prompt.map_or_else(|| line.to_owned(), |p| first(p, line)),
            Self::Replace { .. } => line.to_owned(), // not done by line
        }
    }
}

/// The line with the prompt at its beginning, and as a tag nowhere else.
fn first(prompt: &str, line: &str) -> String {
    let prompt = prompt.trim();
    if let Some(rest) = line.trim_start().strip_prefix(prompt)
        && !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_')
    {
        return line.to_owned();
    }
    let is_prompt = |tag: &&str| tag.to_lowercase() == prompt.to_lowercase();
    if tags_of(line).any(|tag| is_prompt(&tag)) {
        let others = tags_of(line).filter(|tag| !is_prompt(tag));
        return join(std::iter::once(prompt).chain(others));
    }
    joined(prompt, ", ", line)
}

fn joined(a: &str, separator: &str, b: &str) -> String {
    if a.is_empty() || b.is_empty() {
        format!("{a}{b}")
    } else {
        format!("{a}{separator}{b}")
    }
}

fn join<'a>(tags: impl Iterator<Item = &'a str>) -> String {
    tags.collect::<Vec<_>>().join(", ")
}

fn pattern(pattern: &str, case_sensitive: bool) -> Result<Regex, InvalidField> {
    let wrong = |message: String| InvalidField {
        field: "find",
        code: "invalid_value",
        message,
    };
    if pattern.is_empty() {
        return Err(wrong(
            "is empty, expected what is to be replaced".to_owned(),
        ));
    }
    RegexBuilder::new(pattern)
        .case_insensitive(!case_sensitive)
        .size_limit(MAX_PATTERN_BYTES)
        .dfa_size_limit(MAX_PATTERN_BYTES)
        .build()
        .map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(operation: &Operation, caption: &str) -> String {
        operation.apply(caption, Some("lumo"))
    }

    #[test]
    fn text_is_put_around_and_replaced() {
        let (text, separator) = ("lumo".to_owned(), ", ".to_owned());
        let prepend = Operation::Prepend {
            text: text.clone(),
            separator: separator.clone(),
        };
        assert_eq!(apply(&prepend, "a, b\nc"), "lumo, a, b\nlumo, c");
        assert_eq!(apply(&prepend, ""), "lumo");
        let append = Operation::Append { text, separator };
        assert_eq!(apply(&append, "a"), "a, lumo");
        let replace = Operation::replace_text("a.b", "$1".to_owned(), false).expect("right");
        assert_eq!(apply(&replace, "A.B axb"), "$1 axb");
        let regex = Operation::replace_regex(r"(\d+) (\w+)", "$2 $1".to_owned(), true);
        assert_eq!(
            apply(&regex.expect("right"), "3 red, 4 blue"),
            "red 3, blue 4"
        );
        for find in ["", "(", r"(\w{1000}){1000}"] {
            let wrong = Operation::replace_regex(find, String::new(), true);
            assert_eq!(wrong.expect_err(find).field, "find");
        }
    }

    #[test]
    fn tags_are_added_removed_and_ordered() {
        let add = Operation::AddTag("Big".to_owned());
        assert_eq!(apply(&add, "a,b"), "a,b, Big");
        assert_eq!(apply(&add, "a, big"), "a, big");
        let remove = Operation::RemoveTag("RED".to_owned());
        assert_eq!(apply(&remove, "red,  a ,b, Red"), "a, b");
        assert_eq!(apply(&remove, "reddish,  a"), "reddish,  a");
        assert_eq!(apply(&Operation::DedupeTags, "a,b, A,c,b"), "a, b, c");
        let sort = Operation::SortTags { keep_first: 1 };
        assert_eq!(apply(&sort, "lumo, c, B, a"), "lumo, a, B, c");
        assert_eq!(apply(&Operation::LimitTags(2), "a,b,c"), "a, b");
        assert_eq!(apply(&Operation::Clean, " a  b ,, c,"), "a b, c");
        let spaces = apply(&Operation::UnderscoresToSpaces, "long_hair, >_<, o_o");
        assert_eq!(spaces, "long hair, >_<, o_o");
    }

    #[test]
    fn the_prompt_comes_first_and_once() {
        let first = |caption: &str| apply(&Operation::InstancePromptFirst, caption);
        assert_eq!(first("a, b"), "lumo, a, b");
        assert_eq!(first("a, Lumo, b"), "lumo, a, b");
        assert_eq!(first("lumo sits, a"), "lumo sits, a");
        assert_eq!(first("lumos, a"), "lumo, lumos, a");
        assert_eq!(first(""), "lumo");
        assert_eq!(first("a\nlumo, b"), "lumo, a\nlumo, b");
        assert_eq!(first(&first("x")), first("x"));
    }
}
