//! Training trajectories: ten steps of AdamW on fixed batches, compared in loss, gradient norm and trained weights.

use serde_json::json;

use super::VerifyError;
use super::goldens::{GoldenFile, Goldens};
use super::models::time_ids;
use super::report::Checker;
use crate::diffusion::{CaptionTokens, Family, LoadError, PredictionType, StableDiffusion};
use crate::networks::{LoraFile, LoraNetwork};
use crate::plugin_host::PluginHost;
use crate::training::{
    Conditioning, LrScheduler, MicroBatch, OptimizerError, TrainSettings, Trainer,
};

/// Absolute, on losses of about 1. The reference's own error is 3e-8 to 2.4e-7.
const LOSS_TOLERANCE: f64 = 1e-5;
/// Relative; ten times the reference's own error.
const NORM_TOLERANCE: f64 = 1e-4;
/// Trained weights: this share of the elements must be within [`TYPICAL_ERROR`].
const TYPICAL_SHARE: f64 = 0.999;
/// See [`TYPICAL_SHARE`].
const TYPICAL_ERROR: f64 = 2e-5;
/// Share of trained elements whose gradient is rounding noise when it first is not zero. Adam's first step is the
/// learning rate times the gradient's sign, so their sign is a coin's.
const NOISE_SHARE: f64 = 1e-4;
/// The same for SDXL's small fixture: of the reference's own gradients of `lora_down` 3.1e-4 are off from f64 by more
/// than half, on another CPU 3.9e-4. Of its 12,976 elements that is five.
const SDXL_NOISE_SHARE: f64 = 4e-4;
/// Learning rate of the goldens.
const LEARNING_RATE: f64 = 1e-3;
/// The same for SDXL, whose reference in f32 is off from itself in f64 by 2.5e-4; we are by 2.7e-4, and both may be off
/// to either side.
const SDXL_NORM_TOLERANCE: f64 = 5.2e-4;
/// One recorded training. What its name tells is what the goldens were made with.
#[derive(Clone, Copy)]
struct Recipe {
    tag: &'static str,
    initial: &'static str,
    settings: fn(&mut TrainSettings),
    /// Largest difference of a single trained element: Adam divides near-zero gradients by their own size, which
    /// makes sign noise of rounding errors, the more the harder gradients are clipped.
    worst_element: f64,
    /// Share of trained elements within [`TYPICAL_ERROR`].
    typical_share: f64,
    /// Share of trained elements that are rounding noise.
    noise_share: f64,
}

impl Recipe {
    /// Gradients of SDXL's small text encoders are small themselves: the reference's own f32 against f64 has 4.6e-4 of
    /// the elements beyond [`TYPICAL_ERROR`] and a worst one of 1.1e-4, on another CPU 6.1e-4 and 7.8e-5; ours against
    /// f64 has 6.1e-4 and 1.2e-4. Two runs in f32 may be off to either side.
    fn of_family(self, family: Family) -> Self {
        match family {
            Family::Sd1 | Family::Sd2 => self,
            Family::Sdxl => Self {
                worst_element: 2.5e-4,
                typical_share: 0.998,
                noise_share: SDXL_NOISE_SHARE,
                ..self
            },
        }
    }
}

