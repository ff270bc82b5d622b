//! How long optimizers take for the LoRA of a Stable Diffusion 1.5 UNet: `cargo bench --bench optimizers -- [DEVICE]
//! [RANK] [OPTIMIZER…]`, such as `vulkan:0 16 adamw lion`.

use std::time::{Duration, Instant};

use burn::tensor::{Device, Distribution, Tensor};
use lorasmith::diffusion::devices;
use lorasmith::kernels::together::{copied_together, places};
use lorasmith::plugin_host::{PluginFolders, PluginHost};
use lorasmith::training::optimizer::{Optimizer, ParamUpdate};
use serde_json::json;

const STEPS: usize = 20;

/// The matrices of every linear layer and 1×1 convolution of the transformers.
fn shapes(rank: usize) -> Vec<[usize; 2]> {
    const TEXT: usize = 768;
    let mut shapes = Vec::new();
    for (blocks, width) in [(5, 320), (5, 640), (6, 1280)] {
        let square = (width, width);
        let layers = [
            square,
            square,
            square,
            square,
            square,
            square,
            square,
            square, // q, out, in, out
            (TEXT, width),
            (TEXT, width),
            (width, 8 * width),
            (4 * width, width),
        ];
        for _ in 0..blocks {
            for (inputs, outputs) in layers {
                shapes.extend([[rank, inputs], [outputs, rank]]);
            }
        }
    }
    shapes
}

struct Weights {
    shapes: Vec<[usize; 2]>,
    names: Vec<String>,
    values: Vec<Tensor<4>>,
    gradients: Vec<Tensor<4>>,
}

impl Weights {
    fn new(rank: usize, device: &Device) -> Self {
        let shapes = shapes(rank);
        let random = |&[rows, columns]: &[usize; 2]| {
            Tensor::random([1, 1, rows, columns], Distribution::Default, device)
        };
        Self {
            names: (0..shapes.len()).map(|at| format!("w{at}")).collect(),
            values: shapes.iter().map(random).collect(),
            gradients: shapes.iter().map(random).collect(),
            shapes,
        }
    }

    /// Puts gradients behind one another, as training does where an operation is a launch.
    fn gather(&mut self) -> Duration {
        let last = self.gradients[self.gradients.len() - 1].clone();
        let _ = last.sum().into_scalar::<f32>(); // all are there
        let started = Instant::now();
        let (begins, length) = places(self.shapes.iter().map(|shape| shape.iter().product()));
        let flat = self
            .gradients
            .iter()
            .map(|g| g.clone().reshape([g.shape().num_elements()]));
        let whole = copied_together(flat.collect(), &begins, length).expect("gradients");
        let _ = whole.clone().narrow(0, 0, 1).into_scalar::<f32>();
        let taken = started.elapsed();
        let each = begins
            .into_iter()
            .zip(&self.shapes)
            .map(|(begin, &[rows, columns])| {
                let own = whole.clone().narrow(0, begin, rows * columns);
                own.reshape([1, 1, rows, columns])
            });
        self.gradients = each.collect();
        taken
    }

    /// One step, until the device has done it.
    fn step(&mut self, optimizer: &mut dyn Optimizer, step: usize) -> Duration {
        let started = Instant::now();
        let values = self.values.iter_mut().zip(&self.gradients);
        let named = values.zip(self.names.iter().zip(&self.shapes)).enumerate();
        let mut updates: Vec<ParamUpdate<'_>> = named
            .map(|(id, ((value, gradient), (name, shape)))| ParamUpdate {
                id: id as u32,
                name,
                shape,
                value,
                grad: gradient.clone(),
                grad_scale: 1.0,
                lr: 1e-4,
                weight_decay: true,
            })
            .collect();
        optimizer.step(step as u64, &mut updates).expect("a step");
        let last = self.values[self.values.len() - 1].clone();
        let _ = last.sum().into_scalar::<f32>();
        started.elapsed()
    }
}

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench");
    let device = arguments.next().unwrap_or_else(|| "cpu".to_owned());
    let rank = arguments
        .next()
        .map_or(16, |rank| rank.parse().expect("a rank"));
    let device = devices::open(device.parse().expect("a device"))
        .expect("a device")
        .device;
    let host = PluginHost::discover(&PluginFolders {
        folders: Vec::new(),
        allowed_sha256: None,
    });
    let gathers = !devices::is_cpu(&device);
    if gathers {
        let mut times: Vec<Duration> = (0..STEPS)
            .map(|_| Weights::new(rank, &device).gather())
            .collect();
        report("gradients together", times.remove(0), times);
    }
    let wanted: Vec<String> = arguments.collect();
    for info in host.optimizers() {
        if !wanted.is_empty() && !wanted.contains(&info.id) {
            continue;
        }
        let mut weights = Weights::new(rank, &device);
        if gathers {
            weights.gather();
        }
        let mut optimizer = host
            .create_optimizer(&info.id, &json!({}))
            .expect("an optimizer");
        let first = weights.step(optimizer.as_mut(), 0);
        let times = (1..=STEPS).map(|step| weights.step(optimizer.as_mut(), step));
        report(&info.id, first, times.collect());
    }
}

/// The middle one of the times after the first.
fn report(name: &str, first: Duration, mut times: Vec<Duration>) {
    times.sort();
    let [middle, first] = [times[times.len() / 2], first].map(|time| 1e3 * time.as_secs_f64());
    println!("{name:22} {middle:9.2} ms (first {first:.0} ms)");
}
