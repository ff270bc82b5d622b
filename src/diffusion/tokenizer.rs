//! CLIP's tokenizer: cleaned lower-case text, split into words, each encoded with byte pairs.
//!
//! Gives the ids of Hugging Face's (slow) `CLIPTokenizer` with `ftfy` installed, which is what trainers use.
//! Source: OpenAI CLIP, `simple_tokenizer.py`; `transformers`, `tokenization_clip.py`.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use regex::Regex;

use super::emphasis;
use super::error::LoadError;
use super::text_fix::fix_text;

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// The byte pairs of OpenAI's CLIP (MIT), the same in every Stable Diffusion 1 model.
const CLIP_MERGES: &str = include_str!("assets/clip_merges.txt");
/// More merges than this are not read; CLIP has 48 894.
const MAX_MERGES: usize = 1 << 20;
/// The largest vocabulary file that is read, in bytes; CLIP's has 1.06 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Text beyond this many characters is dropped; a prompt of 225 tokens has about 1 000.
const MAX_TEXT_CHARS: usize = 100_000;

/// What stands for "nothing more" behind a short text, and whether the text can contain it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// The end token again: Stable Diffusion 1, and the first encoder of SDXL.
    End,
    /// A token declared as special when the tokenizer is made: every `!` in the text becomes it.
    /// Stable Diffusion 2, and the second tokenizer of SDXL in diffusers.
    Declared(char, u32),
    /// An id set afterwards, without a meaning in the text: the second tokenizer of SDXL in sd-scripts.
    Id(u32),
}

/// Text to ids. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    vocabulary: Arc<Vocabulary>,
    padding: Padding,
}

struct Vocabulary {
    ids: HashMap<String, u32>,
    /// Rank and result of merging two neighbours, by their ids.
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// Ids of a byte inside a word, and of one that ends it.
    bytes: [(u32, u32); 256],
    start: u32,
    end: u32,
}

impl Tokenizer {
    /// The CLIP vocabulary that is part of this program.
    pub fn clip() -> Self {
        static CLIP: LazyLock<Arc<Vocabulary>> = LazyLock::new(|| {
            let merges = parse_merges(CLIP_MERGES);
            let ids = derive_ids(&merges);
            let built = Vocabulary::build(ids, &merges);
            Arc::new(built.expect("the embedded vocabulary is checked by a test"))
        });
        Self {
            vocabulary: CLIP.clone(),
            padding: Padding::End,
        }
    }

    /// The tokenizer of a diffusers folder: `vocab.json`, `merges.txt`, and the padding of `tokenizer_config.json`.
    pub fn load(dir: &Path) -> Result<Self, LoadError> {
        let merges_path = dir.join("merges.txt");
        let merges_text = read_text(&merges_path)?;
        let merges = parse_merges(&merges_text);
        let vocab_path = dir.join("vocab.json");
        let invalid = |path: &Path, reason: String| LoadError::Tokenizer {
            path: path.to_owned(),
            reason,
        };
        let ids: HashMap<String, u32> = serde_json::from_str(&read_text(&vocab_path)?)
            .map_err(|error| invalid(&vocab_path, error.to_string()))?;
        let vocabulary =
            Vocabulary::build(ids, &merges).map_err(|reason| invalid(&vocab_path, reason))?;
        let padding = read_padding(dir, &vocabulary)?;
        Ok(Self {
            vocabulary: Arc::new(vocabulary),
            padding,
        })
    }

    /// The same vocabulary, padded differently.
    #[must_use]
    pub fn with_padding(mut self, padding: Padding) -> Self {
        self.padding = padding;
        self
    }

    /// How many ids there are: every id is below this.
    pub fn vocabulary_size(&self) -> usize {
        let largest = self.vocabulary.ids.values().max();
        largest.map_or(0, |&id| id as usize + 1)
    }

