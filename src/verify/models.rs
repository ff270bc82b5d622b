//! Tokens, text encoder, VAE, UNet and noise schedule.

use burn::tensor::Tensor;

use super::VerifyError;
use super::goldens::{GoldenFile, Goldens};
use super::objectives;
use super::report::Checker;
use crate::diffusion::conditioning::TextEncoders;
use crate::diffusion::devices::{AdapterClass, DeviceInfo};
use crate::diffusion::{
    CaptionTokens, Condition, Family, NoiseSchedule, Padding, Precision, PredictionType,
    StableDiffusion, TextStates, TimeIds, Tokenizer,
};

/// Absolute, on outputs of up to about 4. The reference's own error in f32 is 2e-6 to 4e-6.
pub const OUTPUT_TOLERANCE: f64 = 2e-5;

/// The same for a precision. Devices other than the CPU round the values behind every layer, to f16.
pub fn output_tolerance(precision: Precision, device: &DeviceInfo) -> f64 {
    match precision {
        Precision::Fp32 => OUTPUT_TOLERANCE,
        Precision::Fp16 if device.class == AdapterClass::Cpu => 1e-3,
        Precision::Fp16 => 3e-2,
        Precision::Bf16 => 1e-1,
    }
}

/// Relative, on what is one division or root away from the schedule: a few units in the last place of f32.
const WEIGHT_TOLERANCE: f64 = 1e-6;

/// Compares the parts of the model one by one.
pub fn check(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    model: &StableDiffusion,
    quick: bool,
) -> Result<(), VerifyError> {
    tokens(check, goldens, model)?;
    vae(check, goldens, model, quick)?;
    networks(check, goldens, model, OUTPUT_TOLERANCE, quick)?;
    schedule(check, goldens, &model.schedule)
}

/// Compares the parts that know lower precisions.
pub fn networks(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    model: &StableDiffusion,
    tolerance: f64,
    quick: bool,
) -> Result<(), VerifyError> {
    text_encoder(check, goldens, model, tolerance, quick)?;
    unet(check, goldens, model, tolerance, quick)
}

/// The three ways to pad, each at three lengths; then the tokenizers that the model itself has, which pad as sd-scripts
/// pads for its family.
fn tokens(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    model: &StableDiffusion,
) -> Result<(), VerifyError> {
    let Some(file) = goldens.file("tokens")? else {
        return Ok(());
    };
    let captions = goldens.captions()?;
    for (name, padding) in [
        ("tokenizer", Padding::End),
        ("tokenizer_2", Padding::Declared('!', 0)),
        ("tokenizer_2_kohya", Padding::Id(0)),
    ] {
        let tokenizer = model.tokenizer.clone().with_padding(padding);
        for length in [77, 152, 227] {
            let key = format!("{name}.ids_{length}");
            if !file.has(&key) {
                continue;
            }
            let ours: Vec<Vec<u32>> = captions
                .iter()
                .flat_map(|caption| tokenizer.chunks(caption, length))
                .collect();
            check.equal(
                &format!("tokens {key}"),
                &ours.concat(),
                &file.rows(&key)?.concat(),
            );
        }
    }
    let first = match model.family {
        Family::Sd1 | Family::Sdxl => "tokenizer",
        Family::Sd2 => "tokenizer_2",
    };
    let mut own: Vec<(&str, &Tokenizer)> = vec![(first, &model.tokenizer)];
    let second = model.tokenizer_2.as_ref();
    own.extend(second.map(|second| ("tokenizer_2_kohya", second)));
    for (place, (name, tokenizer)) in own.into_iter().enumerate() {
        let key = format!("{name}.ids_152");
        if file.has(&key) {
            let rows = captions
                .iter()
                .flat_map(|caption| tokenizer.chunks(caption, 152));
            let ours: Vec<Vec<u32>> = rows.collect();
            let label = format!("tokens of the model's tokenizer {}", place + 1);
            check.equal(&label, &ours.concat(), &file.rows(&key)?.concat());
        }
    }
    Ok(())
}

