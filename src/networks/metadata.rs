//! The description in a LoRA file's header: sd-scripts' `ss_*` entries and Stability's `modelspec.*`.
//!
//! All values are strings, spelled as Python's `str()` would, because that is what readers of these files expect.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use time::macros::format_description;

use crate::diffusion::Family;
use crate::networks::settings::NetworkSettings;

/// Whose key names LoRA files of SDXL have.
const SGM: &str = "https://github.com/Stability-AI/generative-models";

/// The facts of a training run that its LoRA files tell.
///
/// Options of sd-scripts that do not exist here are written with sd-scripts' "off" value.
#[derive(Debug, Clone)]
pub struct TrainingRecord {
    /// File name without its ending; the title of the file.
    pub output_name: String,
    /// A number that tells runs apart.
    pub session_id: u32,
    /// Options of sd-scripts about captions, pixels, loss and noise, by its names and as it writes them.
    pub data_options: Vec<(&'static str, String)>,
    /// When the run was made: the only time in a file, so that its bytes do not depend on how long anything took.
    pub recorded_at: OffsetDateTime,
    /// Digest of all that decides the result, by which the run's record is found; told as `lorasmith_inputs_sha256`.
    pub inputs_sha256: Option<String>,
    /// Adapters.
    pub network: NetworkSettings,
    /// Learning rate of the UNet; `None` when it is not trained.
    pub unet_lr: Option<f64>,
    /// Learning rate of the text encoder; `None` when it is not trained.
    pub text_encoder_lr: Option<f64>,
    /// Optimizer's id, with its settings in parentheses.
    pub optimizer: String,
    /// Scheduler's id.
    pub lr_scheduler: String,
    /// Optimizer steps of warm-up.
    pub lr_warmup_steps: u64,
    /// Optimizer steps of the whole run.
    pub max_train_steps: u64,
    /// Optimizer steps done.
    pub steps: u64,
    /// Epochs of the whole run.
    pub num_epochs: u64,
    /// Epoch of this file, from 1.
    pub epoch: u64,
    /// Batches in an epoch.
    pub num_batches_per_epoch: usize,
    /// Images per batch.
    pub batch_size: usize,
    /// Batches per optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Whether blocks run again in the backward.
    pub gradient_checkpointing: bool,
    /// Whether pictures are flipped, their colours changed, or cut anywhere; any of them.
    pub flip_aug: bool,
    pub color_aug: bool,
    pub random_crop: bool,
    /// `no`, `fp16` or `bf16`.
    pub mixed_precision: &'static str,
    /// Limit of the gradient's norm; 0 when there is none.
    pub max_grad_norm: f64,
    /// Generation of the base model.
    pub family: Family,
    /// Whether the target is the velocity.
    pub v_prediction: bool,
    /// Whether nothing of the picture is left at the last timestep.
    pub zero_terminal_snr: bool,
    /// γ of min-SNR weighting.
    pub min_snr_gamma: Option<f64>,
    /// The smallest timestep and one above the largest, where they are not all trained on.
    pub timestep_range: Option<(usize, usize)>,
    /// Weight of regularization images.
    pub prior_loss_weight: f64,
    /// Which hidden state of the text encoder is used, counted from the end.
    pub clip_skip: usize,
    /// Caption length in tokens, without begin and end.
    pub max_token_length: usize,
    /// The run's seed.
    pub seed: u64,
    /// Target size of the pictures.
    pub resolution_px: (u32, u32),
    /// Buckets.
    pub buckets: BucketRecord,
    /// Folders of training images.
    pub subsets: Vec<SubsetRecord>,
    /// Folders of regularization images.
    pub reg_subsets: Vec<SubsetRecord>,
    /// Number of validation images.
    pub num_validation_images: usize,
    /// The share of the images that the seed has chosen for validation, if it has.
    pub validation_split: Option<f64>,
    /// Optimizer steps between validations.
    pub validate_every_n_steps: Option<u64>,
    /// What validation says of these adapters and of the run so far.
    pub judgement: Option<JudgementRecord>,
    /// That the run has gone back and on with half the learning rates, if it has.
    pub rolled_back: Option<String>,
    /// Decay of the average that the file holds in place of the adapters of its step, if it does.
    pub ema_decay: Option<f64>,
    /// Base model.
    pub base_model: BaseModelRecord,
}

/// What validation says at the step of a file; told under `lorasmith_*`, as nobody else has words for it.
#[derive(Debug, Clone, PartialEq)]
pub struct JudgementRecord {
    /// Loss on the held-out images.
    pub validation_loss: f64,
    /// Its standard error.
    pub standard_error: f64,
    /// The course of the loss in words.
    pub verdict: String,
}

/// The aspect-ratio buckets of a run.
#[derive(Debug, Clone, Default)]
pub struct BucketRecord {
    /// Whether there is more than one size.
    pub enabled: bool,
    /// Whether small images stay small.
    pub no_upscale: bool,
    /// Shortest side.
    pub min_px: u32,
    /// Longest side.
    pub max_px: u32,
    /// Size and number of images (with repeats) of each bucket in use.
    pub counts: Vec<((u32, u32), usize)>,
}

/// One folder of images.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SubsetRecord {
    /// The folder's name, such as `10_lumo`.
    pub name: String,
    /// How often each image counts.
    pub repeats: u32,
    /// Number of images.
    pub images: usize,
    /// How many captions have each tag, in the order in which the tags first appear.
    pub tags: Vec<(String, usize)>,
}