    /// Start token, the whole text, end token; not truncated.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = vec![self.vocabulary.start];
        self.encode_text(text, &mut ids);
        ids.push(self.vocabulary.end);
        ids
    }

    /// Rows of 77 for the text encoder: start, 75 tokens, end.
    ///
    /// `max_length` counts the first start and the last end: 77 gives one row, 152 two, 227 three (as sd-scripts'
    /// `max_token_length` of 75, 150, 225). A longer text is cut, a shorter one padded.
    pub fn chunks(&self, text: &str, max_length: usize) -> Vec<Vec<u32>> {
        self.cut(self.encode(text), max_length)
    }

    /// The same for a prompt with weights in A1111's style, and the weight of each of the positions that the rows have
    /// when begin and end between them are left out. Begin, end and padding have the weight 1.
    pub fn weighted_chunks(&self, prompt: &str, max_length: usize) -> (Vec<Vec<u32>>, Vec<f32>) {
        let length = 75 * rows(max_length) + 2;
        let (mut ids, mut weights) = (vec![self.vocabulary.start], vec![1.0]);
        for part in emphasis::parse(first_chars(prompt)) {
            self.encode_text(&part.text, &mut ids);
            weights.resize(ids.len(), part.weight as f32);
            if ids.len() > length {
                break;
            }
        }
        ids.push(self.vocabulary.end);
        weights.truncate(length - 1);
        weights.resize(length, 1.0);
        (self.cut(ids, max_length), weights)
    }

    fn cut(&self, mut ids: Vec<u32>, max_length: usize) -> Vec<Vec<u32>> {
        let rows = rows(max_length);
        let length = 75 * rows + 2;
        let (end, pad) = (self.vocabulary.end, self.pad_id());
        if ids.len() > length {
            ids.truncate(length - 1);
            ids.push(end);
        }
        ids.resize(length, pad);
        if rows == 1 {
            return vec![ids];
        }
        let (first, last) = (ids[0], ids[length - 1]);
        ids[1..length - 1]
            .chunks(75)
            .map(|inner| {
                let mut row = Vec::with_capacity(77);
                row.push(first);
                row.extend(inner);
                row.push(last);
                if pad != end {
                    // Where padding is not the end token, each row needs an end of its own.
                    if row[75] != end && row[75] != pad {
                        row[76] = end;
                    }
                    if row[1] == pad {
                        row[1] = end;
                    }
                }
                row
            })
            .collect()
    }

    fn pad_id(&self) -> u32 {
        match self.padding {
            Padding::End => self.vocabulary.end,
            Padding::Declared(_, id) | Padding::Id(id) => id,
        }
    }

    /// Special tokens split the text before anything is cleaned; what is between them is cleaned piece by piece.
    fn encode_text(&self, text: &str, ids: &mut Vec<u32>) {
        let text = first_chars(text);
        let mut piece_start = 0;
        let mut at = 0;
        while at < text.len() {
            let rest = &text[at..];
            let special = if rest.starts_with(START) {
                Some((START.len(), self.vocabulary.start))
            } else if rest.starts_with(END) {
                Some((END.len(), self.vocabulary.end))
            } else {
                match self.padding {
                    Padding::Declared(c, id) if rest.starts_with(c) => Some((c.len_utf8(), id)),
                    _ => None,
                }
            };
            if let Some((length, id)) = special {
                self.encode_piece(&text[piece_start..at], ids);
                ids.push(id);
                at += length;
                piece_start = at;
            } else {
                at += rest.chars().next().map_or(1, char::len_utf8);
            }
        }
        self.encode_piece(&text[piece_start..], ids);
    }

    fn encode_piece(&self, piece: &str, ids: &mut Vec<u32>) {
        // The pattern of CLIP. What is a special token after lower-casing is one, too.
        static WORDS: LazyLock<Regex> = LazyLock::new(|| {
            Regex::new(
                r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
            )
            .expect("a constant pattern")
        });
        if piece.is_empty() {
            return;
        }
        let fixed = fix_text(piece);
        let clean = fixed.split_whitespace().collect::<Vec<_>>().join(" ");
        for word in WORDS.find_iter(&clean.to_lowercase()) {
            match word.as_str() {
                START => ids.push(self.vocabulary.start),
                END => ids.push(self.vocabulary.end),
                word => self.vocabulary.encode_word(word.as_bytes(), ids),
            }
        }
    }
}

