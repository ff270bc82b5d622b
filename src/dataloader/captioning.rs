//! Captions as a step sees them: dropped out, chosen, warmed up, shuffled. What is done in which order is sd-scripts'
//! (`BaseDataset.process_caption`); random numbers come from whoever asks, so that a run can be taken up again.

use rand::RngExt as _;
use rand::seq::SliceRandom as _;
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};

/// The most characters of a separator.
pub const MAX_SEPARATOR_CHARS: usize = 32;
/// The most characters of what is put before or after a caption.
pub const MAX_AFFIX_CHARS: usize = 1000;
/// The most tags that can be kept in place, or that a warm-up begins with.
pub const MAX_TAGS: u32 = 1000;
/// The most epochs or steps.
const MAX_STEPS: f64 = 10_000_000.0;

/// What becomes of a caption whenever it is used. An empty text or 0 switches a part off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CaptionSettings {
    /// Whether tags change places, but for those that are kept.
    pub shuffle_captions: bool,
    /// What is between tags.
    pub caption_separator: String,
    /// So many tags stay first and are never dropped.
    pub keep_tokens: u32,
    /// Where a caption has it, the tags before its first place, and after its second, are those that are kept.
    pub keep_tokens_separator: String,
    /// Becomes the separator once tags have been shuffled: what it joins stays together.
    pub secondary_separator: String,
    /// Share of showings without a caption.
    pub caption_dropout_rate: f64,
    /// Every so many epochs there are no captions.
    pub caption_dropout_every_n_epochs: u32,
    /// Share of tags that are left out.
    pub caption_tag_dropout_rate: f64,
    /// Comes before every caption, with a space.
    pub caption_prefix: String,
    /// Comes after every caption, with a space.
    pub caption_suffix: String,
    /// Whether `{a|b}` is one of the two, and a caption of several lines one of its lines.
    pub enable_wildcards: bool,
    /// So many tags are there in the first step of a warm-up.
    pub token_warmup_min: u32,
    /// The step from which on all tags are there; below 1, as a share of the run.
    pub token_warmup_step: f64,
}

impl Default for CaptionSettings {
    fn default() -> Self {
        Self {
            shuffle_captions: false,
            caption_separator: ",".to_owned(),
            keep_tokens: 0,
            keep_tokens_separator: String::new(),
            secondary_separator: String::new(),
            caption_dropout_rate: 0.0,
            caption_dropout_every_n_epochs: 0,
            caption_tag_dropout_rate: 0.0,
            caption_prefix: String::new(),
            caption_suffix: String::new(),
            enable_wildcards: false,
            token_warmup_min: 1,
            token_warmup_step: 0.0,
        }
    }
}

/// Where in a run a caption is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The epoch, from 1.
    pub epoch: u64,
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
}

