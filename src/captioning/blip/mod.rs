//! BLIP (Li et al. 2022, arXiv:2201.12086): a vision transformer and a BERT decoder that captions pictures.
//!
//! Files are those of `Salesforce/blip-image-captioning-base` and `-large` on Hugging Face; numbers and token ids are
//! those of transformers.

mod beam;
mod chain;
mod config;
mod decoder;
mod generate;
mod pixels;
mod scores;
mod settings;
#[cfg(test)]
mod testing;
mod tokenizer;
mod vision;
mod weights;

use std::path::Path;

use burn::tensor::Tensor;
use image::RgbImage;

use super::{CaptionError, MissingModel};
use crate::diffusion::LoadOptions;
use crate::diffusion::devices::ComputeDevice;

use config::BlipConfig;
use decoder::TextDecoder;
use generate::Caption;
use pixels::Processor;
use tokenizer::Tokenizer;
use vision::VisionModel;

pub use settings::{BlipSettings, Decoding, EarlyStopping};

/// The files of a model.
pub const FILES: [&str; 4] = [
    "config.json",
    weights::FILE,
    "vocab.txt",
    "preprocessor_config.json",
];
/// Where published ones are.
pub const SOURCE: &str = "https://huggingface.co/Salesforce/blip-image-captioning-base (or -large)";
/// Pictures that are captioned at once: together they read each weight once for a token.
const AT_ONCE: usize = 8;

/// A captioner, ready to use.
#[derive(Debug)]
pub struct Blip {
    vision_model: VisionModel,
    text_decoder: TextDecoder,
    processor: Processor,
    tokenizer: Tokenizer,
    begin: u32,
    end: u32,
    positions: usize,
}

impl Blip {
    /// The files that `folder` lacks; `None` when it is complete.
    pub fn missing(folder: &Path) -> Option<MissingModel> {
        let mut missing = MissingModel::look(folder, &FILES, SOURCE)?;
        if weights::is_split(folder) {
            missing.missing.retain(|name| name != weights::FILE);
        }
        (!missing.missing.is_empty()).then_some(missing)
    }

    /// Reads a model. Weights stay in the number format that they are stored in, where the device has it.
    ///
    /// # Errors
    /// When files are missing ([`CaptionError::Missing`] names them) or broken.
    pub fn load(folder: &Path, device: &ComputeDevice) -> Result<Self, CaptionError> {
        if let Some(missing) = Self::missing(folder) {
            return Err(missing.into());
        }
        let config = BlipConfig::load(&folder.join("config.json"))?;
        let (vision, text) = (&config.vision_config, &config.text_config);
        let preprocessor = folder.join("preprocessor_config.json");
        let processor = Processor::load(&preprocessor, vision.image_size)?;
        let tokenizer = Tokenizer::load(folder, text.vocab_size)?;
        let weights = weights::open(folder)?.with_options(&LoadOptions::new(&device.device));
        Ok(Self {
            vision_model: VisionModel::load(&weights.at("vision_model"), vision)?,
            text_decoder: TextDecoder::load(&weights.at("text_decoder"), text, vision.hidden_size)?,
            processor,
            tokenizer,
            begin: text.bos_token_id,
            end: text.sep_token_id,
            positions: text.max_position_embeddings,
        })
    }

    /// A caption for each picture, in their order.
    ///
    /// `keep_going` is asked before each picture and each token. A picture's caption does not depend on its company,
    /// but for the rounding of sums on some devices.
    ///
    /// # Errors
    /// When a setting is out of range, or `keep_going` says no ([`CaptionError::Cancelled`]).
    pub fn caption(
        &self,
        pictures: &[RgbImage],
        settings: &BlipSettings,
        keep_going: &mut dyn FnMut() -> bool,
    ) -> Result<Vec<String>, CaptionError> {
        let captions = self.generate(pictures, settings, keep_going)?;
        let prefix = self.tokenizer.decode(&self.prompt(settings));
        Ok(captions
            .into_iter()
            .map(|caption| {
                let text = self.tokenizer.decode(&caption.ids);
                match text.strip_prefix(&prefix) {
                    Some(rest) if !settings.keep_prefix => rest.trim_start().to_owned(),
                    _ => text,
                }
            })
            .collect())
    }

