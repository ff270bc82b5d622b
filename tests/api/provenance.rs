//! `/v1/runs/{id}/provenance` and `…/reproduce`: where files come from, and whether they come out the same again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use lorasmith::api::run_provenance::Provenance;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::support::{Service, png};

const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with one base model.
fn models() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-sd15");
    let model = folder.path().join("tiny.safetensors");
    std::fs::copy(fixture.join("tiny-sd15-ldm.safetensors"), &model).expect("copied");
    (folder, model)
}

fn service(models: &Path) -> Service {
    Service::start_with(|config| {
        config.models_dir = models.to_owned();
        config.device = "cpu".to_owned();
        // The service here is a test, the worker a program, and each has plugins beside it: of two builds.
        let own = std::env::current_exe().expect("this program");
        let program = own.parent().and_then(Path::parent).expect("a folder");
        config.plugin_dirs = vec![program.to_owned()];
    })
}

fn dataset(service: &Service) -> String {
    let path = service.dataset("a");
    let files = [png(1), png(2)];
    let files = [("a.png", files[0].as_slice()), ("b.png", &files[1])];
    service
        .upload(&format!("{path}/images"), &[], &files)
        .expect(201);
    path
}

fn start(service: &Service, dataset: &str) -> String {
    let body = json!({
        "name": "a", "dataset_id": dataset.rsplit('/').next(), "base_model": "tiny", "max_train_steps": 4,
        "network": {"rank": 2}, "resolution": {"width_px": 64, "height_px": 64}, "buckets": {"enabled": false},
        "save": {"every_n_steps": 2},
    });
    path_of(&service.post("/v1/runs", &body).expect(201))
}

fn path_of(run: &Value) -> String {
    format!("/v1/runs/{}", run["id"].as_str().expect("an id"))
}

fn wait(service: &Service, run: &str, state: &str) -> Value {
    until(|| {
        let found = service.get(run).expect(200);
        (found["state"] == state).then_some(found)
    })
}

fn until<T>(look: impl Fn() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "it never comes");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[test]
fn a_run_tells_where_its_file_comes_from_and_can_be_repeated() {
    let (folder, model) = models();
    let service = service(folder.path());
    let dataset = dataset(&service);
    let run = start(&service, &dataset);
    let repeat = |run: &str| service.post(&format!("{run}/reproduce"), &json!({}));
    repeat(&run).problem(409, "not_reproducible");
    // What the dataset becomes later changes nothing.
    let images = service.get(&format!("{dataset}/images")).expect(200);
    let image = images["data"][0].clone();
    let image = format!("{dataset}/images/{}", image["id"].as_str().expect("an id"));
    let ended = wait(&service, &run, "succeeded");
    assert_eq!(ended["reproduction"], Value::Null);
    service.delete(&image).expect(204);

    let answer = service.get(&format!("{run}/provenance"));
    let record = answer.expect(200);
    assert_eq!(
        answer.header("etag"),
        format!("\"{}\"", digest(&answer.bytes))
    );
    let typed: Provenance = serde_json::from_slice(&answer.bytes).expect("as documented");
    let same = serde_json::to_vec(&typed).expect("JSON") == answer.bytes;
    assert!(
        same,
        "the documented fields are all there are, in their order"
    );
    let inputs = serde_json::to_vec(&typed.inputs).expect("JSON");
    assert_eq!(record["inputs_sha256"], digest(&inputs).as_str());
    assert_eq!(record["complete"], true);
    let mut pictures: Vec<&str> = typed
        .inputs
        .images
        .iter()
        .map(|i| i.sha256.as_str())
        .collect();
    pictures.sort_unstable();
    let mut expected = [digest(&png(1)), digest(&png(2))];
    expected.sort_unstable();
    assert_eq!(pictures, expected);
    let base = &record["inputs"]["base_model"];
    let weights = std::fs::read(&model).expect("there");
    assert_eq!(base["sha256"], digest(&weights).as_str());
    assert_eq!(
        (&base["path"], &base["family"]),
        (&json!("tiny.safetensors"), &json!("sd1"))
    );
    let plugins = typed.inputs.plugins.iter();
    let roles: Vec<&str> = plugins.clone().map(|plugin| plugin.role.as_str()).collect();
    assert_eq!(roles, ["optimizer", "scheduler"]);
    assert!(
        plugins
            .clone()
            .all(|plugin| plugin.sha256.as_ref().is_some_and(|sha| sha.len() == 64))
    );
    let environment = &record["attempts"][0]["environment"];
    assert_eq!(environment["program_version"], env!("CARGO_PKG_VERSION"));
    assert!(environment["instructions"].is_string(), "{environment}");
    let names: Vec<&str> = typed
        .result
        .files
        .iter()
        .map(|f| f.file_name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "a-step00000002.safetensors",
            "a-step00000004.safetensors",
            "a.safetensors"
        ]
    );
    let id = ended["lora_id"].as_str().expect("a LoRA");
    let file = service.get(&format!("/v1/loras/{id}/content"));
    assert_eq!(typed.result.files[2].sha256, digest(&file.bytes));
    let header = String::from_utf8_lossy(&file.bytes[8..4096.min(file.bytes.len())]).into_owned();
    let named = record["inputs_sha256"].as_str().expect("a digest");
    assert!(
        header.contains(named),
        "the file names the digest of its inputs"
    );

    let again = repeat(&run).expect(201);
    let again = path_of(&again);
    let waiting = service.get(&again).expect(200);
    assert_eq!(waiting["reproduction"]["of_run_id"], ended["id"]);
    let found = wait(&service, &again, "succeeded")["reproduction"].clone();
    assert_eq!(found["state"], "identical", "{found}");
    assert_eq!(
        (&found["identical"], &found["differences"]),
        (&json!(true), &json!([]))
    );
    assert_eq!(found["first_differing_step"], Value::Null);
    let repeated = service.get(&format!("{again}/provenance")).expect(200);
    assert_eq!(repeated["inputs"], record["inputs"]);
    assert_eq!(
        repeated["result"]["losses_sha256"],
        record["result"]["losses_sha256"]
    );

    // A longer one has no beginning of its own.
    let longer = service.post(&format!("{run}/extend"), &json!({"steps": 1}));
    let longer = path_of(&longer.expect(201));
    wait(&service, &longer, "succeeded");
    repeat(&longer).problem(409, "not_reproducible");
}

