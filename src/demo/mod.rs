//! `lorasmith demo`: teaches the bundled base model a mascot that it has never seen, over the service's own HTTP API.
//!
//! It starts a service on a free port, uploads the picture set as a zip, corrects one caption, starts a run, follows
//! its events, downloads the LoRA and writes what a person wants to see: the file, samples before and after, the
//! loss curve, and the same calls as curl commands.

mod client;
mod pictures;

use std::fmt;
use std::io::{Cursor, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use image::RgbImage;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use self::client::Client;
use self::pictures::{Curves, SheetRow};
use crate::app;
use crate::config::Config;

/// Pictures that are left out of training and judged by: their loss says whether the mascot was learned.
const HELD_OUT: [&str; 4] = ["lumo_03.png", "lumo_07.png", "lumo_11.png", "lumo_15.png"];

/// What the sheet shows: three of the mascot, two plain shapes that must keep their look.
const PROMPTS: [&str; 5] = [
    "lumo, blue background",
    "lumo, red background, on the left",
    "large lumo, yellow background",
    "a red circle, white background",
    "a large blue star, yellow background",
];

/// What `lorasmith demo` was asked for.
pub struct DemoOptions {
    /// Where the results go.
    pub output: PathBuf,
    /// The folder with `base/` and `dataset/`; found by itself when absent.
    pub assets: Option<PathBuf>,
    /// Optimizer steps.
    pub steps: u32,
    /// Device of the run: `auto`, `cpu`, `vulkan:0`.
    pub device: String,
    /// Whether to draw progress bars.
    pub quiet: bool,
}

/// What the demo found out.
#[derive(Debug)]
pub struct DemoReport {
    /// Held-out loss of the base model.
    pub base_loss: f64,
    /// Held-out loss with the trained LoRA.
    pub trained_loss: f64,
    /// The LoRA file.
    pub lora: PathBuf,
    /// Size of the LoRA file.
    pub lora_bytes: usize,
    /// Samples before and after.
    pub sheet: PathBuf,
    /// The loss curve.
    pub plot: PathBuf,
    /// The calls as a shell script.
    pub script: PathBuf,
}

impl DemoReport {
    /// Held-out loss with the LoRA as a part of the base's: at most one half when the mascot was learned.
    pub fn ratio(&self) -> f64 {
        self.trained_loss / self.base_loss
    }
}

impl fmt::Display for DemoReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "held-out  loss {:.4} with the base model, {:.4} with the LoRA: {:.2} of it",
            self.base_loss,
            self.trained_loss,
            self.ratio()
        )?;
        let size = self.lora_bytes as f64 / f64::from(1 << 20);
        writeln!(f, "lora      {} ({size:.1} MiB)", self.lora.display())?;
        writeln!(f, "samples   {}", self.sheet.display())?;
        writeln!(f, "losses    {}", self.plot.display())?;
        write!(f, "calls     {}", self.script.display())
    }
}

/// Runs the whole demo.
///
/// # Errors
/// When the assets are missing, a call is refused, or the run does not succeed.
pub fn run(options: &DemoOptions) -> Result<DemoReport> {
    let assets = find_assets(options.assets.as_deref())?;
    std::fs::create_dir_all(&options.output)
        .with_context(|| format!("creating {}", options.output.display()))?;
    let service = app::Service::start_in_background(Config {
        bind: ([127, 0, 0, 1], 0).into(),
        data_dir: options.output.join("service"),
        models_dir: assets.clone(),
        device: options.device.clone(),
        ..Config::default()
    })?;
    let base = format!("http://{}", service.address());
    println!("service   {base}  (API documentation at {base}/docs)");
    let report = drive(&mut Client::new(&base), &assets, options);
    service.stop()?;
    report
}

