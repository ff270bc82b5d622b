//! What can be found wrong with a run's adapters by looking at the base model's layers and at the LoRA to begin with.

use std::path::{Path, PathBuf};

use super::{RunError, RunProblem, RunService};
use crate::diffusion::{Footprint, StableDiffusion};
use crate::models::BaseModel;
use crate::networks::beginning::{compare, take_sizes, targets_of_file};
use crate::networks::targets::{Layer, layers};
use crate::networks::{InitFrom, Naming, NetworkError, NetworkSettings, Rules, Target, TrainParts};
use crate::runs::beginning;
use crate::store::StoreError;
use crate::training::TrainSettings;

impl RunService {
    /// Checks the adapters against the model. Fixes the LoRA to begin with by its digest, and takes its sizes where it
    /// decides them.
    pub(super) async fn check_network(
        &self,
        base: &BaseModel,
        settings: &mut TrainSettings,
    ) -> Result<Vec<RunProblem>, RunError> {
        // What is wrong by itself is told elsewhere.
        if base.problem().is_some() || !settings.network.problems().is_empty() {
            return Ok(Vec::new());
        }
        let file = match self.fix_beginning(&mut settings.network).await? {
            Ok(file) => file,
            Err(problem) => return Ok(vec![problem]),
        };
        let parts = TrainParts {
            unet: settings.unet_lr != 0.0,
            text_encoder: settings.text_encoder_lr != 0.0,
        };
        let (path, mut network) = (base.path.clone(), settings.network.clone());
        let checked = tokio::task::spawn_blocking(move || {
            let Ok(model) = StableDiffusion::measure(&path) else {
                return (network, Vec::new()); // its worker says why
            };
            let problems = check(&model, &mut network, parts, file.as_deref());
            (network, problems)
        });
        let (network, problems) = checked.await?;
        settings.network = network;
        Ok(problems)
    }

    /// The file to begin with, whose digest is in the settings then.
    async fn fix_beginning(
        &self,
        network: &mut NetworkSettings,
    ) -> Result<Result<Option<PathBuf>, RunProblem>, RunError> {
        let Some(from) = &mut network.init_from else {
            return Ok(Ok(None));
        };
        let asked = from.sha256.take();
        let pointer = match from.file {
            Some(_) => "/network/init_from/file",
            None => "/network/init_from/lora_id",
        };
        let gone = |message: String| Ok(Err(RunProblem::new(pointer, "not_found", message)));
        let found = match self.digest_of(from).await? {
            Ok(found) => found,
            Err(message) => return gone(message),
        };
        if let Some(asked) = asked
            && asked != found
        {
            let message = format!("is {asked}, the file has {found}");
            let pointer = "/network/init_from/sha256";
            return Ok(Err(RunProblem::new(pointer, "invalid_value", message)));
        }
        from.sha256 = Some(found);
        Ok(Ok(beginning::place(&self.store, &self.models, from)))
    }

    async fn digest_of(&self, from: &InitFrom) -> Result<Result<String, String>, RunError> {
        if let Some(id) = &from.lora_id {
            let unknown = format!("found {id}, there is no such LoRA");
            let Ok(parsed) = id.parse() else {
                return Ok(Err(unknown));
            };
            return match self.store.lora(parsed).await {
                Ok(lora) => Ok(Ok(lora.sha256)),
                Err(StoreError::NotFound) => Ok(Err(unknown)),
                Err(error) => Err(error.into()),
            };
        }
        let name = from.file.clone().unwrap_or_default();
        let path = self.models.lora_file(&name);
        let digest = tokio::task::spawn_blocking(move || beginning::sha256(&path)).await?;
        Ok(digest.map_err(|error| {
            format!(
                "found {name:?}, which the folder `lora` of the model folder does not have: {error}"
            )
        }))
    }
}

fn problem(field: &str, message: String) -> RunProblem {
    RunProblem::new(format!("/network/{field}"), "invalid_value", message)
}

fn check(
    model: &Footprint,
    network: &mut NetworkSettings,
    parts: TrainParts,
    file: Option<&Path>,
) -> Vec<RunProblem> {
    let of_file = match file.map(|file| targets_of_file(file, model, parts)) {
        Some(Ok(targets)) => Some(targets),
        Some(Err(error)) => return vec![problem("init_from", unusable(&error))],
        None => None,
    };
    let decides = network
        .init_from
        .as_ref()
        .is_some_and(|from| from.dim_from_weights);
    if let (Some(targets), true) = (&of_file, decides) {
        take_sizes(network, targets);
    }
    let naming = Naming::of_footprint(model);
    let rules = match Rules::new(&naming, network) {
        Ok(rules) => rules,
        Err(NetworkError::Settings { field, message }) => return vec![problem(&field, message)],
        Err(error) => return vec![problem("kind", error.to_string())],
    };
    let layers = layers(model, parts);
    let targets = layers
        .iter()
        .filter_map(|layer: &Layer| rules.target(layer.part, &layer.path, layer.shape));
    let targets: Vec<Target> = targets.collect();
    if !decides {
        let unused = rules.unused_patterns(&layers);
        if !unused.is_empty() {
            let unused = unused.into_iter();
            return unused
                .map(|(field, message)| problem(&field, message))
                .collect();
        }
        if targets.is_empty() {
            let field = if network.include.is_empty() && network.exclude.is_empty() {
                "kind"
            } else {
                "include"
            };
            let message = "no layer that is trained gets an adapter by these settings";
            return vec![problem(field, message.to_owned())];
        }
        if let Some(found) = of_file
            && let Err(error) = compare(found.iter(), targets.into_iter())
        {
            return vec![problem("init_from", error.to_string())];
        }
    }
    Vec::new()
}

/// The message without the file's place on this machine.
fn unusable(error: &NetworkError) -> String {
    match error {
        NetworkError::Io { source, .. } => source.to_string(),
        NetworkError::Format { message, .. } => message.clone(),
        NetworkError::NoTargets => {
            "the file has no adapter for a half of the model that is trained".to_owned()
        }
        NetworkError::TooLarge {
            size_bytes,
            max_bytes,
            ..
        } => format!("{size_bytes} bytes, expected at most {max_bytes}"),
        other => other.to_string(),
    }
}