/// What a base model is called, and the hashes by which it is recognised.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BaseModelRecord {
    /// File or folder name.
    pub name: String,
    /// First 8 hex digits of the SHA-256 of 64 KiB at 1 MiB of the file.
    pub legacy_hash: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// The VAE that was used in place of its own.
    pub vae: Option<Box<Self>>,
}

impl TrainingRecord {
    /// The `ss_*` and `modelspec.*` entries; the two `sshs_*` hashes come when the file is written.
    pub fn entries(&self) -> BTreeMap<String, String> {
        let mut entries = BTreeMap::new();
        let mut put = |key: &str, value: String| entries.insert(format!("ss_{key}"), value);
        for (key, value) in OFF {
            put(key, (*value).to_owned());
        }
        for (key, value) in &self.data_options {
            put(key, value.clone());
        }
        self.put_run(&mut put);
        self.put_training(&mut put);
        self.put_data(&mut put);
        self.put_modelspec(&mut entries);
        self.put_judgement(&mut entries);
        if let Some(sha256) = &self.inputs_sha256 {
            entries.insert("lorasmith_inputs_sha256".to_owned(), sha256.clone());
        }
        entries
    }

    fn put_run(&self, put: &mut impl FnMut(&str, String) -> Option<String>) {
        put("output_name", self.output_name.clone());
        put("session_id", self.session_id.to_string());
        put("training_started_at", timestamp(self.recorded_at));
        put("max_train_steps", self.max_train_steps.to_string());
        put("steps", self.steps.to_string());
        put("num_epochs", self.num_epochs.to_string());
        put("epoch", self.epoch.to_string());
        put("seed", self.seed.to_string());
        let version = match (self.family, self.v_prediction) {
            (Family::Sd1, false) => "sd_v1",
            (Family::Sd1, true) => "sd_v1_v",
            (Family::Sd2, false) => "sd_v2",
            (Family::Sd2, true) => "sd_v2_v",
            (Family::Sdxl, _) => "sdxl_base_v1-0",
        };
        put("base_model_version", version.to_owned());
        put("v2", boolean(self.family == Family::Sd2));
        put("sd_model_name", self.base_model.name.clone());
        put("sd_model_hash", self.base_model.legacy_hash.clone());
        put("new_sd_model_hash", self.base_model.sha256.clone());
        if let Some(vae) = &self.base_model.vae {
            put("vae_name", vae.name.clone());
            put("vae_hash", vae.legacy_hash.clone());
            put("new_vae_hash", vae.sha256.clone());
        }
    }

