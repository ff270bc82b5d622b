//! `/v1/models` and `/v1/vaes`: files of torch, 8-bit weights, uploads, registered paths, corrections, separate VAEs.

use std::io::{Cursor, Write as _};
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::runs::{dataset, fixtures, settings, start, wait};
use crate::support::Service;

/// Name, format, shape and numbers of a tensor.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

fn tiny() -> Vec<Stored> {
    let bytes = std::fs::read(fixtures().join("tiny-sd15-ldm.safetensors")).expect("a fixture");
    let file = SafeTensors::deserialize(&bytes).expect("a fixture");
    let tensors = file.tensors().into_iter();
    tensors
        .map(|(key, view)| {
            (
                key,
                view.dtype(),
                view.shape().to_vec(),
                view.data().to_vec(),
            )
        })
        .collect()
}

/// A bare VAE whose decoder draws something else.
fn bare_vae() -> Vec<Stored> {
    let of_vae = tiny().into_iter().filter_map(|(key, dtype, shape, data)| {
        let key = key.strip_prefix("first_stage_model.")?.to_owned();
        let mut data = data;
        if key == "encoder.conv_in.weight" {
            data[1] ^= 0x80; // a sign
        }
        Some((key, dtype, shape, data))
    });
    of_vae.collect()
}

fn safetensors_of(tensors: &[Stored]) -> Vec<u8> {
    let views = tensors.iter().map(|(key, dtype, shape, data)| {
        let view = TensorView::new(*dtype, shape.clone(), data);
        (key.as_str(), view.expect("a tensor"))
    });
    safetensors::serialize(views, None).expect("a file")
}

/// What torch.save writes of `{"state_dict": …}`.
fn checkpoint_of(tensors: &[Stored]) -> Vec<u8> {
    let text = |pickle: &mut Vec<u8>, text: &str| {
        pickle.push(b'X');
        pickle.extend((text.len() as u32).to_le_bytes());
        pickle.extend(text.as_bytes());
    };
    let int = |pickle: &mut Vec<u8>, number: usize| {
        pickle.push(b'J');
        pickle.extend((number as u32).to_le_bytes());
    };
    let mut pickle = b"\x80\x02}".to_vec();
    text(&mut pickle, "state_dict");
    pickle.extend(b"}(");
    for (index, (key, dtype, shape, _)) in tensors.iter().enumerate() {
        let class = match dtype {
            Dtype::F16 => "Half",
            Dtype::F32 => "Float",
            Dtype::I64 => "Long",
            other => panic!("{key} is {other:?}"),
        };
        text(&mut pickle, key);
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut pickle, "storage");
        pickle.extend(format!("ctorch\n{class}Storage\n").bytes());
        text(&mut pickle, &index.to_string());
        text(&mut pickle, "cpu");
        int(&mut pickle, shape.iter().product());
        pickle.extend(b"tQK\0(");
        shape.iter().for_each(|n| int(&mut pickle, *n));
        pickle.extend(b"t(");
        for axis in 0..shape.len() {
            int(&mut pickle, shape[axis + 1..].iter().product());
        }
        pickle.extend(b"t\x89NtR");
    }
    pickle.extend(b"us.");
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    let options = options.compression_method(zip::CompressionMethod::Stored);
    let storages = tensors.iter().enumerate();
    let storages = storages.map(|(index, (.., data))| (format!("data/{index}"), data.as_slice()));
    for (name, content) in [("data.pkl".to_owned(), pickle.as_slice())]
        .into_iter()
        .chain(storages)
    {
        writer
            .start_file(format!("tiny/{name}"), options)
            .expect("started");
        writer.write_all(content).expect("written");
    }
    writer.finish().expect("finished").into_inner()
}

/// A service whose model folder has the tiny model as `base`, described by a folder beside it.
fn service(models: &Path) -> Service {
    write(models, "base.safetensors", &safetensors_of(&tiny()));
    describe(models, "base");
    let models = models.to_owned();
    Service::start_with(move |config| {
        settings(config);
        config.models_dir = models;
    })
}

