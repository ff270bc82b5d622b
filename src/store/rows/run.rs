//! Table `runs`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "runs")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub name: String,
    pub state: String,
    pub spec: String,
    pub images: String,
    pub dataset_id: Uuid,
    pub base_model_id: String,
    pub error_code: Option<String>,
    pub error_message: Option<String>,
    pub cancel_requested: bool,
    pub attempt: i32,
    pub lease_owner: Option<String>,
    pub lease_until_ms: Option<i64>,
    pub worker_pid: Option<i32>,
    pub phase: Option<String>,
    pub step: i64,
    pub total_steps: Option<i64>,
    pub epoch: i64,
    pub total_epochs: Option<i64>,
    pub loss_average: Option<f64>,
    pub steps_per_s: Option<f64>,
    pub eta_s: Option<f64>,
    pub memory_bytes: Option<i64>,
    pub device: Option<String>,
    pub created_at_ms: i64,
    pub started_at_ms: Option<i64>,
    pub finished_at_ms: Option<i64>,
    pub updated_at_ms: i64,
    pub pause_requested: bool,
    pub save_requested: bool,
    pub sample_requested: bool,
    pub leave_requested: bool,
    pub kept_step: Option<i64>,
    pub furthest_step: i64,
    pub judged_kept_step: Option<i64>,
    pub judged_furthest_step: i64,
    pub stalls: i32,
    pub wait_code: Option<String>,
    pub wait_message: Option<String>,
    pub wait_bytes: Option<i64>,
    pub worker_host: Option<String>,
    pub continued_from: Option<Uuid>,
    pub priority: i32,
    pub verdict: Option<String>,
    pub early_stop: Option<String>,
    pub api_key_id: Option<Uuid>,
    pub wanted_device: Option<String>,
    pub number: i64,
    pub turn: i64,
    pub keeps_turn: bool,
    pub rolled_back: Option<String>,
    pub provenance_sha256: Option<String>,
    pub reproduction_of: Option<Uuid>,
    pub reproduction: Option<String>,
    pub grid_of: Option<Uuid>,
    pub captioner: Option<String>,
    pub dataset: Option<String>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
