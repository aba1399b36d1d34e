//! The bytes of a model folder's files: limits, and what is refused by its name.

use std::path::Path;

use serde_json::Value;

use super::TextError;
use crate::folder::{json, wrapping};

/// Largest of the small JSON files; Mistral's `tokenizer_config.json` has about 200 KiB.
const CONFIG_BYTES_MAX: u64 = 8 << 20;
/// Tokenizers in other forms, and what they are called.
const OTHER_TOKENIZERS: [(&str, &str); 5] = [
    ("tokenizer.model", "SentencePiece"),
    ("tekken.json", "tekken"),
    ("vocab.txt", "WordPiece"),
    ("vocab.json", "vocabulary and merges"),
    ("tiktoken.model", "tiktoken"),
];

pub(super) fn read(folder: &Path, file: &str, limit: u64) -> Result<Option<Vec<u8>>, TextError> {
    let path = folder.join(file);
    let failed = |error| TextError::Read { file: file.into(), error };
    let bytes = match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
        Ok(metadata) => metadata.len(),
    };
    if bytes > limit {
        return Err(TextError::TooLarge { file: file.into(), bytes, limit });
    }
    let bytes = std::fs::read(&path).map_err(failed)?;
    let malformed = |what| TextError::Malformed { file: file.into(), error: format!("it {what}") };
    wrapping::text_of(&bytes).map(|text| Some(text.to_vec())).map_err(malformed)
}

pub(super) fn read_text(folder: &Path, file: &str, limit: u64) -> Result<Option<String>, TextError> {
    let Some(bytes) = read(folder, file, limit)? else { return Ok(None) };
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|error| TextError::Malformed { file: file.into(), error: error.to_string() })
}

pub(super) fn read_json(folder: &Path, file: &str) -> Result<Option<Value>, TextError> {
    let Some(bytes) = read(folder, file, CONFIG_BYTES_MAX)? else { return Ok(None) };
    match json::parse::<Value>(&bytes) {
        Ok(value @ Value::Object(_)) => Ok(Some(value)),
        Ok(_) => Err(TextError::Malformed { file: file.into(), error: "is not a JSON object".into() }),
        Err(error) => Err(TextError::Malformed { file: file.into(), error }),
    }
}

/// Why there is no `tokenizer.json`, and the command that makes one of what is there instead.
pub(super) fn no_tokenizer(folder: &Path) -> TextError {
    let other = OTHER_TOKENIZERS.into_iter().find(|(file, _)| folder.join(file).exists());
    let Some((file, kind)) = other else {
        return TextError::Read { file: "tokenizer.json".into(), error: std::io::ErrorKind::NotFound.into() };
    };
    let path = folder.display();
    TextError::Malformed {
        file: file.into(),
        error: format!(
            "a {kind} tokenizer without tokenizer.json is not read; convert it with: python -c \"from transformers \
             import AutoTokenizer as A; A.from_pretrained('{path}').save_pretrained('{path}')\""
        ),
    }
}

/// Refuses tokenizer files that are chosen by the version of transformers.
pub(super) fn check_versions(config: &Value) -> Result<(), TextError> {
    let files = config["fast_tokenizer_files"].as_array().map(Vec::as_slice).unwrap_or_default();
    match files.iter().find(|file| **file != "tokenizer.json") {
        Some(file) => Err(TextError::Malformed {
            file: "tokenizer_config.json".into(),
            error: format!(
                "fast_tokenizer_files: {file} would replace tokenizer.json; keep one of them and drop the field"
            ),
        }),
        None => Ok(()),
    }
}
