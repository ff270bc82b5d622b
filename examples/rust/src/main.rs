//! From pictures to a LoRA with a client that progenitor has written.
//!
//!     cargo run -- PICTURES.zip BASE_MODEL [STEPS] [RESOLUTION] [OUTPUT]
//!
//! The address comes from LORASMITH, the key from LORASMITH_API_KEY where the service wants one.

use std::collections::BTreeMap;
use std::env;
use std::num::NonZeroU64;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use futures_util::TryStreamExt as _;
use reqwest::header::{AUTHORIZATION, ETAG, HeaderMap};
use reqwest::multipart::{Form, Part};
use serde_json::Value;
use uuid::Uuid;

use types::{Buckets, CreateDataset, CreateRun, ImagePatch, Network, Resolution, RunState, Upload};

progenitor::generate_api!(
    spec = { path = "openapi.json", relative_to = OutDir },
    interface = Builder,
);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let mut next = |default: &str| arguments.next().unwrap_or_else(|| default.to_owned());
    let (pictures, base_model) = (next(""), next(""));
    let steps: NonZeroU64 = next("1000").parse()?;
    let size: u32 = next("512").parse()?;
    let output = next("lumo.safetensors");

    let client = connect()?;
    let dataset = upload(&client, Path::new(&pictures)).await?;
    correct_a_caption(&client, dataset).await?;
    let network: Network = Network::builder().rank(16).alpha(16.0).try_into()?;
    let resolution: Resolution = Resolution::builder()
        .width_px(size)
        .height_px(size)
        .try_into()?;
    let buckets: Buckets = Buckets::builder()
        .min_px(size / 2)
        .max_px(size * 2)
        .try_into()?;
    let settings = CreateRun::builder()
        .name("lumo")
        .dataset_id(dataset)
        .base_model(base_model)
        .network(network)
        .max_train_steps(steps)
        .seed(42i64)
        .resolution(resolution)
        .buckets(buckets);
    let run = start(&client, settings.try_into()?).await?;
    follow(&client, run).await?;
    download(&client, run, Path::new(&output)).await
}

fn connect() -> Result<Client> {
    let base = env::var("LORASMITH").unwrap_or_else(|_| "http://127.0.0.1:7870".to_owned());
    let mut headers = HeaderMap::new();
    if let Ok(key) = env::var("LORASMITH_API_KEY") {
        headers.insert(AUTHORIZATION, format!("Bearer {key}").parse()?);
    }
    let http = reqwest::Client::builder()
        .default_headers(headers)
        .build()?;
    Ok(Client::new_with_client(&base, http))
}

/// Forms are what progenitor does not write: this one is sent with the same connection.
async fn upload(client: &Client, pictures: &Path) -> Result<Uuid> {
    let body = CreateDataset::builder().name("lumo");
    let dataset = client.create_dataset().body(body).send().await?;
    let name = pictures.file_name().context("no file")?.to_string_lossy();
    let file = Part::bytes(std::fs::read(pictures)?).file_name(name.into_owned());
    let url = format!("{}/v1/datasets/{}/images", client.baseurl(), dataset.id);
    let sent = client
        .client()
        .post(url)
        .multipart(Form::new().part("file", file))
        .send()
        .await?;
    let answer: Upload = sent.error_for_status()?.json().await?;
    println!("dataset {}: {} pictures", dataset.id, answer.summary.images);
    Ok(dataset.id)
}

async fn correct_a_caption(client: &Client, dataset: Uuid) -> Result<()> {
    let page = client.list_images().dataset_id(dataset).send().await?;
    let first = page.data.first().context("no pictures")?;
    let seen = client
        .get_image()
        .dataset_id(dataset)
        .image_id(first.id)
        .send()
        .await?;
    let tag = seen.headers()[ETAG].to_str()?;
    let caption = format!("{}, smiling", first.caption.as_deref().unwrap_or("lumo"));
    // With If-Match nobody's change in between is overwritten: it would be a 412.
    let changed = client
        .update_image()
        .dataset_id(dataset)
        .image_id(first.id)
        .if_match(tag)
        .body(ImagePatch::builder().caption(caption))
        .send()
        .await?;
    println!(
        "caption of {}: {}",
        changed.file_name,
        changed.caption.as_deref().unwrap_or("none")
    );
    Ok(())
}

async fn start(client: &Client, settings: CreateRun) -> Result<Uuid> {
    let plan = client.plan_run().body(settings.clone()).send().await?;
    println!("plan: {} steps on {}", plan.total_steps, plan.device);
    if let Some(refusal) = &plan.refusal {
        bail!("{}: {}", refusal.code, refusal.message);
    }
    Ok(client.create_run().body(settings).send().await?.id)
}

/// Prints events until the run's story ends; each answer comes when there is something to tell.
async fn follow(client: &Client, run: Uuid) -> Result<()> {
    let mut after = Some(0);
    while let Some(seen) = after {
        let events = client
            .list_events()
            .run_id(run)
            .after(seen)
            .wait(30)
            .send()
            .await?;
        for event in &events.data {
            println!("  {} {}", event.event, serde_json::to_string(&event.data)?);
        }
        after = events.next_after;
    }
    Ok(())
}

async fn download(client: &Client, run: Uuid, output: &Path) -> Result<()> {
    let run = client.get_run().run_id(run).send().await?;
    if run.state != RunState::Succeeded {
        bail!(
            "{}: {}",
            run.state,
            run.error.as_ref().map_or("", |error| &error.message)
        );
    }
    let id = run.lora_id.context("a run that succeeds has a LoRA")?;
    let content = client.get_lora_content().lora_id(id).send().await?;
    let bytes: Vec<u8> = content
        .into_inner()
        .into_inner()
        .map_ok(|part| part.to_vec())
        .try_concat()
        .await?;
    let (length, rest) = bytes.split_first_chunk().context("a short file")?;
    let header = &rest[..usize::try_from(u64::from_le_bytes(*length))?];
    let header: BTreeMap<String, Value> = serde_json::from_slice(header)?;
    if !header.keys().any(|name| name.ends_with("lora_down.weight")) {
        bail!("no LoRA");
    }
    std::fs::write(output, &bytes)?;
    println!("{}: {} tensors", output.display(), header.len() - 1);
    Ok(())
}