impl CaptionSettings {
    /// The fields that make no sense, as (field name, message).
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if self.caption_separator.is_empty() {
            let message = "is empty, expected what is between tags, such as `,`";
            problems.push(("caption_separator", message.to_owned()));
        }
        for (field, text, most) in [
            (
                "caption_separator",
                &self.caption_separator,
                MAX_SEPARATOR_CHARS,
            ),
            (
                "keep_tokens_separator",
                &self.keep_tokens_separator,
                MAX_SEPARATOR_CHARS,
            ),
            (
                "secondary_separator",
                &self.secondary_separator,
                MAX_SEPARATOR_CHARS,
            ),
            ("caption_prefix", &self.caption_prefix, MAX_AFFIX_CHARS),
            ("caption_suffix", &self.caption_suffix, MAX_AFFIX_CHARS),
        ] {
            let found = text.chars().count();
            if found > most {
                problems.push((
                    field,
                    format!("has {found} characters, expected at most {most}"),
                ));
            } else if text.chars().any(char::is_control) {
                let message = "has control characters, expected one line of text";
                problems.push((field, message.to_owned()));
            }
        }
        for (field, rate) in [
            ("caption_dropout_rate", self.caption_dropout_rate),
            ("caption_tag_dropout_rate", self.caption_tag_dropout_rate),
        ] {
            if !(0.0..=1.0).contains(&rate) {
                problems.push((field, format!("is {rate}, expected a number from 0 to 1")));
            }
        }
        for (field, tags) in [
            ("keep_tokens", self.keep_tokens),
            ("token_warmup_min", self.token_warmup_min),
        ] {
            if tags > MAX_TAGS {
                let message = format!("is {tags}, expected a whole number from 0 to {MAX_TAGS}");
                problems.push((field, message));
            }
        }
        for (field, count) in [
            (
                "caption_dropout_every_n_epochs",
                f64::from(self.caption_dropout_every_n_epochs),
            ),
            ("token_warmup_step", self.token_warmup_step),
        ] {
            if !(0.0..=MAX_STEPS).contains(&count) {
                let message = format!("is {count}, expected a number from 0 to {MAX_STEPS}");
                problems.push((field, message));
            }
        }
        problems
    }

    /// Whether two showings of a caption may be different texts.
    pub fn varies(&self, caption: &str) -> bool {
        let chosen = self.enable_wildcards
            && [caption, &self.caption_prefix, &self.caption_suffix]
                .iter()
                .any(|text| text.contains(['{', '\n']));
        chosen
            || self.shuffle_captions
            || self.caption_dropout_rate > 0.0
            || self.caption_dropout_every_n_epochs > 0
            || self.caption_tag_dropout_rate > 0.0
            || self.token_warmup_step > 0.0
    }

    /// The text that a step sees.
    pub fn at(&self, caption: &str, moment: Moment, rng: &mut ChaCha12Rng) -> String {
        let every = u64::from(self.caption_dropout_every_n_epochs);
        let dropped = self.caption_dropout_rate > 0.0
            && rng.random::<f64>() < self.caption_dropout_rate
            || every > 0 && moment.epoch.is_multiple_of(every);
        if dropped {
            return String::new();
        }
        let caption = self.chosen(caption, rng);
        self.with_second_separator(self.tags(&caption, Some(moment), rng))
    }

    /// The text that measurements see: whole, its tags in their order. Only wildcards are still a matter of chance.
    pub fn whole(&self, caption: &str, rng: &mut ChaCha12Rng) -> String {
        let caption = self.chosen(caption, rng);
        self.with_second_separator(self.tags(&caption, None, rng))
    }

    /// Prefix, suffix, and one of what can be chosen from. The prefix is that of the first line, the suffix of the last.
    fn chosen(&self, caption: &str, rng: &mut ChaCha12Rng) -> String {
        let mut text = caption.to_owned();
        if !self.caption_prefix.is_empty() {
            text = format!("{} {text}", self.caption_prefix);
        }
        if !self.caption_suffix.is_empty() {
            text = format!("{text} {}", self.caption_suffix);
        }
        let lines: Vec<&str> = text.split('\n').collect();
        if !self.enable_wildcards {
            return lines[0].to_owned();
        }
        let line = match lines.as_slice() {
            [only] => *only,
            lines => lines[rng.random_range(0..lines.len())],
        };
        wildcards(line, rng)
    }

    /// Tags that are kept in place, and the others as this moment has them: fewer in a warm-up, shuffled, left out.
    fn tags(&self, caption: &str, moment: Option<Moment>, rng: &mut ChaCha12Rng) -> String {
        let warmup = self.warmup_steps(moment);
        let split = self.shuffle_captions
            || self.token_warmup_step > 0.0
            || self.caption_tag_dropout_rate > 0.0;
        if !split {
            return caption.to_owned();
        }
        let (first, mut others, last) = self.parts(caption);
        if let Some(moment) = moment {
            if (moment.step as f64) < warmup {
                let most = others.len() as f64;
                let least = f64::from(self.token_warmup_min);
                let there = (moment.step as f64 * ((most - least) / warmup)).floor() + least;
                others.truncate(there as usize);
            }
            if self.shuffle_captions {
                others.shuffle(rng);
            }
            if self.caption_tag_dropout_rate > 0.0 {
                others.retain(|_| rng.random::<f64>() >= self.caption_tag_dropout_rate);
            }
        }
        // Always this, whatever separates tags.
        [first, others, last].concat().join(", ")
    }

    fn warmup_steps(&self, moment: Option<Moment>) -> f64 {
        match moment {
            Some(moment) if self.token_warmup_step < 1.0 => {
                (self.token_warmup_step * moment.total_steps as f64).floor()
            }
            _ => self.token_warmup_step,
        }
    }

    /// The tags that stay first, those that may move, and those that stay last. Empty ones go only where the caption
    /// itself says what is kept.
    fn parts<'a>(&self, caption: &'a str) -> (Vec<&'a str>, Vec<&'a str>, Vec<&'a str>) {
        let separator = self.caption_separator.as_str();
        let tags = |text: &'a str| -> Vec<&'a str> {
            let tags = text.split(separator).map(str::trim);
            tags.filter(|tag| !tag.is_empty()).collect()
        };
        let keep = self.keep_tokens_separator.as_str();
        if !keep.is_empty()
            && let Some((first, rest)) = caption.split_once(keep)
        {
            let (others, last) = match rest.split_once(keep) {
                Some((others, last)) => (others, tags(last)),
                None => (rest, Vec::new()),
            };
            return (tags(first), tags(others), last);
        }
        let mut first: Vec<&str> = caption.trim().split(separator).map(str::trim).collect();
        let others = first.split_off(first.len().min(self.keep_tokens as usize));
        (first, others, Vec::new())
    }

    fn with_second_separator(&self, caption: String) -> String {
        if self.secondary_separator.is_empty() {
            caption
        } else {
            caption.replace(&self.secondary_separator, &self.caption_separator)
        }
    }
}

