//! Settings of loss, noise and timesteps at `POST /v1/runs`: kept, shown, told in files; refused where they make no
//! sense.

use serde_json::{Value, json};

use crate::runs::{dataset, settings, short, start, wait};
use crate::support::Service;

#[test]
fn objectives_are_kept_shown_and_trained_with() {
    let service = Service::start_with(settings);
    let dataset = dataset(&service);
    let given = json!({
        "min_snr_gamma": 5.0, "batch_size": 2,
        "loss": {"type": "huber", "huber_schedule": "exponential", "huber_c": 0.2, "masked": true,
                 "debiased_estimation": true, "v_pred_like_loss": 0.1},
        "noise": {"offset": 0.05, "adaptive_scale": 0.01, "multires_iterations": 6, "input_perturbation": 0.1},
        "timesteps": {"min": 100},
    });
    let run = start(&service, &dataset, &given);
    let shown = wait(&service, &run, "succeeded")["settings"].clone();
    for part in ["loss", "noise", "timesteps"] {
        for (field, value) in given[part].as_object().expect("settings") {
            assert_eq!(&shown[part][field], value, "{part}/{field}");
        }
    }
    // Defaults are filled in.
    let defaults = json!({"huber_scale": 1.0, "scale_v_pred_loss": false});
    for (field, value) in defaults.as_object().expect("settings") {
        assert_eq!(&shown["loss"][field], value);
    }
    assert_eq!(shown["noise"]["multires_discount"], 0.3);
    assert_eq!(shown["timesteps"]["max"], 1000);
    // Sent again, the settings start the same run.
    service.post("/v1/runs", &shown).expect(201);
}

#[test]
fn objectives_that_make_no_sense_are_refused() {
    let service = Service::start_with(settings);
    let dataset = dataset(&service);
    let refused = |more: &Value| {
        let answer = service.post("/v1/runs:plan", &short(&dataset, more));
        let problem = answer.problem(422, "invalid_settings");
        problem["errors"][0]["pointer"].clone()
    };
    for (more, pointer) in [
        (json!({"loss": {"huber_c": 0.0}}), "/loss/huber_c"),
        (
            json!({"loss": {"v_pred_like_loss": -1.0}}),
            "/loss/v_pred_like_loss",
        ),
        // The model predicts noise.
        (
            json!({"loss": {"scale_v_pred_loss": true}}),
            "/loss/scale_v_pred_loss",
        ),
        (
            json!({"prediction_type": "v_prediction", "loss": {"v_pred_like_loss": 1.0}}),
            "/loss/v_pred_like_loss",
        ),
        (
            json!({"noise": {"adaptive_scale": 0.1}}),
            "/noise/adaptive_scale",
        ),
        (
            json!({"noise": {"multires_iterations": 65}}),
            "/noise/multires_iterations",
        ),
        (
            json!({"timesteps": {"min": 500, "max": 500}}),
            "/timesteps/min",
        ),
        (json!({"timesteps": {"max": 1001}}), "/timesteps/max"),
    ] {
        assert_eq!(refused(&more), pointer, "{more}");
    }
    let allowed = json!({"min_snr_gamma": 5.0, "loss": {"debiased_estimation": true}});
    service
        .post("/v1/runs:plan", &short(&dataset, &allowed))
        .expect(200);
    let misspelt = json!({"loss": {"kind": "l1"}});
    service
        .post("/v1/runs:plan", &short(&dataset, &misspelt))
        .expect(422);
}
