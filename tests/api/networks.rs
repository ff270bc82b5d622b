//! `network` of `/v1/runs`: kinds, patterns, blocks, and LoRA files to begin with.

use lorasmith::config::Config;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::runs::{dataset, fixtures, settings, short, start, wait};
use crate::support::Service;

/// A model folder of its own, where a LoRA can be put.
fn own_models(models: &std::path::Path) -> impl FnOnce(&mut Config) {
    let name = "tiny-sd15-ldm.safetensors";
    std::fs::copy(fixtures().join(name), models.join(name)).expect("copied");
    let models = models.to_owned();
    move |config| {
        settings(config);
        config.models_dir = models;
    }
}

/// The LoRA of a run: its bytes.
fn content(service: &Service, run: &Value) -> Vec<u8> {
    let lora = run["lora_id"].as_str().expect("a LoRA");
    let answer = service.get(&format!("/v1/loras/{lora}/content"));
    assert_eq!(answer.status, 200);
    answer.bytes
}

#[test]
fn settings_that_do_not_go_together_are_refused_with_a_pointer() {
    let service = Service::start_with(settings);
    let dataset = dataset(&service);
    for (network, pointer) in [
        (json!({"factor": 8}), "factor"),
        (json!({"kind": "lokr", "factor": 1}), "factor"),
        (json!({"kind": "loha", "full_matrix": true}), "full_matrix"),
        (json!({"kind": "ia3", "dora": true}), "dora"),
        (json!({"kind": "ia3", "rank_dropout": 0.1}), "rank_dropout"),
        (json!({"kind": "loha", "dropout": 0.1}), "dropout"),
        (json!({"dora": true, "dropout": 0.1}), "dropout"),
        (json!({"module_dropout": 1.0}), "module_dropout"),
        (json!({"tucker": true}), "tucker"),
        (json!({"conv_alpha": 1.0}), "conv_alpha"),
        (
            json!({"kind": "loha", "preset": "attn-mlp", "conv_rank": 2}),
            "conv_rank",
        ),
        (json!({"scale_weight_norms": 0.0}), "scale_weight_norms"),
        (
            json!({"kind": "lokr", "loraplus_lr_ratio": 4.0}),
            "loraplus_lr_ratio",
        ),
        (json!({"block_dims": [4, 4]}), "block_dims"),
        (json!({"block_dims": vec![4; 23]}), "block_dims"),
        (json!({"block_dims": vec![0; 25]}), "block_dims"),
        (json!({"block_alphas": vec![1.0; 25]}), "block_alphas"),
        (json!({"down_lr_weight": "tangent"}), "down_lr_weight"),
        (json!({"mid_lr_weight": "1,2"}), "mid_lr_weight"),
        (json!({"include": ["("]}), "include/0"),
        (
            json!({"include": ["attn1", "a{999}{999}{999}"]}),
            "include/1",
        ),
        (json!({"exclude": ["no_such_layer"]}), "exclude/0"),
        (
            json!({"include": ["attn1"], "exclude": ["attn1"]}),
            "include",
        ),
        (
            json!({"preset": "unet-convblock-only", "include": ["lora_te_"]}),
            "include/0",
        ),
        (json!({"init_from": {}}), "init_from"),
        (
            json!({"init_from": {"file": "../x.safetensors"}}),
            "init_from/file",
        ),
        (
            json!({"init_from": {"file": "x.safetensors"}}),
            "init_from/file",
        ),
        (
            json!({"init_from": {"lora_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11"}}),
            "init_from/lora_id",
        ),
    ] {
        let body = short(&dataset, &json!({"network": network}));
        for path in ["/v1/runs", "/v1/runs:plan"] {
            let problem = service.post(path, &body).problem(422, "invalid_settings");
            let errors = problem["errors"].as_array().expect("errors");
            let pointer = format!("/network/{pointer}");
            let found = errors
                .iter()
                .any(|error| error["pointer"] == pointer.as_str());
            assert!(found, "{body}: {problem}");
        }
    }
    let unknown = short(&dataset, &json!({"network": {"kind": "lorb"}}));
    let problem = service
        .post("/v1/runs", &unknown)
        .problem(422, "invalid_body");
    assert_eq!(problem["errors"][0]["pointer"], "/network/kind");
}