    fn generate(
        &self,
        pictures: &[RgbImage],
        settings: &BlipSettings,
        keep_going: &mut dyn FnMut() -> bool,
    ) -> Result<Vec<Caption>, CaptionError> {
        settings.check()?;
        let prompt = self.prompt(settings);
        self.check_lengths(settings, prompt.len())?;
        let mut captions = Vec::with_capacity(pictures.len());
        for pictures in pictures.chunks(AT_ONCE) {
            let mut states = Vec::with_capacity(pictures.len());
            for picture in pictures {
                if !keep_going() {
                    return Err(CaptionError::Cancelled);
                }
                states.push(self.vision_model.forward(&self.processor.pixels(picture)));
            }
            let states = Tensor::cat(states, 0);
            captions.extend(generate::generate(
                &self.text_decoder,
                &states,
                pictures,
                &prompt,
                (settings, self.end),
                keep_going,
            )?);
        }
        Ok(captions)
    }

    /// The begin token in the place of BERT's, and no end.
    fn prompt(&self, settings: &BlipSettings) -> Vec<u32> {
        let mut ids = vec![self.begin];
        ids.extend(self.tokenizer.encode(&settings.prefix));
        ids
    }

    fn check_lengths(&self, settings: &BlipSettings, prompt: usize) -> Result<(), CaptionError> {
        let wrong = |setting, reason| Err(CaptionError::Setting { setting, reason });
        if settings.max_length > self.positions {
            let reason = format!(
                "is {}, expected at most {}, the model's positions",
                settings.max_length, self.positions
            );
            return wrong("max_length", reason);
        }
        if prompt >= settings.max_length {
            let reason = format!(
                "has {} tokens, expected fewer than {}: with the begin token they must be fewer than max_length",
                prompt - 1,
                settings.max_length - 1
            );
            return wrong("prefix", reason);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testing::{check, device, folder, json, pictures, tensors};

    /// Every golden on a device: pixels, states, logits, ids, scores and texts; of captions only some when `quick`.
    fn every_golden(device: &ComputeDevice, folder: &Path, quick: bool) {
        let blip = Blip::load(folder, device).unwrap();
        let (goldens, told) = (tensors(folder), testing::json_in(folder));
        let pictures = pictures(folder);
        let (expected, _) = goldens.read_f32("pixel_values").unwrap();
        let pixels: Vec<Vec<f32>> = (pictures.iter())
            .map(|picture| blip.processor.pixels(picture))
            .collect();
        assert!(pixels.concat() == expected, "pixels differ");

        let states = pixels
            .iter()
            .map(|p| blip.vision_model.forward(p))
            .collect();
        let states = Tensor::cat(states, 0);
        check(&goldens, "vision_states", states.clone(), 1e-4);
        let ids = testing::ids(&goldens, "ids");
        let mut cache = blip.text_decoder.look(&states);
        let hidden = blip.text_decoder.forward(&ids, &mut cache);
        check(&goldens, "logits", blip.text_decoder.scores(hidden), 1e-4);

        let cases = told["captions"].as_array().unwrap();
        assert!(cases.len() >= 8);
        for case in cases {
            let short = case["max_length"].as_u64() < Some(13);
            if quick && !short {
                continue;
            }
            let settings = testing::settings(case);
            let captions = blip.generate(&pictures, &settings, &mut || true).unwrap();
            for (index, caption) in captions.iter().enumerate() {
                let expected: Vec<u32> =
                    serde_json::from_value(case["ids"][index].clone()).unwrap();
                assert_eq!(caption.ids, expected, "picture {index}, {settings:?}");
                let expected = case["scores"][index].as_f64();
                assert_eq!(caption.score.is_some(), expected.is_some());
                if let (Some(found), Some(expected)) = (caption.score, expected) {
                    let error = (f64::from(found) - expected).abs();
                    assert!(error <= 1e-4 * expected.abs().max(1.0), "off by {error:e}");
                }
            }
            let texts = blip.caption(&pictures, &settings, &mut || true).unwrap();
            assert_eq!(serde_json::json!(texts), case["texts"]);
        }
    }

    #[test]
    fn every_golden_is_equal_on_the_cpu() {
        every_golden(&device("cpu").unwrap(), &folder(), false);
    }

    /// A software one will do. Trying out kernels takes such a device minutes and changes no result: only the
    /// environment of a process can say so.
    #[test]
    fn goldens_are_equal_on_vulkan() {
        if device("vulkan:0").is_none() {
            eprintln!("no Vulkan device on this machine: nothing was compared");
            return;
        }
        let name = "captioning::blip::tests::goldens_in_a_process_of_their_own";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--ignored", "--nocapture"])
            .env("CUBECL_AUTOTUNE_LEVEL", "minimal")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let found = output.status.success() && text.contains("1 passed");
        assert!(found, "{text}{}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    #[ignore = "run by `goldens_are_equal_on_vulkan`"]
    fn goldens_in_a_process_of_their_own() {
        every_golden(&device("vulkan:0").unwrap(), &folder(), true);
    }

    /// `LORASMITH_BLIP_FIXTURE` names a folder that `make.py` has made with another seed.
    #[test]
    fn every_golden_of_another_model_is_equal() {
        if let Some(folder) = std::env::var_os("LORASMITH_BLIP_FIXTURE") {
            every_golden(&device("cpu").unwrap(), Path::new(&folder), false);
        }
    }

    /// `LORASMITH_BLIP_MODEL` names the folder; `LORASMITH_BLIP_DEVICE` the device, if not the CPU.
    #[test]
    #[ignore = "needs a full-size model"]
    fn seconds_for_each_picture() {
        let folder = std::env::var_os("LORASMITH_BLIP_MODEL").expect("a folder");
        let name = std::env::var("LORASMITH_BLIP_DEVICE");
        let device = device(name.as_deref().unwrap_or("cpu")).expect("the device");
        let begin = std::time::Instant::now();
        let blip = Blip::load(Path::new(&folder), &device).unwrap();
        println!("loaded in {:.1} s", begin.elapsed().as_secs_f64());
        let picture = |seed: u32| {
            RgbImage::from_fn(640, 480, |x, y| {
                image::Rgb([x, y, x * y + seed].map(|value| (value % 256) as u8))
            })
        };
        for (count, beams) in [(1, 1), (1, 3), (4, 1), (4, 3)] {
            let pictures: Vec<RgbImage> = (0..count).map(picture).collect();
            let settings = BlipSettings {
                decoding: Decoding::Beam {
                    beams,
                    length_penalty: 1.0,
                    early_stopping: EarlyStopping::default(),
                },
                min_length: 20,
                max_length: 20,
                ..BlipSettings::default()
            };
            let (begin, mut parts) = (std::time::Instant::now(), Vec::new());
            let mut note = || {
                parts.push(begin.elapsed().as_secs_f64());
                true
            };
            blip.caption(&pictures, &settings, &mut note).unwrap();
            let total = begin.elapsed().as_secs_f64();
            let seen = parts[count as usize];
            println!(
                "{count} pictures, {beams} beams: {:.2} s a picture, {:.2} s of it for 19 tokens",
                total / f64::from(count),
                (total - seen) / f64::from(count)
            );
        }
    }

    #[test]
    fn a_picture_is_captioned_alone_as_in_company_and_by_its_seed() {
        let blip = Blip::load(&folder(), &device("cpu").unwrap()).unwrap();
        let pictures: Vec<RgbImage> = pictures(&folder()).into_iter().cycle().take(11).collect();
        let settings = |seed| BlipSettings {
            decoding: Decoding::Nucleus {
                top_p: 0.9,
                top_k: None,
                temperature: 1.0,
                seed,
            },
            max_length: 20,
            ..BlipSettings::default()
        };
        let together = blip.caption(&pictures, &settings(7), &mut || true).unwrap();
        let alone: Vec<String> = (pictures.iter())
            .flat_map(|picture| {
                let one = std::slice::from_ref(picture);
                blip.caption(one, &settings(7), &mut || true).unwrap()
            })
            .collect();
        assert_eq!(together, alone);
        assert_ne!(
            together,
            blip.caption(&pictures, &settings(8), &mut || true).unwrap()
        );
    }

    #[test]
    fn a_prefix_can_be_left_out_of_the_caption() {
        let blip = Blip::load(&folder(), &device("cpu").unwrap()).unwrap();
        let settings = |keep_prefix| BlipSettings {
            prefix: "A photo of".to_owned(),
            max_length: 12,
            keep_prefix,
            ..BlipSettings::default()
        };
        let picture = &pictures(&folder())[..1];
        let with = blip
            .caption(picture, &settings(true), &mut || true)
            .unwrap();
        let without = blip
            .caption(picture, &settings(false), &mut || true)
            .unwrap();
        let rest = with[0].strip_prefix("a photo of").expect("the prefix");
        assert_eq!(rest.trim_start(), without[0]);
    }

    #[test]
    fn a_captioner_stops_when_it_is_told_to() {
        let blip = Blip::load(&folder(), &device("cpu").unwrap()).unwrap();
        let pictures = pictures(&folder());
        let settings = BlipSettings {
            max_length: 20,
            ..BlipSettings::default()
        };
        // Four pictures, then tokens.
        for allowed in 0..8 {
            let mut asked = 0;
            let mut keep_going = || {
                asked += 1;
                asked <= allowed
            };
            let outcome = blip.caption(&pictures, &settings, &mut keep_going);
            assert!(matches!(outcome, Err(CaptionError::Cancelled)));
            assert_eq!(asked, allowed + 1);
        }
    }

    #[test]
    fn settings_that_cannot_be_met_are_errors() {
        let blip = Blip::load(&folder(), &device("cpu").unwrap()).unwrap();
        let message = |settings: BlipSettings| {
            let outcome = blip.caption(&[], &settings, &mut || true);
            outcome.unwrap_err().to_string()
        };
        let base = BlipSettings {
            max_length: 10,
            ..BlipSettings::default()
        };
        let longer = BlipSettings {
            max_length: 65,
            ..base.clone()
        };
        assert!(message(longer).contains("`max_length` is 65"));
        let wordy = BlipSettings {
            prefix: "a photo of a dog, a cat and the moon".to_owned(),
            ..base.clone()
        };
        assert!(message(wordy).contains("`prefix` has"));
        let nan = BlipSettings {
            repetition_penalty: f32::NAN,
            ..base
        };
        assert!(message(nan).contains("`repetition_penalty` is NaN"));
    }

    #[test]
    fn a_missing_model_names_its_files_and_folder() {
        let empty = tempfile::tempdir().unwrap();
        let outcome = Blip::load(empty.path(), &device("cpu").unwrap());
        let message = outcome.unwrap_err().to_string();
        for word in FILES
            .iter()
            .copied()
            .chain([empty.path().to_str().unwrap(), SOURCE])
        {
            assert!(message.contains(word), "{message}");
        }
        assert!(json()["captions"].is_array());
    }

    #[test]
    fn a_model_of_other_sizes_than_its_config_is_an_error() {
        let copy = tempfile::tempdir().unwrap();
        for name in FILES {
            std::fs::copy(folder().join(name), copy.path().join(name)).unwrap();
        }
        let config = std::fs::read_to_string(folder().join("config.json")).unwrap();
        let other = config.replace("\"intermediate_size\": 48", "\"intermediate_size\": 50");
        std::fs::write(copy.path().join("config.json"), other).unwrap();
        let message = Blip::load(copy.path(), &device("cpu").unwrap())
            .unwrap_err()
            .to_string();
        assert!(message.contains("intermediate.dense.weight"), "{message}");
    }
}
