//! Which runs still need a model of the model folder.

use sea_orm::{ColumnTrait as _, Condition, EntityTrait as _, QueryFilter as _, QuerySelect as _};
use uuid::Uuid;

use super::{RunState, words};
use crate::store::rows::run;
use crate::store::{Store, StoreError};

impl Store {
    /// A run, grid or job that is in none of the states `ended` and is on this base model, or has this VAE in its spec.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn run_that_needs(
        &self,
        model_or_vae: &str,
        ended: &[RunState],
    ) -> Result<Option<Uuid>, StoreError> {
        let as_vae = format!(r#"%"vae_id":"{model_or_vae}"%"#);
        let needs = Condition::any()
            .add(run::Column::BaseModelId.eq(model_or_vae))
            .add(run::Column::Spec.like(as_vae));
        let found = run::Entity::find()
            .select_only()
            .column(run::Column::Id)
            .filter(needs)
            .filter(run::Column::State.is_not_in(words(ended)))
            .limit(1)
            .into_tuple()
            .one(&self.db)
            .await?;
        Ok(found)
    }
}
