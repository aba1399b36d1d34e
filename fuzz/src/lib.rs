//! What the fuzz targets share. Each target is one reader of input from outside: model files, configurations,
//! jobs. A target fails on a panic, on a broken promise, on much memory and on a hang.
//!
//! `make fuzz` builds all targets with coverage on the pinned compiler, writes the seeds, and runs each one for
//! `MILLRACE_FUZZ_S` seconds. An input that fails is kept under `fuzz/artifacts`.

use std::path::Path;
use std::sync::LazyLock;

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

/// The process's folder, holding this file beside what it held before. `scripts/fuzz` removes it.
///
/// # Panics
/// When the folder for temporary files cannot be written to.
pub fn folder_with(name: &str, data: &[u8]) -> &'static Path {
    std::fs::write(FOLDER.path().join(name), data).expect("written");
    FOLDER.path()
}
