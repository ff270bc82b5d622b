//! The learning-rate schedules of sd-scripts, diffusers and transformers, and REX and one-cycle.
//!
//! Where there is a warm-up, its factor is `step / warmup_steps`, so that the first step runs at a rate of zero, as in
//! sd-scripts.

mod falling;
mod flat;
mod shaped;

use lorasmith_sdk::{Run, export_plugin};

pub use falling::{
    Cosine, CosineWithMinLr, CosineWithRestarts, InverseSqrt, Linear, Polynomial, Rex,
};
pub use flat::{Constant, ConstantWithWarmup, PiecewiseConstant};
pub use shaped::{OneCycle, WarmupStableDecay};

/// The factor during the warm-up, `None` after it.
fn warmup(run: &Run, step: u64) -> Option<f64> {
    (step < run.warmup_steps).then(|| step as f64 / run.warmup_steps as f64)
}

/// How much of what comes after the warm-up is over at `step`, which is not in it.
fn progress(run: &Run, step: u64) -> f64 {
    let steps = run.total_steps.saturating_sub(run.warmup_steps).max(1);
    (step - run.warmup_steps) as f64 / steps as f64
}

export_plugin! {
    id: "schedules",
    optimizers: [],
    schedules: [
        Constant, ConstantWithWarmup, Linear, Cosine, CosineWithRestarts, CosineWithMinLr, Polynomial, InverseSqrt,
        WarmupStableDecay, PiecewiseConstant, Rex, OneCycle,
    ],
}

#[cfg(test)]
mod tests;
