//! Settings of a run about what it leaves behind on its way, and their way to the domain: LoRA files, resume points,
//! preview pictures.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::twins::same_variants;
use crate::runs::settings::{self as domain, SamplerKind, SavePrecision};

/// When LoRA files are saved on the way, and how.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Save {
    /// Every so many optimizer steps.
    #[schema(minimum = 1)]
    pub every_n_steps: Option<u64>,
    /// After every so many epochs.
    #[schema(minimum = 1)]
    pub every_n_epochs: Option<u64>,
    /// Number format of the files.
    pub precision: Precision,
}

impl From<Save> for domain::SaveSettings {
    fn from(wire: Save) -> Self {
        Self {
            every_n_steps: wire.every_n_steps,
            every_n_epochs: wire.every_n_epochs,
            precision: wire.precision.into(),
        }
    }
}

impl From<domain::SaveSettings> for Save {
    fn from(domain: domain::SaveSettings) -> Self {
        Self {
            every_n_steps: domain.every_n_steps,
            every_n_epochs: domain.every_n_epochs,
            precision: domain.precision.into(),
        }
    }
}

/// Number formats of a LoRA file.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// As trained.
    #[default]
    Fp32,
    /// Half the size, read by everything.
    Fp16,
    /// Half the size, with the range of fp32.
    Bf16,
}

/// When the run is kept so that it can go on exactly after a crash, besides at each saved LoRA. What it computes does
/// not depend on this. The last two points are kept, each about three times the size of the LoRA in fp32.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Resume {
    /// After every so many optimizer steps.
    #[schema(minimum = 1)]
    pub every_n_steps: Option<u64>,
    /// After so many minutes.
    #[schema(exclusive_minimum = 0, maximum = 1440)]
    pub every_minutes: f64,
}

impl Default for Resume {
    fn default() -> Self {
        domain::ResumeSettings::default().into()
    }
}

impl From<Resume> for domain::ResumeSettings {
    fn from(wire: Resume) -> Self {
        Self {
            every_n_steps: wire.every_n_steps,
            every_minutes: wire.every_minutes,
        }
    }
}

impl From<domain::ResumeSettings> for Resume {
    fn from(domain: domain::ResumeSettings) -> Self {
        Self {
            every_n_steps: domain.every_n_steps,
            every_minutes: domain.every_minutes,
        }
    }
}

/// Preview pictures.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Samples {
    /// What to draw, at most 64.
    #[schema(max_items = 64)]
    pub prompts: Vec<Prompt>,
    /// Every so many optimizer steps, besides the end.
    #[schema(minimum = 1)]
    pub every_n_steps: Option<u64>,
    /// Also before the first step.
    pub at_first: bool,
}

impl From<Samples> for domain::SampleSettings {
    fn from(wire: Samples) -> Self {
        Self {
            prompts: wire.prompts.into_iter().map(Into::into).collect(),
            every_n_steps: wire.every_n_steps,
            at_first: wire.at_first,
        }
    }
}

impl From<domain::SampleSettings> for Samples {
    fn from(domain: domain::SampleSettings) -> Self {
        Self {
            prompts: domain.prompts.into_iter().map(Into::into).collect(),
            every_n_steps: domain.every_n_steps,
            at_first: domain.at_first,
        }
    }
}

/// One preview picture.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// What to draw. Words have weights as in A1111's web UI: `(word:1.3)`, `(word)` is 1.1, `[word]` 1/1.1; `\(` is a
    /// bracket.
    pub prompt: String,
    /// What to move away from; weights as in `prompt`.
    #[serde(default = "unsaid::negative_prompt")]
    #[schema(default = unsaid::negative_prompt)]
    pub negative_prompt: String,
    /// Width; rounded down to what the model can draw.
    #[schema(minimum = 8, maximum = 4096)]
    #[serde(default = "unsaid::width_px")]
    #[schema(default = unsaid::width_px)]
    pub width_px: u32,
    /// Height; rounded down to what the model can draw.
    #[schema(minimum = 8, maximum = 4096)]
    #[serde(default = "unsaid::height_px")]
    #[schema(default = unsaid::height_px)]
    pub height_px: u32,
    /// Seed of the picture's noise.
    #[serde(default = "unsaid::seed")]
    #[schema(default = unsaid::seed)]
    pub seed: u64,
    /// Steps of the sampler.
    #[schema(minimum = 1, maximum = 1000)]
    #[serde(default = "unsaid::steps")]
    #[schema(default = unsaid::steps)]
    pub steps: usize,
    /// Strength of classifier-free guidance; 1 is none.
    #[schema(minimum = 0)]
    #[serde(default = "unsaid::cfg_scale")]
    #[schema(default = unsaid::cfg_scale)]
    pub cfg_scale: f64,
    /// The sampler.
    #[serde(default = "unsaid::sampler")]
    #[schema(default = unsaid::sampler)]
    pub sampler: Sampler,
}

/// What a prompt's fields are when nothing is said of them; what to draw has to be said.
mod unsaid {
    use super::{Prompt, Sampler};

    macro_rules! fields {
        ($($name:ident: $kind:ty),+) => {
            $(pub fn $name() -> $kind {
                Prompt::default().$name
            })+
        };
    }
    fields!(negative_prompt: String, width_px: u32, height_px: u32, seed: u64, steps: usize, cfg_scale: f64, sampler: Sampler);
}

impl Default for Prompt {
    fn default() -> Self {
        domain::SamplePrompt::default().into()
    }
}

impl From<Prompt> for domain::SamplePrompt {
    fn from(wire: Prompt) -> Self {
        let Prompt {
            prompt,
            negative_prompt,
            width_px,
            height_px,
            seed,
            steps,
            cfg_scale,
            sampler,
        } = wire;
        let sampler = sampler.into();
        Self {
            prompt,
            negative_prompt,
            width_px,
            height_px,
            seed,
            steps,
            cfg_scale,
            sampler,
        }
    }
}

impl From<domain::SamplePrompt> for Prompt {
    fn from(domain: domain::SamplePrompt) -> Self {
        let domain::SamplePrompt {
            prompt,
            negative_prompt,
            width_px,
            height_px,
            seed,
            steps,
            cfg_scale,
            sampler,
        } = domain;
        let sampler = sampler.into();
        Self {
            prompt,
            negative_prompt,
            width_px,
            height_px,
            seed,
            steps,
            cfg_scale,
            sampler,
        }
    }
}

/// Samplers of previews.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// DDIM as Stable Diffusion 1.5 is configured.
    #[default]
    Ddim,
    /// DDIM as sd-scripts' previews use it.
    DdimKohya,
    /// Euler.
    Euler,
}

same_variants!(Precision, SavePrecision: Fp32, Fp16, Bf16);
same_variants!(Sampler, SamplerKind: Ddim = DdimSd15, DdimKohya = DdimKohya, Euler = Euler);