    fn put_training(&self, put: &mut impl FnMut(&str, String) -> Option<String>) {
        let network = &self.network;
        let module = if network.is_plain_lora() {
            "networks.lora"
        } else {
            "lycoris.kohya"
        };
        put("network_module", module.to_owned());
        put("network_dim", network.rank.to_string());
        put("network_alpha", float(network.alpha));
        let given = |value: f64| (value != 0.0).then_some(value);
        let neurons = given(network.dropout.neuron);
        put("network_dropout", optional(neurons, float));
        let norm = network.scale_weight_norms;
        put("scale_weight_norms", optional(norm, float));
        let args = network_args(network);
        if !args.is_empty() {
            put("network_args", python_json(&Pairs(&args)));
        }
        let rate = self.unet_lr.or(self.text_encoder_lr).unwrap_or(0.0);
        put("learning_rate", float(rate));
        put("unet_lr", optional(self.unet_lr, float));
        put("text_encoder_lr", optional(self.text_encoder_lr, float));
        put("optimizer", self.optimizer.clone());
        put("lr_scheduler", self.lr_scheduler.clone());
        put("lr_warmup_steps", self.lr_warmup_steps.to_string());
        let accumulation = self.gradient_accumulation_steps;
        put("gradient_accumulation_steps", accumulation.to_string());
        put(
            "gradient_checkpointing",
            boolean(self.gradient_checkpointing),
        );
        put("mixed_precision", self.mixed_precision.to_owned());
        put("max_grad_norm", float(self.max_grad_norm));
        put("zero_terminal_snr", boolean(self.zero_terminal_snr));
        put("min_snr_gamma", optional(self.min_snr_gamma, float));
        put("prior_loss_weight", float(self.prior_loss_weight));
        // sd-scripts knows its own defaults only as "not given".
        let given = |value: usize, default: usize| (value != default).then_some(value);
        let clip_skip = given(self.clip_skip, 1);
        put("clip_skip", optional(clip_skip, |value| value.to_string()));
        let length = given(self.max_token_length, 75);
        put(
            "max_token_length",
            optional(length, |value| value.to_string()),
        );
    }

    fn put_data(&self, put: &mut impl FnMut(&str, String) -> Option<String>) {
        let images = |subsets: &[SubsetRecord]| {
            let counts = subsets.iter().map(|set| set.images * set.repeats as usize);
            counts.sum::<usize>().to_string()
        };
        put("num_train_images", images(&self.subsets));
        put("num_reg_images", images(&self.reg_subsets));
        let validation = self.num_validation_images;
        put("num_validation_images", validation.to_string());
        if let Some(fraction) = self.validation_split {
            put("validation_split", float(fraction));
            put("validation_seed", self.seed.to_string());
        }
        let every = self.validate_every_n_steps;
        put("validate_every_n_steps", optional(every, |n| n.to_string()));
        let batches = self.num_batches_per_epoch;
        put("num_batches_per_epoch", batches.to_string());
        put("batch_size_per_device", self.batch_size.to_string());
        put("total_batch_size", self.batch_size.to_string());
        let (width, height) = self.resolution_px;
        put("resolution", format!("({width}, {height})"));
        put("flip_aug", boolean(self.flip_aug));
        put("color_aug", boolean(self.color_aug));
        put("random_crop", boolean(self.random_crop));
        put(
            "cache_latents",
            boolean(!self.color_aug && !self.random_crop),
        );
        put("dataset_dirs", dataset_dirs(&self.subsets));
        put("reg_dataset_dirs", dataset_dirs(&self.reg_subsets));
        let tags: Vec<_> = self.subsets.iter().chain(&self.reg_subsets).collect();
        let tags: Vec<_> = tags
            .iter()
            .map(|set| (set.name.as_str(), Pairs(&set.tags)))
            .collect();
        put("tag_frequency", python_json(&Pairs(&tags)));
        let buckets = &self.buckets;
        put("enable_bucket", boolean(buckets.enabled));
        put("bucket_no_upscale", boolean(buckets.no_upscale));
        let side = |px: u32| optional(buckets.enabled.then_some(px), |px| px.to_string());
        put("min_bucket_reso", side(buckets.min_px));
        put("max_bucket_reso", side(buckets.max_px));
        put("bucket_info", buckets.info());
    }

    fn put_judgement(&self, entries: &mut BTreeMap<String, String>) {
        if let Some(back) = &self.rolled_back {
            entries.insert("lorasmith_rolled_back".to_owned(), back.clone());
        }
        if let Some(decay) = self.ema_decay {
            entries.insert("lorasmith_weights".to_owned(), "ema".to_owned());
            entries.insert("lorasmith_ema_decay".to_owned(), float(decay));
        }
        let Some(judgement) = &self.judgement else {
            return;
        };
        for (key, value) in [
            ("validation_loss", float(judgement.validation_loss)),
            ("validation_error", float(judgement.standard_error)),
            ("verdict", judgement.verdict.clone()),
        ] {
            entries.insert(format!("lorasmith_{key}"), value);
        }
    }

