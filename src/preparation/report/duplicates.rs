//! The same picture twice: by content, and by what it looks like.

use std::collections::{BTreeMap, HashMap};

use super::{Entry, FINDINGS_OF_A_KIND, Finding, FindingCode, Severity, count};
use crate::preparation::Measures;

/// Bits of 64 in which the perceptual hashes of near duplicates may differ.
const BITS: u32 = 6;
/// How far the colours of their tiny copies may be apart, on average, of 255.
const COLOURS: f64 = 14.0;
/// Two hashes that differ in at most [`BITS`] bits are the same in one of so many parts.
const PARTS: u32 = BITS + 1;

pub(super) fn check(entries: &[Entry<'_>]) -> Vec<Finding> {
    let mut findings = exact(entries);
    findings.extend(near(entries));
    findings
}

/// A subset takes a file once: the others are in other subsets.
fn exact(entries: &[Entry<'_>]) -> Vec<Finding> {
    let mut by_content: BTreeMap<&str, Vec<&Entry<'_>>> = BTreeMap::new();
    for entry in entries {
        by_content
            .entry(&entry.image.sha256)
            .or_default()
            .push(entry);
    }
    by_content
        .into_values()
        .filter(|same| same.len() > 1)
        .take(FINDINGS_OF_A_KIND)
        .map(|same| {
            let both = same.iter().any(|entry| entry.subset.is_reg)
                && same.iter().any(|entry| !entry.subset.is_reg);
            let (severity, why) = match both {
                true => (Severity::Serious, ", once as the subject and once for regularization"),
                false => (Severity::Warning, ""),
            };
            Finding::new(
                FindingCode::ExactDuplicates,
                severity,
                format!("The same file is there {} times{why}.", same.len()),
                "Keep one of them, unless two concepts are meant to share it: repeats say how often an image counts.",
                same.iter().map(|entry| entry.named(None)).collect(),
            )
        })
        .collect()
}

/// Groups of pictures that look the same; those for regularization among themselves.
fn near(entries: &[Entry<'_>]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for regularization in [false, true] {
        // One of each content: exact duplicates are told already.
        let mut seen: HashMap<&str, (&Entry<'_>, &Measures)> = HashMap::new();
        for entry in entries
            .iter()
            .filter(|entry| entry.subset.is_reg == regularization)
        {
            if let Some(measures) = entry.measured.and_then(|measured| measured.whole()) {
                seen.entry(&entry.image.sha256).or_insert((entry, measures));
            }
        }
        let mut known: Vec<_> = seen.into_values().collect();
        known.sort_by_key(|(entry, _)| entry.image.id);
        let groups = groups(
            &known
                .iter()
                .map(|(_, measures)| *measures)
                .collect::<Vec<_>>(),
        );
        findings.extend(groups.into_iter().take(FINDINGS_OF_A_KIND).map(|group| {
            let images: Vec<_> = group.iter().map(|index| known[*index].0.named(None)).collect();
            Finding::new(
                FindingCode::NearDuplicates,
                if regularization { Severity::Info } else { Severity::Warning },
                format!("{} look nearly the same.", count(images.len())),
                "Keep the best of them: together they count as often as they are there, and the LoRA learns this one \
                 picture by heart.",
                images,
            )
        }));
    }
    findings
}

/// Indices of pictures that look alike, in groups of two or more.
fn groups(pictures: &[&Measures]) -> Vec<Vec<usize>> {
    let mut parents: Vec<usize> = (0..pictures.len()).collect();
    // Only pictures that have one part of the hash in common are compared.
    for part in 0..PARTS {
        let mut shelves: HashMap<u64, Vec<usize>> = HashMap::new();
        for (index, picture) in pictures.iter().enumerate() {
            shelves
                .entry(part_of(picture.phash, part))
                .or_default()
                .push(index);
        }
        for shelf in shelves.into_values() {
            for (place, &first) in shelf.iter().enumerate() {
                for &second in &shelf[place + 1..] {
                    let close =
                        (pictures[first].phash ^ pictures[second].phash).count_ones() <= BITS;
                    if close && colours_apart(pictures[first], pictures[second]) <= COLOURS {
                        let (a, b) = (root(&mut parents, first), root(&mut parents, second));
                        parents[a.max(b)] = a.min(b);
                    }
                }
            }
        }
    }
    let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for index in 0..pictures.len() {
        groups
            .entry(root(&mut parents, index))
            .or_default()
            .push(index);
    }
    groups
        .into_values()
        .filter(|group| group.len() > 1)
        .collect()
}

fn part_of(hash: u64, part: u32) -> u64 {
    let (start, end) = (64 * part / PARTS, 64 * (part + 1) / PARTS);
    (hash >> start) & ((1 << (end - start)) - 1)
}

fn root(parents: &mut [usize], mut index: usize) -> usize {
    while parents[index] != index {
        parents[index] = parents[parents[index]];
        index = parents[index];
    }
    index
}

fn colours_apart(a: &Measures, b: &Measures) -> f64 {
    let apart = a.tiny.iter().zip(&b.tiny);
    let sum: u32 = apart.map(|(a, b)| u32::from(a.abs_diff(*b))).sum();
    f64::from(sum) / a.tiny.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataloader::Energy;
    use image::RgbImage;

    fn picture(phash: u64, shade: u8) -> Measures {
        Measures {
            phash,
            tiny: vec![shade; 48],
            sharpness: 500.0,
            darkest: 0,
            brightest: 255,
            medians: [128; 3],
            energy: Energy::of(&RgbImage::new(1, 1)),
        }
    }

    #[test]
    fn every_pair_within_reach_is_found() {
        // Six bits away in as many different parts as there are, and one bit more.
        let base = 0x0123_4567_89ab_cdef_u64;
        let flipped = |bits: &[u32]| bits.iter().fold(base, |hash, bit| hash ^ (1 << bit));
        let near = flipped(&[0, 10, 19, 28, 37, 46]);
        let far = flipped(&[0, 10, 19, 28, 37, 46, 55]);
        let pictures = [picture(base, 9), picture(near, 9), picture(!base, 9)];
        assert_eq!(groups(&pictures.iter().collect::<Vec<_>>()), [vec![0, 1]]);
        let pictures = [picture(base, 9), picture(far, 9)];
        assert!(groups(&pictures.iter().collect::<Vec<_>>()).is_empty());
        // The same shape in another colour is another picture.
        let pictures = [picture(base, 9), picture(base, 90)];
        assert!(groups(&pictures.iter().collect::<Vec<_>>()).is_empty());
    }

    #[test]
    fn the_parts_make_up_the_whole() {
        let hash = 0xfedc_ba98_7654_3210_u64;
        let mut together = 0;
        for part in 0..PARTS {
            together |= part_of(hash, part) << (64 * part / PARTS);
        }
        assert_eq!(together, hash);
    }
}
