//! SmolLM2-135M-Instruct as a Hugging Face folder, imported once from the GGUF file of the tools' cache.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use millrace_worker::import::{self, ImportOptions};

use crate::tools;

/// The GGUF file's place in the tools' cache.
pub const GGUF: &str = "models/SmolLM2-135M-Instruct.Q4_1.gguf";
/// The imported folder's place. The number grows when the importer writes something else.
const FOLDER: &str = "models/smollm2-135m-instruct-bf16-1";

/// The folder; imports it if that was not done before. Two processes may do so at once.
///
/// # Errors
/// When the GGUF file is missing or refused.
pub fn smollm2() -> Result<PathBuf> {
    let gguf = tools::tool(GGUF)?;
    let folder = tools::cache()?.join(FOLDER);
    let lock = fs::File::create(folder.with_extension("lock"))?;
    lock.lock()?;
    if !folder.join("manifest.json").is_file() {
        let part = folder.with_extension("part");
        if part.exists() {
            fs::remove_dir_all(&part)?;
        }
        import::run(&gguf, &part, &ImportOptions::default())?;
        fs::rename(&part, &folder)?;
    }
    Ok(folder)
}
