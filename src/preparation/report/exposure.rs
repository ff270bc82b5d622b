//! Pictures that are blurred, too dark or too bright.

use super::{Entry, Finding, FindingCode, FindingImage, Severity, count};
use crate::preparation::Measures;

/// Variance of the Laplacian at 512 pixels. Sharp photographs and drawings have 300 to 5 000; below 100 edges have gone
/// soft (the usual threshold of this measure), below 20 nothing is left of them.
const BLURRED: f64 = 100.0;
/// 95 % of the pixels are darker than this: even what is bright is dark.
const DARK: u8 = 80;
/// 95 % of the pixels are brighter than this. A drawing on white has its lines below.
const BRIGHT: u8 = 190;

pub(super) fn check(entries: &[Entry<'_>]) -> Vec<Finding> {
    let of = |told: fn(&Measures) -> Option<String>| -> Vec<FindingImage> {
        let known = entries.iter().filter(|entry| !entry.subset.is_reg);
        known
            .filter_map(|entry| {
                let detail = told(entry.measured?.whole()?)?;
                Some(entry.named(Some(detail)))
            })
            .collect()
    };
    let blurred = of(|measures| {
        let blurred = measures.sharpness < BLURRED;
        blurred.then(|| format!("sharpness {:.0}", measures.sharpness))
    });
    let dark = of(|measures| {
        let dark = measures.brightest < DARK;
        dark.then(|| format!("95 % below {} of 255", measures.brightest))
    });
    let bright = of(|measures| {
        let bright = measures.darkest > BRIGHT;
        bright.then(|| format!("95 % above {} of 255", measures.darkest))
    });
    [
        (
            FindingCode::Blurred,
            blurred,
            "blurred, or empty (variance of the Laplacian below 100): the LoRA learns the blur, too.",
            "Replace them by sharper ones, or delete them. Soft backgrounds behind a sharp subject are fine.",
        ),
        (
            FindingCode::Underexposed,
            dark,
            "very dark: 95 % of the pixels are below 80 of 255.",
            "Brighten them, or try `color_correction: auto_levels`; keep them if darkness is what is to be learned.",
        ),
        (
            FindingCode::Overexposed,
            bright,
            "very bright: 95 % of the pixels are above 190 of 255.",
            "Darken them, or try `color_correction: auto_levels`; keep them if this is what is to be learned.",
        ),
    ]
    .into_iter()
    .filter(|(_, images, ..)| !images.is_empty())
    .map(|(code, images, message, advice)| {
        let verb = if images.len() == 1 { "is" } else { "are" };
        let message = format!("{} {verb} {message}", count(images.len()));
        Finding::new(code, Severity::Warning, message, advice, images)
    })
    .collect()
}
