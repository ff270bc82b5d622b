//! What a model's `scheduler_config.json` says of its noise.

use serde::Deserialize;

use super::PredictionType;
use super::schedule::{BetaShape, NoiseSchedule};

/// More timesteps than this make no schedule.
const MAX_TIMESTEPS: usize = 100_000;

/// `scheduler_config.json`, as far as it says something about the noise.
#[derive(Debug, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    #[serde(rename = "_class_name")]
    class_name: String,
    beta_schedule: String,
    beta_start: f64,
    beta_end: f64,
    num_train_timesteps: usize,
    trained_betas: Option<Vec<f32>>,
    prediction_type: String,
    rescale_betas_zero_snr: bool,
}

impl Default for SchedulerConfig {
    /// diffusers' defaults, which a file leaves out.
    fn default() -> Self {
        Self {
            class_name: String::new(),
            beta_schedule: "linear".to_owned(),
            beta_start: 0.0001,
            beta_end: 0.02,
            num_train_timesteps: 1000,
            trained_betas: None,
            prediction_type: "epsilon".to_owned(),
            rescale_betas_zero_snr: false,
        }
    }
}

impl SchedulerConfig {
    /// The schedule and what the UNet predicts; or what is wrong with the values.
    pub fn resolve(self) -> Result<(NoiseSchedule, PredictionType), String> {
        if ["EDM", "FlowMatch"]
            .iter()
            .any(|kind| self.class_name.starts_with(kind))
        {
            return Err(format!(
                "`_class_name` is `{}`, expected a schedule of discrete steps",
                self.class_name
            ));
        }
        let prediction = match self.prediction_type.as_str() {
            "epsilon" => PredictionType::Epsilon,
            "v_prediction" => PredictionType::VPrediction,
            other => {
                return Err(format!(
                    "`prediction_type` is `{other}`, expected `epsilon` or `v_prediction`"
                ));
            }
        };
        let schedule = match self.trained_betas {
            Some(betas) => checked_betas(betas)?,
            None => self.computed()?,
        };
        Ok(if self.rescale_betas_zero_snr {
            (schedule.zero_terminal(), prediction)
        } else {
            (schedule, prediction)
        })
    }

    fn computed(&self) -> Result<NoiseSchedule, String> {
        let shape = match self.beta_schedule.as_str() {
            "linear" => BetaShape::Linear,
            "scaled_linear" => BetaShape::ScaledLinear,
            other => {
                return Err(format!(
                    "`beta_schedule` is `{other}`, expected `linear` or `scaled_linear`"
                ));
            }
        };
        let steps = self.num_train_timesteps;
        if !(1..=MAX_TIMESTEPS).contains(&steps) {
            return Err(format!(
                "`num_train_timesteps` is {steps}, expected 1 to {MAX_TIMESTEPS}"
            ));
        }
        for (name, beta) in [("beta_start", self.beta_start), ("beta_end", self.beta_end)] {
            if !(beta > 0.0 && beta < 1.0) {
                return Err(format!(
                    "`{name}` is {beta}, expected a number between 0 and 1"
                ));
            }
        }
        Ok(NoiseSchedule::new(
            shape,
            self.beta_start,
            self.beta_end,
            steps,
        ))
    }
}

fn checked_betas(betas: Vec<f32>) -> Result<NoiseSchedule, String> {
    if betas.is_empty() || betas.len() > MAX_TIMESTEPS {
        return Err(format!(
            "`trained_betas` has {} entries, expected 1 to {MAX_TIMESTEPS}",
            betas.len()
        ));
    }
    if let Some(beta) = betas.iter().find(|beta| !(**beta > 0.0 && **beta < 1.0)) {
        return Err(format!(
            "`trained_betas` has {beta}, expected numbers between 0 and 1"
        ));
    }
    Ok(NoiseSchedule::from_betas(betas))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_is_read_or_refused() {
        let parse = |text: &str| {
            serde_json::from_str::<SchedulerConfig>(text)
                .expect("JSON")
                .resolve()
        };
        let (schedule, prediction) = parse(
            r#"{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                "prediction_type": "v_prediction"}"#,
        )
        .expect("a schedule");
        assert_eq!(schedule, NoiseSchedule::stable_diffusion());
        assert_eq!(prediction, PredictionType::VPrediction);
        for (text, named) in [
            (r#"{"beta_schedule": "squaredcos_cap_v2"}"#, "beta_schedule"),
            (r#"{"prediction_type": "sample"}"#, "prediction_type"),
            (r#"{"_class_name": "EDMEulerScheduler"}"#, "_class_name"),
            (r#"{"beta_end": 2.0}"#, "beta_end"),
            (r#"{"num_train_timesteps": 0}"#, "num_train_timesteps"),
            (r#"{"trained_betas": []}"#, "trained_betas"),
        ] {
            let error = parse(text).expect_err("wrong");
            assert!(error.contains(named), "{error}");
        }
    }
}
