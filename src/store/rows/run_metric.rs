//! Table `run_metrics`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "run_metrics")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub run_id: Uuid,
    #[sea_orm(primary_key, auto_increment = false)]
    pub step: i64,
    pub epoch: i64,
    pub loss: Option<f64>,
    pub loss_average: Option<f64>,
    pub validation_loss: Option<f64>,
    pub lr_unet: Option<f64>,
    pub lr_text_encoder: Option<f64>,
    pub grad_norm: Option<f64>,
    pub step_time_s: Option<f64>,
    pub memory_bytes: Option<i64>,
    pub validation_error: Option<f64>,
    pub grad_norm_unet: Option<f64>,
    pub grad_norm_text_encoder: Option<f64>,
    pub images_per_s: Option<f64>,
    pub eta_s: Option<f64>,
    pub device_memory_bytes: Option<i64>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
