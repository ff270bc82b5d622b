//! `lorasmith demo`
mod client;
mod pictures;
