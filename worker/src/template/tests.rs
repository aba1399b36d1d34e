//! Tests of `template.rs`.
