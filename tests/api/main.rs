//! The REST API as a client sees it: the real application on a port, a database file, requests over TCP.

mod auth;
mod datasets;
mod images;
mod limits;
mod openapi;
mod operations;
mod plugins;
mod runs;
mod support;
mod uploads;
mod webhooks;
