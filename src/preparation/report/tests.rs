//! Hand-made datasets, one for each finding.

use image::{Rgb, RgbImage};
use time::OffsetDateTime;

use super::*;
use crate::preparation::Measures;
use crate::store::datasets::SubsetTraining;

struct Maker(ReportInput);

fn picture(seed: u32) -> RgbImage {
    RgbImage::from_fn(96, 96, |x, y| {
        let cell = (x / 12 + 1) * (y / 12 + 3) * (seed * 7919 + 31);
        Rgb([
            (cell % 251) as u8,
            (cell % 241) as u8,
            (cell / 3 % 239) as u8,
        ])
    })
}

impl Maker {
    fn new() -> Self {
        Self(ReportInput {
            dataset: Dataset {
                id: Uuid::now_v7(),
                name: "a <set>".to_owned(),
                color_correction: None,
                revision: 1,
                created_at: OffsetDateTime::UNIX_EPOCH,
                updated_at: OffsetDateTime::UNIX_EPOCH,
            },
            rows: Vec::new(),
            measured: HashMap::new(),
            settings: ReportSettings {
                buckets: BucketSettings::default(),
                batch_size: 1,
                max_token_length: 75,
                kind: None,
            },
        })
    }

    /// Twelve images that nothing is wrong with.
    fn fine() -> Self {
        let mut maker = Self::new();
        for index in 0..12 {
            let caption = format!("lumo, scene {index}");
            maker.add(
                "10_lumo",
                false,
                Some(&caption),
                (512, 512),
                &picture(index),
            );
        }
        maker
    }

    fn add(
        &mut self,
        subset: &str,
        is_reg: bool,
        caption: Option<&str>,
        size: (u32, u32),
        looks: &RgbImage,
    ) -> &mut Self {
        let sha256 = format!("{:064x}", self.0.rows.len());
        let measures = Measures::of(looks);
        self.0
            .measured
            .insert(sha256.clone(), Measured::Whole(Box::new(measures)));
        let image = Image {
            id: Uuid::now_v7(),
            dataset_id: self.0.dataset.id,
            subset_id: Uuid::nil(),
            subset_name: subset.to_owned(),
            file_name: format!("{}.png", self.0.rows.len()),
            sha256,
            media_type: "image/png".to_owned(),
            size_bytes: 1,
            width_px: size.0,
            height_px: size.1,
            caption: caption.map(str::to_owned),
            color_correction: None,
            has_alpha: false,
            mask_sha256: None,
            background: None,
            revision: 1,
            created_at: OffsetDateTime::UNIX_EPOCH,
            updated_at: OffsetDateTime::UNIX_EPOCH,
        };
        let subset = Subset {
            id: Uuid::nil(),
            dataset_id: self.0.dataset.id,
            name: subset.to_owned(),
            repeats: 2,
            is_reg,
            instance_prompt: (!is_reg && subset == "10_lumo").then(|| "lumo".to_owned()),
            class_prompt: None,
            training: SubsetTraining::default(),
            revision: 1,
            created_at: OffsetDateTime::UNIX_EPOCH,
        };
        self.0.rows.push((image, subset));
        self
    }

    /// Codes with the file names of their images, but for those of a set without fault.
    fn findings(&self) -> Vec<(FindingCode, Vec<String>)> {
        let report = build(&self.0);
        let told = report.findings.into_iter().map(|finding| {
            let names = finding.images.into_iter().map(|image| image.file_name);
            (finding.code, names.collect())
        });
        told.collect()
    }
}

fn finding(code: FindingCode, images: &[&str]) -> (FindingCode, Vec<String>) {
    (code, images.iter().map(|name| (*name).to_owned()).collect())
}

#[test]
fn a_set_without_fault_has_no_findings() {
    assert_eq!(Maker::fine().findings(), []);
}

#[test]
fn blur_and_exposure_are_found() {
    let mut maker = Maker::fine();
    let blurred = image::imageops::blur(&picture(77), 9.0);
    let lift = |scale: f32, offset: f32| {
        let mut changed = picture(50 + scale as u32);
        for value in changed.iter_mut() {
            *value = (f32::from(*value) * scale + offset) as u8;
        }
        changed
    };
    maker.add("10_lumo", false, Some("lumo, a"), (512, 512), &blurred);
    maker.add(
        "10_lumo",
        false,
        Some("lumo, b"),
        (512, 512),
        &lift(0.25, 0.0),
    );
    maker.add(
        "10_lumo",
        false,
        Some("lumo, c"),
        (512, 512),
        &lift(0.25, 191.0),
    );
    let found = maker.findings();
    for expected in [
        finding(FindingCode::Blurred, &["12.png"]),
        finding(FindingCode::Underexposed, &["13.png"]),
        finding(FindingCode::Overexposed, &["14.png"]),
    ] {
        assert!(found.contains(&expected), "{expected:?} in {found:?}");
    }
}