/// What shapes cannot tell of the tiny model.
fn describe(models: &Path, name: &str) {
    for part in ["unet", "text_encoder", "vae", "scheduler"] {
        let from = fixtures().join("diffusers").join(part);
        let to = models.join(format!("{name}.config")).join(part);
        std::fs::create_dir_all(&to).expect("made");
        for file in std::fs::read_dir(from).expect("a folder") {
            let file = file.expect("an entry").path();
            if file.extension().is_some_and(|end| end == "json") {
                std::fs::copy(&file, to.join(file.file_name().expect("a name"))).expect("copied");
            }
        }
    }
}

fn write(models: &Path, name: &str, content: &[u8]) {
    let path = models.join(name);
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    std::fs::write(path, content).expect("written");
}

fn send(service: &Service, path: &str, content: &[u8]) -> crate::support::Answer {
    let headers = [("content-type", "application/octet-stream")];
    service.send("POST", path, &headers, content)
}

/// The metadata and the tensors of a run's LoRA file.
fn lora(service: &Service, run: &Value) -> (Value, Vec<u8>) {
    let id = run["lora_id"].as_str().expect("an id");
    let content = service.get(&format!("/v1/loras/{id}/content")).bytes;
    let length = u64::from_le_bytes(content[..8].try_into().expect("a length")) as usize;
    let header: Value = serde_json::from_slice(&content[8..8 + length]).expect("a header");
    (
        header["__metadata__"].clone(),
        content[8 + length..].to_vec(),
    )
}

/// The same numbers in another container train the same adapters, to the bit.
#[test]
fn a_checkpoint_of_torch_trains_like_the_safetensors_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let service = service(folder.path());
    write(folder.path(), "torch.ckpt", &checkpoint_of(&tiny()));
    describe(folder.path(), "torch");
    let model = service.get("/v1/models/torch.ckpt").expect(200);
    assert_eq!(
        (&model["family"], &model["dtype"]),
        (&json!("sd1"), &json!("F16")),
        "{model}"
    );
    assert_eq!(model["trainable"], true, "{model}");
    let dataset = dataset(&service);
    let trained = |base: &str| {
        let run = start(
            &service,
            &dataset,
            &json!({"base_model": base, "max_train_steps": 3}),
        );
        lora(&service, &wait(&service, &run, "succeeded")).1
    };
    assert_eq!(trained("torch.ckpt"), trained("base"));
}

