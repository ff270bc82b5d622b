//! `/v1/models`: generations of base models, what their files tell of them, and runs of each.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::runs::{dataset, settings, short, start, wait};
use crate::support::Service;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(path)
}

/// A service with models of all generations: single files, whose heads and epsilons are told by a folder beside them.
fn service(models: &Path) -> Service {
    for model in ["tiny-sd2", "tiny-sdxl"] {
        let file = format!("{model}-ldm.safetensors");
        std::fs::copy(
            fixture(model).join(&file),
            models.join(format!("{model}.safetensors")),
        )
        .expect("copied");
        copy_folder(
            &fixture(model).join("diffusers"),
            &models.join(format!("{model}.config")),
        );
        std::fs::remove_file(models.join(format!("{model}.config/model_index.json")))
            .expect("described, not a model of its own");
    }
    copy_folder(
        &fixture("tiny-sdxl/diffusers"),
        &models.join("sdxl-diffusers"),
    );
    let models = models.to_owned();
    Service::start_with(move |config| {
        settings(config);
        config.models_dir = models;
    })
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("made");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let place = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy_folder(&path, &place);
        } else {
            std::fs::copy(&path, &place).expect("copied");
        }
    }
}

/// A single file without numbers: names and shapes are all that is looked at.
fn write_header(path: &Path, tensors: &[(&str, &[usize])]) {
    let mut entries = Vec::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        entries.push(format!(
            r#""{name}":{{"dtype":"F16","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + end, 0);
    std::fs::write(path, bytes).expect("written");
}

#[test]
fn family_and_prediction_are_told_by_tensors() {
    let folder = tempfile::tempdir().expect("a folder");
    let unet: [(&str, &[usize]); 2] = [
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            &[8, 4, 3, 3],
        ),
        ("model.diffusion_model.out.2.weight", &[4, 8, 3, 3]),
    ];
    let inpainting: [(&str, &[usize]); 2] = [
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            &[8, 9, 3, 3],
        ),
        unet[1],
    ];
    let sd1 = (
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        &[8][..],
    );
    let sd2 = ("cond_stage_model.model.ln_final.bias", &[8][..]);
    let clip = (
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        &[8][..],
    );
    let big = ("conditioner.embedders.1.model.ln_final.bias", &[8][..]);
    let refiner = ("conditioner.embedders.0.model.ln_final.bias", &[8][..]);
    let added = ("model.diffusion_model.label_emb.0.0.weight", &[8, 58][..]);
    let (v_pred, ztsnr) = (("v_pred", &[0][..]), ("ztsnr", &[0][..]));
    let write = |name: &str, unet: &[(&str, &[usize])], more: &[(&str, &[usize])]| {
        let path = folder.path().join(format!("{name}.safetensors"));
        write_header(&path, &[unet, more].concat());
    };
    write("sd1", &unet, &[sd1]);
    write("sd1-inpainting", &inpainting, &[sd1]);
    write("sd2", &unet, &[sd2]);
    write("sd2-inpainting", &inpainting, &[sd2]);
    write("sd2-unclip", &unet, &[sd2, added]);
    write("sdxl", &unet, &[clip, big, added]);
    write("sdxl-inpainting", &inpainting, &[clip, big, added]);
    write("sdxl-v", &unet, &[clip, big, added, v_pred, ztsnr]);
    write("sdxl-refiner", &unet, &[refiner, added]);
    let models = folder.path().to_owned();
    let service = Service::start_with(move |config| config.models_dir = models);
    for (name, family, prediction, zero_terminal, problem) in [
        ("sd1", "sd1", "epsilon", false, None),
        (
            "sd1-inpainting",
            "sd1",
            "epsilon",
            false,
            Some("9 to 4 channels"),
        ),
        ("sd2", "sd2", "v_prediction", false, None),
        (
            "sd2-inpainting",
            "sd2",
            "v_prediction",
            false,
            Some("inpainting"),
        ),
        ("sd2-unclip", "sd2", "v_prediction", false, Some("unCLIP")),
        ("sdxl", "sdxl", "epsilon", false, None),
        (
            "sdxl-inpainting",
            "sdxl",
            "epsilon",
            false,
            Some("inpainting"),
        ),
        ("sdxl-v", "sdxl", "v_prediction", true, None),
        ("sdxl-refiner", "sdxl", "epsilon", false, Some("refiner")),
    ] {
        let model = service.get(&format!("/v1/models/{name}")).expect(200);
        assert_eq!(model["family"], family, "{model}");
        assert_eq!(model["prediction_type"], prediction, "{model}");
        assert_eq!(model["zero_terminal_snr"], zero_terminal, "{model}");
        assert_eq!(model["trainable"], problem.is_none(), "{model}");
        let said = model["problem"].as_str().unwrap_or_default();
        assert!(said.contains(problem.unwrap_or_default()), "{said}");
    }
}