const RECIPES: [Recipe; 6] = [
    Recipe {
        tag: "eps",
        initial: "lora_init_linear",
        settings: |_| {},
        worst_element: 1e-4,
        typical_share: TYPICAL_SHARE,
        noise_share: NOISE_SHARE,
    },
    Recipe {
        tag: "v_minsnr5_clipskip2",
        initial: "lora_init_linear",
        settings: |settings| {
            settings.prediction = Some(PredictionType::VPrediction);
            settings.min_snr_gamma = Some(5.0);
            settings.clip_skip = 2;
        },
        worst_element: 1e-4,
        typical_share: TYPICAL_SHARE,
        noise_share: NOISE_SHARE,
    },
    Recipe {
        tag: "eps_conv",
        initial: "lora_init_conv",
        settings: |settings| settings.max_grad_norm = 0.05,
        worst_element: 1e-4,
        // The reference's own f32 against f64: 1.0e-3; against its f32 on another CPU: 2.5e-3.
        typical_share: 0.995,
        noise_share: NOISE_SHARE,
    },
    Recipe {
        tag: "v",
        initial: "lora_init_linear",
        settings: |settings| settings.prediction = Some(PredictionType::VPrediction),
        worst_element: 1e-4,
        typical_share: TYPICAL_SHARE,
        noise_share: NOISE_SHARE,
    },
    Recipe {
        tag: "v_ztsnr_minsnr5",
        initial: "lora_init_linear",
        settings: |settings| {
            settings.prediction = Some(PredictionType::VPrediction);
            settings.zero_terminal_snr = Some(true);
            settings.min_snr_gamma = Some(5.0);
        },
        worst_element: 1e-4,
        typical_share: TYPICAL_SHARE,
        noise_share: NOISE_SHARE,
    },
    Recipe {
        tag: "v_conv",
        initial: "lora_init_conv",
        settings: |settings| settings.prediction = Some(PredictionType::VPrediction),
        // The reference's own f32 against f64: 4.6e-3 and 1.2e-4; against its f32 on another CPU: 7.0e-3 and 1.9e-4.
        worst_element: 3e-4,
        typical_share: 0.99,
        noise_share: NOISE_SHARE,
    },
];

/// The learning rates of the log, whatever made them.
struct Recorded(Vec<f64>);

impl LrScheduler for Recorded {
    fn factor(&self, step: u64) -> Result<f64, OptimizerError> {
        let rate = usize::try_from(step).ok().and_then(|step| self.0.get(step));
        let rate = rate.ok_or_else(|| OptimizerError(format!("the log has no step {step}")))?;
        Ok(rate / LEARNING_RATE)
    }
}

/// Trains each recorded trajectory again.
pub fn check(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    load: impl Fn() -> Result<StableDiffusion, LoadError>,
    plugins: &PluginHost,
) -> Result<(), VerifyError> {
    let Some(inputs) = goldens.file("train_inputs")? else {
        return Ok(());
    };
    for tag in goldens.training_tags() {
        match RECIPES.iter().find(|recipe| recipe.tag == tag) {
            Some(recipe) => trajectory(check, goldens, &inputs, load()?, plugins, recipe)?,
            None => check.skip(format!("training `{tag}`: its settings are not known")),
        }
    }
    Ok(())
}

fn trajectory(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    inputs: &GoldenFile,
    mut model: StableDiffusion,
    plugins: &PluginHost,
    recipe: &Recipe,
) -> Result<(), VerifyError> {
    let recipe = &recipe.of_family(model.family);
    let tag = recipe.tag;
    let norm_tolerance = match model.family {
        Family::Sd1 | Family::Sd2 => NORM_TOLERANCE,
        Family::Sdxl => SDXL_NORM_TOLERANCE,
    };
    let Some(log) = goldens.file(&format!("train_{tag}_log"))? else {
        return Ok(());
    };
    let device = inputs.tensor::<4>("latents_0")?.device();
    let initial = goldens.path(&format!("{}.safetensors", recipe.initial));
    let mut network = LoraNetwork::load(&initial, &mut model, &device)?;
    let mut settings = TrainSettings {
        unet_lr: LEARNING_RATE,
        text_encoder_lr: LEARNING_RATE,
        ..TrainSettings::default()
    };
    (recipe.settings)(&mut settings);
    let mut optimizer = plugins.create_optimizer("adamw", &json!({"weight_decay": 0.01}))?;
    let rates = Recorded(log.values("lr")?.to_vec());
    let steps = rates.0.len();

    let mut trainer = Trainer::new(
        &mut model,
        &mut network,
        optimizer.as_mut(),
        &rates,
        &settings,
    );
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for step in 0..steps {
        let output = trainer.optimizer_step(&[batch(inputs, step)?])?;
        losses.push(output.loss);
        norms.push(output.grad_norm);
        if step == 0 {
            after_first_step(check, goldens, &trainer, recipe)?;
        }
    }
    let label = |what: &str| format!("training {tag}, {what}");
    check.numbers(
        &label("loss"),
        &losses,
        &log.values("loss")?[..steps],
        LOSS_TOLERANCE,
    );
    let expected = &log.values("grad_norm_before_clip")?[..steps];
    check.relative(&label("gradient norm"), &norms, expected, norm_tolerance);
    let golden = format!("train_{tag}_lora_final.safetensors");
    weights(check, goldens, &trainer, &golden, &label("trained"), recipe)?;
    Ok(())
}