#[test]
fn a_separate_vae_makes_the_latents_and_is_told_everywhere() {
    let folder = tempfile::tempdir().expect("a folder");
    let service = service(folder.path());
    write(
        folder.path(),
        "vae/other.safetensors",
        &safetensors_of(&bare_vae()),
    );
    write(folder.path(), "vae/whole.ckpt", &checkpoint_of(&tiny()));
    write(folder.path(), "vae/notes.safetensors", b"nothing");
    let diffusers = fixtures().join("diffusers/vae");
    for name in ["config.json", "diffusion_pytorch_model.safetensors"] {
        let content = std::fs::read(diffusers.join(name)).expect("a fixture");
        write(folder.path(), &format!("vae/folder/{name}"), &content);
    }
    let listed = service.get("/v1/vaes").expect(200);
    let named: Vec<(&Value, &Value)> = listed["data"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|vae| (&vae["name"], &vae["usable"]))
        .collect();
    let expected = [
        ("folder", true),
        ("notes", false),
        ("other", true),
        ("whole.ckpt", true),
    ];
    let expected = expected.map(|(name, usable)| (json!(name), json!(usable)));
    assert_eq!(
        named,
        expected.iter().map(|(n, u)| (n, u)).collect::<Vec<_>>()
    );
    // None of them is a base model.
    let models = service.get("/v1/models").expect(200);
    assert_eq!(models["data"].as_array().map(Vec::len), Some(1), "{models}");

    let dataset = dataset(&service);
    let run = |vae: Value| {
        let more = json!({"base_model": "base", "vae": vae, "max_train_steps": 2});
        let run = start(&service, &dataset, &more);
        (wait(&service, &run, "succeeded"), run)
    };
    let (own, _) = run(Value::Null);
    let (whole, _) = run(json!("whole.ckpt"));
    let (parts, _) = run(json!("folder"));
    let (other, path) = run(json!("other"));
    let [(_, own), (_, whole), (metadata, other)] =
        [&own, &whole, &other].map(|run| lora(&service, run));
    assert_eq!(own, whole, "the same VAE in another file");
    assert_eq!(own, lora(&service, &parts).1, "the same VAE in a folder");
    assert_ne!(own, other);
    assert_eq!(metadata["ss_vae_name"], "other.safetensors");
    let vae = service.get("/v1/vaes/other").expect(200);
    assert_eq!(metadata["ss_new_vae_hash"], vae["sha256"], "{metadata}");
    assert_eq!(metadata["ss_vae_hash"].as_str().map(str::len), Some(8));
    let provenance = service.get(&format!("{path}/provenance")).expect(200);
    assert_eq!(provenance["inputs"]["vae"]["path"], "vae/other.safetensors");
    assert_eq!(provenance["inputs"]["vae"]["sha256"], vae["sha256"]);
    assert_eq!(service.get(&path).expect(200)["settings"]["vae"], vae["id"]);

    let again = service
        .post(&format!("{path}/reproduce"), &json!({}))
        .expect(201);
    let again = format!("/v1/runs/{}", again["id"].as_str().expect("an id"));
    let again = wait(&service, &again, "succeeded");
    assert_eq!(again["reproduction"]["identical"], true, "{again}");
    // Another file in its place is found out.
    write(
        folder.path(),
        "vae/other.safetensors",
        &safetensors_of(&bare_vae()[1..]),
    );
    let changed = service.post(&format!("{path}/reproduce"), &json!({}));
    assert!(
        changed.status == 409 || changed.status == 201,
        "{changed:?}"
    );

    let wrong = crate::runs::short(&dataset, &json!({"base_model": "base", "vae": "absent"}));
    let problem = service
        .post("/v1/runs:plan", &wrong)
        .problem(422, "invalid_settings");
    assert_eq!(problem["errors"][0]["pointer"], "/vae");
    let wrong = crate::runs::short(&dataset, &json!({"base_model": "base", "vae": "notes"}));
    let problem = service
        .post("/v1/runs:plan", &wrong)
        .problem(422, "invalid_settings");
    assert!(
        problem["errors"][0]["message"]
            .as_str()
            .is_some_and(|text| text.contains("notes"))
    );
}

