//! BERT's WordPiece tokenizer (`BertTokenizerFast` of transformers): the prefix to ids, and ids back to text.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use plsfix::{Normalization, TextFixerConfig};
use regex::Regex;
use serde::Deserialize;

use crate::diffusion::LoadError;
use crate::diffusion::config::read_json;

/// The largest vocabulary file.
const MAX_FILE_BYTES: u64 = 32 << 20;
/// Longer words are unknown.
const MAX_WORD_CHARS: usize = 100;
const UNKNOWN: &str = "[UNK]";
/// Tokens that stand for no text. BLIP's own two have ids behind the vocabulary file, but may also be in it.
const SPECIAL: [&str; 7] = [
    "[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]",
];
/// Those that are recognised in a text.
const WRITTEN: [&str; 5] = ["[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]"];
/// Ideographs are words of their own. The blocks are those of the reference, its gap included.
const IDEOGRAPHS: [(char, char); 8] = [
    ('\u{3400}', '\u{4dbf}'),
    ('\u{4e00}', '\u{9fff}'),
    ('\u{f900}', '\u{faff}'),
    ('\u{20000}', '\u{2a6df}'),
    ('\u{2a700}', '\u{2b73f}'),
    ('\u{2b740}', '\u{2b81f}'),
    ('\u{2b920}', '\u{2ceaf}'),
    ('\u{2f800}', '\u{2fa1f}'),
];

/// Characters that are dropped: controls, formats and private ones.
static CONTROL: LazyLock<Regex> = LazyLock::new(|| pattern(r"[\p{Cc}\p{Cf}\p{Co}]"));
static PUNCTUATION: LazyLock<Regex> = LazyLock::new(|| pattern(r"\p{P}"));
/// Accents, once they are characters of their own.
static ACCENTS: LazyLock<Regex> = LazyLock::new(|| pattern(r"\p{Mn}"));

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant pattern")
}

/// Words and their pieces.
#[derive(Debug)]
pub struct Tokenizer {
    tokens: Vec<String>,
    ids: HashMap<String, u32>,
    unknown: u32,
    settings: Settings,
}

/// `tokenizer_config.json`, which may be absent.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Settings {
    do_lower_case: bool,
    /// Takes spaces before punctuation away. Older files do not say: transformers did so by default.
    clean_up_tokenization_spaces: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            do_lower_case: true,
            clean_up_tokenization_spaces: true,
        }
    }
}

impl Tokenizer {
    /// Reads `vocab.txt`, one token a line, and `tokenizer_config.json` where there is one.
    ///
    /// # Errors
    /// When a file cannot be read, or the vocabulary has no unknown token or more than `most` tokens.
    pub fn load(folder: &Path, most: usize) -> Result<Self, LoadError> {
        let path = folder.join("vocab.txt");
        let broken = |reason: String| LoadError::Tokenizer {
            path: path.clone(),
            reason,
        };
        let io = |source| LoadError::io(&path, source);
        let size = fs::metadata(&path).map_err(io)?.len();
        if size > MAX_FILE_BYTES {
            return Err(broken(format!(
                "{size} bytes, at most {MAX_FILE_BYTES} are read"
            )));
        }
        let tokens: Vec<String> = fs::read_to_string(&path)
            .map_err(io)?
            .lines()
            .map(str::to_owned)
            .collect();
        if tokens.len() > most {
            return Err(broken(format!(
                "{} tokens, the model has {most}",
                tokens.len()
            )));
        }
        let ids: HashMap<String, u32> = tokens.iter().cloned().zip(0..).collect();
        let unknown = *ids
            .get(UNKNOWN)
            .ok_or_else(|| broken(format!("the token `{UNKNOWN}` is missing")))?;
        let settings = folder.join("tokenizer_config.json");
        let settings = if settings.exists() {
            read_json(&settings)?
        } else {
            Settings::default()
        };
        Ok(Self {
            tokens,
            ids,
            unknown,
            settings,
        })
    }

    /// The ids of a text, without a begin or end.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut rest = text;
        loop {
            let found = WRITTEN
                .iter()
                .filter_map(|token| Some((rest.find(token)?, token, self.ids.get(*token)?)))
                .min_by_key(|(at, ..)| *at);
            let Some((at, token, id)) = found else {
                self.encode_plain(rest, &mut ids);
                return ids;
            };
            self.encode_plain(&rest[..at], &mut ids);
            ids.push(*id);
            rest = &rest[at + token.len()..];
        }
    }

    /// The text of ids: special tokens and ids outside of the vocabulary have none.
    pub fn decode(&self, ids: &[u32]) -> String {
        let tokens = ids
            .iter()
            .filter_map(|id| self.tokens.get(*id as usize))
            .filter(|token| !SPECIAL.contains(&token.as_str()));
        let mut text = String::new();
        for (place, token) in tokens.enumerate() {
            // The decoder itself cleans each word; only words with spaces in them are changed by that.
            text += &match token.strip_prefix("##") {
                _ if place == 0 => clean_up(token),
                Some(piece) => clean_up(piece),
                None => clean_up(&format!(" {token}")),
            };
        }
        if self.settings.clean_up_tokenization_spaces {
            clean_up(&text)
        } else {
            text
        }
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) {
        let text = normalize(text, self.settings.do_lower_case);
        for part in text.split(char::is_whitespace) {
            let mut word = String::new();
            for letter in part.chars() {
                if is_punctuation(letter) {
                    self.encode_word(&std::mem::take(&mut word), ids);
                    self.encode_word(letter.encode_utf8(&mut [0; 4]), ids);
                } else {
                    word.push(letter);
                }
            }
            self.encode_word(&word, ids);
        }
    }

    /// The longest token that the word begins with, then the longest piece that the rest begins with, and so on.
    fn encode_word(&self, word: &str, ids: &mut Vec<u32>) {
        if word.is_empty() {
            return;
        }
        if word.chars().count() > MAX_WORD_CHARS {
            return ids.push(self.unknown);
        }
        let (mut start, mut pieces) = (0, Vec::new());
        while start < word.len() {
            let mut ends = (start + 1..=word.len())
                .rev()
                .filter(|end| word.is_char_boundary(*end));
            let found = ends.find_map(|end| {
                let piece = &word[start..end];
                let id = if start == 0 {
                    self.ids.get(piece)
                } else {
                    self.ids.get(&format!("##{piece}"))
                };
                Some((*id?, end))
            });
            let Some((id, end)) = found else {
                return ids.push(self.unknown);
            };
            pieces.push(id);
            start = end;
        }
        ids.extend(pieces);
    }
}

