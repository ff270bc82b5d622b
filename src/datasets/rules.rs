//! Which names, prompts and repeats are possible.

use super::error::InvalidField;
use crate::store::datasets::{SubsetCaptions, SubsetTraining};

pub const MAX_NAME_CHARS: usize = 128;
pub const MAX_PROMPT_CHARS: usize = 1000;
pub const MAX_REPEATS: u32 = 10_000;
pub const MAX_SEPARATOR_CHARS: usize = 32;
const MAX_TAGS: f64 = 1000.0;
const MAX_STEPS: f64 = 10_000_000.0;

/// What somebody says about a subset. What is absent is not checked.
#[derive(Clone, Copy, Debug)]
pub struct SubsetWords<'a> {
    /// The field that its name comes from, and the name.
    pub name: Option<(&'static str, &'a str)>,
    pub repeats: Option<u32>,
    pub instance_prompt: Option<&'a str>,
    pub class_prompt: Option<&'a str>,
}

impl SubsetWords<'_> {
    /// # Errors
    /// Everything that a subset cannot be.
    pub fn check(&self) -> Result<(), Vec<InvalidField>> {
        let mut checker = Checker::default();
        if let Some((field, name)) = self.name {
            checker.subset_name(field, name);
        }
        if let Some(repeats) = self.repeats {
            checker.repeats("repeats", repeats);
        }
        checker
            .prompt("instance_prompt", self.instance_prompt)
            .prompt("class_prompt", self.class_prompt)
            .finish()
    }
}

/// Collects wrong values, so that an answer names all of them.
#[derive(Debug, Default)]
pub struct Checker(Vec<InvalidField>);

impl Checker {
    /// The name of a dataset.
    pub fn name(&mut self, field: &'static str, name: &str) -> &mut Self {
        let length = name.chars().count();
        if length == 0 || length > MAX_NAME_CHARS {
            let message = format!("found {length} characters, expected 1 to {MAX_NAME_CHARS}");
            self.push(field, "out_of_range", message);
        } else if name.trim() != name || name.chars().any(char::is_control) {
            self.push(
                field,
                "invalid_value",
                "found control characters or spaces around the name, expected none",
            );
        }
        self
    }

    /// The name of a subset; it has to be able to name a folder.
    pub fn subset_name(&mut self, field: &'static str, name: &str) -> &mut Self {
        if name.contains(['/', '\\']) || matches!(name, "." | "..") {
            self.push(
                field,
                "invalid_value",
                format!("found `{name}`, expected a name that a folder can have"),
            );
            return self;
        }
        self.name(field, name)
    }

    pub fn repeats(&mut self, field: &'static str, repeats: u32) -> &mut Self {
        if !(1..=MAX_REPEATS).contains(&repeats) {
            self.push(
                field,
                "out_of_range",
                format!("found {repeats}, expected 1 to {MAX_REPEATS}"),
            );
        }
        self
    }

    /// An instance or class prompt: one line.
    pub fn prompt(&mut self, field: &'static str, prompt: Option<&str>) -> &mut Self {
        self.line(field, prompt, MAX_PROMPT_CHARS)
    }

    fn line(&mut self, field: &'static str, text: Option<&str>, most: usize) -> &mut Self {
        let Some(prompt) = text else { return self };
        let length = prompt.chars().count();
        if length > most {
            self.push(
                field,
                "out_of_range",
                format!("found {length} characters, expected at most {most}"),
            );
        } else if prompt.chars().any(char::is_control) {
            self.push(
                field,
                "invalid_value",
                "found control characters, expected one line of text",
            );
        }
        self
    }

    fn push(&mut self, field: &'static str, code: &'static str, message: impl Into<String>) {
        self.0.push(InvalidField {
            field,
            code,
            message: message.into(),
        });
    }

    /// What a subset says of its training; the ranges are those of a run's settings.
    pub fn training(&mut self, training: &SubsetTraining) -> &mut Self {
        let SubsetCaptions {
            shuffle_captions: _,
            caption_separator,
            keep_tokens,
            keep_tokens_separator,
            secondary_separator,
            caption_dropout_rate,
            caption_dropout_every_n_epochs,
            caption_tag_dropout_rate,
            caption_prefix,
            caption_suffix,
            enable_wildcards: _,
            token_warmup_min,
            token_warmup_step,
        } = &training.captions;
        if caption_separator.as_deref() == Some("") {
            let message = "is empty, expected what is between tags, such as `,`";
            self.push("captions/caption_separator", "invalid_value", message);
        }
        for (field, text, most) in [
            (
                "captions/caption_separator",
                caption_separator,
                MAX_SEPARATOR_CHARS,
            ),
            (
                "captions/keep_tokens_separator",
                keep_tokens_separator,
                MAX_SEPARATOR_CHARS,
            ),
            (
                "captions/secondary_separator",
                secondary_separator,
                MAX_SEPARATOR_CHARS,
            ),
            ("captions/caption_prefix", caption_prefix, MAX_PROMPT_CHARS),
            ("captions/caption_suffix", caption_suffix, MAX_PROMPT_CHARS),
        ] {
            self.line(field, text.as_deref(), most);
        }
        let count = |count: &Option<u32>| count.map(f64::from);
        for (field, number, most) in [
            ("captions/caption_dropout_rate", *caption_dropout_rate, 1.0),
            (
                "captions/caption_tag_dropout_rate",
                *caption_tag_dropout_rate,
                1.0,
            ),
            ("captions/keep_tokens", count(keep_tokens), MAX_TAGS),
            (
                "captions/token_warmup_min",
                count(token_warmup_min),
                MAX_TAGS,
            ),
            (
                "captions/caption_dropout_every_n_epochs",
                count(caption_dropout_every_n_epochs),
                MAX_STEPS,
            ),
            ("captions/token_warmup_step", *token_warmup_step, MAX_STEPS),
        ] {
            if let Some(number) = number
                && !(0.0..=most).contains(&number)
            {
                let message = format!("found {number}, expected 0 to {most}");
                self.push(field, "out_of_range", message);
            }
        }
        self
    }

    /// # Errors
    /// Everything that was found.
    pub fn finish(&mut self) -> Result<(), Vec<InvalidField>> {
        match std::mem::take(&mut self.0) {
            wrong if wrong.is_empty() => Ok(()),
            wrong => Err(wrong),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(check: impl FnOnce(&mut Checker) -> &mut Checker) -> Vec<&'static str> {
        let found = check(&mut Checker::default()).finish();
        let fields = found.err().unwrap_or_default();
        fields.iter().map(|field| field.field).collect()
    }

    #[test]
    fn all_wrong_values_are_named() {
        assert!(
            wrong(|c| c
                .name("name", "lumo")
                .repeats("repeats", 1)
                .prompt("prompt", None))
            .is_empty()
        );
        assert_eq!(
            wrong(|c| c.name("name", "").repeats("repeats", 0)),
            ["name", "repeats"]
        );
        assert_eq!(
            wrong(|c| c.subset_name("name", "a/b").prompt("prompt", Some("a\nb"))),
            ["name", "prompt"]
        );
        assert_eq!(
            wrong(|c| c.subset_name("name", "..").repeats("repeats", 10_001)),
            ["name", "repeats"]
        );
        assert_eq!(
            wrong(|c| c.name("name", " a").name("name", &"a".repeat(129))),
            ["name", "name"]
        );
    }
}
