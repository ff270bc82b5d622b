//! Compiles C plugins, and drives one parameter through an optimizer.

use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{Device, Tensor, TensorData};
use lorasmith::plugin_host::{PluginFolders, PluginHost, PluginInfo};
use lorasmith::training::optimizer::{Optimizer, OptimizerError, ParamUpdate, ParamValue};
use tempfile::TempDir;

/// A plugin folder of one test.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The path of a library of this folder.
    pub fn library(&self, name: &str) -> PathBuf {
        self.path().join(format!("{DLL_PREFIX}{name}{DLL_SUFFIX}"))
    }

    /// Builds a C source of the repository; `flags` are such as `-DMAJOR=2`.
    pub fn build(&self, name: &str, source: &str, flags: &[&str]) -> PathBuf {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let library = self.library(name);
        let built = Command::new("cc")
            .args([
                "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", "-O1",
                "-I",
            ])
            .arg(root.join("plugins/abi/include"))
            .args(flags)
            .arg("-o")
            .args([&library, &root.join(source)])
            .status()
            .expect("a C compiler called `cc`");
        assert!(built.success());
        library
    }

    pub fn discover(&self) -> PluginHost {
        discover(&[self.path()], None)
    }
}

/// A host over these folders; the program's own folder comes after them.
pub fn discover(folders: &[&Path], allowed_sha256: Option<Vec<String>>) -> PluginHost {
    PluginHost::discover(&PluginFolders {
        folders: folders.iter().map(|&folder| folder.to_owned()).collect(),
        allowed_sha256,
    })
}

/// What the host says of one path.
pub fn info<'a>(host: &'a PluginHost, path: &Path) -> &'a PluginInfo {
    host.plugins()
        .iter()
        .find(|plugin| plugin.path == path)
        .unwrap_or_else(|| panic!("{} is not listed", path.display()))
}

/// One parameter on the CPU.
pub struct Weight {
    pub value: Tensor<4>,
    shape: Vec<usize>,
    pub lr: f64,
}

impl Weight {
    pub fn new(values: &[f32], shape: &[usize], lr: f64) -> Self {
        Self {
            value: padded(values, shape),
            shape: shape.to_vec(),
            lr,
        }
    }

    pub fn step(
        &mut self,
        optimizer: &mut dyn Optimizer,
        step: u64,
        grad: &[f32],
    ) -> Result<(), OptimizerError> {
        let grad = padded(grad, &self.shape);
        let mut params = [ParamUpdate {
            id: 7,
            name: "lora_unet_a.lora_down.weight",
            shape: &self.shape,
            value: &mut self.value,
            grad,
            grad_scale: 1.0,
            lr: self.lr,
            weight_decay: true,
        }];
        optimizer.step(step, &mut params)
    }

    pub fn eval(
        &self,
        optimizer: &mut dyn Optimizer,
    ) -> Result<Option<Vec<Tensor<4>>>, OptimizerError> {
        optimizer.eval(&[ParamValue {
            id: 7,
            name: "lora_unet_a.lora_down.weight",
            shape: &self.shape,
            value: &self.value,
        }])
    }

    pub fn values(&self) -> Vec<f32> {
        self.value
            .clone()
            .into_data()
            .try_into_vec_as::<f32>()
            .unwrap()
    }
}

fn padded(values: &[f32], shape: &[usize]) -> Tensor<4> {
    let mut dims = [1; 4];
    dims[4 - shape.len()..].copy_from_slice(shape);
    Tensor::from_data(TensorData::new(values.to_vec(), dims), &Device::flex())
}

/// A gradient that changes from step to step and element to element.
pub fn gradient(step: u64, elements: usize) -> Vec<f32> {
    (0..elements)
        .map(|i| ((step * 7 + i as u64 * 3) as f32).sin() * 0.3)
        .collect()
}
