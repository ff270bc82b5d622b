//! Pictures that are too small, or lose much to their crop, and buckets that nearly nothing is in.

use std::collections::BTreeMap;

use super::{
    BucketUse, Entry, FINDINGS_OF_A_KIND, Finding, FindingCode, FindingImage, ReportSettings,
    Severity, count,
};
use crate::dataloader::Placement;

/// Enlarging up to this is not seen.
const SLIGHTLY: f64 = 1.05;
/// Enlarged beyond this a picture has nothing of the detail that it is trained at.
const MUCH: f64 = 1.5;
/// The share of a picture that may be cut off; from the second on it is likely to be the subject's feet.
const CUT: f64 = 0.10;
const MUCH_CUT: f64 = 0.25;

pub(super) fn check(
    entries: &[Entry<'_>],
    settings: &ReportSettings,
    buckets: &BTreeMap<(u32, u32), BucketUse>,
) -> Vec<Finding> {
    let placed: Vec<(&Entry<'_>, Placement)> = entries
        .iter()
        .map(|entry| {
            let (width, height) = (entry.image.width_px.max(1), entry.image.height_px.max(1));
            (entry, settings.buckets.place(width, height))
        })
        .collect();
    let mut findings = Vec::new();
    findings.extend(too_small(&placed, settings));
    findings.extend(crop_loss(&placed));
    findings.extend(lonely(&placed, settings, buckets));
    findings
}

fn too_small(placed: &[(&Entry<'_>, Placement)], settings: &ReportSettings) -> Option<Finding> {
    let mut worst = 1.0_f64;
    let mut images = Vec::new();
    let target = &settings.buckets;
    let area = f64::from(target.width_px) * f64::from(target.height_px);
    for (entry, placement) in placed.iter().filter(|(entry, _)| !entry.subset.is_reg) {
        let (width, height) = (
            f64::from(entry.image.width_px),
            f64::from(entry.image.height_px),
        );
        // Without enlarging, a small picture is trained small.
        let scale = match target.enabled && target.no_upscale {
            true => (area / (width * height).max(1.0)).sqrt(),
            false => f64::from(placement.resized.0) / width.max(1.0),
        };
        if scale > SLIGHTLY {
            worst = worst.max(scale);
            let detail = format!("{width} × {height}, {scale:.1} times too small");
            images.push(entry.named(Some(detail)));
        }
    }
    (!images.is_empty()).then(|| {
        let severity = if worst > MUCH { Severity::Warning } else { Severity::Info };
        let what = match target.enabled && target.no_upscale {
            true => "too small, and trained at their own size",
            false => "too small, and enlarged",
        };
        Finding::new(
            FindingCode::BelowResolution,
            severity,
            format!(
                "{}, {what}: the run has room for the detail of {} × {} pixels.",
                count(images.len()),
                target.width_px,
                target.height_px,
            ),
            "Use larger originals, or a lower resolution; or `buckets.no_upscale`, which trains them at their size.",
            images,
        )
    })
}

fn crop_loss(placed: &[(&Entry<'_>, Placement)]) -> Option<Finding> {
    let mut cut: Vec<(f64, FindingImage)> = placed
        .iter()
        .filter(|(_, placement)| placement.crop_loss() > CUT)
        .map(|(entry, placement)| {
            let loss = placement.crop_loss();
            let (width, height) = placement.bucket;
            let detail = format!("{:.0} % cut off at {width} × {height}", loss * 100.0);
            (loss, entry.named(Some(detail)))
        })
        .collect();
    cut.sort_by(|a, b| b.0.total_cmp(&a.0));
    let worst = cut.first()?.0;
    let severity = if worst > MUCH_CUT {
        Severity::Warning
    } else {
        Severity::Info
    };
    Some(Finding::new(
        FindingCode::CropLoss,
        severity,
        format!(
            "{} would lose more than {:.0} % to the crop, {:.0} % at most.",
            count(cut.len()),
            CUT * 100.0,
            worst * 100.0
        ),
        "Look at the previews. Crop these by hand, switch `buckets` on, lower `buckets.step_px`, raise \
         `buckets.max_px`, or try `crop: smart`.",
        cut.into_iter().map(|(_, image)| image).collect(),
    ))
}

fn lonely(
    placed: &[(&Entry<'_>, Placement)],
    settings: &ReportSettings,
    buckets: &BTreeMap<(u32, u32), BucketUse>,
) -> Vec<Finding> {
    buckets
        .values()
        .filter(|bucket| bucket.lonely)
        .take(FINDINGS_OF_A_KIND)
        .map(|bucket| {
            let size = (bucket.width_px, bucket.height_px);
            let images: Vec<_> = placed
                .iter()
                .filter(|(_, placement)| placement.bucket == size)
                .map(|(entry, _)| entry.named(None))
                .collect();
            let short = bucket.images_per_epoch < settings.batch_size as u64;
            let (severity, why) = if short {
                let why = format!(
                    "shown {} times in an epoch, which does not fill a batch of {}",
                    bucket.images_per_epoch, settings.batch_size
                );
                (Severity::Warning, why)
            } else {
                (Severity::Info, "every batch of this size is the same picture".to_owned())
            };
            Finding::new(
                FindingCode::LonelyBucket,
                severity,
                format!(
                    "The bucket {} × {} holds {}: {why}.",
                    size.0,
                    size.1,
                    count(bucket.images as usize)
                ),
                "Crop it to the shape of the others, add images of this shape, or use a larger `buckets.step_px`.",
                images,
            )
        })
        .collect()
}