fn drive(client: &mut Client, assets: &Path, options: &DemoOptions) -> Result<DemoReport> {
    let model = find_base_model(client)?;
    let dataset = upload_dataset(client, &assets.join("dataset"), &options.output)?;
    let held_out = prepare_images(client, &dataset)?;
    let request = run_request(&dataset, &model, &held_out, options);
    let run = client.post("Start the run", "/v1/runs", &request)?.body;
    let run_id = text(&run, "/id")?;
    println!("run       {run_id}");
    let losses = follow_run(client, &run_id, options)?;
    collect(client, &run_id, &losses, options)
}

fn find_base_model(client: &mut Client) -> Result<String> {
    let models = client
        .get("Which base models are there?", "/v1/models")?
        .body;
    let model = list(&models)?
        .iter()
        .find(|model| model["name"] == "base")
        .context("the service does not list the bundled model `base`")?;
    println!(
        "model     {} ({})",
        text(model, "/name")?,
        text(model, "/family")?
    );
    text(model, "/id")
}

fn upload_dataset(client: &mut Client, folder: &Path, output: &Path) -> Result<String> {
    let dataset = client
        .post("Make a dataset", "/v1/datasets", &json!({"name": "lumo"}))?
        .body;
    let id = text(&dataset, "/id")?;
    let archive = zip_folder(folder)?;
    let file_name = "lumo.zip";
    std::fs::write(output.join(file_name), &archive)?;
    let uploaded = client
        .upload(
            "Upload the pictures: a zip in kohya layout, captions and regularization pictures included",
            &format!("/v1/datasets/{id}/images"),
            file_name,
            &archive,
        )?
        .body;
    println!("dataset   {id}: {}", uploaded["summary"]);
    Ok(id)
}

/// Corrects one caption and returns the ids of the held-out pictures.
fn prepare_images(client: &mut Client, dataset: &str) -> Result<Vec<String>> {
    let images = client
        .get(
            "What is in it?",
            &format!("/v1/datasets/{dataset}/images?limit=200"),
        )?
        .body;
    let images = list(&images)?;
    let named = |name: &str| {
        images
            .iter()
            .find(|image| image["file_name"] == name)
            .with_context(|| format!("`{name}` is not in the dataset"))
            .and_then(|image| text(image, "/id"))
    };
    let path = format!("/v1/datasets/{dataset}/images/{}", named("lumo_00.png")?);
    let before = client.get("Look at one picture", &path)?;
    let etag = before.etag.context("an image carries an ETag")?;
    let caption = text(&before.body, "/caption")?;
    client.patch(
        "Correct its caption, unless somebody else did meanwhile",
        &path,
        &etag,
        &json!({"caption": format!("{caption}, smiling face")}),
    )?;
    HELD_OUT.into_iter().map(named).collect()
}

/// The run's settings: those of the reference LoRA (rank 16, learning rates 1e-3 and 5e-4, batch 4, cosine).
fn run_request(dataset: &str, model: &str, held_out: &[String], options: &DemoOptions) -> Value {
    let prompts: Vec<Value> = (1..)
        .zip(PROMPTS)
        .map(|(seed, prompt)| {
            json!({
                "prompt": prompt, "seed": seed, "width_px": 64, "height_px": 64,
                "steps": 25, "cfg_scale": 4.0, "sampler": "ddim",
            })
        })
        .collect();
    json!({
        "name": "lumo",
        "dataset_id": dataset,
        "base_model": model,
        "network": {"kind": "lora", "rank": 16, "alpha": 16.0},
        "unet_lr": 1e-3,
        "text_encoder_lr": 5e-4,
        "optimizer": {"id": "adamw", "settings": {"weight_decay": 0.01}},
        "scheduler": {"id": "cosine", "settings": {}},
        "lr_warmup_steps": 20,
        "max_train_steps": options.steps,
        "batch_size": 4,
        "resolution": {"width_px": 64, "height_px": 64},
        "buckets": {"enabled": true, "min_px": 32, "max_px": 128, "step_px": 16},
        "seed": 42,
        "samples": {"prompts": prompts, "at_first": true},
        "validation": {"image_ids": held_out, "every_n_steps": 50},
        "device": options.device,
    })
}

