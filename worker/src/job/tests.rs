//! Tests of `job.rs`.