/// The text without control characters; ideographs stand alone; lower case without accents when `lower`.
fn normalize(text: &str, lower: bool) -> String {
    let mut result = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_whitespace() {
            result.push(' ');
        } else if letter == '\u{fffd}' || (!is_plain(letter) && matches(&CONTROL, letter)) {
        } else if IDEOGRAPHS.iter().any(|(a, b)| (*a..=*b).contains(&letter)) {
            result.extend([' ', letter, ' ']);
        } else {
            result.push(letter);
        }
    }
    if lower {
        let without_accents: String = result.chars().map(decomposed).collect();
        let kept = without_accents
            .chars()
            .filter(|letter| letter.is_ascii() || !matches(&ACCENTS, *letter));
        result = kept.flat_map(char::to_lowercase).collect();
    }
    result
}

fn is_plain(letter: char) -> bool {
    matches!(letter, ' '..='~')
}

fn is_punctuation(letter: char) -> bool {
    letter.is_ascii_punctuation() || (!letter.is_ascii() && matches(&PUNCTUATION, letter))
}

fn matches(class: &Regex, letter: char) -> bool {
    class.is_match(letter.encode_utf8(&mut [0; 4]))
}

/// The canonical decomposition of a character. `plsfix` holds the tables; all else that it does is off.
fn decomposed(letter: char) -> String {
    if letter.is_ascii() {
        return letter.to_string();
    }
    let config = TextFixerConfig {
        unescape_html: Some(false),
        remove_terminal_escapes: false,
        fix_encoding: false,
        restore_byte_a0: false,
        replace_lossy_sequences: false,
        decode_inconsistent_utf8: false,
        fix_c1_controls: false,
        fix_latin_ligatures: false,
        fix_character_width: false,
        uncurl_quotes: false,
        fix_line_breaks: false,
        remove_control_chars: false,
        normalization: Some(Normalization::NFD),
        max_decode_length: i32::MAX,
    };
    plsfix::fix_and_explain(&letter.to_string(), false, Some(&config)).text
}

/// `clean_up_tokenization` of transformers.
fn clean_up(text: &str) -> String {
    let pairs = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    pairs.iter().fold(text.to_owned(), |text, (from, to)| {
        if text.contains(from) {
            text.replace(from, to)
        } else {
            text
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::captioning::blip::testing;

    #[test]
    fn every_golden_text_and_row_of_ids_is_equal() {
        let goldens = testing::json();
        let mut tokenizer = Tokenizer::load(&testing::folder(), 1_000).unwrap();
        let cases = goldens["tokenizer"]["encoded"].as_array().unwrap();
        assert!(cases.len() > 10);
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            // The reference puts a begin and an end around them.
            assert_eq!(tokenizer.encode(text), ids[1..ids.len() - 1], "{text:?}");
        }
        for (key, clean_up) in [("cleaned", true), ("plain", false)] {
            tokenizer.settings.clean_up_tokenization_spaces = clean_up;
            for case in goldens["tokenizer"]["decoded"].as_array().unwrap() {
                let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
                assert_eq!(tokenizer.decode(&ids), case[key].as_str().unwrap());
            }
        }
    }

    #[test]
    fn a_vocabulary_without_an_unknown_token_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("vocab.txt"), "[PAD]\na\n").unwrap();
        let message = Tokenizer::load(folder.path(), 9).unwrap_err().to_string();
        assert!(message.contains("vocab.txt") && message.contains("[UNK]"));
        let message = Tokenizer::load(folder.path(), 1).unwrap_err().to_string();
        assert!(message.contains("2 tokens, the model has 1"), "{message}");
    }

    #[test]
    fn hostile_texts_are_no_panic() {
        let tokenizer = Tokenizer::load(&testing::folder(), 1_000).unwrap();
        for text in [
            "\u{0}\u{fffd}\u{10ffff}",
            "[[[UNK]",
            "\u{301}\u{301}",
            &"猫".repeat(500),
        ] {
            tokenizer.encode(text);
        }
        tokenizer.decode(&[u32::MAX, 0, 0]);
    }
}
