//! The command line: `serve`, `keys`, `worker`, `demo`, `verify`, `bench`, `lora`, `plugins`, `devices`, `doctor`,
//! `openapi`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use uuid::Uuid;

use crate::access::Scope;
use crate::bench::ModelSource;
use crate::config::Overrides;
use crate::diffusion::Family;
use crate::lora_commands::LoraArgs;
use crate::networks::NetworkKind;
use crate::training::{ComputePrecision, GradientCheckpointing};

/// Trains LoRA adapters for Stable Diffusion on any GPU, behind a REST API.
#[derive(Debug, Parser)]
#[command(version, about, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Settings file (TOML); `lorasmith.toml` in the working directory when there is one.
    #[arg(long, global = true, env = "LORASMITH_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// The program's commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the REST API; documentation at /docs.
    Serve(ServeArgs),
    /// Make, list and revoke keys of the API.
    Keys(KeysArgs),
    /// Train one run; the service starts this by itself.
    Worker(WorkerArgs),
    /// Watch the whole path once: upload, train, sample, download, on a small bundled model.
    Demo(DemoArgs),
    /// Compare this build and a device with golden tensors of the reference implementation.
    Verify(VerifyArgs),
    /// Measure time and memory of training steps on a full-size model, by default one with random weights.
    Bench(BenchArgs),
    /// Write one output of the UNet with a LoRA, with its inputs, for other programs to compare with.
    LoraOutput(LoraOutputArgs),
    /// Look into LoRA files, merge, resize and rename them; also those of other programs.
    Lora(LoraArgs),
    /// List optimizer and scheduler plugins: found, loaded, refused and why.
    Plugins(JsonArgs),
    /// List the compute devices of this machine.
    Devices(JsonArgs),
    /// Tell what this binary holds and which devices there are, and check GPUs against the CPU.
    Doctor(DoctorArgs),
    /// Print the OpenAPI document.
    Openapi(OpenapiArgs),
    /// Decode a picture and tell what was found; the service starts this for files that are to be trusted least.
    #[command(hide = true)]
    ExaminePicture(ExaminePictureArgs),
}

/// Flags of `serve`; each has a setting of the same name.
#[derive(Debug, Default, Args)]
pub struct ServeArgs {
    /// Address and port to listen on.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub bind: Option<SocketAddr>,
    /// Where the database and files are kept.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where base models are looked for.
    #[arg(long, value_name = "DIR")]
    pub models_dir: Option<PathBuf>,
    /// Device of runs that name none: `auto`, `cpu`, `vulkan:0`.
    #[arg(long)]
    pub device: Option<String>,
    /// How many runs may train at the same time on one device.
    #[arg(long, value_name = "N")]
    pub max_runs_per_device: Option<usize>,
}

impl From<ServeArgs> for Overrides {
    fn from(args: ServeArgs) -> Self {
        Self {
            bind: args.bind,
            data_dir: args.data_dir,
            models_dir: args.models_dir,
            device: args.device,
            max_runs_per_device: args.max_runs_per_device,
        }
    }
}

/// Flags of `keys`.
#[derive(Debug, Args)]
pub struct KeysArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: KeysCommand,
    /// Where the service keeps its files.
    #[arg(long, global = true, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
}

/// What can be done with keys.
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Make a key and print it; it cannot be shown again.
    Create {
        /// What it is for.
        #[arg(long)]
        name: String,
        /// What it allows: `read`, `write` (and read), `admin` (and everything else). Can be given more than once.
        #[arg(
            long = "scope",
            value_name = "SCOPE",
            required = true,
            value_delimiter = ','
        )]
        scopes: Vec<Scope>,
        /// Print JSON instead of words.
        #[arg(long)]
        json: bool,
    },
    /// List the keys, without the keys themselves.
    List(JsonArgs),
    /// Make a key useless, within a second and for good.
    Revoke {
        /// Its id, as `list` shows it.
        id: Uuid,
    },
}

/// Flags of `openapi`.
#[derive(Debug, Args)]
pub struct OpenapiArgs {
    /// Version of the OpenAPI specification: 3.0 is for generators that do not know 3.1.
    #[arg(long, value_enum, default_value_t = OpenapiVersion::V3_1)]
    pub spec: OpenapiVersion,
}

/// Versions of the OpenAPI specification.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OpenapiVersion {
    /// 3.1
    #[value(name = "3.1")]
    V3_1,
    /// 3.0.3
    #[value(name = "3.0")]
    V3_0,
}

/// Flags of `examine-picture`.
#[derive(Debug, Args)]
pub struct ExaminePictureArgs {
    /// Width times height, at most.
    #[arg(long)]
    pub pixels: u64,
    /// The file.
    pub path: PathBuf,
}

/// Flags of `worker`.
#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// The run to train.
    #[arg(long, value_name = "ID")]
    pub run: Uuid,
}

/// Flags of `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Where the LoRA, the pictures and the curl commands go.
    #[arg(long, value_name = "DIR", default_value = "demo-output")]
    pub output: PathBuf,
    /// Folder with the demo's `base/` and `dataset/`.
    #[arg(long, value_name = "DIR")]
    pub assets: Option<PathBuf>,
    /// Optimizer steps.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// Device to train on: `auto`, `cpu`, `vulkan:0`.
    #[arg(long, default_value = "auto")]
    pub device: String,
}

