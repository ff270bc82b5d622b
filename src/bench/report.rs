//! What was measured, as a table and as JSON.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::BenchOptions;
use super::usage::{Spent, peak_rss_bytes};
use crate::diffusion::Family;
use crate::diffusion::devices::DeviceInfo;
use crate::networks::NetworkKind;
use crate::training::ComputePrecision;
use crate::training::GradientCheckpointing;

const MIB: f64 = 1024.0 * 1024.0;

/// Seconds of one step's parts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PhaseTimes {
    /// Latents, noise and ids to the device.
    pub data_s: f64,
    /// Forward pass of the text encoder.
    pub text_encoder_s: f64,
    /// Forward pass of the UNet, and the loss.
    pub forward_s: f64,
    /// Backward pass.
    pub backward_s: f64,
    /// Clipping and update.
    pub optimizer_s: f64,
}

impl PhaseTimes {
    /// The median of each part by itself.
    fn medians(steps: &[Self]) -> Option<Self> {
        let median = |part: fn(&Self) -> f64| median(steps.iter().map(part));
        Some(Self {
            data_s: median(|times| times.data_s)?,
            text_encoder_s: median(|times| times.text_encoder_s)?,
            forward_s: median(|times| times.forward_s)?,
            backward_s: median(|times| times.backward_s)?,
            optimizer_s: median(|times| times.optimizer_s)?,
        })
    }

    fn named(&self) -> [(&'static str, f64); 5] {
        [
            ("data", self.data_s),
            ("text encoder", self.text_encoder_s),
            ("forward", self.forward_s),
            ("backward", self.backward_s),
            ("optimizer", self.optimizer_s),
        ]
    }
}

/// Several measurements of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// As many are above as below.
    pub median: f64,
    /// The smallest.
    pub min: f64,
}

impl Summary {
    fn of(values: &[f64]) -> Option<Self> {
        Some(Self {
            median: median(values.iter().copied())?,
            min: values.iter().copied().min_by(f64::total_cmp)?,
        })
    }
}

/// Memory of the device as its allocator tells it, the most that was seen after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceMemory {
    /// Held by tensors.
    pub in_use_bytes: u64,
    /// Taken from the device, pages held for the next step included.
    pub reserved_bytes: u64,
}

impl DeviceMemory {
    fn most(self, other: Self) -> Self {
        Self {
            in_use_bytes: self.in_use_bytes.max(other.in_use_bytes),
            reserved_bytes: self.reserved_bytes.max(other.reserved_bytes),
        }
    }
}

/// One step.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepMeasure {
    pub spent: Spent,
    pub phases: PhaseTimes,
    pub loss: f64,
}

/// Everything that was measured.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    start: Spent,
    trained_parameters: usize,
    steps: Vec<StepMeasure>,
    device_memory: Option<DeviceMemory>,
}

impl Measured {
    /// `start` is what was used from the start of the process to the first step.
    pub fn new(start: Spent, trained_parameters: usize) -> Self {
        Self {
            start,
            trained_parameters,
            steps: Vec::new(),
            device_memory: None,
        }
    }

    pub fn add(&mut self, step: StepMeasure, memory: Option<DeviceMemory>) {
        self.steps.push(step);
        self.device_memory = match (self.device_memory, memory) {
            (Some(before), Some(now)) => Some(before.most(now)),
            (before, now) => now.or(before),
        };
    }
}

