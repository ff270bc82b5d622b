//! The noise that is added to the latents of a batch, and how it may differ from plain white noise. All of it is made on
//! the host, as a function of the run's seed and the batch's number.
//!
//! Source: sd-scripts, `get_noise_noisy_latents_and_timesteps` in `library/train_util.py`; `apply_noise_offset` and
//! `pyramid_noise_like` in `library/custom_train_functions.py`.

use rand::RngExt as _;
use serde::{Deserialize, Serialize};

use crate::training::data::Latents;
use crate::training::random::{Stream, generator, normal};

/// What makes noise other than white; nothing by default.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NoiseSettings {
    /// Deviation of one number for each channel of a sample, which is added to the whole plane (`noise_offset`).
    pub offset: f64,
    /// Whether each batch takes a random part of it (`noise_offset_random_strength`).
    pub offset_random_strength: bool,
    /// Times the size of a plane's mean, added to `offset` (`adaptive_noise_scale`).
    pub adaptive_scale: f64,
    /// How many coarser copies of noise are added at most, each coarser than the one before; off at 0
    /// (`multires_noise_iterations`).
    pub multires_iterations: u32,
    /// The strength of each of them beside the one before (`multires_noise_discount`).
    pub multires_discount: f64,
    /// Deviation of noise that the UNet sees beside the noise that it is to find (`ip_noise_gamma`; Ning et al. 2023,
    /// arXiv:2301.11706).
    pub input_perturbation: f64,
    /// Whether each batch takes a random part of it (`ip_noise_gamma_random_strength`).
    pub input_perturbation_random_strength: bool,
}

impl Default for NoiseSettings {
    fn default() -> Self {
        Self {
            offset: 0.0,
            offset_random_strength: false,
            adaptive_scale: 0.0,
            multires_iterations: 0,
            multires_discount: 0.3,
            input_perturbation: 0.0,
            input_perturbation_random_strength: false,
        }
    }
}

/// The noise of a batch, row-major as its latents.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchNoise {
    /// What the UNet is to find.
    pub target: Vec<f32>,
    /// What is added to the latents, where that is something else.
    pub input: Option<Vec<f32>>,
}

impl NoiseSettings {
    /// All that is out of range, or has no effect: field and message.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        for (field, value, range) in [
            ("offset", self.offset, 0.0..=10.0),
            ("adaptive_scale", self.adaptive_scale, -10.0..=10.0),
            ("multires_discount", self.multires_discount, 0.0..=1.0),
            ("input_perturbation", self.input_perturbation, 0.0..=10.0),
        ] {
            if !range.contains(&value) {
                let (low, high) = range.into_inner();
                problems.push((
                    field,
                    format!("is {value}, expected a number from {low} to {high}"),
                ));
            }
        }
        if self.multires_iterations > MAX_LEVELS {
            let found = self.multires_iterations;
            let message = format!("is {found}, expected a whole number from 0 to {MAX_LEVELS}");
            problems.push(("multires_iterations", message));
        }
        for (field, given, of, value) in [
            (
                "offset_random_strength",
                self.offset_random_strength,
                "offset",
                self.offset,
            ),
            (
                "adaptive_scale",
                self.adaptive_scale != 0.0,
                "offset",
                self.offset,
            ),
            (
                "input_perturbation_random_strength",
                self.input_perturbation_random_strength,
                "input_perturbation",
                self.input_perturbation,
            ),
        ] {
            if given && value == 0.0 {
                let message = format!("is given without {of}, which it changes");
                problems.push((field, message));
            }
        }
        problems
    }

    /// The noise of the batch at a place. What is off draws nothing.
    pub fn draw(&self, seed: u64, place: &[u8], latents: &[&Latents]) -> BatchNoise {
        let shape = Shape::of(latents);
        let mut target = normal(&mut generator(seed, Stream::Noise, place), shape.count());
        if self.offset > 0.0 {
            let mut rng = generator(seed, Stream::NoiseOffset, place);
            let part = rng.random::<f32>(); // in any case, so that the numbers below do not depend on it
            let strength = strength(self.offset, self.offset_random_strength, part);
            let strengths = self.offset_strengths(strength, latents);
            add_offset(&mut target, &normal(&mut rng, shape.planes()), &strengths);
        }
        if self.multires_iterations > 0 {
            let mut rng = generator(seed, Stream::MultiresNoise, place);
            let levels = (0..self.multires_iterations).map(|index| {
                let (height, width) = shape.level(index, rng.random::<f64>() * 2.0 + 2.0);
                let values = normal(&mut rng, shape.planes() * height * width);
                Level {
                    height,
                    width,
                    values,
                }
            });
            add_levels(&mut target, shape, levels, self.multires_discount);
        }
        let input = (self.input_perturbation > 0.0).then(|| {
            let mut rng = generator(seed, Stream::InputPerturbation, place);
            let part = rng.random::<f32>();
            let random = self.input_perturbation_random_strength;
            let strength = strength(self.input_perturbation, random, part);
            let own = normal(&mut rng, shape.count());
            let sum = target.iter().zip(&own);
            sum.map(|(noise, own)| noise + strength * own).collect()
        });
        BatchNoise { target, input }
    }

    /// How strong the offset of each plane is: `[batch · channels]`.
    fn offset_strengths(&self, strength: f32, latents: &[&Latents]) -> Vec<f32> {
        let planes = latents.iter().flat_map(|latents| {
            let [channels, height, width] = latents.shape;
            let plane = move |index| &latents.values[index * height * width..][..height * width];
            (0..channels).map(plane)
        });
        let mean = |plane: &[f32]| {
            let sum: f64 = plane.iter().map(|&value| f64::from(value)).sum();
            (sum / plane.len() as f64) as f32
        };
        let scale = self.adaptive_scale as f32;
        planes
            .map(|plane| match scale {
                0.0 => strength,
                scale => (strength + scale * mean(plane).abs()).max(0.0),
            })
            .collect()
    }
}