fn text_encoder(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    model: &StableDiffusion,
    tolerance: f64,
    quick: bool,
) -> Result<(), VerifyError> {
    let Some(file) = goldens.file("text_encoder")? else {
        return Ok(());
    };
    let text = model.text()?;
    if text.second.is_some() {
        return two_text_encoders(check, &file, text, tolerance, quick);
    }
    let (encoder, ids) = (&text.first, file.rows("input_ids")?);
    let key = "last_hidden_state";
    let name = "text encoder, last layer";
    check.tensor(name, encoder.forward(&ids, 1), &file, key, tolerance)?;
    if quick {
        return Ok(());
    }
    let (name, raw) = (
        "text encoder, penultimate layer, raw",
        encoder.hidden_state_raw(&ids, 2),
    );
    check.tensor(name, raw, &file, "penultimate_raw", tolerance)?;
    let name = "text encoder, penultimate layer, final norm";
    check.tensor(
        name,
        encoder.forward(&ids, 2),
        &file,
        "clip_skip_2",
        tolerance,
    )?;
    let captions = goldens.captions()?;
    for (index, caption) in captions.iter().enumerate() {
        let key = format!("joined_227_caption{index}");
        if file.has(&key) {
            let chunks = model.tokenizer.chunks(caption, 227);
            let states = encoder.encode_chunks(&[chunks], 1);
            let name = format!("text encoder, 227 tokens, caption {index}");
            check.tensor(&name, states, &file, &key, tolerance)?;
        }
    }
    Ok(())
}

/// SDXL's: the states of both encoders, and what they condition the UNet with together.
fn two_text_encoders(
    check: &mut Checker<'_>,
    file: &GoldenFile,
    text: &TextEncoders,
    tolerance: f64,
    quick: bool,
) -> Result<(), VerifyError> {
    let (first, second) = (file.rows("input_ids_1")?, file.rows("input_ids_2")?);
    let pairs = first.iter().zip(&second);
    let captions: Vec<CaptionTokens> = pairs
        .map(|(first, second)| CaptionTokens {
            first: vec![first.clone()],
            second: vec![second.clone()],
        })
        .collect();
    let encoded = text.encode(&captions, 1);
    let name = "text encoders, context";
    check.tensor(name, encoded.states, file, "context", tolerance)?;
    if let Some(pooled) = encoded.pooled {
        check.tensor("text encoders, pooled", pooled, file, "pooled", tolerance)?;
    }
    if quick {
        return Ok(());
    }
    let encoders = [Some(&text.first), text.second.as_ref()]
        .into_iter()
        .flatten();
    for ((number, encoder), ids) in (1..).zip(encoders).zip([&first, &second]) {
        let (last, raw) = (encoder.forward(ids, 1), encoder.hidden_state_raw(ids, 2));
        let name = format!("text encoder {number}, last layer");
        let key = format!("te{number}_last_after_ln");
        check.tensor(&name, last, file, &key, tolerance)?;
        let name = format!("text encoder {number}, penultimate layer, raw");
        let key = format!("te{number}_penultimate_no_ln");
        check.tensor(&name, raw, file, &key, tolerance)?;
    }
    Ok(())
}

fn vae(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    model: &StableDiffusion,
    quick: bool,
) -> Result<(), VerifyError> {
    let Some(file) = goldens.file("vae")? else {
        return Ok(());
    };
    let vae = model.vae()?;
    let scale = vae.scaling_factor();
    let moments = vae.encode(file.tensor("image")?);
    let eps = file.has("eps").then(|| file.tensor("eps")).transpose()?;
    let sampled = eps.map(|eps| moments.sample(eps).mul_scalar(scale));
    check.tensor(
        "vae, mean",
        moments.mean,
        &file,
        "moments_mean",
        OUTPUT_TOLERANCE,
    )?;
    check.tensor(
        "vae, logvar",
        moments.logvar,
        &file,
        "moments_logvar",
        OUTPUT_TOLERANCE,
    )?;
    if let Some(sampled) = sampled {
        check.tensor(
            "vae, sampled latent",
            sampled,
            &file,
            "sampled_scaled",
            OUTPUT_TOLERANCE,
        )?;
    }
    if quick {
        return Ok(());
    }
    if file.has("image_rect") {
        let moments = vae.encode(file.tensor("image_rect")?);
        check.tensor(
            "vae, mean, rectangle",
            moments.mean,
            &file,
            "rect_mean",
            OUTPUT_TOLERANCE,
        )?;
        let name = "vae, logvar, rectangle";
        check.tensor(name, moments.logvar, &file, "rect_logvar", OUTPUT_TOLERANCE)?;
    }
    let latent: Tensor<4> = file.tensor("latent_in")?;
    let decoded = vae.decode(latent.div_scalar(scale));
    check.tensor("vae, decoded", decoded, &file, "decoded", OUTPUT_TOLERANCE)?;
    Ok(())
}