/// Each kind is trained, written with its own keys and description, and goes on in another run.
#[test]
fn runs_of_every_kind_train_save_and_go_on() {
    let service = Service::start_with(settings);
    let dataset = dataset(&service);
    for (network, ending, module, args) in [
        (
            json!({"kind": "locon", "rank": 2, "alpha": 1.0, "rank_dropout": 0.2}),
            "lora_unet_mid_block_resnets_0_conv1.lora_down.weight",
            "networks.lora",
            json!({"conv_dim": "2", "conv_alpha": "1.0", "rank_dropout": "0.2"}),
        ),
        (
            json!({"rank": 2, "alpha": 1.0, "dora": true}),
            "lora_unet_mid_block_attentions_0_proj_in.dora_scale",
            "lycoris.kohya",
            json!({"preset": "attn-mlp", "algo": "lora", "dora_wd": "True"}),
        ),
        (
            json!({"kind": "loha", "rank": 2, "alpha": 1.0, "conv_rank": 1, "tucker": true}),
            "lora_unet_conv_in.hada_t1",
            "lycoris.kohya",
            json!({
                "preset": "full", "algo": "loha", "conv_dim": "1", "conv_alpha": "1.0", "use_tucker": "True",
            }),
        ),
        (
            json!({"kind": "lokr", "rank": 1, "alpha": 1.0, "factor": 4, "scale_weight_norms": 1.0}),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w1",
            "lycoris.kohya",
            json!({"preset": "full", "algo": "lokr", "conv_dim": "1", "conv_alpha": "1.0", "factor": "4"}),
        ),
        (
            json!({"kind": "ia3"}),
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2.on_input",
            "lycoris.kohya",
            json!({"preset": "ia3", "algo": "ia3"}),
        ),
    ] {
        let run = start(
            &service,
            &dataset,
            &json!({"network": network, "max_train_steps": 2}),
        );
        let ended = wait(&service, &run, "succeeded");
        for (field, value) in network.as_object().expect("an object") {
            assert_eq!(&ended["settings"]["network"][field], value);
        }
        let bytes = content(&service, &ended);
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        assert!(file.names().contains(&ending), "{ending}");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a header");
        let told = header.metadata().as_ref().expect("a description");
        assert_eq!(told["ss_network_module"], module);
        let found: Value = serde_json::from_str(&told["ss_network_args"]).expect("JSON");
        assert_eq!(found, args);

        let again = json!({
            "network": {"rank": 7, "init_from": {"lora_id": ended["lora_id"], "dim_from_weights": true}},
        });
        let longer = start(&service, &dataset, &again);
        let longer = wait(&service, &longer, "succeeded");
        let bytes = content(&service, &longer);
        let next = SafeTensors::deserialize(&bytes).expect("safetensors");
        let names = |file: &SafeTensors<'_>| {
            let mut names: Vec<String> = file.names().into_iter().map(str::to_owned).collect();
            names.sort();
            names
        };
        assert_eq!(names(&next), names(&file));
        let settings = &longer["settings"]["network"];
        assert_eq!(
            settings["init_from"]["sha256"].as_str().map(str::len),
            Some(64)
        );
        let sent_again = short(&dataset, &json!({"network": settings}));
        service.post("/v1/runs:plan", &sent_again).expect(200);
    }
}

#[test]
fn a_run_begins_with_a_file_of_the_model_folder() {
    let models = tempfile::tempdir().expect("a folder");
    let service = Service::start_with(own_models(models.path()));
    let dataset = dataset(&service);
    let network = json!({"rank": 2, "alpha": 1.0});
    let first = start(&service, &dataset, &json!({"network": network}));
    let first = wait(&service, &first, "succeeded");
    let folder = models.path().join("lora");
    std::fs::create_dir_all(&folder).expect("a folder");
    let file = folder.join("mine.safetensors");
    std::fs::write(&file, content(&service, &first)).expect("written");
    let begin = |rank: usize, from: Value| {
        let network = json!({"rank": rank, "alpha": 1.0, "init_from": from});
        service.post("/v1/runs", &short(&dataset, &json!({"network": network})))
    };
    let name = json!({"file": "mine.safetensors"});
    let other = begin(3, name.clone()).problem(422, "invalid_settings");
    let error = &other["errors"][0];
    assert_eq!(error["pointer"], "/network/init_from");
    let message = error["message"].as_str().expect("words");
    assert!(message.contains("lora of rank 2"), "{message}");
    let digest = json!({"file": "mine.safetensors", "sha256": "0".repeat(64)});
    begin(2, digest).problem(422, "invalid_settings");

    let run = begin(2, name.clone()).expect(201);
    let run = format!("/v1/runs/{}", run["id"].as_str().expect("an id"));
    let ended = wait(&service, &run, "succeeded");
    assert_ne!(content(&service, &ended), content(&service, &first));

    std::fs::write(&file, b"no LoRA").expect("written");
    let problem = begin(2, name).problem(422, "invalid_settings");
    assert_eq!(problem["errors"][0]["pointer"], "/network/init_from");
}

/// Blocks and patterns decide what is in a file.
#[test]
fn only_the_layers_that_were_asked_for_are_in_a_file() {
    let service = Service::start_with(settings);
    let dataset = dataset(&service);
    let mut dims = vec![0; 25];
    dims[12] = 3;
    let network = json!({
        "rank": 2, "block_dims": dims, "exclude": ["_ff_net_", r"\.attn1\.to_v$"], "loraplus_lr_ratio": 4.0,
    });
    let more = json!({"network": network, "text_encoder_lr": 0.0});
    let run = start(&service, &dataset, &more);
    let ended = wait(&service, &run, "succeeded");
    let bytes = content(&service, &ended);
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let names = file.names();
    assert!(names.len() >= 3 * 8, "{names:?}");
    for name in &names {
        assert!(name.starts_with("lora_unet_mid_block_"), "{name}");
        assert!(
            !name.contains("_ff_net_") && !name.contains("attn1_to_v"),
            "{name}"
        );
    }
    let shape = file.tensor("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight");
    assert_eq!(shape.expect("a tensor").shape()[0], 3);
}