/// What a training took. Absent numbers are those that the system, the device or the trainer does not tell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BenchReport {
    /// `lorasmith`.
    pub program: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Generation of the model.
    pub family: Family,
    /// The model's file or folder.
    pub model: String,
    /// Side of the pictures.
    pub resolution_px: u32,
    /// Pictures per step.
    pub batch_size: usize,
    /// Kind of the adapters.
    pub network_kind: NetworkKind,
    /// Rank of the adapters.
    pub rank: usize,
    /// Whether the text encoders stay as they are.
    pub unet_only: bool,
    /// Trained elements.
    pub trained_parameters: usize,
    /// Whether activations are computed again.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Number format of the computation.
    pub precision: ComputePrecision,
    /// Id of the optimizer.
    pub optimizer: String,
    /// Id of the device.
    pub device: String,
    /// Its name and driver.
    pub device_name: String,
    /// Steps that were timed.
    pub steps: usize,
    /// From the start of the process to the first step; writing random weights is left out.
    pub start: Spent,
    /// The first step, which also compiles and allocates; it is none of the timed ones.
    pub first_step: Spent,
    /// Seconds of a timed step.
    pub step_s: Option<Summary>,
    /// Processor seconds of a timed step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_cpu_s: Option<Summary>,
    /// Where the seconds went.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phases: Option<PhaseTimes>,
    /// The most memory that the process had in RAM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
    /// Memory of the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_memory: Option<DeviceMemory>,
    /// Loss of the last step.
    pub loss: f64,
}

impl BenchReport {
    pub(super) fn new(
        options: &BenchOptions,
        model: &Path,
        device: &DeviceInfo,
        measured: &Measured,
    ) -> Self {
        let (first, timed) = match measured.steps.split_first() {
            Some((first, timed)) => (Some(first), timed),
            None => (None, measured.steps.as_slice()),
        };
        let wall: Vec<f64> = timed.iter().map(|step| step.spent.wall_s).collect();
        let cpu: Vec<f64> = timed.iter().filter_map(|step| step.spent.cpu_s).collect();
        let phases: Vec<PhaseTimes> = timed.iter().map(|step| step.phases).collect();
        Self {
            program: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
            family: options.family,
            model: model.display().to_string(),
            resolution_px: options.resolution_px,
            batch_size: options.batch_size,
            network_kind: options.network_kind,
            rank: options.rank,
            unet_only: options.unet_only,
            trained_parameters: measured.trained_parameters,
            gradient_checkpointing: options.gradient_checkpointing,
            precision: options.precision,
            optimizer: options.optimizer.clone(),
            device: device.id.clone(),
            device_name: format!("{} {}", device.name, device.driver)
                .trim()
                .to_owned(),
            steps: timed.len(),
            start: measured.start,
            first_step: first.map_or(Spent::default(), |step| step.spent),
            step_s: Summary::of(&wall),
            step_cpu_s: Summary::of(&cpu),
            phases: PhaseTimes::medians(&phases),
            peak_rss_bytes: peak_rss_bytes(),
            device_memory: measured.device_memory,
            loss: measured.steps.last().map_or(f64::NAN, |step| step.loss),
        }
    }
}

impl fmt::Display for BenchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "model    {}", self.model)?;
        writeln!(f, "device   {} ({})", self.device, self.device_name)?;
        let checkpointing = format!("{:?}", self.gradient_checkpointing).to_lowercase();
        let precision = format!("{:?}", self.precision).to_lowercase();
        let kind = self.network_kind.algo();
        writeln!(
            f,
            "training {0} × {0}, batch {1}, {kind} of rank {2}, {precision}, gradient checkpointing {checkpointing}, \
             {5}, {3} parameters of {4}",
            self.resolution_px,
            self.batch_size,
            self.rank,
            self.trained_parameters,
            if self.unet_only {
                "the UNet"
            } else {
                "UNet and text encoders"
            },
            self.optimizer
        )?;
        writeln!(f, "\n{:<28} {:>10} {:>14}", "", "seconds", "CPU seconds")?;
        write_row(
            f,
            "start to first step",
            self.start.wall_s,
            self.start.cpu_s,
        )?;
        let first = self.first_step;
        write_row(f, "first step", first.wall_s, first.cpu_s)?;
        if let Some(step) = self.step_s {
            let cpu = self.step_cpu_s;
            let label = format!("step, median of {}", self.steps);
            write_row(f, &label, step.median, cpu.map(|cpu| cpu.median))?;
            write_row(f, "step, fastest", step.min, cpu.map(|cpu| cpu.min))?;
        }
        for (name, seconds) in self.phases.iter().flat_map(PhaseTimes::named) {
            write_row(f, &format!("  {name}"), seconds, None)?;
        }
        writeln!(f)?;
        if let Some(bytes) = self.peak_rss_bytes {
            writeln!(f, "{:<28} {:>10.0} MiB", "peak memory", bytes as f64 / MIB)?;
        }
        if let Some(memory) = self.device_memory {
            let reserved = memory.reserved_bytes as f64 / MIB;
            let in_use = memory.in_use_bytes as f64 / MIB;
            writeln!(f, "{:<28} {reserved:>10.0} MiB", "device memory, reserved")?;
            writeln!(
                f,
                "{:<28} {in_use:>10.0} MiB",
                "device memory, after a step"
            )?;
        }
        writeln!(f, "{:<28} {:>10.4}", "loss of the last step", self.loss)
    }
}