fn after_first_step(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    trainer: &Trainer<'_>,
    recipe: &Recipe,
) -> Result<(), VerifyError> {
    let golden = format!("train_{}_lora_after_step1.safetensors", recipe.tag);
    if goldens.path(&golden).is_file() {
        let label = format!("training {}, after one step", recipe.tag);
        weights(check, goldens, trainer, &golden, &label, recipe)?;
    }
    Ok(())
}

/// Compares the adapters' matrices, `lora_up` and `lora_down` apart.
fn weights(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    trainer: &Trainer<'_>,
    golden: &str,
    label: &str,
    recipe: &Recipe,
) -> Result<(), VerifyError> {
    let theirs = LoraFile::read(&goldens.path(golden))?;
    let ours = trainer.network.tensors()?;
    for half in ["lora_up", "lora_down"] {
        let (mut actual, mut expected) = (Vec::new(), Vec::new());
        let mut missing = 0;
        for (key, theirs) in theirs.tensors.iter().filter(|(key, _)| key.contains(half)) {
            match ours.get(key).filter(|ours| ours.shape == theirs.shape) {
                Some(ours) => {
                    actual.extend(ours.values.iter().copied().map(f64::from));
                    expected.extend(theirs.values.iter().copied().map(f64::from));
                }
                None => missing += 1,
            }
        }
        if expected.is_empty() && missing == 0 {
            continue;
        }
        let far = |(a, b): &(&f64, &f64)| (*a - *b).abs() > TYPICAL_ERROR;
        let share = actual.iter().zip(&expected).filter(far).count() as f64 / actual.len() as f64;
        check.add(
            format!("{label}, {half}, share beyond {TYPICAL_ERROR:.0e}"),
            if missing == 0 { share } else { f64::INFINITY },
            1.0 - recipe.typical_share,
            if missing == 0 {
                String::new()
            } else {
                format!("{missing} tensors are missing")
            },
        );
        let (typical, largest) = without_noise(&actual, &expected, recipe.noise_share);
        let name = format!("{label}, {half}, worst element");
        check.add(
            name,
            typical,
            recipe.worst_element,
            format!("{largest:.1e} with sign noise"),
        );
    }
    Ok(())
}

/// The largest difference but for a share of the elements, and the largest of all.
fn without_noise(actual: &[f64], expected: &[f64], noise_share: f64) -> (f64, f64) {
    let mut differences: Vec<f64> = actual
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .collect();
    differences.sort_by(f64::total_cmp); // what is not a number comes last
    let noise = (differences.len() as f64 * noise_share) as usize;
    let at = |from_end: usize| {
        let index = differences.len().checked_sub(1 + from_end);
        index.map_or(f64::NAN, |index| differences[index])
    };
    let largest = at(0);
    (if largest.is_nan() { largest } else { at(noise) }, largest)
}

fn batch(inputs: &GoldenFile, index: usize) -> Result<MicroBatch, VerifyError> {
    let timesteps = inputs.timesteps(&format!("timesteps_{index}"))?;
    let rows = |key: &str| -> Result<Vec<Vec<u32>>, VerifyError> {
        let key = format!("{key}_{index}");
        let found = inputs.has(&key).then(|| inputs.rows(&key));
        Ok(found.transpose()?.unwrap_or_default())
    };
    let (only, first, second) = (rows("ids")?, rows("ids1")?, rows("ids2")?);
    let only = only.into_iter().map(|row| vec![row].into());
    let pairs = first.into_iter().zip(second);
    let pairs = pairs.map(|(first, second)| CaptionTokens {
        first: vec![first],
        second: vec![second],
    });
    Ok(MicroBatch {
        latents: inputs.tensor(&format!("latents_{index}"))?,
        noise: inputs.tensor(&format!("noise_{index}"))?,
        input_noise: None,
        mask: None,
        loss_weights: vec![1.0; timesteps.len()],
        timesteps,
        conditioning: Conditioning::Tokens(only.chain(pairs).collect()),
        time_ids: time_ids(inputs, &format!("time_ids_{index}"))?,
    })
}