/// What is read of a text.
fn first_chars(text: &str) -> &str {
    match text.char_indices().nth(MAX_TEXT_CHARS) {
        Some((cut, _)) => &text[..cut],
        None => text,
    }
}

/// How many rows a length makes that counts the first start and the last end.
fn rows(max_length: usize) -> usize {
    max_length.saturating_sub(2).div_ceil(75).max(1)
}

impl fmt::Debug for Vocabulary {
    /// Fifty thousand words would bury whatever else is printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vocabulary({} words)", self.ids.len())
    }
}

impl Vocabulary {
    fn build(ids: HashMap<String, u32>, merges: &[(&str, &str)]) -> Result<Self, String> {
        let find = |token: &str| {
            let id = ids.get(token).copied();
            id.ok_or_else(|| format!("the token `{token}` is missing"))
        };
        let mut bytes = [(0, 0); 256];
        for (byte, symbol) in byte_symbols() {
            bytes[byte as usize] = (find(&symbol.to_string())?, find(&format!("{symbol}</w>"))?);
        }
        let mut ranks = HashMap::with_capacity(merges.len());
        for (rank, (left, right)) in merges.iter().enumerate() {
            let merged = find(&format!("{left}{right}"))?;
            let pair = (find(left)?, find(right)?);
            ranks.insert(pair, (u32::try_from(rank).unwrap_or(u32::MAX), merged));
        }
        Ok(Self {
            merges: ranks,
            bytes,
            start: find(START)?,
            end: find(END)?,
            ids,
        })
    }

    /// Byte-pair encoding: merge the pair of lowest rank, leftmost first, until no pair is in the table.
    ///
    /// A heap over a linked list, so that a "word" of many thousand letters is no denial of service. A pair's rank is
    /// higher than those of the pairs its parts came from, so the order is the reference's.
    fn encode_word(&self, word: &[u8], ids: &mut Vec<u32>) {
        let Some((&last, inner)) = word.split_last() else {
            return;
        };
        let mut symbols: Vec<u32> = inner.iter().map(|&b| self.bytes[b as usize].0).collect();
        symbols.push(self.bytes[last as usize].1);
        let n = symbols.len();
        let mut next: Vec<usize> = (1..=n).collect(); // n: none
        let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
        let mut alive = vec![true; n];
        let mut heap = BinaryHeap::new();
        let push = |heap: &mut BinaryHeap<_>, symbols: &[u32], left: usize, right: usize| {
            let pair = (symbols[left], symbols[right]);
            if let Some(&(rank, merged)) = self.merges.get(&pair) {
                heap.push(Reverse((rank, left, right, pair, merged)));
            }
        };
        for left in 0..n.saturating_sub(1) {
            push(&mut heap, &symbols, left, left + 1);
        }
        while let Some(Reverse((_, left, right, pair, merged))) = heap.pop() {
            let current = alive[left] && alive[right] && next[left] == right;
            if !current || (symbols[left], symbols[right]) != pair {
                continue; // one of the two has been merged with its other neighbour
            }
            symbols[left] = merged;
            alive[right] = false;
            next[left] = next[right];
            if next[left] < n {
                previous[next[left]] = left;
                push(&mut heap, &symbols, left, next[left]);
            }
            if left > 0 && previous[left] < n {
                push(&mut heap, &symbols, previous[left], left);
            }
        }
        ids.extend((0..n).filter(|&i| alive[i]).map(|i| symbols[i]));
    }
}

/// GPT-2's and CLIP's printable stand-in for each byte, in the vocabulary's order.
fn byte_symbols() -> Vec<(u8, char)> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut symbols: Vec<_> = (0..=255u8)
        .filter(|&b| printable(b))
        .map(|b| (b, char::from(b)))
        .collect();
    let others = (0..=255u8).filter(|&b| !printable(b));
    symbols.extend(others.zip('\u{100}'..));
    symbols
}

