//! How many images there are, and whether they can be read.

use std::collections::BTreeMap;

use super::{Entry, Finding, FindingCode, ReportSettings, Severity, Subject, count};
use crate::preparation::Measured;

/// Fewer than these are learned by heart.
const FEW: usize = 10;
const FEW_OF_A_STYLE: usize = 20;
/// More than these rarely help; variety and captions do.
const MANY: usize = 50;
const MANY_OF_A_CHARACTER: usize = 30;

pub(super) fn check(entries: &[Entry<'_>], settings: &ReportSettings) -> Vec<Finding> {
    let mut findings: Vec<Finding> = unreadable(entries).into_iter().collect();
    let mut subsets: BTreeMap<&str, usize> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| !entry.subset.is_reg) {
        *subsets.entry(&entry.subset.name).or_default() += 1;
    }
    if subsets.is_empty() {
        findings.push(Finding::new(
            FindingCode::NoImages,
            Severity::Serious,
            "There is nothing to train on: the dataset has no image besides those for regularization.",
            "Upload images of the subject.",
            Vec::new(),
        ));
    }
    let (few, many) = match settings.kind {
        Some(Subject::Character) => (FEW, MANY_OF_A_CHARACTER),
        Some(Subject::Style) => (FEW_OF_A_STYLE, MANY),
        None => (FEW, MANY),
    };
    let usual = "Usual are 10 to 30 images of a character and 20 to 50 of a style.";
    for (subset, images) in subsets {
        if images < few {
            findings.push(Finding::new(
                FindingCode::TooFewImages,
                Severity::Warning,
                format!("`{subset}` has {}: fewer than {few} are soon learned by heart.", count(images)),
                format!("{usual} Add different ones: other poses, backgrounds, light; or train for fewer steps."),
                Vec::new(),
            ));
        } else if images > many {
            findings.push(Finding::new(
                FindingCode::ManyImages,
                Severity::Info,
                format!("`{subset}` has {}.", count(images)),
                format!("{usual} More are no mistake, as long as they are good; the best ones alone train faster."),
                Vec::new(),
            ));
        }
    }
    findings
}

fn unreadable(entries: &[Entry<'_>]) -> Option<Finding> {
    let images: Vec<_> = entries
        .iter()
        .filter_map(|entry| match entry.measured? {
            Measured::Unreadable(reason) => Some(entry.named(Some(reason.clone()))),
            Measured::Whole(_) => None,
        })
        .collect();
    (!images.is_empty()).then(|| {
        Finding::new(
            FindingCode::Unreadable,
            Severity::Serious,
            format!(
                "{} cannot be decoded: a run would fail at the first of them.",
                count(images.len())
            ),
            "Delete them, or save them again and upload them.",
            images,
        )
    })
}
