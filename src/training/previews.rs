//! Preview pictures: fixed prompts and seeds drawn with the adapters as they are.

use burn::tensor::Tensor;
use image::RgbImage;

use crate::diffusion::samplers::{Guidance, Sampler, sample};
use crate::training::TrainError;
use crate::training::random::{Stream, generator, normal_tensor};
use crate::training::settings::SamplePrompt;
use crate::training::step::{Conditioning, Trainer};
use crate::training::text::token_rows;

/// Draws one prompt.
///
/// Sides are rounded down to what the VAE and the UNet can handle.
pub fn draw(
    trainer: &Trainer<'_>,
    prompt: &SamplePrompt,
    max_token_length: usize,
) -> Result<RgbImage, TrainError> {
    let model = &*trainer.model;
    let encode = |text: &str| {
        let rows = token_rows(model, text, max_token_length);
        trainer.encode(&Conditioning::Tokens(vec![rows])) // [1, tokens, d]
    };
    let (cond, uncond) = (encode(&prompt.prompt), encode(&prompt.negative_prompt));
    let vae = model.vae()?;
    let factor = vae.factor();
    let side = |px: u32| (px as usize / factor).max(8) / 8 * 8;
    let (height, width) = (side(prompt.height_px), side(prompt.width_px));
    let mut rng = generator(prompt.seed, Stream::Preview, b"");
    let shape = [1, model.unet.latent_channels(), height, width];
    let noise = normal_tensor(&mut rng, shape, &trainer.device());
    let prediction = trainer.objective().prediction;
    let sampler = Sampler::new(prompt.sampler, &model.schedule, prediction, prompt.steps);
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
    let values = decoded
        .permute([0, 2, 3, 1]) // [1, height, width, 3]
        .try_into_vec_as::<f32>()
        .map_err(|error| TrainError::Device(error.to_string()))?;
    let bytes = values
        .into_iter()
        .map(|value| ((value.clamp(-1.0, 1.0) + 1.0) * 127.5).round() as u8)
        .collect();
    RgbImage::from_raw(width as u32, height as u32, bytes)
        .ok_or_else(|| TrainError::Device("the picture is incomplete".to_owned()))
}
