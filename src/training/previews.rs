//! Preview pictures: fixed prompts and seeds drawn with the adapters as they are.

use burn::tensor::{Device, Tensor};
use image::RgbImage;

use crate::diffusion::samplers::{Guidance, Sampler, sample};
use crate::diffusion::{Condition, PredictionType, StableDiffusion};
use crate::training::TrainError;
use crate::training::data::read;
use crate::training::random::{Stream, generator, normal_tensor};
use crate::training::settings::{SamplePrompt, TrainSettings};
use crate::training::step::Trainer;

/// What decides a picture besides the model and the prompt.
#[derive(Debug, Clone)]
pub struct Drawing {
    /// Which hidden state of the text encoder is used, counted from the end.
    pub clip_skip: usize,
    /// Length of a prompt in tokens, without begin and end.
    pub max_token_length: usize,
    /// What the UNet predicts.
    pub prediction: PredictionType,
    /// Where the model is.
    pub device: Device,
}

/// Draws one prompt in a training.
///
/// Sides are rounded down to what the VAE and the UNet can handle.
pub fn draw(
    trainer: &Trainer<'_>,
    prompt: &SamplePrompt,
    settings: &TrainSettings,
) -> Result<RgbImage, TrainError> {
    let how = Drawing {
        clip_skip: settings.clip_skip,
        max_token_length: settings.max_token_length,
        prediction: trainer.objective().prediction,
        device: trainer.device(),
    };
    draw_with(&*trainer.model, prompt, &how)
}

/// Draws one prompt with the adapters that are attached to the model, if any are.
///
/// Sides are rounded down to what the VAE and the UNet can handle.
pub fn draw_with(
    model: &StableDiffusion,
    prompt: &SamplePrompt,
    how: &Drawing,
) -> Result<RgbImage, TrainError> {
    let vae = model.vae()?;
    let factor = vae.factor();
    let side = |px: u32| (px as usize / factor).max(8) / 8 * 8;
    let (height, width) = (side(prompt.height_px), side(prompt.width_px));
    let (height_px, width_px) = ((height * factor) as f32, (width * factor) as f32);
    let time_ids = [height_px, width_px, 0.0, 0.0, height_px, width_px];
    let encode = |text: &str| -> Result<Condition, TrainError> {
        let prompt = model.weighted_tokens(text, how.max_token_length + 2); // begin and end
        let states = model.text()?.encode_weighted(&prompt, how.clip_skip);
        Ok(states.with_sizes(&[time_ids]))
    };
    let (cond, uncond) = (encode(&prompt.prompt)?, encode(&prompt.negative_prompt)?);
    let mut rng = generator(prompt.seed, Stream::Preview, b"");
    let shape = [1, model.unet.latent_channels(), height, width];
    let noise = normal_tensor(&mut rng, shape, &how.device);
    let sampler = Sampler::new(
        prompt.sampler,
        &model.schedule,
        how.prediction,
        prompt.steps,
    );
    let guidance = Guidance {
        cond,
        uncond,
        cfg_scale: prompt.cfg_scale,
    };
    let latents = sample(&model.unet, &sampler, &guidance, noise, |_, _| {});
    picture(vae.decode(latents.div_scalar(vae.scaling_factor())))
}

/// A decoded picture `[1, 3, height, width]` in [-1, 1] as bytes.
pub fn picture(decoded: Tensor<4>) -> Result<RgbImage, TrainError> {
    let [_, _, height, width] = decoded.dims();
    let values = read(decoded.permute([0, 2, 3, 1]))?; // [1, height, width, 3]
    let bytes = values
        .into_iter()
        .map(|value| ((value.clamp(-1.0, 1.0) + 1.0) * 127.5).round() as u8)
        .collect();
    RgbImage::from_raw(width as u32, height as u32, bytes)
        .ok_or_else(|| TrainError::Device("the picture is incomplete".to_owned()))
}
