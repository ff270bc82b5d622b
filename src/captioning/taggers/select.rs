//! From probabilities to a caption: thresholds, order, underscores, what is left out.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::{Category, ScoredTag};
use crate::captioning::CaptionError;

/// The most tags that can be excluded.
pub const MAX_EXCLUDED: usize = 10_000;
/// Tags that look like faces keep their underscores.
const FACES: [&str; 19] = [
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o",
    "@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||",
];
/// So do shorter ones than this, as in sd-scripts.
const SHORT: usize = 3;

/// In which order tags are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The surest first.
    #[default]
    Confidence,
    /// As the network's list has them.
    List,
}

/// Where the rating is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RatingPlace {
    /// Nowhere.
    #[default]
    None,
    /// Before all tags.
    First,
    /// After all tags.
    Last,
}

/// Which tags become a caption, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaggerSettings {
    /// The least probability of a general tag.
    pub general_threshold: f64,
    /// The least probability of a character.
    pub character_threshold: f64,
    /// Where the most probable rating goes.
    pub rating: RatingPlace,
    /// Whether underscores stay.
    pub keep_underscores: bool,
    /// Tags that are never written.
    pub exclude: Vec<String>,
    /// In which order.
    pub order: Order,
    /// Whether characters come before all other tags.
    pub characters_first: bool,
    /// The most tags, without the rating.
    pub max_tags: usize,
    /// What is between two tags.
    pub separator: String,
}

impl Default for TaggerSettings {
    fn default() -> Self {
        Self {
            general_threshold: 0.35,
            character_threshold: 0.85,
            rating: RatingPlace::None,
            keep_underscores: false,
            exclude: Vec::new(),
            order: Order::Confidence,
            characters_first: false,
            max_tags: 200,
            separator: ", ".to_owned(),
        }
    }
}

impl TaggerSettings {
    /// Whether every setting is in its range.
    ///
    /// # Errors
    /// [`CaptionError::Setting`]: the first that is not.
    pub fn check(&self) -> Result<(), CaptionError> {
        let wrong = |setting, reason| Err(CaptionError::Setting { setting, reason });
        for (setting, found) in [
            ("general_threshold", self.general_threshold),
            ("character_threshold", self.character_threshold),
        ] {
            if !(0.05..=1.0).contains(&found) {
                return wrong(setting, format!("is {found}, expected 0.05 to 1"));
            }
        }
        if !(1..=200).contains(&self.max_tags) {
            return wrong(
                "max_tags",
                format!("is {}, expected 1 to 200", self.max_tags),
            );
        }
        if self.exclude.len() > MAX_EXCLUDED {
            let found = self.exclude.len();
            return wrong(
                "exclude",
                format!("has {found} tags, expected at most {MAX_EXCLUDED}"),
            );
        }
        let separator = self.separator.chars();
        if self.separator.trim().is_empty()
            || separator.clone().count() > 10
            || separator.clone().any(char::is_control)
        {
            let found = &self.separator;
            let reason =
                format!("is `{found}`, expected 1 to 10 characters, not all of them spaces");
            return wrong("separator", reason);
        }
        Ok(())
    }

    /// The tags of a picture that become its caption.
    pub fn choose(&self, tags: &[ScoredTag]) -> Vec<String> {
        let excluded: HashSet<String> = self.exclude.iter().map(|tag| plain(tag)).collect();
        let wanted = |tag: &ScoredTag| !excluded.contains(&plain(&tag.name));
        let passes = |tag: &ScoredTag| {
            let threshold = match tag.category {
                Category::General => self.general_threshold,
                Category::Character => self.character_threshold,
                Category::Rating => return false,
            };
            // Both as f32: 0.35 is then reached by what the network calls 0.35.
            tag.confidence >= threshold as f32
        };
        let mut chosen: Vec<&ScoredTag> = tags
            .iter()
            .filter(|tag| passes(tag) && wanted(tag))
            .collect();
        if chosen.len() > self.max_tags || self.order == Order::Confidence {
            let mut by_confidence = chosen.clone();
            by_confidence.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
            by_confidence.truncate(self.max_tags);
            if self.order == Order::Confidence {
                chosen = by_confidence;
            } else {
                chosen.retain(|tag| by_confidence.iter().any(|kept| std::ptr::eq(*kept, *tag)));
            }
        }
        if self.characters_first {
            chosen.sort_by_key(|tag| tag.category != Category::Character);
        }
        let ratings = tags.iter().filter(|tag| tag.category == Category::Rating);
        let rating = ratings.max_by(|a, b| a.confidence.total_cmp(&b.confidence));
        let rating = rating.filter(|tag| wanted(tag));
        match self.rating {
            RatingPlace::None => {}
            RatingPlace::First => chosen.splice(0..0, rating).for_each(drop),
            RatingPlace::Last => chosen.extend(rating),
        }
        chosen
            .into_iter()
            .map(|tag| self.written(&tag.name))
            .collect()
    }

