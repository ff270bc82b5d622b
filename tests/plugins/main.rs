//! Plugins through the program's own host: what it refuses, what it survives, and the numbers it gives.

mod goldens;
mod misuse;
mod refused;
mod schedules;
mod support;
mod trajectories;
