//! The worker's part of a grid: draws every picture, then the sheet with its labels.

use image::imageops::overlay;
use image::{Rgb, RgbImage};
use tokio::runtime::Runtime;

use super::grid::{GridLora, GridSpec};
use super::reporter::Reporter;
use super::worker::{self, Ending, WorkerParts};
use crate::diffusion::devices;
use crate::diffusion::{LoadOptions, StableDiffusion};
use crate::lettering::{Lettering, wrap};
use crate::networks::LoraNetwork;
use crate::store::runs::{Run, RunFailure};
use crate::training::previews::{Drawing, draw_with};
use crate::training::{Control, Phase, ProgressSink as _, Report, SamplePrompt};

const MARGIN_PX: u32 = 12;
const LABEL_PX: u32 = 220;
const HEADER_PX: u32 = 36;
const LINE_PX: u32 = 22;
const LETTERS_PX: f32 = 18.0;

/// Draws a grid and keeps it.
pub fn draw(
    runtime: &Runtime,
    parts: &WorkerParts,
    run: &Run,
    reporter: &mut Reporter,
) -> Result<(), Ending> {
    let failed = |code: &'static str| move |error: String| RunFailure::new(code, error);
    let spec: GridSpec = serde_json::from_str(&run.spec)
        .map_err(|error| failed("spec_unreadable")(error.to_string()))?;
    let asked = spec.device.parse();
    let asked = asked.map_err(|error| RunFailure::new("device_unusable", error))?;
    let device = devices::open(asked).map_err(|error| RunFailure::new("device_unusable", error))?;
    let noted = format!("{} ({})", device.info.id, device.info.name);
    runtime
        .block_on(parts.store.set_device(run.id, &noted))
        .map_err(worker::store_failed)?;
    device
        .check(spec.precision.into())
        .map_err(|error| RunFailure::new("device_unusable", error))?;
    if !parts.force_devices {
        worker::check_device(&parts.self_checks, &device, reporter)?;
    }
    reporter.report(Report::Phase(Phase::Loading));
    let found = parts.models.find(&spec.base_model_id);
    let found = found.map_err(|error| RunFailure::new("model_unusable", error))?;
    let Some(base) = found else {
        let message = format!("the base model `{}` is no longer there", run.base_model_id);
        return Err(RunFailure::new("model_unusable", message).into());
    };
    let load = LoadOptions {
        precision: spec.precision.into(),
        vae: worker::vae_path(&parts.models, spec.vae_id.as_deref())?,
        ..LoadOptions::new(&device.device)
    };
    let mut model = StableDiffusion::load(&base.path, &load)
        .map_err(|error| RunFailure::new("model_unusable", error))?;
    if let Some(zero_terminal) = spec.zero_terminal_snr {
        model.set_zero_terminal_snr(zero_terminal);
    }
    let how = Drawing {
        clip_skip: spec.clip_skip,
        max_token_length: spec.max_token_length,
        prediction: spec.prediction.unwrap_or(model.prediction),
        device: device.device.clone(),
    };
    reporter.expect_steps(spec.cells() as u64);
    if reporter.report(Report::Phase(Phase::Training)) == Control::Stop {
        return Err(Ending::Stopped);
    }
    let mut pictures: Vec<Vec<RgbImage>> = Vec::new(); // [file][prompt, strength]
    let mut done = 0;
    for lora in &spec.loras {
        let file = parts.store.blobs().path(&lora.sha256);
        let network = LoraNetwork::load(&file, &mut model, &device.device);
        let mut network = network.map_err(|error| RunFailure::new("lora_unusable", error))?;
        let mut row = Vec::new();
        for prompt in &spec.prompts {
            for strength in &spec.strengths {
                network.set_multiplier(*strength);
                network.attach(&mut model, false);
                row.push(draw_with(&model, prompt, &how)?);
                done += 1;
                if reporter.drawn(done) == Control::Stop {
                    return Err(Ending::Stopped);
                }
            }
        }
        network.detach(&mut model);
        pictures.push(row);
    }
    reporter.report(Report::Phase(Phase::Saving));
    let sheet =
        sheet(&spec, &pictures).map_err(|error| RunFailure::new("drawing_failed", error))?;
    let first = &spec.prompts[0];
    let kept = reporter.report(Report::Sample {
        step: done,
        prompt_index: 0,
        prompt: &first.prompt,
        seed: first.seed,
        image: &sheet,
    });
    match kept {
        Control::Continue => Ok(()),
        Control::Stop => Err(Ending::Stopped),
    }
}

