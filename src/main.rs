//! The `lorasmith` program.

fn main() {}
