//! What a file is that is no Stable Diffusion model of a known generation, told by the names of its tensors.

use super::weights::Weights;

/// What is supported, for messages.
pub const SUPPORTED: &str =
    "text-to-image models of Stable Diffusion 1.x, 2.x and XL are supported";

/// Something that was recognised.
pub enum Other {
    /// A model that draws pictures, but is not handled.
    Model(&'static str),
    /// A part of a model, or what is added to one.
    Part(&'static str),
}

/// Parts of names, what has them, and whether that is a model that draws; the first that fits counts.
const KNOWN: [(&[&str], &str, bool); 16] = [
    (
        &[
            "lora_unet_",
            "lora_te",
            ".lora_down.",
            ".lora_A.",
            ".hada_w1_a",
            ".lokr_w1",
        ],
        "adapters (a LoRA)",
        false,
    ),
    (
        &[
            "control_model.",
            "controlnet_cond_embedding.",
            "controlnet_down_blocks.",
        ],
        "a ControlNet",
        false,
    ),
    (&["motion_modules."], "a motion module (AnimateDiff)", false),
    (&["joint_blocks."], "a model of Stable Diffusion 3", true),
    (
        &["double_blocks.0.img_attn.", "single_transformer_blocks."],
        "a Flux model",
        true,
    ),
    (&["double_layers.0.attn."], "an AuraFlow model", true),
    (
        &[".time_mix_conv", ".time_stack.", ".time_mixer."],
        "a video model (Stable Video Diffusion)",
        true,
    ),
    (&["blocks.0.self_attn.q."], "a video model (Wan)", true),
    (
        &["blocks.0.cross_attn.q_linear.", "caption_projection."],
        "a PixArt or Sana model",
        true,
    ),
    (
        &["transformer_blocks.0.attn.add_k_proj."],
        "a transformer of Stable Diffusion 3 or Flux",
        true,
    ),
    (
        &["model.diffusion_model.input_blocks."],
        "a UNet without a text encoder that is known",
        true,
    ),
    (
        &["down_blocks.0.resnets.0.time_emb_proj."],
        "the UNet of a diffusers folder alone",
        true,
    ),
    (
        &["emb_params", "string_to_param"],
        "an embedding (textual inversion)",
        false,
    ),
    (
        &["first_stage_model.", "decoder.up.", "decoder.up_blocks."],
        "a VAE alone; VAEs belong into the folder `vae` of the model folder",
        false,
    ),
    (
        &["text_model.", "transformer.resblocks."],
        "a text encoder alone",
        false,
    ),
    (
        &["clip_l", "clip_g"],
        "an embedding (textual inversion)",
        false,
    ),
];

/// What a file is; `None` where its names say nothing.
pub fn other(weights: &Weights) -> Option<Other> {
    let has = |part: &&str| weights.stored().any(|(key, ..)| key.contains(part));
    let (_, what, is_model) = KNOWN.iter().find(|(parts, ..)| parts.iter().any(has))?;
    Some(match is_model {
        true => Other::Model(what),
        false => Other::Part(what),
    })
}

/// Parts of names that only models of moving pictures have.
const OF_VIDEO: [&str; 4] = [".time_stack.", ".time_mix", ".temporal_", ".temopral_"];

/// Whether a file that is laid out like Stable Diffusion draws moving pictures.
pub fn is_video(weights: &Weights) -> bool {
    let of_video = |key: &str| OF_VIDEO.iter().any(|part| key.contains(part));
    weights.stored().any(|(key, ..)| of_video(key))
}

/// What a UNet is told besides the noisy latent, by the channels that go into it and the latent's.
pub fn of_channels(channels: usize, latent: usize) -> &'static str {
    match channels.checked_sub(latent) {
        Some(1) => "its input also holds a depth map or a mask",
        Some(3) => "an upscaler: its input also holds a small picture",
        Some(more) if more == latent => {
            "an instruction model (instruct-pix2pix): its input also holds the latent of a picture"
        }
        Some(more) if more == latent + 1 => {
            "an inpainting model: its input also holds a mask and the latent of a picture"
        }
        _ => "not a text-to-image model",
    }
}
