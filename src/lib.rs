//! lorasmith trains LoRA adapters for Stable Diffusion behind a REST API.

pub mod config;
pub mod dataloader;
pub mod diffusion;
pub mod models;
pub mod networks;
pub mod telemetry;
pub mod training;