/// More levels than this no picture has.
const MAX_LEVELS: u32 = 64;

fn strength(full: f64, random: bool, part: f32) -> f32 {
    let full = full as f32;
    if random { full * part } else { full }
}

/// Of a batch of latents.
#[derive(Debug, Clone, Copy)]
struct Shape {
    batch: usize,
    channels: usize,
    height: usize,
    width: usize,
}

impl Shape {
    fn of(latents: &[&Latents]) -> Self {
        let [channels, height, width] = latents.first().map_or([0; 3], |latents| latents.shape);
        Self {
            batch: latents.len(),
            channels,
            height,
            width,
        }
    }

    fn planes(self) -> usize {
        self.batch * self.channels
    }

    fn count(self) -> usize {
        self.planes() * self.height * self.width
    }

    /// Height and width of a level of the pyramid, whose sides are the latents' by `ratio^index`.
    fn level(self, index: u32, ratio: f64) -> (usize, usize) {
        let side = |side: usize| ((side as f64 / ratio.powf(f64::from(index))) as usize).max(1);
        (side(self.height), side(self.width))
    }
}

/// One number for each plane, times that plane's strength, is added to the whole plane.
fn add_offset(noise: &mut [f32], offsets: &[f32], strengths: &[f32]) {
    let plane = noise.len() / offsets.len().max(1);
    let planes = noise.chunks_mut(plane.max(1));
    for (values, (offset, strength)) in planes.zip(offsets.iter().zip(strengths)) {
        for value in values {
            *value += strength * offset;
        }
    }
}

/// Noise of a coarser resolution: `[planes, height, width]`.
struct Level {
    height: usize,
    width: usize,
    values: Vec<f32>,
}

/// Adds levels that are enlarged to the latents' size, each `discount` times as strong as the one before, up to the
/// first of a single row or column, and brings the sum back to a deviation of 1.
fn add_levels(noise: &mut [f32], shape: Shape, levels: impl Iterator<Item = Level>, discount: f64) {
    let (mut weight, plane) = (1.0_f64, shape.height * shape.width);
    for level in levels {
        let rows = taps(level.height, shape.height);
        let columns = taps(level.width, shape.width);
        let coarse = level.values.chunks(level.height * level.width);
        for (fine, coarse) in noise.chunks_mut(plane.max(1)).zip(coarse) {
            for (line, row) in fine.chunks_mut(shape.width.max(1)).zip(&rows) {
                let line_at = |index: usize| &coarse[index * level.width..][..level.width];
                let (above, below) = (line_at(row.first), line_at(row.second));
                for (value, column) in line.iter_mut().zip(&columns) {
                    let (upper, lower) = (column.mix(above), column.mix(below));
                    let mixed = upper * (1.0 - row.share) + lower * row.share;
                    *value += mixed * weight as f32;
                }
            }
        }
        weight *= discount;
        if level.height == 1 || level.width == 1 {
            break;
        }
    }
    let deviation = deviation(noise);
    for value in noise {
        *value /= deviation;
    }
}

/// The two coarse positions that a fine one lies between.
struct Tap {
    first: usize,
    second: usize,
    /// Of the second.
    share: f32,
}

impl Tap {
    fn mix(&self, line: &[f32]) -> f32 {
        line[self.first] * (1.0 - self.share) + line[self.second] * self.share
    }
}

/// `torch.nn.Upsample(mode="bilinear")`: positions are those of the elements' middles.
fn taps(coarse: usize, fine: usize) -> Vec<Tap> {
    let scale = coarse as f32 / fine as f32;
    (0..fine)
        .map(|index| {
            let at = ((index as f32 + 0.5) * scale - 0.5).max(0.0);
            let first = (at as usize).min(coarse - 1);
            Tap {
                first,
                second: (first + 1).min(coarse - 1),
                share: at - first as f32,
            }
        })
        .collect()
}

