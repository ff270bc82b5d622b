//! lorasmith trains LoRA adapters for Stable Diffusion behind a REST API.

pub mod api;
pub mod config;
pub mod dataloader;
pub mod datasets;
pub mod diffusion;
pub mod telemetry;