/// What is no base model at all is left out; what is one of another kind is listed with what it is.
#[test]
fn other_models_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let (input, output) = (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.out.2.weight",
    );
    let text = "cond_stage_model.transformer.text_model.final_layer_norm.bias";
    let clip = "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias";
    const OUT: &[usize] = &[4, 8, 3, 3];
    let unet = |channels: &'static [usize]| vec![(input, channels), (output, OUT)];
    let one: &[usize] = &[1];
    let sd1 = |channels: &'static [usize]| [unet(channels), vec![(text, one)]].concat();
    type Shapes<'a> = Vec<(&'a str, &'a [usize])>;
    let cases: Vec<(&str, Shapes<'_>, Option<&str>)> = vec![
        ("pix2pix", sd1(&[8, 8, 3, 3]), Some("instruct-pix2pix")),
        ("inpainting", sd1(&[8, 9, 3, 3]), Some("9 to 4 channels")),
        ("depth", sd1(&[8, 5, 3, 3]), Some("a depth map")),
        ("upscaler", sd1(&[8, 7, 3, 3]), Some("an upscaler")),
        (
            "flux",
            vec![("double_blocks.0.img_attn.norm.key_norm.scale", one)],
            Some("a Flux model"),
        ),
        (
            "sd3",
            vec![(
                "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
                one,
            )],
            Some("Stable Diffusion 3"),
        ),
        (
            "video",
            [
                unet(&[8, 8, 3, 3]),
                vec![
                    ("conditioner.embedders.0.open_clip.model.ln_final.bias", one),
                    (
                        "model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.bias",
                        one,
                    ),
                ],
            ]
            .concat(),
            Some("a video model"),
        ),
        (
            "edm",
            [unet(&[8, 4, 3, 3]), vec![(clip, one), ("edm_mean", one)]].concat(),
            Some("another kind of noise"),
        ),
        ("unet", unet(&[8, 4, 3, 3]), Some("without a text encoder")),
        (
            "lora",
            vec![("lora_unet_mid_block_attentions_0_proj_in.alpha", one)],
            None,
        ),
        (
            "vae",
            vec![("decoder.up.0.block.0.conv1.weight", one)],
            None,
        ),
        ("embedding", vec![("emb_params", one)], None),
    ];
    for (name, tensors, _) in &cases {
        write_header(&folder.path().join(format!("{name}.safetensors")), tensors);
    }
    let models = folder.path().to_owned();
    let service = Service::start_with(move |config| config.models_dir = models);
    for (name, _, said) in cases {
        let answer = service.get(&format!("/v1/models/{name}"));
        let Some(said) = said else {
            answer.problem(404, "model_not_found");
            let path = json!({"path": format!("{name}.safetensors")});
            service
                .post("/v1/models", &path)
                .problem(422, "invalid_model");
            continue;
        };
        let model = answer.expect(200);
        let problem = model["problem"].as_str().unwrap_or_default();
        assert!(
            problem.contains(said) && problem.contains("supported"),
            "{name}: {problem}"
        );
        assert_eq!(model["trainable"], false);
    }
}

#[test]
fn every_generation_is_trained_and_drawn_with() {
    let folder = tempfile::tempdir().expect("a folder");
    let service = service(folder.path());
    let dataset = dataset(&service);
    for (base, rate, version, keys) in [
        (
            "tiny-sd2",
            5e-5,
            "sd_v2_v",
            vec!["lora_te_", "lora_unet_down_blocks_"],
        ),
        (
            "tiny-sdxl",
            5e-5,
            "sdxl_base_v1-0",
            vec!["lora_te1_", "lora_te2_", "lora_unet_input_blocks_"],
        ),
        (
            "sdxl-diffusers",
            0.0,
            "sdxl_base_v1-0",
            vec!["lora_unet_input_blocks_"],
        ),
    ] {
        let prompt = json!({"prompt": "lumo", "width_px": 64, "height_px": 64, "steps": 2, "sampler": "euler"});
        let more = json!({
            "base_model": base, "max_train_steps": 2, "text_encoder_lr": rate, "max_token_length": 150,
            "samples": {"prompts": [prompt]}, "validation": {"fraction": 0.5},
        });
        let run = start(&service, &dataset, &more);
        let done = wait(&service, &run, "succeeded");
        let lora = done["lora_id"].as_str().expect("an id");
        let content = service.get(&format!("/v1/loras/{lora}/content")).bytes;
        let length = u64::from_le_bytes(content[..8].try_into().expect("a length")) as usize;
        let header: Value = serde_json::from_slice(&content[8..8 + length]).expect("a header");
        let metadata = &header["__metadata__"];
        assert_eq!(metadata["ss_base_model_version"], version, "{base}");
        let names: Vec<&String> = header.as_object().expect("an object").keys().collect();
        for prefix in &keys {
            assert!(
                names.iter().any(|name| name.starts_with(prefix)),
                "{prefix}"
            );
        }
        let known = |name: &&&String| {
            name.as_str() == "__metadata__"
                || keys.iter().any(|prefix| name.starts_with(prefix))
                || name.starts_with("lora_unet_")
        };
        assert_eq!(names.iter().filter(known).count(), names.len());
        let samples = service.get(&format!("{run}/samples")).expect(200);
        assert_eq!(samples["data"].as_array().map(Vec::len), Some(1));
    }
    // The penultimate states are what SDXL takes.
    let more = json!({"base_model": "tiny-sdxl", "clip_skip": 2});
    let refused = service.post("/v1/runs:plan", &short(&dataset, &more));
    let problem = refused.problem(422, "invalid_settings");
    assert_eq!(problem["errors"][0]["pointer"], "/clip_skip");
}

/// A schedule and a target other than the model's own.
#[test]
fn what_files_tell_can_be_overridden() {
    let folder = tempfile::tempdir().expect("a folder");
    let service = service(folder.path());
    let dataset = dataset(&service);
    let loss = |more: Value| {
        let run = start(&service, &dataset, &more);
        wait(&service, &run, "succeeded")["progress"]["loss_average"]
            .as_f64()
            .expect("a loss")
    };
    let own = loss(json!({"base_model": "tiny-sdxl", "seed": 1}));
    let velocity = json!({"base_model": "tiny-sdxl", "seed": 1, "prediction_type": "v_prediction"});
    let mut shifted = velocity.clone();
    shifted["zero_terminal_snr"] = json!(true);
    let (velocity, shifted) = (loss(velocity), loss(shifted));
    assert!(
        own != velocity && velocity != shifted,
        "{own} {velocity} {shifted}"
    );
}