/// The lines of `merges.txt` behind its version line.
fn parse_merges(text: &str) -> Vec<(&str, &str)> {
    text.lines()
        .skip(1)
        .filter_map(|line| line.trim().split_once(' '))
        .take(MAX_MERGES)
        .collect()
}

/// CLIP's ids follow from its merges: bytes, bytes that end a word, merges, start and end.
fn derive_ids(merges: &[(&str, &str)]) -> HashMap<String, u32> {
    let symbols = byte_symbols();
    let inner = symbols.iter().map(|(_, c)| c.to_string());
    let ending = symbols.iter().map(|(_, c)| format!("{c}</w>"));
    let merged = merges.iter().map(|(left, right)| format!("{left}{right}"));
    inner
        .chain(ending)
        .chain(merged)
        .chain([START.to_owned(), END.to_owned()])
        .zip(0..)
        .collect()
}

fn read_text(path: &Path) -> Result<String, LoadError> {
    let size = fs::metadata(path)
        .map_err(|source| LoadError::io(path, source))?
        .len();
    if size > MAX_FILE_BYTES {
        return Err(LoadError::Tokenizer {
            path: path.to_owned(),
            reason: format!("{size} bytes, at most {MAX_FILE_BYTES} are read"),
        });
    }
    fs::read_to_string(path).map_err(|source| LoadError::io(path, source))
}

