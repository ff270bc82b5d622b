//! Table `images`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "images")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub dataset_id: Uuid,
    pub subset_id: Uuid,
    pub file_name: String,
    pub sha256: String,
    pub media_type: String,
    pub size_bytes: i64,
    pub width_px: i32,
    pub height_px: i32,
    pub caption: Option<String>,
    pub has_alpha: bool,
    pub background: Option<String>,
    pub color_correction: Option<String>,
    pub mask_sha256: Option<String>,
    pub revision: i64,
    pub created_at_ms: i64,
    pub updated_at_ms: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