#[test]
fn duplicates_are_found() {
    let mut maker = Maker::fine();
    maker.add("10_lumo", false, Some("lumo, a"), (512, 512), &picture(3));
    assert_eq!(
        maker.findings(),
        [finding(FindingCode::NearDuplicates, &["3.png", "12.png"])]
    );
    maker.add("lumo_reg", true, Some("a robot"), (512, 512), &picture(99));
    let subject = maker.0.rows[0].0.sha256.clone();
    maker.0.rows[13].0.sha256 = subject;
    let found = maker.findings();
    assert!(
        found.contains(&finding(FindingCode::ExactDuplicates, &["0.png", "13.png"])),
        "{found:?}"
    );
}

#[test]
fn small_cut_and_lonely_pictures_are_found() {
    let mut maker = Maker::fine();
    maker.add("10_lumo", false, Some("lumo, a"), (128, 128), &picture(60));
    maker.add("10_lumo", false, Some("lumo, b"), (4096, 512), &picture(61));
    let found = maker.findings();
    for expected in [
        finding(FindingCode::BelowResolution, &["12.png"]),
        finding(FindingCode::CropLoss, &["13.png"]),
        finding(FindingCode::LonelyBucket, &["13.png"]),
    ] {
        assert!(found.contains(&expected), "{expected:?} in {found:?}");
    }
    // A batch of 8 is not filled by two showings.
    maker.0.settings.batch_size = 8;
    let report = build(&maker.0);
    let lonely = report
        .findings
        .iter()
        .find(|finding| finding.code == FindingCode::LonelyBucket);
    assert_eq!(
        lonely.map(|finding| finding.severity),
        Some(Severity::Warning)
    );
    let widths: Vec<_> = report
        .buckets
        .iter()
        .map(|bucket| (bucket.width_px, bucket.images, bucket.lonely))
        .collect();
    assert_eq!(widths, [(512, 13, false), (1024, 1, true)]);
}

#[test]
fn captions_are_looked_at() {
    let mut maker = Maker::fine();
    maker.add("10_lumo", false, None, (512, 512), &picture(60));
    maker.add("10_lumo", false, Some("a robot"), (512, 512), &picture(61));
    let long = format!("lumo, {}", "cat ".repeat(90));
    maker.add("10_lumo", false, Some(&long), (512, 512), &picture(62));
    maker.add(
        "lumo_reg",
        true,
        Some("a robot like Lumo"),
        (512, 512),
        &picture(63),
    );
    maker.add("lumo_reg", true, None, (512, 512), &picture(64));
    let found = maker.findings();
    assert_eq!(
        found,
        [
            finding(FindingCode::CaptionMissing, &["16.png"]),
            finding(FindingCode::InstancePromptInRegularization, &["15.png"]),
            finding(FindingCode::CaptionMissing, &["12.png"]),
            finding(FindingCode::CaptionTooLong, &["14.png"]),
            finding(FindingCode::InstancePromptMissing, &["13.png"]),
        ]
    );
}

#[test]
fn tags_that_always_come_together_are_found() {
    let mut maker = Maker::new();
    for index in 0..12 {
        let hat = if index < 6 {
            ", red hat, long scarf"
        } else {
            ""
        };
        let caption = format!("lumo, scene {index}, white background{hat}");
        maker.add(
            "10_lumo",
            false,
            Some(&caption),
            (512, 512),
            &picture(index),
        );
    }
    let report = build(&maker.0);
    let told: Vec<_> = report
        .findings
        .iter()
        .map(|finding| (finding.code, finding.message.as_str()))
        .collect();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(
        told[0].0 == FindingCode::TagBakedIn
            && told[0].1.contains("`white background` is on 12 of 12")
    );
    assert!(
        told[1].0 == FindingCode::TagsInseparable
            && told[1].1.contains("`long scarf` and `red hat`")
    );
    assert_eq!(
        report.tags[0],
        TagUse {
            tag: "lumo".to_owned(),
            images: 12
        }
    );
}

#[test]
fn numbers_of_images_are_judged_by_what_is_to_be_learned() {
    let codes = |maker: &Maker| -> Vec<_> {
        build(&maker.0)
            .findings
            .iter()
            .map(|finding| finding.code)
            .collect()
    };
    let mut maker = Maker::fine();
    maker.0.settings.kind = Some(Subject::Style);
    assert_eq!(codes(&maker), [FindingCode::TooFewImages]);
    maker.0.rows.truncate(3);
    maker.0.settings.kind = None;
    assert_eq!(codes(&maker), [FindingCode::TooFewImages]);
    maker.0.rows.clear();
    assert_eq!(codes(&maker), [FindingCode::NoImages]);
}

#[test]
fn a_picture_that_was_not_measured_makes_the_report_incomplete_and_a_broken_one_is_told() {
    let mut maker = Maker::fine();
    let sha256 = maker.0.rows[4].0.sha256.clone();
    maker
        .0
        .measured
        .insert(sha256.clone(), Measured::Unreadable("no".to_owned()));
    assert_eq!(
        maker.findings(),
        [finding(FindingCode::Unreadable, &["4.png"])]
    );
    maker.0.measured.remove(&sha256);
    let report = build(&maker.0);
    assert_eq!(
        (report.complete, report.measured_images, report.images),
        (false, 11, 12)
    );
    let page = html::page(&report, &HashMap::new());
    assert!(page.contains("a &lt;set&gt;") && page.contains("http-equiv=\"refresh\""));
}
