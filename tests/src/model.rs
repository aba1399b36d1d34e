//! SmolLM2-135M-Instruct as a Hugging Face folder, imported once from the GGUF file of the tools' cache.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use millrace_engine::import::{self, ImportOptions};
use millrace_engine::text::prompt::Text;
use serde_json::Value;

use crate::tools;

/// The GGUF file's place in the tools' cache.
pub const GGUF: &str = "models/SmolLM2-135M-Instruct.Q4_1.gguf";
/// The imported folder's place. The number grows when the importer writes something else.
const FOLDER: &str = "models/smollm2-135m-instruct-bf16-3";

/// One job a line.
const EXAMPLES: &str = include_str!("../../examples/prompts.jsonl");

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

/// Prompts of `examples/prompts.jsonl`, spread over the file, as the model's chat template and tokenizer give
/// them.
///
/// # Errors
/// When the file has fewer chats.
pub fn prompts(text: &Text, count: usize) -> Result<Vec<Vec<u32>>> {
    let mut found = Vec::new();
    for line in EXAMPLES.lines() {
        let line: Value = serde_json::from_str(line)?;
        let Some(messages) = line["body"]["messages"].as_array() else { continue };
        let mut chat = String::new();
        for message in messages {
            let of = |key: &str| message[key].as_str().with_context(|| format!("a message has no {key}"));
            chat += &format!("<|im_start|>{}\n{}<|im_end|>\n", of("role")?, of("content")?);
        }
        found.push(text.encode(&format!("{chat}<|im_start|>assistant\n"), false)?);
    }
    ensure!(found.len() >= count, "{} chats in the examples; {count} are needed", found.len());
    // Prompts of one kind stand together.
    let step = found.len() / count;
    Ok(found.into_iter().step_by(step).take(count).collect())
}
