//! Samplers with classifier-free guidance, with and without the LoRA of the first trajectory, and the LoRA itself.

use burn::tensor::Tensor;

use super::VerifyError;
use super::goldens::{GoldenFile, Goldens};
use super::models::{OUTPUT_TOLERANCE, time_ids, told};
use super::report::Checker;
use crate::diffusion::layers::LayerMut;
use crate::diffusion::samplers::{Guidance, Sampler, SamplerKind, sample};
use crate::diffusion::{Condition, Family, StableDiffusion, TextStates};
use crate::networks::LoraNetwork;

/// Guidance of the goldens; 5 for SDXL.
const CFG_SCALE: f64 = 7.5;
/// The largest difference of a latent within five steps. The guidance multiplies the UNet's error and early noise
/// levels divide by a small signal, so rounding shows: the reference in f32 is off from itself in f64 by 8e-5 (DDIM),
/// 6e-5 (Euler) and 2.4e-3 (DDIM as sd-scripts uses it: clipping on the edge), and from itself on another CPU by
/// 1e-4, 9e-5 and 4.3e-3. Allowed is twice the one; for the clipped sampler the sum of both, since two runs in f32
/// may be off to either side (ours: 3.1e-3 in vector registers, 5.0e-3 on a matrix unit).
///
/// SDXL's goldens clip at values of up to 18: there the reference is off from itself by 6.8e-2 (f64) and 1.7e-1
/// (another CPU), ours by 4.5e-2. The other two samplers are off from themselves in f64 by 1.5e-4 and 1.2e-4, on
/// another CPU by 1.6e-4 and 1e-4; allowed is twice the first here, too (ours: 1.5e-4 and 2.8e-4).
fn tolerance(kind: SamplerKind, family: Family) -> f64 {
    match (kind, family) {
        (SamplerKind::DdimSd15 | SamplerKind::Euler, Family::Sd1 | Family::Sd2) => 2e-4,
        (SamplerKind::DdimSd15 | SamplerKind::Euler, Family::Sdxl) => 3e-4,
        (SamplerKind::DdimKohya, Family::Sd1 | Family::Sd2) => 6.7e-3,
        (SamplerKind::DdimKohya, Family::Sdxl) => 2.4e-1,
    }
}

/// Compares trajectories, step by step, and the decoded picture.
pub fn check(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    model: &mut StableDiffusion,
) -> Result<(), VerifyError> {
    let Some(file) = goldens.file("sample")? else {
        return Ok(());
    };
    // The pictures were drawn with the first of the trainings.
    let trained = ["train_eps_lora_final", "train_v_lora_final"];
    let mut files = trained
        .map(|name| goldens.path(&format!("{name}.safetensors")))
        .into_iter();
    let Some(lora_file) = files.find(|file| file.is_file()) else {
        check.skip("sampling: the goldens have no trained LoRA".to_owned());
        return Ok(());
    };
    let device = file.tensor::<4>("noise")?.device();
    for lora in [false, true] {
        if lora {
            let network = LoraNetwork::load(&lora_file, model, &device)?;
            network.attach(model, false);
            adapters(check, goldens, &file, &network, model)?;
        }
        let name = if lora { "lora" } else { "base" };
        let guidance = states(check, &file, model, name)?;
        for kind in SamplerKind::ALL {
            trajectory(check, &file, model, kind, name, &guidance)?;
        }
    }
    Ok(())
}

/// The prompt is the first caption, the negative prompt the second, which is empty.
fn states(
    check: &mut Checker<'_>,
    file: &GoldenFile,
    model: &StableDiffusion,
    name: &str,
) -> Result<Guidance, VerifyError> {
    let ids = time_ids(file, "time_ids")?;
    let told = |what: &str| -> Result<Condition, VerifyError> {
        let pooled = match what {
            "cond" => format!("pooled_{name}"),
            _ => format!("pooled_uncond_{name}"),
        };
        let pooled = file
            .has(&pooled)
            .then(|| file.tensor(&pooled))
            .transpose()?;
        let states = file.tensor(&format!("{what}_{name}"))?;
        Ok(TextStates { states, pooled }.with_sizes(&ids))
    };
    let empty = model.text()?.encode(&[model.tokens("", 77)], 1);
    let key = format!("uncond_{name}");
    let label = format!("text encoder, empty prompt, {name}");
    check.tensor(&label, empty.states, file, &key, OUTPUT_TOLERANCE)?;
    if let Some(pooled) = empty.pooled {
        let key = format!("pooled_uncond_{name}");
        let label = format!("text encoder, empty prompt, pooled, {name}");
        check.tensor(&label, pooled, file, &key, OUTPUT_TOLERANCE)?;
    }
    Ok(Guidance {
        cond: told("cond")?,
        uncond: told("uncond")?,
        cfg_scale: match model.family {
            Family::Sdxl => 5.0,
            Family::Sd1 | Family::Sd2 => CFG_SCALE,
        },
    })
}

