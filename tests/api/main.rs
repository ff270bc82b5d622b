//! The REST API as a client sees it: the real application on a port, a database file, requests over TCP.

mod auth;
mod captions;
#[path = "../support/database.rs"]
mod database;
mod datasets;
mod examples;
mod grids;
mod images;
mod limits;
mod openapi;
mod operations;
mod plugins;
mod provenance;
mod queue;
mod runs;
mod support;
mod uploads;
mod webhooks;
