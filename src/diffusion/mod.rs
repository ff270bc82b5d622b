//! Stable Diffusion in burn.

pub mod devices;