#[test]
fn an_upload_is_offered_once_it_was_opened() {
    let folder = tempfile::tempdir().expect("a folder");
    let service = service(folder.path());
    let whole = safetensors_of(&tiny());
    let key = [
        ("content-type", "application/octet-stream"),
        ("idempotency-key", "one"),
    ];
    let made = service.send("POST", "/v1/models?name=sent.safetensors", &key, &whole);
    let model = made.expect(201);
    assert_eq!(
        (&model["name"], &model["uploaded"]),
        (&json!("sent"), &json!(true))
    );
    let path = format!("/v1/models/{}", model["id"].as_str().expect("an id"));
    assert_eq!(made.header("location"), path);
    assert_eq!(
        std::fs::read(folder.path().join("sent.safetensors")).expect("there"),
        whole
    );
    let replayed = service.send("POST", "/v1/models?name=sent.safetensors", &key, &whole);
    assert_eq!(replayed.header("idempotency-replayed"), "true");
    assert_eq!(replayed.expect(201)["id"], model["id"]);
    let again = send(&service, "/v1/models?name=sent.safetensors", &whole);
    again.problem(409, "model_exists");

    let formed = service.upload(
        "/v1/models",
        &[],
        &[("formed.ckpt", &checkpoint_of(&tiny()))],
    );
    assert_eq!(formed.expect(201)["name"], "formed.ckpt");

    let missing: Vec<Stored> = tiny()
        .into_iter()
        .filter(|(key, ..)| !key.ends_with("middle_block.1.norm.weight"))
        .collect();
    let inpainting: Vec<Stored> = tiny()
        .into_iter()
        .map(|(key, dtype, mut shape, mut data)| {
            if key == "model.diffusion_model.input_blocks.0.0.weight" {
                shape[1] = 9;
                data = vec![0; 2 * shape.iter().product::<usize>()];
            }
            (key, dtype, shape, data)
        })
        .collect();
    let evil = {
        let mut bytes = Cursor::new(Vec::new());
        let mut writer = zip::ZipWriter::new(&mut bytes);
        let options = zip::write::SimpleFileOptions::default();
        let options = options.compression_method(zip::CompressionMethod::Stored);
        writer.start_file("a/data.pkl", options).expect("started");
        writer
            .write_all(b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R.")
            .expect("written");
        writer.finish().expect("finished");
        bytes.into_inner()
    };
    for (name, content, said) in [
        (
            "cut.safetensors",
            &whole[..whole.len() / 2],
            "cut.safetensors",
        ),
        (
            "missing.safetensors",
            &safetensors_of(&missing),
            "norm.weight` is missing",
        ),
        (
            "inpainting.safetensors",
            &safetensors_of(&inpainting),
            "inpainting",
        ),
        ("vae.safetensors", &safetensors_of(&bare_vae()), "VAE"),
        ("evil.ckpt", &evil, "calls `os.system`"),
        ("words.ckpt", b"no model at all", "words.ckpt"),
    ] {
        let refused = send(&service, &format!("/v1/models?name={name}"), content);
        let problem = refused.problem(422, "invalid_model");
        let detail = problem["detail"].as_str().expect("words");
        assert!(detail.contains(said), "{name}: {detail}");
        assert!(!detail.contains(".upload-"), "{detail}");
        assert!(!folder.path().join(name).exists());
    }
    for name in [
        "..%2Fa.safetensors",
        ".a.safetensors",
        "a.txt",
        "a%00.ckpt",
        "vae%2Fa.ckpt",
    ] {
        send(&service, &format!("/v1/models?name={name}"), b"x").problem(422, "invalid_model");
    }
    send(&service, "/v1/models", b"x").problem(422, "invalid_query");
    let headers = [("content-type", "text/plain")];
    let text = service.send("POST", "/v1/models?name=a.ckpt", &headers, b"x");
    text.problem(415, "unsupported_media_type");
    let left = std::fs::read_dir(folder.path())
        .expect("a folder")
        .filter(|entry| {
            let name = entry.as_ref().expect("an entry").file_name();
            name.to_string_lossy().starts_with(".upload-")
        });
    assert_eq!(left.count(), 0);

    // What a run needs stays; what was put there by hand, too.
    service
        .delete("/v1/models/base")
        .problem(409, "model_not_uploaded");
    let dataset = dataset(&service);
    describe(folder.path(), "sent");
    let run = start(
        &service,
        &dataset,
        &json!({"base_model": "sent", "max_train_steps": 500}),
    );
    service.delete(&path).problem(409, "model_in_use");
    service.post(&format!("{run}/cancel"), &json!({}));
    wait(&service, &run, "cancelled");
    assert_eq!(service.delete(&path).status, 204);
    service.get(&path).problem(404, "model_not_found");
    assert!(!folder.path().join("sent.safetensors").exists());

    let vae = send(
        &service,
        "/v1/vaes?name=mine.safetensors",
        &safetensors_of(&bare_vae()),
    );
    let vae = vae.expect(201);
    let path = format!("/v1/vaes/{}", vae["id"].as_str().expect("an id"));
    assert!(folder.path().join("vae/mine.safetensors").is_file());
    assert_eq!(service.delete(&path).status, 204);
    service.get(&path).problem(404, "vae_not_found");
    let refused = send(
        &service,
        "/v1/vaes?name=mine.safetensors",
        &safetensors_of(&bare_vae()[..9]),
    );
    refused.problem(422, "invalid_model");
}

#[test]
fn only_paths_of_the_model_folder_are_registered() {
    let folder = tempfile::tempdir().expect("a folder");
    let outside = tempfile::tempdir().expect("another");
    let service = service(folder.path());
    let deep = "a/b/c/d/e/f/deep.safetensors";
    write(folder.path(), deep, &safetensors_of(&tiny()));
    service
        .get("/v1/models/deep")
        .problem(404, "model_not_found");
    let made = service
        .post("/v1/models", &json!({"path": deep}))
        .expect(201);
    assert_eq!(made["name"], "a/b/c/d/e/f/deep");
    assert_eq!(made["uploaded"], false);
    let path = format!("/v1/models/{}", made["id"].as_str().expect("an id"));
    assert_eq!(service.get(&path).expect(200)["name"], made["name"]);

    write(outside.path(), "far.safetensors", &safetensors_of(&tiny()));
    for path in [
        "../far.safetensors".to_owned(),
        "a/../../far.safetensors".to_owned(),
        outside.path().join("far.safetensors").display().to_string(),
        ".hidden.safetensors".to_owned(),
        "absent.safetensors".to_owned(),
        "captioners/a.safetensors".to_owned(),
        String::new(),
        "a\0b".to_owned(),
    ] {
        let answer = service.post("/v1/models", &json!({"path": path}));
        assert_eq!(
            answer.problem(422, "invalid_model")["errors"][0]["pointer"],
            "/path",
            "{path}"
        );
    }
    #[cfg(unix)]
    for (name, target) in [
        ("link.safetensors", outside.path().join("far.safetensors")),
        ("linked", outside.path().to_owned()),
    ] {
        std::os::unix::fs::symlink(target, folder.path().join(name)).expect("a link");
        let path = if name == "linked" {
            "linked/far.safetensors"
        } else {
            name
        };
        let answer = service.post("/v1/models", &json!({"path": path}));
        let problem = answer.problem(422, "invalid_model");
        let said = problem["errors"][0]["message"].as_str().expect("words");
        assert!(said.contains("leads out of the model folder"), "{said}");
    }
    let unknown = service.post("/v1/models", &json!({"path": deep, "kind": "x"}));
    unknown.problem(422, "invalid_body");
}

#[test]
fn corrections_hold_for_runs_that_say_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let service = service(folder.path());
    let found = service.get("/v1/models/base");
    let tag = found.header("etag").to_owned();
    assert_eq!(found.expect(200)["prediction_type"], "epsilon");
    let patch =
        json!({"prediction_type": "v_prediction", "zero_terminal_snr": true, "family": "sd1"});
    let model = service
        .patch("/v1/models/base", Some(&tag), &patch)
        .expect(200);
    assert_eq!(model["prediction_type"], "v_prediction");
    assert_eq!(model["zero_terminal_snr"], true);
    assert_eq!(
        model["detected"],
        json!({"prediction_type": "epsilon", "zero_terminal_snr": false})
    );
    service
        .patch("/v1/models/base", Some(&tag), &patch)
        .problem(412, "precondition_failed");
    let refused = service.patch("/v1/models/base", None, &json!({"family": "sdxl"}));
    let problem = refused.problem(422, "invalid_model");
    assert_eq!(problem["errors"][0]["pointer"], "/family");
    assert!(
        problem["errors"][0]["message"]
            .as_str()
            .is_some_and(|text| text.contains("one CLIP"))
    );
    service
        .patch("/v1/models/base", None, &json!({"dtype": "F32"}))
        .problem(422, "invalid_body");

    let dataset = dataset(&service);
    let run = start(&service, &dataset, &json!({"base_model": "base"}));
    let run = wait(&service, &run, "succeeded");
    assert_eq!(run["settings"]["prediction_type"], "v_prediction");
    assert_eq!(run["settings"]["zero_terminal_snr"], true);
    assert_eq!(lora(&service, &run).0["ss_base_model_version"], "sd_v1_v");
    let own = start(
        &service,
        &dataset,
        &json!({"base_model": "base", "prediction_type": "epsilon"}),
    );
    let own = wait(&service, &own, "succeeded");
    assert_eq!(own["settings"]["prediction_type"], "epsilon");

    let service = service.restart_with({
        let models = folder.path().to_owned();
        move |config| {
            settings(config);
            config.models_dir = models;
        }
    });
    assert_eq!(
        service.get("/v1/models/base").expect(200)["prediction_type"],
        "v_prediction"
    );
    let back = json!({"prediction_type": null, "zero_terminal_snr": null});
    let model = service.patch("/v1/models/base", None, &back).expect(200);
    assert_eq!(model["prediction_type"], "epsilon");
    assert_eq!(model["zero_terminal_snr"], false);
}