/// Flags of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Folder with `diffusers/`, a single-file checkpoint and `goldens/`.
    #[arg(long, value_name = "DIR")]
    pub fixture: PathBuf,
    /// Device to check: `auto`, `cpu`, `vulkan:0`.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Only the part that stays quick on a slow device.
    #[arg(long)]
    pub quick: bool,
    /// Number format of text encoder and UNet; below fp32 their outputs alone are compared.
    #[arg(long, value_enum, default_value_t = PrecisionName::Fp32)]
    pub precision: PrecisionName,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Flags of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Generation of the model.
    #[arg(long, value_enum, default_value_t = FamilyName::Sd1)]
    pub family: FamilyName,
    /// Side of the pictures, a multiple of 64.
    #[arg(long, value_name = "PIXELS", default_value = "512", value_parser = resolution_px)]
    pub resolution: u32,
    /// Steps to time; one more is done before them and told apart.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub steps: u32,
    /// Pictures per step.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub batch_size: u32,
    /// Kind of the adapters, on the layers that each kind has by itself.
    #[arg(long, value_enum, default_value_t = KindName::Lora)]
    pub network_kind: KindName,
    /// Rank of the adapters, of UNet and text encoder.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub rank: u32,
    /// Leave the text encoders as they are: the caption is encoded once, and their memory given back.
    #[arg(long)]
    pub unet_only: bool,
    /// Whether activations are computed again in the backward pass.
    #[arg(long, value_enum, default_value_t = CheckpointingName::None)]
    pub gradient_checkpointing: CheckpointingName,
    /// Number format of the computation.
    #[arg(long, value_enum, default_value_t = PrecisionName::Fp32)]
    pub precision: PrecisionName,
    /// Optimizer, by its id, with the settings that it has by itself.
    #[arg(long, value_name = "ID", default_value = "adamw")]
    pub optimizer: String,
    /// Device to train on: `auto`, `cpu`, `vulkan:0`.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// A model of your own: a diffusers folder or a single file.
    #[arg(long, value_name = "PATH", conflicts_with = "model_file")]
    pub model: Option<PathBuf>,
    /// Where random weights are kept (2 GB, SDXL 7 GB); written when not there. In the folder for temporary files by default.
    #[arg(long, value_name = "FILE", value_parser = safetensors_file)]
    pub model_file: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

impl BenchArgs {
    /// What is trained on.
    pub fn model(&self) -> ModelSource {
        match &self.model {
            Some(path) => ModelSource::Own(path.clone()),
            None => ModelSource::Random(self.model_file.clone()),
        }
    }
}

/// Generations of models that can be measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FamilyName {
    /// Stable Diffusion 1.5.
    Sd1,
    /// Stable Diffusion 2.1.
    Sd2,
    /// Stable Diffusion XL.
    Sdxl,
}

impl From<FamilyName> for Family {
    fn from(name: FamilyName) -> Self {
        match name {
            FamilyName::Sd1 => Self::Sd1,
            FamilyName::Sd2 => Self::Sd2,
            FamilyName::Sdxl => Self::Sdxl,
        }
    }
}

/// Kinds of adapters.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum KindName {
    /// Two narrow matrices.
    Lora,
    /// The same, on convolutions too.
    Locon,
    /// The element-wise product of two such products.
    Loha,
    /// The Kronecker product of two matrices.
    Lokr,
    /// One factor for each output or input.
    Ia3,
}

impl From<KindName> for NetworkKind {
    fn from(name: KindName) -> Self {
        match name {
            KindName::Lora => Self::Lora,
            KindName::Locon => Self::Locon,
            KindName::Loha => Self::Loha,
            KindName::Lokr => Self::Lokr,
            KindName::Ia3 => Self::Ia3,
        }
    }
}

/// Kinds of gradient checkpointing.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum CheckpointingName {
    /// All activations are kept.
    None,
    /// What goes into each block is kept, and the block runs again.
    Blocks,
}

impl From<CheckpointingName> for GradientCheckpointing {
    fn from(name: CheckpointingName) -> Self {
        match name {
            CheckpointingName::None => Self::None,
            CheckpointingName::Blocks => Self::Blocks,
        }
    }
}

/// Number formats of the computation.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PrecisionName {
    /// 32-bit floats.
    Fp32,
    /// f16 with loss scaling; on the CPU two parts of bf16.
    Fp16,
    /// bf16.
    Bf16,
}

impl From<PrecisionName> for ComputePrecision {
    fn from(name: PrecisionName) -> Self {
        match name {
            PrecisionName::Fp32 => Self::Fp32,
            PrecisionName::Fp16 => Self::Fp16,
            PrecisionName::Bf16 => Self::Bf16,
        }
    }
}

fn resolution_px(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(side @ 64..=4096) if side % 64 == 0 => Ok(side),
        _ => Err("expected a multiple of 64 from 64 to 4096".to_owned()),
    }
}

fn safetensors_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.extension().is_some_and(|end| end == "safetensors") {
        Ok(path)
    } else {
        Err("expected a name that ends with `.safetensors`".to_owned())
    }
}

/// Flags of `lora-output`.
#[derive(Debug, Args)]
pub struct LoraOutputArgs {
    /// The base model: a diffusers folder or a single file.
    #[arg(long, value_name = "PATH")]
    pub base: PathBuf,
    /// The LoRA file.
    #[arg(long, value_name = "FILE")]
    pub lora: PathBuf,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Flags of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// A device to check besides the hardware GPUs, such as a software one: `vulkan:0`.
    #[arg(long)]
    pub device: Option<String>,
    /// Check again what was checked before: after a system update on macOS or Windows, whose drivers have no version.
    #[arg(long)]
    pub again: bool,
    /// Where the service keeps its files: results are remembered there.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Flags of the listing commands.
#[derive(Debug, Args)]
pub struct JsonArgs {
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}