/// Losses by step, as the events brought them.
#[derive(Default)]
struct Losses {
    validation: Vec<(f64, f64)>,
}

fn follow_run(client: &mut Client, run_id: &str, options: &DemoOptions) -> Result<Losses> {
    let bar = if options.quiet {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(u64::from(options.steps))
    };
    bar.set_style(ProgressStyle::with_template(
        "training  {bar:32} {pos}/{len}  {msg}",
    )?);
    let mut losses = Losses::default();
    let mut end = None;
    client.follow(
        "Follow the run",
        &format!("/v1/runs/{run_id}/events"),
        |event| {
            let data = &event.data;
            match event.kind.as_str() {
                "phase" => bar.set_message(data["phase"].as_str().unwrap_or_default().to_owned()),
                "progress" => {
                    bar.set_position(data["step"].as_u64().unwrap_or_default());
                    bar.set_message(format!(
                        "loss {:.4}  {:.0} s left",
                        data["loss_average"].as_f64().unwrap_or_default(),
                        data["eta_s"].as_f64().unwrap_or_default()
                    ));
                }
                "validation" => losses
                    .validation
                    .push((number(data, "/step")?, number(data, "/loss")?)),
                "state" => {
                    let state = text(data, "/state")?;
                    if matches!(state.as_str(), "succeeded" | "failed" | "cancelled") {
                        end = Some((state, data.clone()));
                        return Ok(false);
                    }
                }
                _ => {}
            }
            Ok(true)
        },
    )?;
    bar.finish();
    match end {
        Some((state, _)) if state == "succeeded" => Ok(losses),
        Some((state, data)) => bail!("the run {state}: {data}"),
        None => bail!("the event stream ended before the run did"),
    }
}

fn collect(
    client: &mut Client,
    run_id: &str,
    losses: &Losses,
    options: &DemoOptions,
) -> Result<DemoReport> {
    let run = client
        .get("How did it end?", &format!("/v1/runs/{run_id}"))?
        .body;
    let lora_id = text(&run, "/lora_id")?;
    let (bytes, etag) = client.download(
        "Fetch the LoRA",
        &format!("/v1/loras/{lora_id}/content"),
        "lumo.safetensors",
    )?;
    let digest = hex::encode(Sha256::digest(&bytes));
    if etag.as_deref().map(|tag| tag.trim_matches('"')) != Some(digest.as_str()) {
        bail!("the LoRA's ETag {etag:?} is not the SHA-256 of what came: {digest}");
    }
    let lora = options.output.join("lumo.safetensors");
    std::fs::write(&lora, &bytes)?;

    let sheet = options.output.join("before-after.png");
    pictures::sheet(&sheet_rows(client, run_id)?)?.save(&sheet)?;
    let plot = options.output.join("loss.png");
    draw_losses(client, run_id, losses, &plot)?;
    let script = options.output.join("demo.sh");
    std::fs::write(&script, client.script())?;

    let (Some(first), Some(last)) = (losses.validation.first(), losses.validation.last()) else {
        bail!("the run reported no held-out loss");
    };
    Ok(DemoReport {
        base_loss: first.1,
        trained_loss: last.1,
        lora,
        lora_bytes: bytes.len(),
        sheet,
        plot,
        script,
    })
}

