//! The REST API as a client sees it: the real application on a port, a database file, requests over TCP.

mod auth;
mod captioning;
mod captions;
#[path = "../support/database.rs"]
mod database;
mod datasets;
mod examples;
mod grids;
mod images;
mod limits;
mod lora_tools;
mod masks;
mod model_files;
mod models;
mod networks;
mod objectives;
mod openapi;
mod operations;
mod plugins;
mod preparation;
mod provenance;
mod queue;
mod runs;
mod support;
mod upload_formats;
mod upload_parts;
mod uploads;
mod webhooks;
