//! The command line: `serve`, `worker`, `demo`, `verify`, `plugins`, `devices`, `openapi`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use uuid::Uuid;

use crate::config::Overrides;

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
    /// Train one run; the service starts this by itself.
    Worker(WorkerArgs),
    /// Watch the whole path once: upload, train, sample, download, on a small bundled model.
    Demo(DemoArgs),
    /// Compare this build and a device with golden tensors of the reference implementation.
    Verify(VerifyArgs),
    /// Write one output of the UNet with a LoRA, with its inputs, for other programs to compare with.
    LoraOutput(LoraOutputArgs),
    /// List optimizer and scheduler plugins: found, loaded, refused and why.
    Plugins(JsonArgs),
    /// List the compute devices of this machine.
    Devices(JsonArgs),
    /// Print the OpenAPI document.
    Openapi,
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
}

impl From<ServeArgs> for Overrides {
    fn from(args: ServeArgs) -> Self {
        Self {
            bind: args.bind,
            data_dir: args.data_dir,
            models_dir: args.models_dir,
            device: args.device,
        }
    }
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
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
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

/// Flags of the listing commands.
#[derive(Debug, Args)]
pub struct JsonArgs {
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}
