//! `/v1/optimizers`, `/v1/schedulers` and their previews.

use serde_json::{Value, json};

use crate::support::Service;

fn listed(service: &Service, path: &str) -> Vec<Value> {
    let answer = service.get(path).expect(200);
    answer["data"].as_array().expect("a list").clone()
}

#[test]
fn optimizers_have_names_and_settings() {
    let service = Service::start();
    let optimizers = listed(&service, "/v1/optimizers");
    for (id, alias) in [
        ("adamw8bit", "PagedAdamW8bit"),
        ("lion8bit", "Lion8bit"),
        ("sgd", "SGDNesterov"),
        ("prodigy", "Prodigy"),
    ] {
        let found = optimizers.iter().find(|found| found["id"] == id);
        let found = found.unwrap_or_else(|| panic!("{id} is not listed"));
        let aliases = found["aliases"].as_array().expect("aliases");
        assert!(aliases.contains(&json!(alias)), "{found}");
        let decay = &found["settings_schema"]["properties"]["weight_decay"];
        assert_eq!(decay["minimum"], 0.0, "{found}");
    }
}

#[test]
fn a_preview_is_the_curve_of_the_run() {
    let service = Service::start();
    let path = "/v1/schedulers/linear:preview?total_steps=20&warmup_steps=4&learning_rate=0.0002";
    let curve = service.get(path).expect(200);
    let points = curve["points"].as_array().expect("points");
    assert_eq!(points.len(), 20);
    assert_eq!(points[2]["factor"], 0.5);
    assert_eq!(points[4]["learning_rate"], 0.0002);
    assert_eq!(points[12]["learning_rate"], 0.0001);

    // Fewer points than steps, with both ends; settings are JSON.
    let settings = "%7B%22num_cycles%22%3A3%7D";
    let path = format!(
        "/v1/schedulers/cosine_with_restarts:preview?total_steps=1001&points=11&settings={settings}"
    );
    let curve = service.get(&path).expect(200);
    assert_eq!(curve["settings"], json!({"num_cycles": 3}));
    let steps: Vec<&Value> = curve["points"].as_array().expect("points").iter().collect();
    assert_eq!(
        (steps.len(), &steps[0]["step"], &steps[10]["step"]),
        (11, &json!(0), &json!(1000))
    );

    let single = service
        .get("/v1/schedulers/constant:preview?total_steps=1")
        .expect(200);
    assert_eq!(
        single["points"],
        json!([{"step": 0, "factor": 1.0, "learning_rate": 1.0}])
    );
}

#[test]
fn a_preview_that_makes_no_sense_is_refused() {
    let service = Service::start();
    let missing = service.get("/v1/schedulers/nonsense:preview?total_steps=5");
    missing.problem(404, "not_found");
    for (query, code, pointer) in [
        ("total_steps=0", "invalid_query", "/total_steps"),
        ("total_steps=5&points=1", "invalid_query", "/points"),
        (
            "total_steps=5&learning_rate=-1",
            "invalid_query",
            "/learning_rate",
        ),
        ("total_steps=5&settings=%7B", "invalid_query", "/settings"),
        ("total_steps=5&step=1", "invalid_query", "/step"),
        ("", "invalid_query", "/total_steps"),
        (
            "total_steps=5&settings=%7B%22num_cycle%22%3A1%7D",
            "invalid_settings",
            "/settings/num_cycle",
        ),
        ("total_steps=5&settings=3", "invalid_settings", "/settings"),
    ] {
        let path = format!("/v1/schedulers/cosine:preview?{query}");
        let problem = service.get(&path).problem(422, code);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    let path = "/v1/schedulers/constant:preview?total_steps=5&warmup_steps=2";
    let problem = service.get(path).problem(422, "invalid_settings");
    let message = problem["errors"][0]["message"].as_str().expect("a message");
    assert!(message.contains("constant_with_warmup"), "{message}");
}
