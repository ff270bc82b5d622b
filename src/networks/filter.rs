//! Patterns that choose among the layers.

use regex::{Regex, RegexBuilder};

use crate::networks::NetworkError;
use crate::networks::settings::{MAX_PATTERN_CHARS, NetworkSettings};

/// Largest compiled pattern, in bytes.
const MAX_COMPILED_BYTES: usize = 256 << 10;

/// A regular expression of a client, of bounded size; matching takes time linear in the name's length.
pub fn pattern(text: &str) -> Result<Regex, String> {
    let chars = text.chars().count();
    if !(1..=MAX_PATTERN_CHARS).contains(&chars) {
        return Err(format!(
            "has {chars} characters, expected 1 to {MAX_PATTERN_CHARS}"
        ));
    }
    let compiled = RegexBuilder::new(text)
        .size_limit(MAX_COMPILED_BYTES)
        .dfa_size_limit(MAX_COMPILED_BYTES)
        .nest_limit(32)
        .build();
    compiled.map_err(|error| {
        let error = error.to_string();
        let reason = error.lines().last().unwrap_or_default();
        format!("is {text:?}, expected a regular expression: {reason}")
    })
}

/// The layers that `include` and `exclude` leave.
#[derive(Debug, Clone, Default)]
pub struct LayerFilter {
    include: Vec<Regex>,
    exclude: Vec<Regex>,
}

impl LayerFilter {
    /// # Errors
    /// When a pattern is no regular expression, or too large.
    pub fn new(settings: &NetworkSettings) -> Result<Self, NetworkError> {
        let compile = |field: &str, patterns: &[String]| {
            let patterns = patterns.iter().enumerate();
            patterns
                .map(|(index, text)| {
                    pattern(text).map_err(|message| NetworkError::Settings {
                        field: format!("{field}/{index}"),
                        message,
                    })
                })
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            include: compile("include", &settings.include)?,
            exclude: compile("exclude", &settings.exclude)?,
        })
    }

    /// Whether an adapter of this name, on the layer with this path, stays.
    pub fn admits(&self, name: &str, path: &str) -> bool {
        let matches = |pattern: &Regex| pattern.is_match(name) || pattern.is_match(path);
        (self.include.is_empty() || self.include.iter().any(matches))
            && !self.exclude.iter().any(matches)
    }

    /// The patterns that match no layer: field and number of each.
    pub fn unused<'a>(
        &self,
        layers: impl Iterator<Item = (&'a str, &'a str)> + Clone,
    ) -> Vec<(String, String)> {
        let lists = [("include", &self.include), ("exclude", &self.exclude)];
        let mut unused = Vec::new();
        for (field, patterns) in lists {
            for (index, pattern) in patterns.iter().enumerate() {
                let mut layers = layers.clone();
                if !layers.any(|(name, path)| pattern.is_match(name) || pattern.is_match(path)) {
                    let text = pattern.as_str();
                    let message = format!(
                        "{text:?} matches none of the layers that would have an adapter without it, neither by the \
                         adapter's name nor by the layer's path"
                    );
                    unused.push((format!("{field}/{index}"), message));
                }
            }
        }
        unused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths_are_matched() {
        let settings = NetworkSettings {
            include: vec!["attn2".to_owned(), r"^mid_block\.".to_owned()],
            exclude: vec!["_to_v$".to_owned()],
            ..NetworkSettings::default()
        };
        let filter = LayerFilter::new(&settings).expect("patterns");
        let admits = |path: &str| {
            let name = format!("lora_unet_{}", path.replace('.', "_"));
            filter.admits(&name, path)
        };
        assert!(admits("down_blocks.0.attentions.0.attn2.to_q"));
        assert!(!admits("down_blocks.0.attentions.0.attn2.to_v"));
        assert!(admits("mid_block.attentions.0.proj_in"));
        assert!(!admits("up_blocks.0.attentions.0.attn1.to_q"));
        let layers = [("lora_unet_a", "a")];
        let unused = filter.unused(layers.into_iter());
        let fields: Vec<&str> = unused.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["include/0", "include/1", "exclude/0"]);
    }

    #[test]
    fn patterns_that_are_wrong_or_too_large_are_named() {
        for text in ["(", "", "a{1000}{1000}{1000}", &"x".repeat(257)] {
            let settings = NetworkSettings {
                exclude: vec!["attn".to_owned(), text.to_owned()],
                ..NetworkSettings::default()
            };
            let error = LayerFilter::new(&settings).expect_err("no pattern");
            assert!(error.to_string().contains("network.exclude/1"), "{error}");
        }
    }
}