fn trajectory(
    check: &mut Checker<'_>,
    file: &GoldenFile,
    model: &StableDiffusion,
    kind: SamplerKind,
    name: &str,
    guidance: &Guidance,
) -> Result<(), VerifyError> {
    let key = format!("{}.{name}.trajectory", kind.name());
    if !file.has(&key) {
        return Ok(());
    }
    let timesteps = file.values(&format!("{}.timesteps", kind.name()))?;
    let sampler = Sampler::new(kind, &model.schedule, model.prediction, timesteps.len());
    let ours: Vec<f64> = (0..sampler.len())
        .map(|i| f64::from(sampler.timestep(i)))
        .collect();
    let label = |what: &str| format!("sampler {}, {name}, {what}", kind.name());
    check.numbers(&label("timesteps"), &ours, timesteps, 0.0);
    let mut visited = Vec::new();
    let last = sample(
        &model.unet,
        &sampler,
        guidance,
        file.tensor("noise")?,
        |_, latent| {
            visited.push(latent.clone());
        },
    );
    let steps = Tensor::cat(visited, 0); // [steps + 1, channels, height, width]
    check.tensor(
        &label("latents"),
        steps,
        file,
        &key,
        tolerance(kind, model.family),
    )?;
    let key = format!("{}.{name}.image", kind.name());
    if file.has(&key) {
        let vae = model.vae()?;
        let picture = vae.decode(last.div_scalar(vae.scaling_factor()));
        check.tensor(&label("picture"), picture, file, &key, OUTPUT_TOLERANCE)?;
    }
    Ok(())
}

/// What the attached LoRA does to the UNet, and what merging it does to a weight.
fn adapters(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    file: &GoldenFile,
    network: &LoraNetwork,
    model: &mut StableDiffusion,
) -> Result<(), VerifyError> {
    if let Some(inputs) = goldens.file("unet")? {
        let (input, context) = (inputs.tensor::<4>("sample")?, inputs.tensor("context")?);
        let times = vec![500.0; input.dims()[0]];
        let predicted = model.unet.forward(input, &times, told(&inputs, context)?);
        let key = "unet_pred_lora_t500";
        check.tensor(
            "unet with lora, t500",
            predicted,
            file,
            key,
            OUTPUT_TOLERANCE,
        )?;
    }
    for key in file.keys().filter(|key| key.starts_with("merged.")) {
        let name = key.trim_start_matches("merged.");
        let target = network.modules().find(|module| module.name == name);
        let (Some(target), Some(delta)) = (target, network.weight_delta(name)) else {
            check.skip(format!("`{key}`: the LoRA has no such adapter"));
            continue;
        };
        let path = target.path.clone();
        let layer = model
            .layers_mut()
            .into_iter()
            .find(|(_, found, _)| *found == path);
        let weight: Vec<f64> = match layer {
            Some((_, _, LayerMut::Linear(linear))) => {
                linear.weight.to_data().iter::<f64>().collect()
            }
            Some((_, _, LayerMut::Conv(conv))) => conv.weight.to_data().iter::<f64>().collect(),
            None => Vec::new(),
        };
        let merged: Vec<f64> = weight
            .iter()
            .zip(&delta.values)
            .map(|(w, d)| w + f64::from(*d))
            .collect();
        check.numbers(
            &format!("merged weight {name}"),
            &merged,
            file.values(key)?,
            1e-6,
        );
    }
    Ok(())
}
