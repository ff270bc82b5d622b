//! Golden tensors of the reference implementation against this build on a device.
//!
//! A fixture is a folder with `diffusers/` (the model), a single-file checkpoint of the same weights beside it, and
//! `goldens/` with what torch and diffusers computed from them. Any folder of that layout works.

mod goldens;
mod models;
mod objectives;
mod probe;
mod report;
mod samples;
mod training;

use std::path::{Path, PathBuf};

use crate::diffusion::devices::{self, DeviceSpec};
use crate::diffusion::{FILE_ENDINGS, LoadError, LoadOptions, Precision, StableDiffusion};
use crate::plugin_host::PluginHost;

pub use goldens::GoldenError;
pub use probe::lora_output;
pub use report::{Item, VerifyReport};

use goldens::Goldens;
use report::Checker;

/// What to verify.
#[derive(Clone, Debug)]
pub struct VerifyOptions {
    /// The fixture.
    pub fixture: PathBuf,
    /// The device.
    pub device: DeviceSpec,
    /// Only the part that stays quick on a slow device.
    pub quick: bool,
    /// What text encoder and UNet compute in. In less than f32 their outputs alone are compared: losses and weights
    /// of the goldens are those of f32.
    pub precision: Precision,
}

/// Why nothing could be compared.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The fixture is not laid out as one.
    #[error("{}: {message}", path.display())]
    Layout {
        /// The file or folder.
        path: PathBuf,
        /// What was expected.
        message: String,
    },
    /// A golden file cannot be used.
    #[error(transparent)]
    Golden(#[from] GoldenError),
    /// The model cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The device cannot be opened.
    #[error(transparent)]
    Device(#[from] devices::DeviceError),
    /// Training has failed.
    #[error(transparent)]
    Train(#[from] crate::training::TrainError),
    /// A LoRA file cannot be used.
    #[error(transparent)]
    Network(#[from] crate::networks::NetworkError),
    /// The AdamW plugin cannot be used.
    #[error(transparent)]
    Optimizer(#[from] crate::training::OptimizerError),
}

/// Compares every golden that there is.
///
/// # Errors
/// When the fixture, the device or the AdamW plugin cannot be used. A golden that is missed is no error: see the report.
pub fn run(options: &VerifyOptions, plugins: &PluginHost) -> Result<VerifyReport, VerifyError> {
    let device = devices::open(options.device)?;
    device.check(options.precision)?;
    let tolerance = models::output_tolerance(options.precision, &device.info);
    let goldens = Goldens::open(&options.fixture.join("goldens"), &device.device)?;
    let folder = options.fixture.join("diffusers");
    let mut report = VerifyReport::new(&device.info);
    let mut layouts = vec![("diffusers", folder.clone(), None)];
    if let Some(file) = single_file(&options.fixture)? {
        layouts.push(("single file", file, Some(folder)));
    }
    if options.quick {
        layouts.truncate(1); // a slow device need not compute everything twice
    }
    for (name, path, config_dir) in layouts {
        let load = || {
            StableDiffusion::load(
                &path,
                &LoadOptions {
                    config_dir: config_dir.clone(),
                    precision: options.precision,
                    ..LoadOptions::new(&device.device)
                },
            )
        };
        let mut check = Checker::new(name, &mut report);
        let mut model = load()?;
        if options.precision != Precision::Fp32 {
            models::networks(&mut check, &goldens, &model, tolerance, options.quick)?;
            continue;
        }
        models::check(&mut check, &goldens, &model, options.quick)?;
        if config_dir.is_none() {
            objectives::check(&mut check, &goldens, &model.schedule)?; // whatever the layout
        }
        if options.quick {
            continue; // a backward pass takes a slow device minutes
        }
        samples::check(&mut check, &goldens, &mut model)?;
        drop(model); // it has a LoRA now, and training loads its own
        training::check(&mut check, &goldens, load, plugins)?;
    }
    Ok(report)
}

/// The checkpoint beside the folder of the same model.
fn single_file(fixture: &Path) -> Result<Option<PathBuf>, VerifyError> {
    let broken = |message: String| VerifyError::Layout {
        path: fixture.to_owned(),
        message,
    };
    let entries = std::fs::read_dir(fixture).map_err(|error| broken(error.to_string()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let ending = path.extension().and_then(|ending| ending.to_str());
            ending.is_some_and(|ending| FILE_ENDINGS.contains(&ending))
        })
        .collect();
    files.sort();
    match files.len() {
        0 | 1 => Ok(files.pop()),
        more => Err(broken(format!(
            "found {more} single-file checkpoints, expected one"
        ))),
    }
}
