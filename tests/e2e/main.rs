//! The program as a whole, as a newcomer meets it: the demo, and what is left after processes are killed.

#[cfg(unix)]
mod captioning;
mod crowd;
mod demo;
#[cfg(unix)]
mod kills;
mod life;
mod optimizers;
mod requests;
#[cfg(target_os = "linux")]
mod room;
mod server;
