//! Replays traffic.
fn main() {}
