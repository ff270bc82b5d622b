//! Table `subsets`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "subsets")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub dataset_id: Uuid,
    pub name: String,
    pub repeats: i32,
    pub is_reg: bool,
    pub instance_prompt: Option<String>,
    pub class_prompt: Option<String>,
    pub revision: i64,
    pub created_at_ms: i64,
    pub training: Option<String>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
