//! Table `loras`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "loras")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    /// None of a file that no run of this service has made.
    pub run_id: Option<Uuid>,
    pub file_name: String,
    pub step: i64,
    pub epoch: i64,
    pub is_final: bool,
    pub sha256: String,
    pub size_bytes: i64,
    pub created_at_ms: i64,
    pub validation_loss: Option<f64>,
    pub validation_error: Option<f64>,
    /// JSON: where a file comes from that no run has made.
    pub origin: Option<String>,
    /// JSON: what was seen when it was read again.
    pub self_check: Option<String>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