/// The sheet: a block for each prompt, in it a row for each file and a column for each strength.
fn sheet(spec: &GridSpec, pictures: &[Vec<RgbImage>]) -> Result<RgbImage, String> {
    let letters = Lettering::new().map_err(|error| error.to_string())?;
    let columns = spec.strengths.len();
    let cell =
        |file: usize, prompt: usize, strength: usize| &pictures[file][prompt * columns + strength];
    let sizes: Vec<(u32, u32)> = (0..spec.prompts.len())
        .map(|prompt| cell(0, prompt, 0).dimensions())
        .collect();
    let widest = sizes.iter().map(|size| size.0).max().unwrap_or(0);
    let column_px = widest.max(64) + MARGIN_PX;
    let width = LABEL_PX + columns as u32 * column_px + MARGIN_PX;
    let titles: Vec<Vec<String>> = spec
        .prompts
        .iter()
        .map(|prompt| wrap(&title(prompt), (width / 9) as usize))
        .collect();
    let row_px = |size: &(u32, u32)| size.1.max(2 * LINE_PX) + MARGIN_PX;
    let blocks = titles.iter().zip(&sizes).map(|(title, size)| {
        title.len() as u32 * LINE_PX + MARGIN_PX + pictures.len() as u32 * row_px(size)
    });
    let height = HEADER_PX + blocks.sum::<u32>() + MARGIN_PX;
    let mut canvas = RgbImage::from_pixel(width, height, Rgb([255, 255, 255]));
    let at = |column: usize| LABEL_PX + column as u32 * column_px;
    for (column, strength) in spec.strengths.iter().enumerate() {
        let words = format!("× {strength}");
        letters.write(&mut canvas, &words, (at(column), MARGIN_PX), LETTERS_PX);
    }
    let mut y = HEADER_PX;
    for (prompt, (title, size)) in titles.iter().zip(&sizes).enumerate() {
        for line in title {
            letters.write(&mut canvas, line, (MARGIN_PX, y), LETTERS_PX);
            y += LINE_PX;
        }
        y += MARGIN_PX;
        for (file, lora) in spec.loras.iter().enumerate() {
            for (line, words) in (0..).zip(label(lora)) {
                letters.write(
                    &mut canvas,
                    &words,
                    (MARGIN_PX, y + line * LINE_PX),
                    LETTERS_PX,
                );
            }
            for column in 0..columns {
                let picture = cell(file, prompt, column);
                overlay(&mut canvas, picture, i64::from(at(column)), i64::from(y));
            }
            y += row_px(size);
        }
    }
    Ok(canvas)
}

fn title(prompt: &SamplePrompt) -> String {
    format!("{} (seed {})", prompt.prompt, prompt.seed)
}

/// Two lines: the step, and as much of the name as there is room for.
fn label(lora: &GridLora) -> [String; 2] {
    let name = lora.file_name.trim_end_matches(".safetensors");
    let name: String = match name.chars().count() {
        0..=24 => name.to_owned(),
        long => {
            let end: String = name.chars().skip(long - 23).collect();
            format!("…{end}")
        }
    };
    [format!("step {}", lora.step), name]
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::training::ComputePrecision;

    #[test]
    fn the_sheet_has_every_picture_at_its_place_and_words_beside_it() {
        let lora = |step| GridLora {
            id: Uuid::nil(),
            file_name: "lumo.safetensors".to_owned(),
            step,
            sha256: String::new(),
        };
        let prompt = SamplePrompt {
            prompt: "lumo".to_owned(),
            ..SamplePrompt::default()
        };
        let spec = GridSpec {
            device: "cpu".to_owned(),
            base_model_id: String::new(),
            vae_id: None,
            zero_terminal_snr: None,
            precision: ComputePrecision::Fp32,
            prediction: None,
            clip_skip: 1,
            max_token_length: 75,
            loras: vec![lora(10), lora(20)],
            prompts: vec![prompt],
            strengths: vec![0.5, 1.0],
        };
        let colour = |file: u8, column: u8| Rgb([50 * (file + 1), 50 * (column + 1), 255]);
        let pictures: Vec<Vec<RgbImage>> = (0..2)
            .map(|file| {
                let of = |column| RgbImage::from_pixel(64, 64, colour(file, column));
                (0..2).map(of).collect()
            })
            .collect();
        let canvas = sheet(&spec, &pictures).expect("a sheet");
        let top = HEADER_PX + LINE_PX + MARGIN_PX;
        for file in 0..2_u8 {
            for column in 0..2_u8 {
                let x = LABEL_PX + u32::from(column) * (64 + MARGIN_PX) + 32;
                let y = top + u32::from(file) * (64 + MARGIN_PX) + 32;
                assert_eq!(*canvas.get_pixel(x, y), colour(file, column));
            }
        }
        let dark = |x: std::ops::Range<u32>, y: std::ops::Range<u32>| {
            let mut all = x.flat_map(|x| y.clone().map(move |y| (x, y)));
            all.any(|(x, y)| canvas.get_pixel(x, y).0.iter().all(|c| *c < 90))
        };
        assert!(dark(LABEL_PX..canvas.width(), 0..HEADER_PX), "strengths");
        assert!(dark(0..LABEL_PX, top..top + 64), "the first file");
    }
}
