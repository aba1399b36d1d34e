//! The engine: tokens in, tokens out, for many sequences at once.
//!
//! It reads no clock, no file and no network: time and randomness come in as arguments.

pub mod blocks;
pub mod handle;
pub mod request;
pub mod scheduler;
pub mod sequence;
