//! Tests of `prompt.rs`.