#[test]
fn a_run_is_not_repeated_with_another_model() {
    let (folder, model) = models();
    let service = service(folder.path());
    let run = start(&service, &dataset(&service));
    wait(&service, &run, "succeeded");
    let models = service.get("/v1/models").expect(200);
    let was = models["data"][0]["sha256"].clone();
    let mut weights = std::fs::read(&model).expect("there");
    assert_eq!(was, digest(&weights).as_str());

    let last = weights.len() - 2;
    weights[last] ^= 1;
    std::fs::write(&model, &weights).expect("written");
    let file = std::fs::File::options().write(true).open(&model);
    let later = SystemTime::now() + Duration::from_secs(5);
    file.expect("there").set_modified(later).expect("set");
    // Nobody has read it yet: the worker does.
    let again = service.post(&format!("{run}/reproduce"), &json!({}));
    let again = path_of(&again.expect(201));
    let failed = wait(&service, &again, "failed");
    assert_eq!(failed["error"]["code"], "inputs_changed");
    assert_eq!(failed["reproduction"]["state"], "unfinished");
    let message = failed["error"]["message"].as_str().expect("words");
    for sha256 in [was.as_str().expect("a digest"), &digest(&weights)] {
        assert!(message.contains(sha256), "{message}");
    }
    // From now on it is known, and who asks for the model alone has it read.
    until(|| {
        let found = service.get("/v1/models/tiny").expect(200);
        (found["sha256"] == digest(&weights).as_str()).then_some(())
    });
    let repeat = || service.post(&format!("{run}/reproduce"), &json!({}));
    let problem = repeat().problem(409, "inputs_changed");
    assert_eq!(problem["errors"][0]["pointer"], "/inputs/base_model/sha256");
    std::fs::remove_file(&model).expect("removed");
    let problem = repeat().problem(409, "inputs_changed");
    let missing = problem["errors"][0]["message"].as_str().expect("words");
    assert!(missing.contains("missing"), "{missing}");
}