/// `pad_token` is a string, or an object with its `content`; without a file CLIP pads with the end token.
fn read_padding(dir: &Path, vocabulary: &Vocabulary) -> Result<Padding, LoadError> {
    let path = dir.join("tokenizer_config.json");
    if !path.exists() {
        return Ok(Padding::End);
    }
    let invalid = |reason: String| LoadError::Tokenizer {
        path: path.clone(),
        reason,
    };
    let config: serde_json::Value =
        serde_json::from_str(&read_text(&path)?).map_err(|error| invalid(error.to_string()))?;
    let entry = &config["pad_token"];
    let Some(token) = entry.as_str().or_else(|| entry["content"].as_str()) else {
        return Ok(Padding::End);
    };
    let mut letters = token.chars();
    match (token, letters.next(), letters.next()) {
        (END, ..) => Ok(Padding::End),
        (_, Some(letter), None) => match vocabulary.ids.get(token) {
            Some(&id) => Ok(Padding::Declared(letter, id)),
            None => Err(invalid(format!("pad_token `{token}` is not in vocab.json"))),
        },
        _ => Err(invalid(format!(
            "pad_token is `{token}`, expected `{END}` or a single letter"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::Weights;
    use std::path::PathBuf;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-sd15")
    }

    #[test]
    fn the_embedded_vocabulary_is_the_one_in_the_files() {
        let embedded = Tokenizer::clip();
        let loaded = Tokenizer::load(&fixture().join("diffusers/tokenizer")).unwrap();
        assert_eq!(embedded.vocabulary.ids, loaded.vocabulary.ids);
        assert_eq!(embedded.vocabulary_size(), 49_408);
        assert_eq!(loaded.padding, Padding::End);
        assert_eq!(
            (embedded.vocabulary.start, embedded.vocabulary.end),
            (49_406, 49_407)
        );
    }

    #[test]
    fn every_golden_id_is_equal() {
        let captions: serde_json::Value = serde_json::from_str(
            &fs::read_to_string(fixture().join("goldens/captions.json")).unwrap(),
        )
        .unwrap();
        let goldens = Weights::open(&[fixture().join("goldens/tokens.safetensors")]).unwrap();
        for (name, padding) in [
            ("tokenizer", Padding::End),
            ("tokenizer_2", Padding::Declared('!', 0)),
            ("tokenizer_2_kohya", Padding::Id(0)),
        ] {
            let tokenizer = Tokenizer::clip().with_padding(padding);
            for length in [77, 152, 227] {
                let (bytes, _, shape) =
                    goldens.read_bytes(&format!("{name}.ids_{length}")).unwrap();
                let expected: Vec<u32> = bytemuck::pod_collect_to_vec(bytes);
                let found: Vec<u32> = captions["captions"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .flat_map(|text| tokenizer.chunks(text.as_str().unwrap(), length))
                    .flatten()
                    .collect();
                assert_eq!(found.len(), shape.iter().product::<usize>());
                assert_eq!(found, expected, "{name} {length}");
            }
            let Some(untruncated) = captions[format!("{name}_untruncated")].as_array() else {
                continue;
            };
            for (text, ids) in captions["captions"]
                .as_array()
                .unwrap()
                .iter()
                .zip(untruncated)
            {
                let ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
                assert_eq!(tokenizer.encode(text.as_str().unwrap()), ids);
            }
        }
    }

    #[test]
    fn weights_are_those_of_sd_scripts() {
        // Made by sd-scripts' own `_get_input_ids(weighted=True)`; weights have six digits.
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/kohya/kohya_golden_weighted_tokens.json");
        let cases: Vec<serde_json::Value> =
            serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        assert!(cases.len() >= 4);
        for case in &cases {
            let prompt = case["caption"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let weights: Vec<f32> = serde_json::from_value(case["weights"].clone()).unwrap();
            let (rows, found) = Tokenizer::clip().weighted_chunks(prompt, ids.len());
            assert_eq!(rows, [ids], "{prompt}");
            assert_eq!(found.len(), weights.len(), "{prompt}");
            for (found, expected) in found.iter().zip(&weights) {
                assert!((found - expected).abs() < 1e-6, "{prompt}: {found}");
            }
        }
    }

    #[test]
    fn a_long_prompt_is_cut_into_rows_and_keeps_its_weights() {
        let tokenizer = Tokenizer::clip();
        let words = |count: usize| vec!["cat"; count].join(" ");
        // 74 plain, 3 heavy: the border between the rows goes through them.
        let prompt = format!("{} ({}:1.5)", words(74), words(3));
        let (rows, weights) = tokenizer.weighted_chunks(&prompt, 152);
        assert_eq!(rows, tokenizer.chunks(&words(77), 152));
        assert_eq!(weights.len(), 152);
        let heavy: Vec<usize> = (0..152).filter(|&at| weights[at] == 1.5).collect();
        assert_eq!(heavy, [75, 76, 77]);
        // What is cut off takes its weight along; the end has none.
        let (rows, weights) = tokenizer.weighted_chunks(&prompt, 77);
        assert_eq!(rows, tokenizer.chunks(&words(77), 77));
        assert_eq!((weights[75], weights[76], weights.len()), (1.5, 1.0, 77));
    }

    #[test]
    fn hard_texts_are_cleaned_and_encoded_as_by_the_reference() {
        // Made with transformers 4.54.1 (slow CLIPTokenizer) and ftfy 6.3.1.
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/clip-texts.json");
        let cases: Vec<serde_json::Value> =
            serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        let tokenizer = Tokenizer::clip();
        assert!(cases.len() > 50);
        for case in &cases {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            assert_eq!(fix_text(text), case["fixed"].as_str().unwrap(), "{text:?}");
            assert_eq!(tokenizer.encode(text), ids, "{text:?}");
        }
    }

    #[test]
    fn a_huge_word_takes_no_time() {
        let ids = Tokenizer::clip().encode(&"a".repeat(3 * MAX_TEXT_CHARS));
        assert!(ids.len() > 1_000 && ids.len() < MAX_TEXT_CHARS);
    }

    #[test]
    fn broken_vocabularies_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let load = |vocab: &str, merges: &str| {
            fs::write(dir.path().join("vocab.json"), vocab).unwrap();
            fs::write(dir.path().join("merges.txt"), merges).unwrap();
            Tokenizer::load(dir.path()).unwrap_err().to_string()
        };
        assert!(load("[1, 2]", "#version: 0.2\n").contains("vocab.json"));
        assert!(load("{\"a\": -1}", "").contains("vocab.json"));
        assert!(load("{}", "#version: 0.2\ni n\n").contains("is missing"));
        fs::remove_file(dir.path().join("merges.txt")).unwrap();
        let missing = Tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(missing.contains("merges.txt"), "{missing}");
    }
}
