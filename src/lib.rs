//! lorasmith trains LoRA adapters for Stable Diffusion behind a REST API.
//!
//! Modules in the order of their dependencies; `ARCHITECTURE.md` says who may use whom.

pub mod allocator;
#[cfg(test)]
mod damage;
pub mod kernels;
pub mod lettering;
pub mod pictures;

pub mod diffusion;
pub mod lora_tools;
pub mod networks;

pub mod captioning;
pub mod dataloader;
pub mod training;

pub mod plugin_host;
pub mod preparation;
pub mod selfcheck;
pub mod store;

pub mod access;
pub mod bench;
pub mod datasets;
pub mod loras;
pub mod models;
pub mod runs;
pub mod verify;
pub mod webhooks;

pub mod api;
pub mod app;
pub mod cli;
pub mod config;
pub mod demo;
pub mod doctor;
pub mod key_commands;
pub mod listing;
pub mod lora_commands;
pub mod telemetry;