    fn put_modelspec(&self, entries: &mut BTreeMap<String, String>) {
        let date = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]");
        let (width, height) = self.resolution_px;
        let prediction = if self.v_prediction { "v" } else { "epsilon" };
        let version = concat!("lorasmith/", env!("CARGO_PKG_VERSION"));
        let mut put = |key: &str, value: String| {
            entries.insert(format!("modelspec.{key}"), value);
        };
        put("sai_model_spec", "1.0.1".to_owned());
        let (architecture, implementation) = match (self.family, self.v_prediction) {
            (Family::Sd1, _) => ("stable-diffusion-v1", "diffusers"),
            (Family::Sd2, false) => ("stable-diffusion-v2-512", "diffusers"),
            (Family::Sd2, true) => ("stable-diffusion-v2-768-v", "diffusers"),
            (Family::Sdxl, _) => ("stable-diffusion-xl-v1-base", SGM),
        };
        put("architecture", format!("{architecture}/lora"));
        put("implementation", implementation.to_owned());
        put("implementation_version", version.to_owned());
        put("title", self.output_name.clone());
        put("resolution", format!("{width}x{height}"));
        put("prediction_type", prediction.to_owned());
        // The format has no time zone; this is UTC.
        put("date", self.recorded_at.format(date).unwrap_or_default());
        if let Some((min, max)) = self.timestep_range {
            put("timestep_range", format!("{min},{max}"));
        }
        if self.clip_skip != 1 {
            put("encoder_layer", self.clip_skip.to_string());
        }
    }
}

impl BucketRecord {
    fn info(&self) -> String {
        if !self.enabled {
            return "null".to_owned();
        }
        let buckets = self.counts.iter().enumerate().map(|(i, (size, count))| {
            let resolution = Value::from(vec![size.0, size.1]);
            let entry = vec![("resolution", resolution), ("count", Value::from(*count))];
            (i.to_string(), entry)
        });
        let buckets = buckets.collect::<Vec<_>>();
        let buckets: Vec<_> = buckets
            .iter()
            .map(|(i, entry)| (i.as_str(), Pairs(entry)))
            .collect();
        python_json(&Pairs(&[("buckets", Pairs(&buckets))]))
    }
}

/// What sd-scripts is told beside dim and alpha, `--network_args`: for `networks.lora`, or LyCORIS.
fn network_args(network: &NetworkSettings) -> Vec<(&'static str, String)> {
    let mut args = Vec::new();
    let mut put = |key: &'static str, value: Option<String>| {
        args.extend(value.map(|value| (key, value)));
    };
    let on = |given: bool| given.then(|| boolean(true));
    if !network.is_plain_lora() {
        // sd-scripts' own layers are those of this preset, or with convolutions nearly those of `full`.
        let own = match network.conv() {
            Some(_) => "full",
            None => "attn-mlp",
        };
        let preset = network.preset().map_or(own, |preset| preset.name());
        put("preset", Some(preset.to_owned()));
        put("algo", Some(network.kind.algo().to_owned()));
    }
    if let Some((rank, alpha)) = network.conv() {
        put("conv_dim", Some(rank.to_string()));
        put("conv_alpha", Some(float(alpha)));
    }
    put("dora_wd", on(network.dora));
    put("use_tucker", on(network.tucker));
    put("factor", network.factor.map(|factor| factor.to_string()));
    put("decompose_both", on(network.decompose_both));
    put("full_matrix", on(network.full_matrix));
    let chance = |value: f64| (value != 0.0).then(|| float(value));
    put("rank_dropout", chance(network.dropout.rank));
    put("module_dropout", chance(network.dropout.module));
    let blocks = &network.blocks;
    let whole = |list: &Option<Vec<usize>>| {
        let texts = list.as_ref()?.iter().map(usize::to_string);
        Some(texts.collect::<Vec<_>>().join(","))
    };
    let real = |list: &Option<Vec<f64>>| {
        let texts = list.as_ref()?.iter().copied().map(float);
        Some(texts.collect::<Vec<_>>().join(","))
    };
    put("block_dims", whole(&blocks.dims));
    put("block_alphas", real(&blocks.alphas));
    put("conv_block_dims", whole(&blocks.conv_dims));
    put("conv_block_alphas", real(&blocks.conv_alphas));
    put("down_lr_weight", blocks.down_lr_weight.clone());
    put("mid_lr_weight", blocks.mid_lr_weight.clone());
    put("up_lr_weight", blocks.up_lr_weight.clone());
    put("block_lr_zero_threshold", chance(blocks.lr_zero_threshold));
    let plus = &network.lora_plus;
    put("loraplus_lr_ratio", plus.ratio.map(float));
    put("loraplus_unet_lr_ratio", plus.unet_ratio.map(float));
    put(
        "loraplus_text_encoder_lr_ratio",
        plus.text_encoder_ratio.map(float),
    );
    args
}

