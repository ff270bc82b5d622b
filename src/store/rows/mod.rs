//! One file per table, as the migrations made it. Nothing outside of the store sees these types.

pub mod api_key;
pub mod caption_change;
pub mod captioning_result;
pub mod dataset;
pub mod idempotency_key;
pub mod image;
pub mod lora;
pub mod picture_measure;
pub mod run;
pub mod run_attempt;
pub mod run_event;
pub mod run_metric;
pub mod run_sample;
pub mod subset;
pub mod upload;
pub mod webhook;
pub mod webhook_delivery;