/// First and last sample of each prompt.
fn sheet_rows(client: &mut Client, run_id: &str) -> Result<Vec<SheetRow>> {
    let samples = client
        .get(
            "Which samples were drawn?",
            &format!("/v1/runs/{run_id}/samples?limit=200"),
        )?
        .body;
    let samples = list(&samples)?;
    let mut rows = Vec::new();
    for (index, prompt) in PROMPTS.into_iter().enumerate() {
        let mut of_prompt: Vec<&Value> = samples
            .iter()
            .filter(|sample| sample["prompt_index"] == index)
            .collect();
        of_prompt.sort_by_key(|sample| sample["step"].as_u64());
        let (Some(first), Some(last)) = (of_prompt.first(), of_prompt.last()) else {
            bail!("no samples of `{prompt}`");
        };
        rows.push(SheetRow {
            prompt: prompt.to_owned(),
            before: sample_picture(client, run_id, first)?,
            after: sample_picture(client, run_id, last)?,
        });
    }
    Ok(rows)
}

fn sample_picture(client: &mut Client, run_id: &str, sample: &Value) -> Result<RgbImage> {
    let id = text(sample, "/id")?;
    let file_name = format!(
        "sample-{}-step-{}.png",
        sample["prompt_index"], sample["step"]
    );
    let (bytes, _) = client.download(
        "Fetch a sample",
        &format!("/v1/runs/{run_id}/samples/{id}/content"),
        &file_name,
    )?;
    Ok(image::load_from_memory(&bytes)?.to_rgb8())
}

fn draw_losses(client: &mut Client, run_id: &str, losses: &Losses, plot: &Path) -> Result<()> {
    let metrics = client
        .get(
            "Fetch the loss of every step",
            &format!("/v1/runs/{run_id}/metrics"),
        )?
        .body;
    let points = list(&metrics)?;
    let series = |key: &str| -> Vec<(f64, f64)> {
        points
            .iter()
            .filter_map(|point| Some((point["step"].as_f64()?, point[key].as_f64()?)))
            .collect()
    };
    pictures::loss_plot(
        &Curves {
            loss: &series("loss"),
            average: &series("loss_average"),
            validation: &losses.validation,
        },
        plot,
    )
}

/// The folder with the demo's base model and picture set.
fn find_assets(named: Option<&Path>) -> Result<PathBuf> {
    let candidates: Vec<PathBuf> = match named {
        Some(folder) => vec![folder.to_owned()],
        None => {
            let beside_program = std::env::current_exe()
                .ok()
                .and_then(|program| Some(program.parent()?.join("examples/demo")));
            [
                Some(PathBuf::from("examples/demo")),
                beside_program,
                Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo")),
            ]
            .into_iter()
            .flatten()
            .collect()
        }
    };
    candidates
        .iter()
        .find(|folder| folder.join("base/model_index.json").is_file() && folder.join("dataset").is_dir())
        .cloned()
        .ok_or_else(|| {
            anyhow!(
                "the demo's base model and pictures were not found in {}: start it in the repository, or name the folder with --assets",
                candidates.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ")
            )
        })
}

/// Packs a folder of folders, names in order.
fn zip_folder(folder: &Path) -> Result<Vec<u8>> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for subset in sorted_entries(folder)? {
        let name = file_name(&subset)?;
        for file in sorted_entries(&subset)? {
            archive.start_file(
                format!("{name}/{}", file_name(&file)?),
                zip::write::SimpleFileOptions::default(),
            )?;
            archive.write_all(&std::fs::read(&file)?)?;
        }
    }
    Ok(archive.finish()?.into_inner())
}

fn sorted_entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = std::fs::read_dir(folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    entries.sort();
    Ok(entries)
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().context("a file name")?;
    Ok(name.to_str().context("a UTF-8 file name")?.to_owned())
}

fn list(answer: &Value) -> Result<&Vec<Value>> {
    answer["data"]
        .as_array()
        .context("the answer is not a list")
}

fn text(value: &Value, pointer: &str) -> Result<String> {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .map(str::to_owned)
        .with_context(|| format!("`{pointer}` is missing in {value}"))
}

fn number(value: &Value, pointer: &str) -> Result<f64> {
    value
        .pointer(pointer)
        .and_then(Value::as_f64)
        .with_context(|| format!("`{pointer}` is missing in {value}"))
}