    fn written(&self, name: &str) -> String {
        if self.keep_underscores || FACES.contains(&name) || name.chars().count() <= SHORT {
            return name.to_owned();
        }
        name.replace('_', " ")
    }
}

/// A tag however it is written.
fn plain(tag: &str) -> String {
    tag.trim().replace('_', " ").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(name: &str, category: Category, confidence: f32) -> ScoredTag {
        ScoredTag {
            name: name.to_owned(),
            category,
            confidence,
        }
    }

    fn tags() -> Vec<ScoredTag> {
        vec![
            tag("general", Category::Rating, 0.2),
            tag("sensitive", Category::Rating, 0.6),
            tag("long_hair", Category::General, 0.5),
            tag("0_0", Category::General, 0.35),
            tag("smile", Category::General, 0.9),
            tag("hat", Category::General, 0.3499),
            tag("(o)_(o)", Category::General, 0.4),
            tag("saber", Category::Character, 0.8),
            tag("lumo_(mascot)", Category::Character, 0.86),
        ]
    }

    #[test]
    fn thresholds_order_and_underscores() {
        let usual = TaggerSettings::default();
        assert_eq!(
            usual.choose(&tags()),
            ["smile", "lumo (mascot)", "long hair", "(o)_(o)", "0_0"]
        );
        let list = TaggerSettings {
            order: Order::List,
            keep_underscores: true,
            character_threshold: 0.8,
            rating: RatingPlace::Last,
            ..usual.clone()
        };
        let expected = [
            "long_hair",
            "0_0",
            "smile",
            "(o)_(o)",
            "saber",
            "lumo_(mascot)",
            "sensitive",
        ];
        assert_eq!(list.choose(&tags()), expected);
        let first = TaggerSettings {
            characters_first: true,
            rating: RatingPlace::First,
            max_tags: 3,
            ..usual
        };
        assert_eq!(
            first.choose(&tags()),
            ["sensitive", "lumo (mascot)", "smile", "long hair"]
        );
        let few = TaggerSettings {
            max_tags: 2,
            ..list
        };
        assert_eq!(few.choose(&tags()), ["smile", "lumo_(mascot)", "sensitive"]);
    }

    #[test]
    fn what_is_excluded_is_never_written_however_it_is_spelt() {
        let settings = TaggerSettings {
            exclude: vec![
                "Long Hair".to_owned(),
                "lumo_(mascot)".to_owned(),
                "sensitive".to_owned(),
            ],
            rating: RatingPlace::First,
            ..TaggerSettings::default()
        };
        assert_eq!(settings.choose(&tags()), ["smile", "(o)_(o)", "0_0"]);
    }

    #[test]
    fn settings_have_ranges() {
        let usual = TaggerSettings::default();
        assert!(usual.check().is_ok());
        let wrong = [
            TaggerSettings {
                general_threshold: 0.0,
                ..usual.clone()
            },
            TaggerSettings {
                character_threshold: f64::NAN,
                ..usual.clone()
            },
            TaggerSettings {
                max_tags: 0,
                ..usual.clone()
            },
            TaggerSettings {
                separator: " ".to_owned(),
                ..usual.clone()
            },
            TaggerSettings {
                separator: ",\n".to_owned(),
                ..usual
            },
        ];
        for settings in wrong {
            assert!(settings.check().is_err(), "{settings:?}");
        }
    }
}
