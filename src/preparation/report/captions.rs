//! Captions: missing, too long, with the instance prompt where it belongs, and tags that cannot be told apart later.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{
    Entry, FINDINGS_OF_A_KIND, Finding, FindingCode, FindingImage, ReportSettings, Severity,
    TagUse, count,
};
use crate::diffusion::tokenizer::Tokenizer;

/// A subset is asked for what always comes together when it has at least so many images.
const ENOUGH_IMAGES: usize = 5;
/// A tag on this share of a subset's images becomes part of its subject.
const ALWAYS: f64 = 0.9;
/// Two tags are one when this share of the images that have either have both.
const TOGETHER: f64 = 0.9;
/// Only tags on so many images are paired, the most frequent ones.
const PAIRED_TAGS: usize = 200;
/// A longer part of a caption is no tag but a sentence.
const TAG_CHARS: usize = 60;
/// Tags of the whole set that a report lists.
const LISTED_TAGS: usize = 50;

pub(super) fn check(entries: &[Entry<'_>], settings: &ReportSettings) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(missing(entries));
    findings.extend(too_long(entries, settings.max_token_length));
    findings.extend(without_instance_prompt(entries));
    findings.extend(instance_prompt_in_regularization(entries));
    findings.extend(baked_in(entries));
    findings
}

/// A finding about images, if there are any.
fn about(
    code: FindingCode,
    severity: Severity,
    images: Vec<FindingImage>,
    message: &str,
    advice: &str,
) -> Option<Finding> {
    let message = format!("{} {message}", count(images.len()));
    (!images.is_empty()).then(|| Finding::new(code, severity, message, advice, images))
}

fn missing(entries: &[Entry<'_>]) -> Vec<Finding> {
    let silent = entries
        .iter()
        .filter(|entry| entry.caption().trim().is_empty());
    let silent = about(
        FindingCode::CaptionMissing,
        Severity::Serious,
        silent.map(|entry| entry.named(None)).collect(),
        "without a caption, in subsets without a prompt: nothing would name what they show.",
        "Give the subset an `instance_prompt` (for regularization a `class_prompt`), or write captions.",
    );
    // A subset without any captions is trained on its prompt, as somebody meant; one with some was forgotten.
    let captioned: BTreeSet<&str> = entries
        .iter()
        .filter(|entry| entry.image.caption.is_some())
        .map(|entry| entry.subset.name.as_str())
        .collect();
    let forgotten = entries.iter().filter(|entry| {
        entry.image.caption.is_none()
            && captioned.contains(entry.subset.name.as_str())
            && !entry.caption().trim().is_empty()
    });
    let forgotten = about(
        FindingCode::CaptionMissing,
        Severity::Warning,
        forgotten.map(|entry| entry.named(None)).collect(),
        "without a caption beside others that have one: they are described by the subset's prompt alone.",
        "Write their captions, or remove those of the others.",
    );
    silent.into_iter().chain(forgotten).collect()
}

fn too_long(entries: &[Entry<'_>], most: usize) -> Option<Finding> {
    let tokenizer = Tokenizer::clip();
    let mut known: HashMap<&str, usize> = HashMap::new();
    let images = entries.iter().filter_map(|entry| {
        let caption = entry.caption();
        let tokens = *known
            .entry(caption)
            .or_insert_with(|| tokenizer.encode(caption).len().saturating_sub(2));
        (tokens > most).then(|| entry.named(Some(format!("{tokens} tokens"))))
    });
    let advice = if most < 225 {
        "Shorten them, put what matters first, or raise `max_token_length` (75, 150 or 225)."
    } else {
        "Shorten them, or put what matters first."
    };
    about(
        FindingCode::CaptionTooLong,
        Severity::Warning,
        images.collect(),
        &format!("with a caption of more than {most} tokens: what is behind is cut off."),
        advice,
    )
}

/// Lower case, one space between words; underscores are spaces.
fn plain(text: &str) -> String {
    let lower = text.to_lowercase().replace('_', " ");
    lower.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a text has a phrase as whole words.
fn has_phrase(text: &str, phrase: &str) -> bool {
    let whole = |end: Option<char>| !end.is_some_and(char::is_alphanumeric);
    !phrase.is_empty()
        && text.match_indices(phrase).any(|(at, _)| {
            whole(text[..at].chars().next_back()) && whole(text[at + phrase.len()..].chars().next())
        })
}

fn without_instance_prompt(entries: &[Entry<'_>]) -> Option<Finding> {
    let images = entries.iter().filter(|entry| !entry.subset.is_reg);
    let images = images.filter_map(|entry| {
        let prompt = entry.subset.instance_prompt.as_deref()?;
        let caption = plain(entry.caption());
        let missing = !caption.is_empty() && !has_phrase(&caption, &plain(prompt));
        (missing && !prompt.trim().is_empty())
            .then(|| entry.named(Some(format!("without `{prompt}`"))))
    });
    about(
        FindingCode::InstancePromptMissing,
        Severity::Warning,
        images.collect(),
        "whose caption does not have the subset's instance prompt: what they show is not tied to it.",
        "Put the instance prompt in front of these captions, or remove it from the subset.",
    )
}

fn instance_prompt_in_regularization(entries: &[Entry<'_>]) -> Option<Finding> {
    let prompts: BTreeSet<String> = entries
        .iter()
        .filter(|entry| !entry.subset.is_reg)
        .filter_map(|entry| entry.subset.instance_prompt.as_deref())
        .map(plain)
        .collect();
    let images = entries.iter().filter(|entry| entry.subset.is_reg);
    let images = images.filter_map(|entry| {
        let caption = plain(entry.caption());
        let found = prompts.iter().find(|prompt| has_phrase(&caption, prompt))?;
        Some(entry.named(Some(format!("with `{found}`"))))
    });
    about(
        FindingCode::InstancePromptInRegularization,
        Severity::Serious,
        images.collect(),
        "for regularization with an instance prompt in the caption: they teach that the prompt means something else.",
        "Remove the instance prompt from captions and class prompts of regularization.",
    )
}

/// The tags of a caption, each once: what is between commas.
fn tags(caption: &str) -> BTreeSet<String> {
    let parts = caption.split(',').map(plain);
    parts
        .filter(|tag| !tag.is_empty() && tag.chars().count() <= TAG_CHARS)
        .collect()
}

/// The most frequent tags of all images.
pub(super) fn frequent_tags(entries: &[Entry<'_>]) -> Vec<TagUse> {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for entry in entries {
        for tag in tags(entry.caption()) {
            *counts.entry(tag).or_default() += 1;
        }
    }
    let mut uses: Vec<TagUse> = counts
        .into_iter()
        .map(|(tag, images)| TagUse { tag, images })
        .collect();
    uses.sort_by(|a, b| b.images.cmp(&a.images).then_with(|| a.tag.cmp(&b.tag)));
    uses.truncate(LISTED_TAGS);
    uses
}

/// What a subset's images always have beside the instance prompt becomes part of what that means.
fn baked_in(entries: &[Entry<'_>]) -> Vec<Finding> {
    let mut subsets: BTreeMap<&str, Vec<&Entry<'_>>> = BTreeMap::new();
    // Captions of their own: a prompt that stands for all captions says nothing.
    let captioned = entries.iter().filter(|entry| entry.image.caption.is_some());
    for entry in captioned.filter(|entry| !entry.subset.is_reg) {
        subsets.entry(&entry.subset.name).or_default().push(entry);
    }
    let enough = subsets
        .into_iter()
        .filter(|(_, images)| images.len() >= ENOUGH_IMAGES);
    enough
        .flat_map(|(name, images)| baked_in_subset(name, &images))
        .collect()
}

fn baked_in_subset(name: &str, images: &[&Entry<'_>]) -> Vec<Finding> {
    let prompt = images
        .first()
        .and_then(|entry| entry.subset.instance_prompt.as_deref());
    let prompt = prompt.map(plain).unwrap_or_default();
    let mut with: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
    for (index, entry) in images.iter().enumerate() {
        for tag in tags(entry.caption()) {
            if !has_phrase(&tag, &prompt) {
                with.entry(tag).or_default().insert(index);
            }
        }
    }
    let total = images.len();
    let (always, sometimes): (Vec<_>, Vec<_>) = with
        .into_iter()
        .partition(|(_, having)| having.len() as f64 >= ALWAYS * total as f64);
    // Without an instance prompt, a tag that is always there may be meant as one.
    let severity = if prompt.is_empty() {
        Severity::Info
    } else {
        Severity::Warning
    };
    let always = always.into_iter().take(FINDINGS_OF_A_KIND).map(|(tag, having)| {
        Finding::new(
            FindingCode::TagBakedIn,
            severity,
            format!("`{tag}` is on {} of {total} images of `{name}`: it will be baked in.", having.len()),
            "If it belongs to the subject, remove the tag, so that the instance prompt stands for it. If it does not, add \
             images without it: a prompt will hardly take it away later.",
            Vec::new(),
        )
    });
    let mut findings: Vec<Finding> = always.collect();
    findings.extend(inseparable(name, images, sometimes));
    findings
}

/// Pairs of tags that hardly ever come alone.
fn inseparable(
    name: &str,
    images: &[&Entry<'_>],
    mut tags: Vec<(String, BTreeSet<usize>)>,
) -> Vec<Finding> {
    tags.retain(|(_, having)| having.len() >= ENOUGH_IMAGES);
    tags.sort_by(|a, b| b.1.len().cmp(&a.1.len()).then_with(|| a.0.cmp(&b.0)));
    tags.truncate(PAIRED_TAGS);
    let mut findings = Vec::new();
    for (index, (first, with_first)) in tags.iter().enumerate() {
        for (second, with_second) in &tags[index + 1..] {
            let both = with_first.intersection(with_second).count();
            let either = with_first.len() + with_second.len() - both;
            if (both as f64) < TOGETHER * either as f64 || findings.len() >= FINDINGS_OF_A_KIND {
                continue;
            }
            let having = with_first.intersection(with_second);
            findings.push(Finding::new(
                FindingCode::TagsInseparable,
                Severity::Info,
                format!("`{first}` and `{second}` nearly always come together in `{name}` ({both} images): each will bring the other."),
                "Add images that have one of them alone, or merge them into one tag.",
                having.map(|index| images[*index].named(None)).collect(),
            ));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phrase_is_found_as_whole_words() {
        assert!(has_phrase("a photo of lumo, smiling", "lumo"));
        assert!(!has_phrase("a photo of lumos", "lumo"));
        assert!(has_phrase(&plain("My_Robot standing"), &plain("my robot")));
        assert!(!has_phrase("anything", ""));
        assert!(has_phrase("über lumo", "lumo"));
    }

    #[test]
    fn tags_are_between_commas() {
        let found = tags("Lumo, blue_sky,  blue sky, , a");
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            ["a", "blue sky", "lumo"]
        );
    }
}
