//! Tests of `detokenize.rs`.
