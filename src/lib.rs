//! lorasmith trains LoRA adapters for Stable Diffusion behind a REST API.

pub mod config;
pub mod demo;
pub mod diffusion;
pub mod telemetry;