fn write_row(
    f: &mut fmt::Formatter<'_>,
    label: &str,
    wall_s: f64,
    cpu_s: Option<f64>,
) -> fmt::Result {
    let cpu = cpu_s.map_or(String::new(), |seconds| format!("{seconds:.2}"));
    writeln!(
        f,
        "{}",
        format!("{label:<28} {wall_s:>10.2} {cpu:>14}").trim_end()
    )
}

/// The middle value, or the mean of the two in the middle.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some((lower + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::ModelSource;
    use crate::diffusion::devices::DeviceSpec;

    fn report(phases: PhaseTimes) -> BenchReport {
        let options = BenchOptions {
            family: Family::Sd1,
            model: ModelSource::Random(None),
            resolution_px: 512,
            batch_size: 1,
            steps: 3,
            network_kind: NetworkKind::Lora,
            rank: 32,
            unet_only: false,
            gradient_checkpointing: GradientCheckpointing::None,
            precision: ComputePrecision::Fp32,
            optimizer: "adamw".to_owned(),
            device: DeviceSpec::Cpu,
        };
        let mut measured = Measured::new(Spent::default(), 0);
        for (wall_s, loss) in [(9.0, 1.0), (3.0, 1.1), (1.0, 1.2), (2.0, 1.3)] {
            let spent = Spent {
                wall_s,
                cpu_s: Some(2.0 * wall_s),
            };
            let step = StepMeasure {
                spent,
                phases,
                loss,
            };
            measured.add(step, None);
        }
        let device = crate::diffusion::devices::open(DeviceSpec::Cpu).unwrap();
        BenchReport::new(
            &options,
            Path::new("a.safetensors"),
            &device.info,
            &measured,
        )
    }

    #[test]
    fn the_first_step_is_none_of_the_timed_ones() {
        let report = report(PHASES);
        let expected = |median, min| Some(Summary { median, min });
        assert_eq!(report.steps, 3);
        assert_eq!(report.first_step.wall_s, 9.0);
        assert_eq!(report.step_s, expected(2.0, 1.0));
        assert_eq!(report.step_cpu_s, expected(4.0, 2.0));
        assert_eq!(report.loss, 1.3);
    }

    const PHASES: PhaseTimes = PhaseTimes {
        data_s: 0.125,
        text_encoder_s: 0.25,
        forward_s: 0.5,
        backward_s: 1.0,
        optimizer_s: 0.25,
    };

    #[test]
    fn what_was_measured_is_told() {
        let report = report(PHASES);
        assert_eq!(report.phases, Some(PHASES));
        assert!(report.to_string().contains("  backward"), "{report}");
        let json = serde_json::to_value(&report).unwrap();
        assert!(json.get("device_memory").is_none());
        assert_eq!(
            (&json["family"], &json["precision"]),
            (&"sd1".into(), &"fp32".into())
        );
    }

    #[test]
    fn a_median_of_an_even_number_lies_between_two() {
        assert_eq!(median([4.0, 1.0, 3.0, 2.0].into_iter()), Some(2.5));
        assert_eq!(median([7.0].into_iter()), Some(7.0));
        assert_eq!(median(std::iter::empty()), None);
    }
}
