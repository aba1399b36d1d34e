//! Model files: from `s3://` or `file://` to verified local files and mapped tensors.
//!
//! A model is a folder in Hugging Face layout with a [`manifest`] that names every file with its size and
//! SHA-256. Nothing is mapped before its bytes were compared with the manifest.

pub mod manifest;