/// Replaces each `{a|b|c}` by one of its words; `{{` and `}}` are braces.
fn wildcards(text: &str, rng: &mut ChaCha12Rng) -> String {
    // No caption has control characters.
    const OPEN: char = '\u{1}';
    const CLOSE: char = '\u{2}';
    let text = text
        .replace("{{", OPEN.encode_utf8(&mut [0; 4]))
        .replace("}}", CLOSE.encode_utf8(&mut [0; 4]));
    let mut made = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(begin) = rest.find('{') {
        made.push_str(&rest[..begin]);
        let inside = &rest[begin + 1..];
        match inside.find('}') {
            Some(end) if end > 0 => {
                let words: Vec<&str> = inside[..end].split('|').collect();
                made.push_str(words[rng.random_range(0..words.len())]);
                rest = &inside[end + 1..];
            }
            // `{}` or a brace that is never closed.
            _ => {
                made.push('{');
                rest = inside;
            }
        }
    }
    made.push_str(rest);
    made.replace(OPEN, "{").replace(CLOSE, "}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::SeedableRng as _;

    use super::*;

    const FIRST: Moment = Moment {
        epoch: 1,
        step: 0,
        total_steps: 100,
    };

    fn rng(seed: u64) -> ChaCha12Rng {
        ChaCha12Rng::seed_from_u64(seed)
    }

    /// All texts that a caption becomes.
    fn all(settings: &CaptionSettings, caption: &str) -> BTreeSet<String> {
        let one = |seed| settings.at(caption, FIRST, &mut rng(seed));
        (0..400).map(one).collect()
    }

    fn set(texts: &[&str]) -> BTreeSet<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn nothing_is_done_by_default_but_to_take_the_first_line() {
        let settings = CaptionSettings::default();
        assert_eq!(settings.problems(), []);
        assert!(!settings.varies("a,  {b|c} ,d\nsecond"));
        assert_eq!(
            all(&settings, "a,  {b|c} ,d\nsecond"),
            set(&["a,  {b|c} ,d"])
        );
    }

    #[test]
    fn shuffling_keeps_the_first_tags_and_the_groups() {
        let settings = CaptionSettings {
            shuffle_captions: true,
            keep_tokens: 1,
            secondary_separator: ";;;".to_owned(),
            ..CaptionSettings::default()
        };
        let found = all(&settings, "lumo,red;;;blue, big");
        assert_eq!(found, set(&["lumo, red,blue, big", "lumo, big, red,blue"]));
        // More than there are: nothing is left to move.
        let settings = CaptionSettings {
            keep_tokens: 9,
            ..settings
        };
        assert_eq!(all(&settings, "b,a"), set(&["b, a"]));
    }

    #[test]
    fn a_caption_may_say_itself_what_stays() {
        let settings = CaptionSettings {
            shuffle_captions: true,
            keep_tokens: 3,
            keep_tokens_separator: "|||".to_owned(),
            ..CaptionSettings::default()
        };
        let found = all(&settings, "lumo, robot, ||| a,, b ||| best, hd");
        let expected = ["lumo, robot, a, b, best, hd", "lumo, robot, b, a, best, hd"];
        assert_eq!(found, set(&expected));
        // Where the caption has none, the number counts, and empty tags stay.
        assert_eq!(all(&settings, "a,b,,c"), set(&["a, b, , c"]));
        // Without anything that needs tags, the caption is left as it is, as in sd-scripts.
        let settings = CaptionSettings {
            shuffle_captions: false,
            ..settings
        };
        assert_eq!(all(&settings, "a ||| b"), set(&["a ||| b"]));
    }

    #[test]
    fn captions_and_tags_are_dropped_at_their_rates() {
        let settings = CaptionSettings {
            caption_dropout_rate: 0.25,
            caption_tag_dropout_rate: 0.5,
            keep_tokens: 1,
            ..CaptionSettings::default()
        };
        let count = 20_000;
        let texts: Vec<String> = (0..count)
            .map(|seed| settings.at("lumo, a", FIRST, &mut rng(seed)))
            .collect();
        let share = |wanted: &str| {
            texts.iter().filter(|text| *text == wanted).count() as f64 / f64::from(count as u32)
        };
        // Of three quarters with a caption, one half has lost its one loose tag; five standard errors are 0.018.
        for (wanted, expected) in [("", 0.25), ("lumo", 0.375), ("lumo, a", 0.375)] {
            let found = share(wanted);
            assert!((found - expected).abs() < 0.018, "{wanted:?}: {found}");
        }
        let certain = CaptionSettings {
            caption_dropout_rate: 1.0,
            caption_prefix: "prefix".to_owned(),
            ..settings.clone()
        };
        assert_eq!(all(&certain, "a"), set(&[""]));
        // Measurements see everything.
        assert_eq!(settings.whole("lumo,a", &mut rng(0)), "lumo, a");
        assert_eq!(certain.whole("lumo,a", &mut rng(0)), "prefix lumo, a");
    }

    #[test]
    fn whole_epochs_go_without_captions() {
        let settings = CaptionSettings {
            caption_dropout_every_n_epochs: 3,
            ..CaptionSettings::default()
        };
        let at = |epoch| settings.at("a", Moment { epoch, ..FIRST }, &mut rng(0));
        let found: Vec<String> = (1..=7).map(at).collect();
        assert_eq!(found, ["a", "a", "", "a", "a", "", "a"]);
    }

    #[test]
    fn tags_come_in_one_after_the_other() {
        let settings = CaptionSettings {
            keep_tokens: 1,
            token_warmup_min: 1,
            token_warmup_step: 0.1,
            ..CaptionSettings::default()
        };
        let at = |step| settings.at("x,1,2,3,4,5", Moment { step, ..FIRST }, &mut rng(0));
        // A tenth of 100 steps: step s has ⌊s · (5 − 1) / 10⌋ + 1 of the five.
        for (step, expected) in [
            (0, "x, 1"),
            (2, "x, 1"),
            (3, "x, 1, 2"),
            (5, "x, 1, 2, 3"),
            (9, "x, 1, 2, 3, 4"),
            (10, "x, 1, 2, 3, 4, 5"),
            (99, "x, 1, 2, 3, 4, 5"),
        ] {
            assert_eq!(at(step), expected, "step {step}");
        }
        let in_steps = CaptionSettings {
            token_warmup_step: 4.0,
            token_warmup_min: 0,
            ..settings
        };
        let at = |step| in_steps.at("x,1,2", Moment { step, ..FIRST }, &mut rng(0));
        // ⌊s · 2 / 4⌋
        assert_eq!(
            [0, 1, 2, 3, 4].map(at),
            ["x", "x", "x, 1", "x, 1", "x, 1, 2"]
        );
    }

    #[test]
    fn wildcards_choose_and_braces_can_be_written() {
        let settings = CaptionSettings {
            enable_wildcards: true,
            caption_prefix: "photo of".to_owned(),
            caption_suffix: "{{x}}".to_owned(),
            ..CaptionSettings::default()
        };
        assert!(settings.varies("a {b|c}") && settings.varies("a\nb"));
        let found = all(&settings, "a {red|blue} {cat|dog}");
        let expected = [
            "photo of a red cat {x}",
            "photo of a red dog {x}",
            "photo of a blue cat {x}",
            "photo of a blue dog {x}",
        ];
        assert_eq!(found, set(&expected));
        // Prefix and suffix belong to the first and the last line, as in sd-scripts.
        assert_eq!(all(&settings, "a\nb"), set(&["photo of a", "b {x}"]));
        let plain = CaptionSettings {
            enable_wildcards: true,
            ..CaptionSettings::default()
        };
        assert_eq!(all(&plain, "{} {open {a|}"), set(&["{} open {a", "{} "]));
        assert_eq!(all(&plain, "{|a}"), set(&["", "a"]));
    }

    #[test]
    fn affixes_come_before_tags_are_counted() {
        let settings = CaptionSettings {
            shuffle_captions: true,
            keep_tokens: 1,
            caption_prefix: "lumo,".to_owned(),
            ..CaptionSettings::default()
        };
        assert_eq!(all(&settings, "a, b"), set(&["lumo, a, b", "lumo, b, a"]));
    }

    #[test]
    fn the_same_numbers_make_the_same_caption() {
        let settings = CaptionSettings {
            shuffle_captions: true,
            caption_tag_dropout_rate: 0.3,
            ..CaptionSettings::default()
        };
        let at = |seed| settings.at("a,b,c,d,e,f,g,h", FIRST, &mut rng(seed));
        assert_eq!(at(1), at(1));
        assert_ne!(at(1), at(2));
    }

    #[test]
    fn wrong_settings_are_named() {
        let settings = CaptionSettings {
            caption_separator: String::new(),
            caption_prefix: "a\nb".to_owned(),
            caption_dropout_rate: f64::NAN,
            keep_tokens: 1001,
            token_warmup_step: -1.0,
            ..CaptionSettings::default()
        };
        let problems = settings.problems();
        let found: Vec<&str> = problems.iter().map(|(field, _)| *field).collect();
        let expected = [
            "caption_separator",
            "caption_prefix",
            "caption_dropout_rate",
            "keep_tokens",
            "token_warmup_step",
        ];
        assert_eq!(found, expected);
    }
}
