//! Table `loras`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "loras")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub run_id: Uuid,
    pub file_name: String,
    pub step: i64,
    pub epoch: i64,
    pub is_final: bool,
    pub sha256: String,
    pub size_bytes: i64,
    pub created_at_ms: i64,
    pub validation_loss: Option<f64>,
    pub validation_error: Option<f64>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
