//! Tests of `generate.rs`.
