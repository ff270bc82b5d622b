//! `config.json`: the sizes of both halves, as transformers writes and defaults them.

use std::path::Path;

use serde::Deserialize;

use crate::diffusion::LoadError;
use crate::diffusion::config::read_json;
use crate::diffusion::layers::Activation;

/// The widest layer.
const MAX_WIDTH: usize = 16_384;
/// The most layers.
const MAX_LAYERS: usize = 256;
/// The largest picture, in pixels along a side.
const MAX_IMAGE_PX: usize = 2_048;
/// The most tokens.
const MAX_VOCABULARY: usize = 1 << 20;

/// `BlipConfig`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct BlipConfig {
    /// The encoder of pictures.
    pub vision_config: VisionConfig,
    /// The decoder of text.
    pub text_config: TextConfig,
}

/// `BlipVisionConfig`
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Length of a state.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of attention.
    pub num_attention_heads: usize,
    /// Side of the picture.
    pub image_size: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Between the layers of the MLP.
    pub hidden_act: HiddenAct,
    /// What keeps norms from dividing by zero.
    pub layer_norm_eps: f64,
}

/// `BlipTextConfig`
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    /// Ids that have an embedding.
    pub vocab_size: usize,
    /// Length of a state.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of attention.
    pub num_attention_heads: usize,
    /// Positions that have an embedding.
    pub max_position_embeddings: usize,
    /// Between the layers of the MLP.
    pub hidden_act: HiddenAct,
    /// What keeps norms from dividing by zero.
    pub layer_norm_eps: f64,
    /// What a caption begins with.
    pub bos_token_id: u32,
    /// What a caption ends with.
    pub sep_token_id: u32,
}

/// The activations that published models have.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenAct {
    /// With the error function.
    Gelu,
    /// With a sigmoid.
    QuickGelu,
}

impl From<HiddenAct> for Activation {
    fn from(act: HiddenAct) -> Self {
        match act {
            HiddenAct::Gelu => Self::Gelu,
            HiddenAct::QuickGelu => Self::QuickGelu,
        }
    }
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3_072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 384,
            patch_size: 16,
            hidden_act: HiddenAct::Gelu,
            layer_norm_eps: 1e-5,
        }
    }
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30_524,
            hidden_size: 768,
            intermediate_size: 3_072,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 512,
            hidden_act: HiddenAct::Gelu,
            layer_norm_eps: 1e-12,
            bos_token_id: 30_522,
            sep_token_id: 102,
        }
    }
}

impl BlipConfig {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// When it cannot be read, or a size is not one that a model can have.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let config: Self = read_json(path)?;
        config
            .check()
            .map_err(|reason| LoadError::config(path, reason))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let (vision, text) = (&self.vision_config, &self.text_config);
        within("vision_config.image_size", vision.image_size, MAX_IMAGE_PX)?;
        within(
            "vision_config.patch_size",
            vision.patch_size,
            vision.image_size,
        )?;
        within("text_config.vocab_size", text.vocab_size, MAX_VOCABULARY)?;
        within(
            "text_config.max_position_embeddings",
            text.max_position_embeddings,
            MAX_WIDTH,
        )?;
        let halves = [
            (
                "vision_config",
                [
                    vision.hidden_size,
                    vision.intermediate_size,
                    vision.num_hidden_layers,
                    vision.num_attention_heads,
                ],
            ),
            (
                "text_config",
                [
                    text.hidden_size,
                    text.intermediate_size,
                    text.num_hidden_layers,
                    text.num_attention_heads,
                ],
            ),
        ];
        for (half, [hidden, intermediate, layers, heads]) in halves {
            within(&format!("{half}.hidden_size"), hidden, MAX_WIDTH)?;
            within(
                &format!("{half}.intermediate_size"),
                intermediate,
                MAX_WIDTH,
            )?;
            within(&format!("{half}.num_hidden_layers"), layers, MAX_LAYERS)?;
            within(&format!("{half}.num_attention_heads"), heads, hidden)?;
            if !hidden.is_multiple_of(heads) {
                return Err(format!(
                    "{half}.num_attention_heads is {heads}, which does not divide hidden_size {hidden}"
                ));
            }
        }
        for (name, id) in [
            ("bos_token_id", text.bos_token_id),
            ("sep_token_id", text.sep_token_id),
        ] {
            if id as usize >= text.vocab_size {
                return Err(format!(
                    "text_config.{name} is {id}, expected less than vocab_size {}",
                    text.vocab_size
                ));
            }
        }
        Ok(())
    }
}

impl VisionConfig {
    /// Patches along a side.
    pub fn patches(&self) -> usize {
        self.image_size / self.patch_size
    }
}

fn within(name: &str, found: usize, most: usize) -> Result<(), String> {
    if (1..=most).contains(&found) {
        Ok(())
    } else {
        Err(format!("{name} is {found}, expected 1 to {most}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<BlipConfig, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, json).unwrap();
        BlipConfig::load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_absent_is_what_transformers_takes() {
        let large = r#"{"model_type": "blip", "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24,
            "num_attention_heads": 16, "intermediate_size": 4096}, "text_config": {"num_attention_heads": 12}}"#;
        let config = read(large).unwrap();
        assert_eq!(config.vision_config.patches(), 24);
        assert_eq!(config.vision_config.hidden_size, 1_024);
        assert_eq!(config.text_config.num_attention_heads, 12);
        assert_eq!(config.text_config.bos_token_id, 30_522);
        assert_eq!(read("{}").unwrap().text_config.sep_token_id, 102);
    }

    #[test]
    fn impossible_sizes_are_errors_that_name_the_field() {
        for (json, field) in [
            (
                r#"{"vision_config": {"num_attention_heads": 7}}"#,
                "vision_config.num_attention_heads",
            ),
            (
                r#"{"vision_config": {"patch_size": 0}}"#,
                "vision_config.patch_size",
            ),
            (
                r#"{"text_config": {"hidden_size": 99999999}}"#,
                "text_config.hidden_size",
            ),
            (
                r#"{"text_config": {"bos_token_id": 30524}}"#,
                "text_config.bos_token_id",
            ),
            (r#"{"text_config": {"hidden_act": "relu"}}"#, "relu"),
            (r#"{"text_config": {"vocab_size": -1}}"#, "config.json"),
            ("[", "config.json"),
        ] {
            let message = read(json).unwrap_err();
            assert!(message.contains(field), "{json}: {message}");
        }
    }
}
