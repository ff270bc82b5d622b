//! Repeating a run: the same spec and images again, once everything else is found to be what it was.

use uuid::Uuid;

use super::origin::plugin_records;
use super::provenance::Provenance;
use super::reproduction::{self, Mismatch};
use super::service::{RunError, RunService, check_device};
use super::spec::RunSpec;
use crate::store::StoreError;
use crate::store::runs::{NewRun, Run, RunState};

impl RunService {
    /// Where a run's files come from: of one that has succeeded the record that was kept, word for word.
    ///
    /// # Errors
    /// [`RunError::NotFound`].
    pub async fn provenance(&self, id: Uuid) -> Result<(Vec<u8>, Option<String>), RunError> {
        let run = self.get(id).await?;
        if let Some(sha256) = &run.provenance_sha256 {
            let path = self.store().blobs().path(sha256);
            let bytes = tokio::fs::read(&path)
                .await
                .map_err(|source| RunError::Store(StoreError::Io { path, source }))?;
            return Ok((bytes, run.provenance_sha256));
        }
        let record = Provenance::of(self.store(), &run, false).await?;
        Ok((serde_json::to_vec(&record)?, None))
    }

    /// Makes a run that repeats one that has succeeded. `api_key_id` asks for it.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::NotReproducible`] when it has not succeeded, or goes on from another;
    /// [`RunError::InputsChanged`] when the base model or a plugin is not what it was, or is missing;
    /// [`RunError::Invalid`] when its device is gone.
    pub async fn reproduce(&self, id: Uuid, api_key_id: Option<Uuid>) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        if run.state != RunState::Succeeded {
            let message = format!("it is {}, expected succeeded", run.state.as_str());
            return Err(RunError::NotReproducible(message));
        }
        if let Some(first) = run.continued_from {
            let message = format!(
                "it goes on from run {first}, so that its first steps are not its own: repeat that run, then extend \
                 the repetition"
            );
            return Err(RunError::NotReproducible(message));
        }
        let record = match reproduction::kept_record(self.store(), &run).await {
            Err(StoreError::NotFound) => {
                let message = "there is no record of where its files come from".to_owned();
                return Err(RunError::NotReproducible(message));
            }
            record => record?,
        };
        let spec: RunSpec = serde_json::from_str(&run.spec)?;
        let changed = self.changed_inputs(&record, &spec).await?;
        if !changed.is_empty() {
            return Err(RunError::InputsChanged(changed));
        }
        if let Some(problem) = check_device(spec.device.clone()).await? {
            return Err(RunError::Invalid(vec![problem]));
        }
        let images = self.store().run_images(id).await?;
        let repeated = NewRun {
            id: Uuid::now_v7(),
            name: run.name,
            // Word for word: the files name a digest of it.
            spec: run.spec,
            images,
            dataset: self.store().run_dataset(id).await?,
            dataset_id: run.dataset_id,
            base_model_id: run.base_model_id,
            continued_from: None,
            reproduction_of: Some(id),
            grid_of: None,
            captioner: None,
            api_key_id,
            wanted_device: self.wanted_device(&spec.device).await?,
            priority: run.priority,
            total_steps: run.total_steps,
        };
        let repeated = self.store().create_run(repeated).await?;
        self.wake();
        Ok(repeated)
    }

    /// What is not as it was, as far as that is known without reading a base model; its worker reads it.
    async fn changed_inputs(
        &self,
        record: &Provenance,
        spec: &RunSpec,
    ) -> Result<Vec<Mismatch>, RunError> {
        let found = plugin_records(self.plugins(), spec);
        let mut changed = reproduction::check_plugins(record, &found);
        let expected = record.inputs.base_model.as_ref();
        let (name, was) = expected.map_or(("", ""), |model| (&model.name, &model.sha256));
        let missing = || Mismatch {
            pointer: "/inputs/base_model".to_owned(),
            message: format!(
                "the base model `{name}` is missing: found none, expected one with SHA-256 {was}"
            ),
        };
        let (models, wanted) = (self.models().clone(), spec.base_model_id.clone());
        let digest = tokio::task::spawn_blocking(move || {
            let found = models.find(&wanted)?;
            Ok::<_, RunError>(found.map(|base| models.known_digest(&base.path)))
        });
        match digest.await?? {
            None => changed.push(missing()),
            Some(Some(digest)) => changed.extend(reproduction::check_model(record, &digest.sha256)),
            Some(None) => {}
        }
        changed.extend(self.changed_vae(record, spec).await?);
        Ok(changed)
    }

    /// The same of the VAE in place of the model's own.
    async fn changed_vae(
        &self,
        record: &Provenance,
        spec: &RunSpec,
    ) -> Result<Option<Mismatch>, RunError> {
        let Some(wanted) = spec.vae_id.clone() else {
            return Ok(None);
        };
        let models = self.models().clone();
        let digest = tokio::task::spawn_blocking(move || {
            let found = models.find_vae(&wanted)?;
            Ok::<_, RunError>(found.map(|vae| models.known_digest(&vae.path)))
        });
        Ok(match digest.await?? {
            None => reproduction::check_vae(record, None),
            Some(Some(digest)) => reproduction::check_vae(record, Some(&digest.sha256)),
            Some(None) => None,
        })
    }
}
