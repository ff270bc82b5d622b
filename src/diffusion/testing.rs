//! Golden tensors for the tests of the models.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::weights::Weights;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-sd15")
}

/// The weights of one component of the tiny model, and its folder.
pub fn weights(component: &str) -> (Weights, PathBuf) {
    let folder = fixture().join("diffusers").join(component);
    let file = ["diffusion_pytorch_model.safetensors", "model.safetensors"]
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.exists())
        .expect("a weight file");
    (Weights::open(&[file]).unwrap(), folder)
}

/// One file of golden tensors.
pub struct Goldens(Weights);

impl Goldens {
    pub fn open(name: &str) -> Self {
        let file = fixture()
            .join("goldens")
            .join(format!("{name}.safetensors"));
        Self(Weights::open(&[file]).unwrap())
    }

    pub fn tensor<const D: usize>(&self, key: &str) -> Tensor<D> {
        let (values, shape) = self.0.read_f32(key).unwrap();
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    pub fn ids(&self, key: &str) -> Vec<Vec<u32>> {
        let (bytes, _, shape) = self.0.read_bytes(key).unwrap();
        let ids: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|id| u32::from_le_bytes(id.try_into().unwrap()))
            .collect();
        ids.chunks(shape[1]).map(<[u32]>::to_vec).collect()
    }

    pub fn check<const D: usize>(&self, key: &str, actual: Tensor<D>, tolerance: f32) {
        let (expected, shape) = self.0.read_f32(key).unwrap();
        assert_eq!(actual.dims().as_slice(), shape, "{key}");
        let actual: Vec<f32> = actual
            .into_data()
            .convert_dtype(DType::F32)
            .try_into_vec()
            .unwrap();
        let worst = actual
            .iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        println!("{key}: {worst:.2e}");
        assert!(
            worst <= tolerance,
            "{key}: off by {worst:e}, allowed {tolerance:e}"
        );
    }
}
