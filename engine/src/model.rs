//! The decoder families: what their configuration means and how their layers follow each other.
//!
//! It knows neither a backend nor the scheduler: layers are calls of `millrace_kernels` ops.

pub mod binding;
pub mod config;
pub mod decoder;
pub mod files;
mod kv_scales;
pub mod quantised;
pub mod random;
pub mod rope;
pub mod source;
