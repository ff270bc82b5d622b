//! `/v1/loras`: files from elsewhere are taken, looked into, merged, resized and converted.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lorasmith::lora_tools::inspect;
use serde_json::{Value, json};

use crate::support::{Answer, Service, png};

fn fixture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lora_tools");
    std::fs::read(folder.join(format!("{name}.safetensors"))).expect("a fixture")
}

fn upload(service: &Service, name: &str) -> Value {
    let file_name = format!("{name}.safetensors");
    let content = fixture(name);
    let answer = service.upload(
        "/v1/loras",
        &[],
        &[(file_name.as_str(), content.as_slice())],
    );
    let lora = answer.expect(201);
    assert_eq!(answer.header("location"), path_of(&lora));
    lora
}

fn path_of(lora: &Value) -> String {
    format!("/v1/loras/{}", lora["id"].as_str().expect("an id"))
}

/// The content of a file, in a folder.
fn download(service: &Service, lora: &Value, folder: &Path) -> PathBuf {
    let content = service.get(&format!("{}/content", path_of(lora)));
    assert_eq!(content.status, 200);
    let path = folder.join("downloaded.safetensors");
    std::fs::write(&path, content.bytes).expect("written");
    path
}

#[test]
fn a_file_from_elsewhere_is_kept_like_others() {
    let service = Service::start();
    let lora = upload(&service, "first");
    assert_eq!(lora["file_name"], "first.safetensors");
    assert_eq!(
        (&lora["run_id"], &lora["self_check"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(lora["origin"], json!({"kind": "uploaded", "sources": []}));
    let content = service.get(&format!("{}/content", path_of(&lora)));
    assert_eq!(content.bytes, fixture("first"));
    let listed = service.get("/v1/loras").expect(200);
    assert_eq!(listed["data"], json!([lora]));

    let found = service
        .get(&format!("{}/inspection", path_of(&lora)))
        .expect(200);
    assert_eq!(found["kinds"], json!(["locon", "lora"]));
    assert_eq!(
        (&found["family"], &found["convention"]),
        (&json!("sd1"), &json!("kohya"))
    );
    assert_eq!(
        (&found["module_count"], &found["problems"]),
        (&json!(4), &json!([]))
    );
    assert_eq!(found["metadata"]["modelspec.title"], "first");
    assert_eq!(found["sha256"], lora["sha256"]);

    service.delete(&path_of(&lora)).expect(204);
    service.get(&path_of(&lora)).problem(404, "lora_not_found");
}

#[test]
fn uploads_that_are_no_loras_are_refused() {
    let service = Service::start();
    let send = |content: &[u8]| service.upload("/v1/loras", &[], &[("a.safetensors", content)]);
    for content in [
        b"no safetensors".as_slice(),
        &fixture("expected"),
        &[0xff; 64],
    ] {
        let problem = send(content).problem(422, "lora_unusable");
        let detail = problem["detail"].as_str().expect("words");
        assert!(
            detail.contains("a.safetensors") && !detail.contains("scratch"),
            "{detail}"
        );
    }
    let mut cut = fixture("first");
    cut.truncate(cut.len() - 4);
    send(&cut).problem(422, "lora_unusable");
    let problem = service.upload("/v1/loras", &[], &[]);
    problem.problem(422, "nothing_uploaded");
    let one = fixture("first");
    let field = service.upload("/v1/loras", &[("rank", "4")], &[("a", one.as_slice())]);
    field.problem(422, "invalid_body");
    let two = service.upload(
        "/v1/loras",
        &[],
        &[("a", one.as_slice()), ("b", one.as_slice())],
    );
    two.problem(413, "payload_too_large");
    service
        .post("/v1/loras", &json!({}))
        .problem(415, "unsupported_media_type");
    assert_eq!(service.get("/v1/loras").expect(200)["data"], json!([]));
}

#[test]
fn files_are_merged() {
    let service = Service::start();
    let (first, second) = (upload(&service, "first"), upload(&service, "second"));
    let loras = json!([{"lora_id": first["id"], "strength": 0.8}, {"lora_id": second["id"]}]);
    let body = json!({"loras": loras, "file_name": "both"});
    let key = [("idempotency-key", "a")];
    let answer = service.post_with("/v1/loras:merge", &key, &body);
    let made = answer.expect(201);
    assert_eq!(answer.header("location"), path_of(&made));
    assert_eq!(made["file_name"], "both.safetensors");
    assert_eq!(made["origin"]["kind"], "merged");
    assert_eq!(made["origin"]["sources"][0]["strength"], 0.8);
    assert_eq!(made["origin"]["sources"][1]["sha256"], second["sha256"]);
    let again: Answer = service.post_with("/v1/loras:merge", &key, &body);
    assert_eq!(again.expect(201)["id"], made["id"]);

    let folder = tempfile::tempdir().expect("a folder");
    let found = inspect(&download(&service, &made, folder.path())).expect("a LoRA");
    assert_eq!(found.module_count, 5);
    assert_eq!(found.metadata["modelspec.merged_from"], "first, second");
    assert_eq!(found.metadata["modelspec.title"], "both");
    assert_eq!(found.hashes.model_hash_matches, Some(true));

    // Down to a rank; and another kind, which needs one.
    let body = json!({"loras": loras, "rank": 2, "precision": "fp16"});
    let small = service.post("/v1/loras:merge", &body).expect(201);
    let found = inspect(&download(&service, &small, folder.path())).expect("a LoRA");
    assert!(found.modules.iter().all(|module| module.rank == Some(2)));
    assert_eq!(found.dtypes.keys().collect::<Vec<_>>(), ["F16"]);

    let [loha, dora] = ["loha", "dora"].map(|kind| upload(&service, kind));
    let merge = |lora: &Value, rank: Option<u32>| {
        let body = json!({"loras": [{"lora_id": lora["id"]}], "rank": rank});
        service.post("/v1/loras:merge", &body)
    };
    merge(&loha, None).problem(422, "lora_unusable");
    merge(&loha, Some(4)).expect(201);
    let problem = merge(&dora, Some(4)).problem(422, "lora_unusable");
    let detail = problem["detail"].as_str().expect("words");
    assert!(
        detail.starts_with("dora.safetensors: ") && detail.contains("base model"),
        "{detail}"
    );
    let gone = json!({"loras": [{"lora_id": "019a9c20-1111-7c30-a4b2-3d1f2f6f0a11"}]});
    service
        .post("/v1/loras:merge", &gone)
        .problem(404, "lora_not_found");
    for body in [
        json!({"loras": []}),
        json!({"loras": [{"lora_id": first["id"], "strength": 1e9}]}),
        json!({"loras": loras, "rank": 0}),
        json!({"loras": loras, "rank": 4097}),
        json!({"loras": loras, "conv_rank": 4}),
        json!({"loras": loras, "file_name": ""}),
    ] {
        service
            .post("/v1/loras:merge", &body)
            .problem(422, "invalid_lora_request");
    }
    let unknown = json!({"loras": loras, "ranks": 4});
    service
        .post("/v1/loras:merge", &unknown)
        .problem(422, "invalid_body");
}

#[test]
fn files_are_resized_and_converted() {
    let service = Service::start();
    let first = upload(&service, "first");
    let folder = tempfile::tempdir().expect("a folder");
    let body = json!({"lora_id": first["id"], "rank": 6, "method": "sv_fro", "value": 0.8});
    let resized = service.post("/v1/loras:resize", &body).expect(201);
    assert_eq!(resized["lora"]["file_name"], "first-resized.safetensors");
    assert_eq!(resized["lora"]["origin"]["kind"], "resized");
    let modules = resized["modules"].as_array().expect("a list");
    assert!(
        modules
            .iter()
            .all(|module| module["new_rank"].as_u64() < Some(6))
    );
    let kept = resized["fro_retained_mean"].as_f64().expect("a number");
    assert!((0.8..1.0).contains(&kept), "{kept}");
    let found = inspect(&download(&service, &resized["lora"], folder.path())).expect("a LoRA");
    assert_eq!(found.metadata["ss_network_dim"], "Dynamic");
    for body in [
        json!({"lora_id": first["id"], "rank": 6, "method": "sv_fro"}),
        json!({"lora_id": first["id"], "rank": 6, "value": 0.5}),
        json!({"lora_id": first["id"], "rank": 6, "method": "sv_fro", "value": 1.5}),
        json!({"lora_id": first["id"], "rank": 0}),
    ] {
        service
            .post("/v1/loras:resize", &body)
            .problem(422, "invalid_lora_request");
    }
    let loha = upload(&service, "loha");
    let body = json!({"lora_id": loha["id"], "rank": 2});
    service
        .post("/v1/loras:resize", &body)
        .problem(422, "lora_unusable");

    let convert = |lora: &Value, to: &str| {
        let body = json!({"lora_id": lora["id"], "to": to});
        service.post("/v1/loras:convert", &body)
    };
    let there = convert(&first, "diffusers").expect(201);
    let found = service
        .get(&format!("{}/inspection", path_of(&there)))
        .expect(200);
    assert_eq!(
        (&found["convention"], &found["family"]),
        (&json!("diffusers"), &json!("sd1"))
    );
    let back = convert(&there, "kohya").expect(201);
    assert_eq!(back["origin"]["sources"][0]["lora_id"], there["id"]);
    let found = inspect(&download(&service, &back, folder.path())).expect("a LoRA");
    assert!(
        found
            .modules
            .iter()
            .all(|module| module.name.starts_with("lora_"))
    );
    // A file that does not tell what it is for.
    let second = upload(&service, "second");
    convert(&second, "diffusers").problem(422, "lora_unusable");
    let body = json!({"lora_id": second["id"], "to": "diffusers", "family": "sd1"});
    service.post("/v1/loras:convert", &body).expect(201);
    convert(&loha, "diffusers").problem(422, "lora_unusable");
}

/// A run's file is checked before it is offered, and can be worked on like the others.
#[test]
fn the_file_of_a_run_has_passed_its_self_check() {
    let service = Service::start_with(|config| {
        config.models_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-sd15");
        config.device = "cpu".to_owned();
    });
    let dataset = service.dataset("a");
    let picture = png(1);
    service
        .upload(
            &format!("{dataset}/images"),
            &[],
            &[("a.png", picture.as_slice())],
        )
        .expect(201);
    let body = json!({
        "name": "a", "dataset_id": dataset.rsplit('/').next(), "base_model": "tiny-sd15-ldm",
        "max_train_steps": 3, "network": {"rank": 2, "conv_rank": 2}, "resolution": {"width_px": 64, "height_px": 64},
        "buckets": {"enabled": false}, "unet_lr": 0.01,
    });
    let run = service.post("/v1/runs", &body).expect(201);
    let path = format!("/v1/runs/{}", run["id"].as_str().expect("an id"));
    let began = Instant::now();
    let ended = loop {
        let run = service.get(&path).expect(200);
        if run["state"] == "succeeded" {
            break run;
        }
        assert!(
            run["state"] != "failed" && began.elapsed() < Duration::from_secs(90),
            "{run}"
        );
        std::thread::sleep(Duration::from_millis(50));
    };
    let lora = service
        .get(&format!(
            "/v1/loras/{}",
            ended["lora_id"].as_str().expect("an id")
        ))
        .expect(200);
    assert_eq!(lora["origin"], json!({"kind": "trained", "sources": []}));
    let check = &lora["self_check"];
    let number = |key: &str| check[key].as_f64().expect("a number");
    assert_eq!(number("tensors"), 3.0 * number("modules"));
    assert!(
        number("with_effect") > 0.0 && number("norm_max") > 0.0,
        "{check}"
    );
    let found = service
        .get(&format!("{}/inspection", path_of(&lora)))
        .expect(200);
    assert_eq!(found["problems"], json!([]));
    assert_eq!(
        found["described_by"],
        json!(["sd-scripts", "modelspec", "lorasmith"])
    );
    let told = found["metadata"]["lorasmith_self_check"]
        .as_str()
        .expect("an entry");
    assert!(told.contains("\"passed\":true"), "{told}");
    let body = json!({"lora_id": lora["id"], "rank": 1});
    let small = service.post("/v1/loras:resize", &body).expect(201);
    assert_eq!(small["lora"]["run_id"], Value::Null);
}