/// The standard deviation of a sample (of `n − 1`), as `torch.std`.
fn deviation(values: &[f32]) -> f32 {
    let count = values.len() as f64;
    let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
    let squares = values
        .iter()
        .map(|&value| (f64::from(value) - mean).powi(2));
    (squares.sum::<f64>() / (count - 1.0)).sqrt() as f32
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::{DType, Device, Tensor, TensorData};

    use super::*;
    use crate::diffusion::Weights;
    use crate::diffusion::schedule::NoiseSchedule;

    /// Made by `tests/fixtures/reference/make_objectives.py`: draws, and what torch makes of them.
    struct Goldens(Weights);

    impl Goldens {
        fn open() -> Self {
            let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/fixtures/tiny-sd15/goldens/objectives.safetensors");
            Self(Weights::open(&[path]).unwrap())
        }

        fn values(&self, key: &str) -> Vec<f32> {
            self.0.read_f32(&format!("noise.{key}")).unwrap().0
        }

        fn latents(&self) -> Vec<Latents> {
            let (values, shape) = self.0.read_f32("noise.latents").unwrap();
            let shape = [shape[1], shape[2], shape[3]];
            let of_sample = |values: &[f32]| Latents {
                shape,
                values: values.to_vec(),
                mask: None,
            };
            values
                .chunks(shape.iter().product())
                .map(of_sample)
                .collect()
        }
    }

    fn worst(found: &[f32], expected: &[f32]) -> f32 {
        assert_eq!(found.len(), expected.len());
        let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, f32::max)
    }

    /// A few units in the last place of numbers up to 4, which sums are rounded to.
    const TOLERANCE: f32 = 2e-6;

    #[test]
    fn offsets_are_those_of_torch() {
        let goldens = Goldens::open();
        let latents = goldens.latents();
        let latents: Vec<&Latents> = latents.iter().collect();
        for (key, offset, random, adaptive_scale) in [
            ("offset", 0.1, false, 0.0),
            ("offset_random", 0.1, true, 0.0),
            ("offset_adaptive", 0.1, false, 0.05),
            ("offset_adaptive_negative", 0.02, false, -0.4),
        ] {
            let settings = NoiseSettings {
                offset,
                adaptive_scale,
                ..NoiseSettings::default()
            };
            let strength = strength(offset, random, 0.625);
            let strengths = settings.offset_strengths(strength, &latents);
            let mut noise = goldens.values("white");
            add_offset(&mut noise, &goldens.values("offset_draw"), &strengths);
            let error = worst(&noise, &goldens.values(key));
            assert!(error < TOLERANCE, "{key}: {error:e}");
        }
    }

    #[test]
    fn levels_are_those_of_torch() {
        let goldens = Goldens::open();
        let latents = goldens.latents();
        let shape = Shape::of(&latents.iter().collect::<Vec<_>>());
        for (key, discount, stops_at) in [("multires", 0.3, 3), ("multires_two", 0.8, 2)] {
            let (ratios, _) = goldens.0.read_f32(&format!("noise.{key}.ratios")).unwrap();
            let mut used = 0;
            let levels = (0..).zip(&ratios).map(|(index, ratio)| {
                used += 1;
                let (height, width) = shape.level(index, f64::from(*ratio));
                let values = goldens.values(&format!("{key}.draw_{index}"));
                assert_eq!(values.len(), shape.planes() * height * width);
                Level {
                    height,
                    width,
                    values,
                }
            });
            let mut noise = goldens.values("white");
            add_levels(&mut noise, shape, levels, discount);
            assert_eq!(used, stops_at, "{key}");
            let error = worst(&noise, &goldens.values(key));
            assert!(error < TOLERANCE, "{key}: {error:e}");
        }
    }

    #[test]
    fn a_perturbed_input_is_that_of_torch() {
        let goldens = Goldens::open();
        let latents = goldens.latents();
        let own = goldens.values("perturbation_draw");
        let noise = goldens.values("white").into_iter().zip(own);
        let noise = noise.map(|(noise, own)| noise + strength(0.1, false, 0.5) * own);
        let shape = Shape::of(&latents.iter().collect::<Vec<_>>());
        let tensor = |values: Vec<f32>| {
            let data = TensorData::new(values, [2, shape.channels, shape.height, shape.width]);
            Tensor::<4>::from_data(data, (&Device::flex(), DType::F32))
        };
        let x0 = tensor(latents.iter().flat_map(|l| l.values.clone()).collect());
        let schedule = NoiseSchedule::stable_diffusion();
        let noisy = schedule.add_noise(x0, tensor(noise.collect()), &[120, 870]);
        let found: Vec<f32> = noisy.to_data().iter::<f32>().collect();
        let error = worst(&found, &goldens.values("perturbed"));
        assert!(error < TOLERANCE, "{error:e}");
    }

    fn blank(side: usize) -> Latents {
        Latents {
            shape: [4, side, side],
            values: vec![0.5; 4 * side * side],
            mask: None,
        }
    }

    fn everything() -> NoiseSettings {
        NoiseSettings {
            offset: 0.1,
            adaptive_scale: 0.2,
            multires_iterations: 6,
            input_perturbation: 0.1,
            ..NoiseSettings::default()
        }
    }

    #[test]
    fn what_is_drawn_depends_on_seed_place_and_settings_alone() {
        let latents = blank(16);
        let draw =
            |settings: NoiseSettings, seed, place| settings.draw(seed, place, &[&latents; 2]);
        let all = draw(everything(), 1, b"7");
        assert_eq!(all, draw(everything(), 1, b"7"));
        assert_ne!(all, draw(everything(), 2, b"7"));
        assert_ne!(all, draw(everything(), 1, b"8"));
        // One setting does not change what another one draws.
        let white = draw(NoiseSettings::default(), 1, b"7");
        let perturbed = NoiseSettings {
            input_perturbation: 0.1,
            ..NoiseSettings::default()
        };
        let perturbed = draw(perturbed, 1, b"7");
        assert_eq!((perturbed.target, white.input), (white.target, None));
        let input = all.input.expect("is perturbed");
        let own = input.iter().zip(&all.target).map(|(a, b)| a - b);
        let white_input = perturbed.input.expect("is perturbed");
        let white_noise = draw(NoiseSettings::default(), 1, b"7").target;
        let of_white = white_input.iter().zip(&white_noise).map(|(a, b)| a - b);
        for (a, b) in own.zip(of_white) {
            assert!((a - b).abs() < TOLERANCE);
        }
    }

    #[test]
    fn deviations_are_those_that_were_asked_for() {
        let latents = blank(32);
        let few = [&latents; 4];
        let settings = NoiseSettings {
            offset: 0.5,
            input_perturbation: 0.3,
            ..NoiseSettings::default()
        };
        let (mut offsets, mut strengths) = (Vec::new(), Vec::new());
        let random = NoiseSettings {
            offset_random_strength: true,
            ..settings
        };
        let white = NoiseSettings::default();
        for number in 0..250_u32 {
            let place = number.to_le_bytes();
            let plain = white.draw(3, &place, &few).target;
            let first = |settings: &NoiseSettings| {
                let noise = settings.draw(3, &place, &few).target;
                let planes = noise.chunks(32 * 32).zip(plain.chunks(32 * 32));
                planes.map(|(a, b)| a[0] - b[0]).collect::<Vec<f32>>()
            };
            let full = first(&settings);
            strengths.push(first(&random)[0] / full[0]);
            offsets.extend(full);
        }
        // 4000 numbers of deviation 0.5: five standard errors are 0.028.
        assert!((deviation(&offsets) - 0.5).abs() < 0.028);
        // Uniform from 0 to 1: five standard errors of the mean are 0.09.
        let mean = strengths.iter().sum::<f32>() / strengths.len() as f32;
        assert!((mean - 0.5).abs() < 0.09, "{mean}");
        assert!(strengths.iter().all(|part| (-0.01..1.01).contains(part)));
        let drawn = settings.draw(3, b"", &few);
        let own: Vec<f32> = drawn
            .input
            .expect("is perturbed")
            .iter()
            .zip(&drawn.target)
            .map(|(a, b)| a - b)
            .collect();
        // 16384 numbers of deviation 0.3: five standard errors are 0.0083.
        assert!((deviation(&own) - 0.3).abs() < 0.0083);
        let levels = NoiseSettings {
            multires_iterations: 10,
            ..white
        };
        let noise = levels.draw(3, b"", &few).target;
        assert!((deviation(&noise) - 1.0).abs() < 1e-5);
    }

    #[test]
    fn what_has_no_effect_is_refused() {
        assert_eq!(NoiseSettings::default().problems(), []);
        assert_eq!(everything().problems(), []);
        let settings = NoiseSettings {
            offset: 0.0,
            offset_random_strength: true,
            multires_iterations: 65,
            multires_discount: f64::NAN,
            input_perturbation: 0.0,
            input_perturbation_random_strength: true,
            ..everything()
        };
        let found: Vec<_> = settings.problems().into_iter().map(|(at, _)| at).collect();
        let expected = [
            "multires_discount",
            "multires_iterations",
            "offset_random_strength",
            "adaptive_scale",
            "input_perturbation_random_strength",
        ];
        assert_eq!(found, expected);
    }
}