fn unet(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    model: &StableDiffusion,
    tolerance: f64,
    quick: bool,
) -> Result<(), VerifyError> {
    let Some(file) = goldens.file("unet")? else {
        return Ok(());
    };
    for key in file.keys().filter(|key| key.starts_with("pred_")) {
        if quick && key != "pred_t500" {
            continue;
        }
        let times: Vec<f32> = key.split('_').filter_map(timestep).collect();
        let (sample, context): (Tensor<4>, Tensor<3>) = if key.contains("_rect_") {
            (file.tensor("sample_rect")?, file.tensor("context_152")?)
        } else {
            (file.tensor("sample")?, file.tensor("context")?)
        };
        let batch = sample.dims()[0];
        let times = if times.len() == 1 {
            vec![times[0]; batch]
        } else {
            times
        };
        if times.len() != batch {
            check.skip(format!(
                "unet `{key}`: its name does not tell {batch} timesteps"
            ));
            continue;
        }
        let predicted = model.unet.forward(sample, &times, told(&file, context)?);
        let name = format!("unet, {}", key.trim_start_matches("pred_"));
        check.tensor(&name, predicted, &file, key, tolerance)?;
    }
    Ok(())
}

/// States with the pooled text and the sizes, where a file has them.
pub fn told(file: &GoldenFile, states: Tensor<3>) -> Result<Condition, VerifyError> {
    let pooled = file.has("pooled").then(|| file.tensor("pooled"));
    let states = TextStates {
        states,
        pooled: pooled.transpose()?,
    };
    Ok(states.with_sizes(&time_ids(file, "time_ids")?))
}

/// Rows of six sizes; none where a file has none.
pub fn time_ids(file: &GoldenFile, key: &str) -> Result<Vec<TimeIds>, VerifyError> {
    if !file.has(key) {
        return Ok(Vec::new());
    }
    let values: Vec<f32> = file.values(key)?.iter().map(|&id| id as f32).collect();
    Ok(values.as_chunks().0.to_vec())
}

/// The timestep in a part of a key: 500 in `t500`.
fn timestep(part: &str) -> Option<f32> {
    part.strip_prefix('t')?.parse().ok()
}

fn schedule(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    schedule: &NoiseSchedule,
) -> Result<(), VerifyError> {
    let Some(file) = goldens.file("scheduler")? else {
        return Ok(());
    };
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().copied().map(f64::from).collect() };
    let exact = [
        ("betas", wide(&schedule.betas), 0.0),
        ("alphas_cumprod", wide(&schedule.alphas_cumprod), 0.0),
        // Ratios of rounded numbers are multiplied up again: the last bits are noise.
        (
            "alphas_cumprod_zero_terminal_snr",
            wide(&schedule.zero_terminal().alphas_cumprod),
            1e-6,
        ),
    ];
    for (key, ours, tolerance) in exact {
        check.numbers(
            &format!("schedule, {key}"),
            &ours,
            file.values(key)?,
            tolerance,
        );
    }
    let all: Vec<f64> = (0..schedule.len()).map(|t| schedule.snr(t)).collect();
    check.relative(
        "schedule, snr",
        &all,
        file.values("all_snr")?,
        WEIGHT_TOLERANCE,
    );
    weights(check, &file, schedule)?;

    let timesteps = file.timesteps("timesteps")?;
    let (latents, noise): (Tensor<4>, Tensor<4>) = (file.tensor("x0")?, file.tensor("noise")?);
    let noisy = schedule.add_noise(latents.clone(), noise.clone(), &timesteps);
    check.tensor(
        "schedule, add_noise",
        noisy,
        &file,
        "add_noise",
        OUTPUT_TOLERANCE,
    )?;
    let velocity = schedule.velocity(latents, noise, &timesteps);
    check.tensor(
        "schedule, velocity",
        velocity,
        &file,
        "velocity",
        OUTPUT_TOLERANCE,
    )?;
    objectives::thresholds(check, &file, schedule, WEIGHT_TOLERANCE)
}

fn weights(
    check: &mut Checker<'_>,
    file: &GoldenFile,
    schedule: &NoiseSchedule,
) -> Result<(), VerifyError> {
    use PredictionType::{Epsilon, VPrediction};
    let timesteps = file.timesteps("timesteps")?;
    let mut compare = |key: &str, weight: &dyn Fn(usize) -> f64| -> Result<(), VerifyError> {
        if file.has(key) {
            let ours: Vec<f64> = timesteps.iter().map(|&t| weight(t)).collect();
            check.relative(
                &format!("schedule, {key}"),
                &ours,
                file.values(key)?,
                WEIGHT_TOLERANCE,
            );
        }
        Ok(())
    };
    for gamma in [1.0, 5.0] {
        compare(&format!("min_snr_{gamma}_eps"), &|t| {
            schedule.min_snr_weight(t, gamma, Epsilon)
        })?;
        compare(&format!("min_snr_{gamma}_v"), &|t| {
            schedule.min_snr_weight(t, gamma, VPrediction)
        })?;
    }
    compare("debiased_eps", &|t| schedule.debiased_weight(t, Epsilon))?;
    compare("debiased_v", &|t| schedule.debiased_weight(t, VPrediction))?;
    compare("scale_v_like_noise", &|t| {
        schedule.velocity_as_noise_weight(t)
    })
}
