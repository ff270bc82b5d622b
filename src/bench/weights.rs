//! A file with random weights, for measuring where no real model is at hand. A training on it learns nothing.

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Write};
use std::path::Path;

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::BenchError;
use super::layout::TensorSpec;

/// Told in the file, so that one of an older recipe is not taken for this one.
const RECIPE: &str = "uniform, variance 1 / fan-in, 1";
/// Numbers that are drawn at once.
const CHUNK: usize = 1 << 16;

/// Writes the tensors to `path` as f16, or leaves the file alone when it is already the whole of them.
///
/// Memory does not grow with the model, and the file appears whole or not at all.
///
/// # Errors
/// When there is another file, or it cannot be written.
pub fn ensure(path: &Path, tensors: &[TensorSpec]) -> Result<(), BenchError> {
    let header = header(tensors);
    let elements: usize = tensors.iter().map(TensorSpec::len).sum();
    let size_bytes = (header.len() + size_of::<f16>() * elements) as u64;
    let failed = |source| BenchError::Io {
        path: path.to_owned(),
        source,
    };
    if path.try_exists().map_err(failed)? {
        return if is_whole(path, &header, size_bytes).map_err(failed)? {
            Ok(())
        } else {
            Err(BenchError::OtherFile {
                path: path.to_owned(),
            })
        };
    }
    eprintln!(
        "writing {:.1} GB of random weights to {}",
        size_bytes as f64 / 1e9,
        path.display()
    );
    write(path, &header, tensors).map_err(failed)
}

/// The length and the JSON that a safetensors file starts with.
fn header(tensors: &[TensorSpec]) -> Vec<u8> {
    let mut entries = vec![format!(r#""__metadata__":{{"random_weights":"{RECIPE}"}}"#)];
    let mut start = 0;
    for tensor in tensors {
        let end = start + size_of::<f16>() * tensor.len();
        let (name, shape) = (&tensor.name, &tensor.shape);
        entries.push(format!(
            r#""{name}":{{"dtype":"F16","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
        start = end;
    }
    let mut json = format!("{{{}}}", entries.join(","));
    let aligned = json.len().next_multiple_of(8);
    json.push_str(&" ".repeat(aligned - json.len()));
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.into_bytes());
    bytes
}

/// The same header and length. The numbers are not compared: a file appears only when it is complete.
fn is_whole(path: &Path, header: &[u8], size_bytes: u64) -> io::Result<bool> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() != size_bytes {
        return Ok(false);
    }
    let mut found = vec![0; header.len()];
    file.read_exact(&mut found)?;
    Ok(found == header)
}

fn write(path: &Path, header: &[u8], tensors: &[TensorSpec]) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let file = tempfile::NamedTempFile::new_in(folder)?;
    let mut writer = BufWriter::new(file);
    writer.write_all(header)?;
    let mut random = ChaCha8Rng::seed_from_u64(0);
    for tensor in tensors {
        write_tensor(&mut writer, tensor, &mut random)?;
    }
    let file = writer.into_inner()?;
    file.as_file().sync_all()?; // or writing it would go on while the steps are timed
    file.persist(path)?;
    Ok(())
}

/// Norms have weight 1 and biases are 0; everything else is uniform with the variance `1 / fan-in`, which keeps the
/// size of what goes through a layer.
fn write_tensor(
    writer: &mut impl Write,
    tensor: &TensorSpec,
    random: &mut ChaCha8Rng,
) -> io::Result<()> {
    let is_vector = tensor.shape.len() == 1;
    let constant = f16::from_f32(f32::from(tensor.name.ends_with("weight")));
    let fan_in: usize = tensor.shape[1..].iter().product();
    let bound = (3.0 / fan_in as f32).sqrt();
    let mut left = tensor.len();
    while left > 0 {
        let count = left.min(CHUNK);
        let values = if is_vector {
            vec![constant; count]
        } else {
            uniform(random, count, bound)
        };
        // The machines that burn's backends run on are little endian, as the format is.
        writer.write_all(bytemuck::cast_slice(&values))?;
        left -= count;
    }
    Ok(())
}

/// Uniform in `-bound .. bound`, in 65 536 steps: f16 has no use for more.
fn uniform(random: &mut ChaCha8Rng, count: usize, bound: f32) -> Vec<f16> {
    let mut bits = vec![0_u16; count];
    random.fill_bytes(bytemuck::cast_slice_mut(&mut bits));
    let step = 2.0 * bound / 65_536.0;
    let wide: Vec<f32> = bits
        .into_iter()
        .map(|bits| (f32::from(bits) - 32_767.5) * step)
        .collect();
    let mut values = vec![f16::ZERO; count];
    values.convert_from_f32_slice(&wide);
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::Weights;

    fn tensors() -> Vec<TensorSpec> {
        let spec = |name: &str, shape: &[usize]| TensorSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
        };
        vec![
            spec("norm.bias", &[3]),
            spec("norm.weight", &[3]),
            spec("conv.weight", &[96, 256, 3, 3]), // more than one chunk
        ]
    }

    #[test]
    fn the_file_can_be_read_and_its_numbers_have_the_promised_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("random.safetensors");
        ensure(&path, &tensors()).unwrap();
        let weights = Weights::open(std::slice::from_ref(&path)).unwrap();
        assert_eq!(weights.read_f32("norm.bias").unwrap().0, [0.0; 3]);
        assert_eq!(weights.read_f32("norm.weight").unwrap().0, [1.0; 3]);

        let (values, shape) = weights.read_f32("conv.weight").unwrap();
        assert_eq!(shape, [96, 256, 3, 3]);
        let (count, fan_in) = (values.len() as f32, 256.0 * 9.0);
        let mean = values.iter().sum::<f32>() / count;
        let variance = values.iter().map(|v| v * v).sum::<f32>() / count * fan_in;
        // Five standard errors: 1/√n of the mean in units of the deviation, √(0.8/n) of a uniform's variance.
        assert!(mean.abs() * fan_in.sqrt() < 5.0 / count.sqrt(), "{mean}");
        assert!(
            (variance - 1.0).abs() < 5.0 * (0.8 / count).sqrt() + 1e-3,
            "{variance}"
        );
    }

    #[test]
    fn a_whole_file_is_kept_and_another_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("random.safetensors");
        ensure(&path, &tensors()).unwrap();
        let written = std::fs::metadata(&path).unwrap().modified().unwrap();
        ensure(&path, &tensors()).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().modified().unwrap(),
            written
        );

        std::fs::write(&path, "somebody's model").unwrap();
        let error = ensure(&path, &tensors()).unwrap_err().to_string();
        assert!(error.contains("random.safetensors"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's model");
    }
}