fn dataset_dirs(subsets: &[SubsetRecord]) -> String {
    let entries: Vec<_> = subsets
        .iter()
        .map(|set| {
            let repeats = ("n_repeats", set.repeats as usize);
            (set.name.as_str(), [repeats, ("img_count", set.images)])
        })
        .collect();
    let entries: Vec<_> = entries
        .iter()
        .map(|(name, entry)| (*name, Pairs(entry)))
        .collect();
    python_json(&Pairs(&entries))
}

/// The base model's entry: sd-scripts' two hashes of a file, and its word for a folder.
pub fn base_model_record(path: &std::path::Path) -> std::io::Result<BaseModelRecord> {
    use sha2::{Digest, Sha256};
    use std::io::{Read, Seek, SeekFrom};

    let name = path.file_name().unwrap_or(path.as_os_str());
    let name = name.to_string_lossy().into_owned();
    if path.is_dir() {
        let word = "IsADirectory".to_owned();
        return Ok(BaseModelRecord {
            name,
            legacy_hash: word.clone(),
            sha256: word,
            vae: None,
        });
    }
    let mut file = std::fs::File::open(path)?;
    let mut window = Vec::new();
    file.seek(SeekFrom::Start(0x10_0000))?;
    file.by_ref().take(0x1_0000).read_to_end(&mut window)?;
    file.rewind()?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        digest.update(&buffer[..count]);
    }
    Ok(BaseModelRecord {
        name,
        legacy_hash: hex::encode(Sha256::digest(&window))[..8].to_owned(),
        sha256: hex::encode(digest.finalize()),
        vae: None,
    })
}

/// The tag counts of a folder's captions: lower-case, comma-separated, stripped, in order of appearance.
pub fn tag_frequency<'a>(captions: impl IntoIterator<Item = &'a str>) -> Vec<(String, usize)> {
    let mut order: Vec<(String, usize)> = Vec::new();
    let mut index: BTreeMap<String, usize> = BTreeMap::new();
    for caption in captions {
        for tag in caption.split(',').map(|tag| tag.trim().to_lowercase()) {
            if tag.is_empty() {
                continue;
            }
            let at = *index.entry(tag.clone()).or_insert_with(|| {
                order.push((tag, 0));
                order.len() - 1
            });
            order[at].1 += 1;
        }
    }
    order
}

/// Options that have no counterpart here, with the value that sd-scripts writes when they are off.
const OFF: &[(&str, &str)] = &[
    ("adaptive_noise_scale", "None"),
    ("caption_dropout_every_n_epochs", "0"),
    ("caption_dropout_rate", "0.0"),
    ("caption_tag_dropout_rate", "0.0"),
    ("debiased_estimation", "False"),
    ("face_crop_aug_range", "None"),
    ("fp8_base", "False"),
    ("fp8_base_unet", "False"),
    ("full_fp16", "False"),
    ("huber_c", "0.1"),
    ("huber_scale", "1.0"),
    ("huber_schedule", "snr"),
    ("ip_noise_gamma", "None"),
    ("ip_noise_gamma_random_strength", "False"),
    ("keep_tokens", "0"),
    ("loss_type", "l2"),
    ("lowram", "False"),
    ("max_validation_steps", "None"),
    ("multires_noise_discount", "0.3"),
    ("multires_noise_iterations", "None"),
    ("network_dropout", "None"),
    ("noise_offset", "None"),
    ("noise_offset_random_strength", "False"),
    ("resize_interpolation", "None"),
    ("scale_weight_norms", "None"),
    ("sd_scripts_commit_hash", "None"),
    ("shuffle_caption", "False"),
    ("training_comment", "None"),
    ("validate_every_n_epochs", "None"),
    ("validation_seed", "None"),
    ("validation_split", "0.0"),
];

