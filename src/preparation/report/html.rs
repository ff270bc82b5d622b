//! The report as one page that needs nothing else: style and thumbnails are in it.

use std::collections::HashMap;
use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use uuid::Uuid;

use super::{Finding, FindingImage, Report, Severity};

/// The longest side of a thumbnail.
pub const SIDE_PX: u32 = 128;
/// Thumbnails of a finding, and of the page.
const SHOWN_OF_A_FINDING: usize = 18;
const SHOWN: usize = 400;
/// Findings of a page; the JSON has all.
const FINDINGS: usize = 300;

const STYLE: &str = include_str!("report.css");

/// The images that the page shows, with the digests of their content.
pub fn pictures(report: &Report) -> HashMap<Uuid, String> {
    let mut shown = HashMap::new();
    for image in report.findings.iter().take(FINDINGS).flat_map(shown_of) {
        if shown.len() == SHOWN {
            break;
        }
        shown.insert(image.image_id, image.sha256.clone());
    }
    shown
}

fn shown_of(finding: &Finding) -> impl Iterator<Item = &FindingImage> {
    finding.images.iter().take(SHOWN_OF_A_FINDING)
}

/// The page. `pictures` are JPEGs by the image's id; what is missing is named without.
pub fn page(report: &Report, pictures: &HashMap<Uuid, Vec<u8>>) -> String {
    let name = escaped(&report.dataset);
    let mut page = String::with_capacity(1 << 16);
    page.push_str("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    page.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    if !report.complete {
        page.push_str("<meta http-equiv=\"refresh\" content=\"5\">\n");
    }
    add(
        &mut page,
        format_args!(
            "<title>{name} – before training</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        ),
    );
    head(&mut page, report, &name);
    page.push_str("<main>\n");
    if report.findings.is_empty() {
        let nothing = if report.complete {
            "Nothing speaks against training on these images."
        } else {
            "Nothing so far."
        };
        add(&mut page, format_args!("<p class=\"fine\">{nothing}</p>\n"));
    }
    for finding in report.findings.iter().take(FINDINGS) {
        add_finding(&mut page, finding, pictures);
    }
    if report.findings.len() > FINDINGS {
        let more = report.findings.len() - FINDINGS;
        add(
            &mut page,
            format_args!("<p class=\"more\">… and {more} more findings, in the JSON.</p>\n"),
        );
    }
    buckets(&mut page, report);
    tags(&mut page, report);
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

/// Text cannot refuse to be written to.
fn add(page: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = page.write_fmt(text); // it has nowhere to fail
}

fn head(page: &mut String, report: &Report, name: &str) {
    let of = |severity| {
        report
            .findings
            .iter()
            .filter(|finding| finding.severity == severity)
            .count()
    };
    let size = &report.settings.buckets;
    add(
        page,
        format_args!(
            "<header>\n<p class=\"over\">Before training</p>\n<h1>{name}</h1>\n<p class=\"facts\">{} images, {} of them for \
             regularization · {} × {} pixels{} · batches of {} · captions of {} tokens</p>\n",
            report.images,
            report.reg_images,
            size.width_px,
            size.height_px,
            if size.enabled { ", in buckets" } else { "" },
            report.settings.batch_size,
            report.settings.max_token_length,
        ),
    );
    page.push_str("<ul class=\"counts\">\n");
    for (severity, words) in [
        (Severity::Serious, "serious"),
        (Severity::Warning, "to look at"),
        (Severity::Info, "good to know"),
    ] {
        let found = of(severity);
        let class = if found == 0 { "none" } else { word(severity) };
        add(
            page,
            format_args!("<li class=\"{class}\"><b>{found}</b> {words}</li>\n"),
        );
    }
    page.push_str("</ul>\n");
    if !report.complete {
        add(
            page,
            format_args!(
                "<p class=\"pending\">{} of {} images are measured. This page loads again by itself.</p>\n",
                report.measured_images, report.images
            ),
        );
    }
    page.push_str("</header>\n");
}

fn word(severity: Severity) -> &'static str {
    match severity {
        Severity::Serious => "serious",
        Severity::Warning => "warning",
        Severity::Info => "info",
    }
}

fn add_finding(page: &mut String, finding: &Finding, pictures: &HashMap<Uuid, Vec<u8>>) {
    let class = word(finding.severity);
    let title = finding.code.as_str().replace('_', " ");
    add(
        page,
        format_args!(
            "<section class=\"finding {class}\">\n<h2>{title}</h2>\n<p>{}</p>\n<p class=\"advice\">{}</p>\n",
            marked(&finding.message),
            marked(&finding.advice)
        ),
    );
    if !finding.images.is_empty() {
        page.push_str("<ul class=\"images\">\n");
        for image in shown_of(finding) {
            add_image(page, image, pictures);
        }
        let shown = finding.images.len().min(SHOWN_OF_A_FINDING) as u64;
        let more = finding.image_count.saturating_sub(shown);
        if more > 0 {
            add(
                page,
                format_args!("<li class=\"more\">and {more} more</li>\n"),
            );
        }
        page.push_str("</ul>\n");
    }
    page.push_str("</section>\n");
}

fn add_image(page: &mut String, image: &FindingImage, pictures: &HashMap<Uuid, Vec<u8>>) {
    let name = escaped(&image.file_name);
    page.push_str("<li><figure>");
    match pictures.get(&image.image_id) {
        Some(jpeg) => {
            let data = STANDARD.encode(jpeg);
            add(
                page,
                format_args!("<img alt=\"\" src=\"data:image/jpeg;base64,{data}\">"),
            );
        }
        None => page.push_str("<div class=\"blank\"></div>"),
    }
    let subset = escaped(&image.subset);
    add(
        page,
        format_args!("<figcaption><span title=\"{subset}/{name}\">{name}</span>"),
    );
    if let Some(detail) = &image.detail {
        add(page, format_args!("<small>{}</small>", escaped(detail)));
    }
    page.push_str("</figcaption></figure></li>\n");
}

fn buckets(page: &mut String, report: &Report) {
    let Some(most) = report
        .buckets
        .iter()
        .map(|bucket| bucket.images_per_epoch)
        .max()
    else {
        return;
    };
    page.push_str("<section class=\"plain\">\n<h2>Buckets</h2>\n<table>\n<tr><th>size</th><th>images</th><th>in an epoch</th><th></th></tr>\n");
    for bucket in &report.buckets {
        let share = 100.0 * bucket.images_per_epoch as f64 / most.max(1) as f64;
        let class = if bucket.lonely {
            " class=\"lonely\""
        } else {
            ""
        };
        add(
            page,
            format_args!(
                "<tr{class}><td>{} × {}</td><td>{}</td><td>{}</td><td class=\"bar\"><i style=\"width:{share:.1}%\"></i></td></tr>\n",
                bucket.width_px, bucket.height_px, bucket.images, bucket.images_per_epoch
            ),
        );
    }
    page.push_str("</table>\n</section>\n");
}

fn tags(page: &mut String, report: &Report) {
    if report.tags.is_empty() {
        return;
    }
    page.push_str("<section class=\"plain\">\n<h2>Tags</h2>\n<ul class=\"tags\">\n");
    for tag in &report.tags {
        add(
            page,
            format_args!("<li>{} <b>{}</b></li>\n", escaped(&tag.tag), tag.images),
        );
    }
    page.push_str("</ul>\n</section>\n");
}

/// Text that means nothing to a browser.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c if c.is_control() => safe.push(' '),
            c => safe.push(c),
        }
    }
    safe
}

/// The same, with what stands between backticks as code.
fn marked(text: &str) -> String {
    let parts: Vec<&str> = text.split('`').collect();
    let whole = parts.len() % 2 == 1;
    let mut marked = String::with_capacity(text.len());
    for (index, part) in parts.into_iter().enumerate() {
        if whole && index % 2 == 1 {
            add(&mut marked, format_args!("<code>{}</code>", escaped(part)));
        } else {
            marked.push_str(&escaped(part));
        }
    }
    marked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_name_is_markup() {
        assert_eq!(
            escaped("<b a=\"1\">&'\n"),
            "&lt;b a=&quot;1&quot;&gt;&amp;&#39; "
        );
        assert_eq!(marked("`<i>` is on 3"), "<code>&lt;i&gt;</code> is on 3");
        assert_eq!(marked("one ` alone"), "one  alone");
    }
}
