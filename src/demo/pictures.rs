//! The demo's pictures: a sheet of samples before and after training, and the loss curve.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use epaint_default_fonts::UBUNTU_LIGHT;
use image::imageops::{FilterType, overlay, resize};
use image::{Rgb, RgbImage};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::lettering::{Lettering, wrap};

/// One line of the sheet: a prompt and the pictures that the model drew for it.
pub struct SheetRow {
    /// The prompt.
    pub prompt: String,
    /// Drawn by the base model.
    pub before: RgbImage,
    /// Drawn with the trained LoRA, from the same noise.
    pub after: RgbImage,
}

const CELL_PX: u32 = 192;
const MARGIN_PX: u32 = 16;
const LABEL_PX: u32 = 300;
const HEADER_PX: u32 = 40;

/// Draws the sheet: one row a prompt, columns *before* and *after*.
///
/// # Errors
/// When the built-in font cannot be read.
pub fn sheet(rows: &[SheetRow]) -> Result<RgbImage> {
    let count = u32::try_from(rows.len())?;
    let width = LABEL_PX + 2 * (CELL_PX + MARGIN_PX) + MARGIN_PX;
    let height = HEADER_PX + count * (CELL_PX + MARGIN_PX);
    let mut canvas = RgbImage::from_pixel(width, height, Rgb([255, 255, 255]));
    let letters = Lettering::new().context("the built-in font")?;
    let columns = [LABEL_PX, LABEL_PX + CELL_PX + MARGIN_PX];
    for (x, title) in columns.into_iter().zip(["before", "after"]) {
        letters.write(&mut canvas, title, (x, 10), 24.0);
    }
    for (index, row) in (0..).zip(rows) {
        let y = HEADER_PX + index * (CELL_PX + MARGIN_PX);
        for (line, words) in (0..).zip(wrap(&row.prompt, 28)) {
            letters.write(&mut canvas, &words, (MARGIN_PX, y + 70 + line * 26), 20.0);
        }
        for (x, picture) in columns.into_iter().zip([&row.before, &row.after]) {
            // Samples may be small: whole pixels stay visible, nothing is smoothed over.
            let cell = resize(picture, CELL_PX, CELL_PX, FilterType::Nearest);
            overlay(&mut canvas, &cell, i64::from(x), i64::from(y));
        }
    }
    Ok(canvas)
}

/// The curves of a run, each a list of `(step, value)`.
pub struct Curves<'a> {
    /// Loss of every optimizer step.
    pub loss: &'a [(f64, f64)],
    /// Its moving average.
    pub average: &'a [(f64, f64)],
    /// Loss on held-out pictures at fixed noise.
    pub validation: &'a [(f64, f64)],
}

/// Draws the loss curves into a PNG file.
///
/// # Errors
/// When there is nothing to draw or the file cannot be written.
pub fn loss_plot(curves: &Curves<'_>, file: &Path) -> Result<()> {
    const SIZE: (u32, u32) = (960, 540);
    register_font("sans-serif", FontStyle::Normal, UBUNTU_LIGHT)
        .map_err(|_| anyhow!("the built-in font cannot be read"))?;
    let all = || curves.loss.iter().chain(curves.validation);
    let last_step = all().map(|point| point.0).fold(1.0, f64::max);
    let highest = all().map(|point| point.1).fold(0.0, f64::max);
    if !highest.is_finite() || highest <= 0.0 {
        return Err(anyhow!("no losses to draw"));
    }
    let mut pixels = vec![255_u8; (SIZE.0 * SIZE.1 * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..last_step, 0.0..highest * 1.05)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("loss")
            .light_line_style(WHITE)
            .draw()?;
        let series = [
            ("training", RGBColor(200, 210, 225), 1, curves.loss),
            (
                "training, moving average",
                RGBColor(40, 90, 180),
                2,
                curves.average,
            ),
            (
                "held-out pictures",
                RGBColor(210, 80, 30),
                3,
                curves.validation,
            ),
        ];
        for (name, color, stroke, points) in series {
            let style = color.stroke_width(stroke);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), style))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE)
            .border_style(RGBColor(200, 200, 200))
            .draw()?;
        area.present()?;
    }
    RgbImage::from_raw(SIZE.0, SIZE.1, pixels)
        .context("picture size")?
        .save(file)
        .with_context(|| format!("writing {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sheet_shows_both_pictures_of_each_row() {
        let (red, blue) = (Rgb([255, 0, 0]), Rgb([0, 0, 255]));
        let rows = [SheetRow {
            prompt: "a red circle, white background".to_owned(),
            before: RgbImage::from_pixel(8, 8, red),
            after: RgbImage::from_pixel(8, 8, blue),
        }];
        let canvas = sheet(&rows).unwrap();
        let y = HEADER_PX + CELL_PX / 2;
        assert_eq!(*canvas.get_pixel(LABEL_PX + 5, y), red);
        assert_eq!(
            *canvas.get_pixel(LABEL_PX + CELL_PX + MARGIN_PX + 5, y),
            blue
        );
        assert!(
            canvas.pixels().any(|pixel| pixel.0.iter().all(|c| *c < 60)),
            "the prompt is written in dark ink"
        );
    }

    #[test]
    fn a_plot_needs_losses() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("loss.png");
        let empty = Curves {
            loss: &[],
            average: &[],
            validation: &[],
        };
        assert!(loss_plot(&empty, &file).is_err());
        let points = [(0.0, 0.12), (10.0, 0.05)];
        let curves = Curves {
            loss: &points,
            average: &points,
            validation: &points,
        };
        loss_plot(&curves, &file).unwrap();
        assert!(image::open(&file).unwrap().width() == 960);
    }
}