/// `str(float)` of Python: the shortest digits that read back, an exponent of two digits outside 1e-4 … 1e16.
pub fn float(value: f64) -> String {
    let size = value.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) && value.is_finite() {
        let text = format!("{value:e}");
        if let Some((digits, exponent)) = text.split_once('e') {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(exponent) => ('-', exponent),
                None => ('+', exponent),
            };
            return format!("{digits}e{sign}{exponent:0>2}");
        }
    }
    let text = format!("{value}");
    if text.contains('.') || !value.is_finite() {
        text
    } else {
        format!("{text}.0")
    }
}

fn boolean(value: bool) -> String {
    if value { "True" } else { "False" }.to_owned()
}

fn optional<T>(value: Option<T>, text: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "None".to_owned(), text)
}

fn timestamp(at: OffsetDateTime) -> String {
    float(at.unix_timestamp_nanos() as f64 / 1e9)
}

/// A JSON object that keeps its order.
struct Pairs<'a, K, V>(&'a [(K, V)]);

impl<K: AsRef<str>, V: Serialize> Serialize for Pairs<'_, K, V> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key.as_ref(), value)))
    }
}

/// `json.dumps` of Python: a space after `,` and `:`, everything beyond ASCII escaped.
fn python_json(value: &impl Serialize) -> String {
    struct PythonStyle;
    impl serde_json::ser::Formatter for PythonStyle {
        fn begin_array_value<W: ?Sized + std::io::Write>(
            &mut self,
            writer: &mut W,
            first: bool,
        ) -> std::io::Result<()> {
            writer.write_all(if first { b"" } else { b", " })
        }
        fn begin_object_key<W: ?Sized + std::io::Write>(
            &mut self,
            writer: &mut W,
            first: bool,
        ) -> std::io::Result<()> {
            writer.write_all(if first { b"" } else { b", " })
        }
        fn begin_object_value<W: ?Sized + std::io::Write>(
            &mut self,
            writer: &mut W,
        ) -> std::io::Result<()> {
            writer.write_all(b": ")
        }
        fn write_string_fragment<W: ?Sized + std::io::Write>(
            &mut self,
            writer: &mut W,
            fragment: &str,
        ) -> std::io::Result<()> {
            let mut units = [0; 2];
            for character in fragment.chars() {
                if character.is_ascii() {
                    write!(writer, "{character}")?;
                } else {
                    for unit in character.encode_utf16(&mut units) {
                        write!(writer, "\\u{unit:04x}")?;
                    }
                }
            }
            Ok(())
        }
    }
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, PythonStyle);
    // Strings and numbers into memory: nothing here can fail.
    if value.serialize(&mut serializer).is_err() {
        return "null".to_owned();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> TrainingRecord {
        TrainingRecord {
            output_name: "k256_fp32".to_owned(),
            session_id: 3_572_901_700,
            data_options: Vec::new(),
            recorded_at: OffsetDateTime::UNIX_EPOCH,
            inputs_sha256: None,
            network: NetworkSettings {
                rank: 32,
                alpha: 32.0,
                ..NetworkSettings::default()
            },
            unet_lr: None,
            text_encoder_lr: Some(1e-4),
            optimizer: "torch.optim.adamw.AdamW".to_owned(),
            lr_scheduler: "constant".to_owned(),
            lr_warmup_steps: 0,
            max_train_steps: 8,
            steps: 8,
            num_epochs: 1,
            epoch: 1,
            num_batches_per_epoch: 40,
            batch_size: 1,
            gradient_accumulation_steps: 1,
            gradient_checkpointing: false,
            flip_aug: false,
            color_aug: false,
            random_crop: false,
            mixed_precision: "no",
            max_grad_norm: 1.0,
            family: Family::Sd1,
            v_prediction: false,
            zero_terminal_snr: false,
            min_snr_gamma: None,
            timestep_range: None,
            prior_loss_weight: 1.0,
            clip_skip: 1,
            max_token_length: 75,
            seed: 42,
            resolution_px: (256, 256),
            buckets: BucketRecord::default(),
            subsets: vec![SubsetRecord {
                name: "10_my_concept".to_owned(),
                repeats: 10,
                images: 4,
                tags: tag_frequency([
                    "my concept, a red square, simple",
                    "My Concept, a blue circle, abstract",
                    "my concept, noisy, green stripes",
                    "my concept, portrait of a cat, best quality",
                ]),
            }],
            reg_subsets: Vec::new(),
            num_validation_images: 0,
            validation_split: None,
            validate_every_n_steps: None,
            judgement: None,
            rolled_back: None,
            ema_decay: None,
            base_model: BaseModelRecord {
                name: "sd15_full_random_fp16.safetensors".to_owned(),
                legacy_hash: "c6406a4c".to_owned(),
                sha256: "8913b46a435f6c6d0750ed910542b35842117ed42684896d879abc34a1f3f5b6"
                    .to_owned(),
                vae: None,
            },
        }
    }

    /// Every entry of a file that sd-scripts really trained, except those that cannot be equal.
    #[test]
    fn entries_are_those_of_a_file_from_sd_scripts() {
        let text = include_str!("../../tests/fixtures/kohya/kohya_lora_metadata_sd15.json");
        let theirs: BTreeMap<String, String> = serde_json::from_str(text).expect("a fixture");
        let ours = record().entries();
        let of_the_writer = [
            "modelspec.date",
            "modelspec.implementation_version",
            "ss_sd_scripts_commit_hash",
            "ss_training_started_at",
            "ss_text_encoder_lr",
        ];
        // The hashes come when the file is written; a time of the end would make every file another one.
        let not_here = [
            "sshs_model_hash",
            "sshs_legacy_hash",
            "ss_training_finished_at",
        ];
        for (key, value) in &theirs {
            if not_here.contains(&key.as_str()) {
                continue;
            }
            let found = ours.get(key).unwrap_or_else(|| panic!("{key} is missing"));
            if !of_the_writer.contains(&key.as_str()) {
                assert_eq!(found, value, "{key}");
            }
        }
        assert_eq!(ours.len(), theirs.len() - not_here.len());
    }

    #[test]
    fn generations_are_told_in_the_words_of_sd_scripts() {
        for (family, v_prediction, version, architecture, v2) in [
            (
                Family::Sd1,
                true,
                "sd_v1_v",
                "stable-diffusion-v1/lora",
                "False",
            ),
            (
                Family::Sd2,
                false,
                "sd_v2",
                "stable-diffusion-v2-512/lora",
                "True",
            ),
            (
                Family::Sd2,
                true,
                "sd_v2_v",
                "stable-diffusion-v2-768-v/lora",
                "True",
            ),
            (
                Family::Sdxl,
                false,
                "sdxl_base_v1-0",
                "stable-diffusion-xl-v1-base/lora",
                "False",
            ),
        ] {
            let record = TrainingRecord {
                family,
                v_prediction,
                ..record()
            };
            let entries = record.entries();
            assert_eq!(entries["ss_base_model_version"], version);
            assert_eq!(entries["modelspec.architecture"], architecture);
            assert_eq!(entries["ss_v2"], v2);
            let sgm = entries["modelspec.implementation"] == SGM;
            assert_eq!(sgm, family == Family::Sdxl);
        }
    }

    #[test]
    fn numbers_are_spelled_as_in_python() {
        for (value, text) in [
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (2.5e-7, "2.5e-07"),
            (1.0, "1.0"),
            (0.0, "0.0"),
            (32.0, "32.0"),
            (1e16, "1e+16"),
            (1_795_412_561.349_575_3, "1795412561.3495753"),
        ] {
            assert_eq!(float(value), text);
        }
    }

    #[test]
    fn json_is_spelled_as_in_python() {
        let pairs = [("é \"x\"", vec![1, 2]), ("🎨", vec![])];
        assert_eq!(
            python_json(&Pairs(&pairs)),
            r#"{"\u00e9 \"x\"": [1, 2], "\ud83c\udfa8": []}"#
        );
    }

    #[test]
    fn convolution_ranks_and_buckets_are_told() {
        let mut record = record();
        record.network.conv_rank = Some(8);
        record.buckets = BucketRecord {
            enabled: true,
            no_upscale: false,
            min_px: 256,
            max_px: 1024,
            counts: vec![((320, 192), 40)],
        };
        let entries = record.entries();
        assert_eq!(
            entries["ss_network_args"],
            r#"{"conv_dim": "8", "conv_alpha": "1.0"}"#
        );
        assert_eq!(
            entries["ss_bucket_info"],
            r#"{"buckets": {"0": {"resolution": [320, 192], "count": 40}}}"#
        );
    }
}
