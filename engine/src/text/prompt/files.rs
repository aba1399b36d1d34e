//! The bytes of a model folder's files: limits, byte order marks, and JSON as Python writes it.

use std::path::Path;

use serde_json::Value;

use super::TextError;

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
    let mut bytes = std::fs::read(&path).map_err(failed)?;
    if bytes.starts_with(b"\xEF\xBB\xBF") {
        bytes.drain(..3);
    }
    let malformed = |error: &str| TextError::Malformed { file: file.into(), error: error.into() };
    if bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]) {
        return Err(malformed("it is UTF-16; write it as UTF-8"));
    }
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(malformed("it is a pointer of Git LFS, not the file; fetch it with `git lfs pull`"));
    }
    Ok(Some(bytes))
}

pub(super) fn read_text(folder: &Path, file: &str, limit: u64) -> Result<Option<String>, TextError> {
    let Some(bytes) = read(folder, file, limit)? else { return Ok(None) };
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|error| TextError::Malformed { file: file.into(), error: error.to_string() })
}

pub(super) fn read_json(folder: &Path, file: &str) -> Result<Option<Value>, TextError> {
    let Some(text) = read_text(folder, file, CONFIG_BYTES_MAX)? else { return Ok(None) };
    let value = serde_json::from_str::<Value>(&text);
    // Python writes numbers that are none as words.
    let value = value.or_else(|error| serde_json::from_str(&without_words(&text)).map_err(|_| error));
    match value {
        Ok(value @ Value::Object(_)) => Ok(Some(value)),
        Ok(_) => Err(TextError::Malformed { file: file.into(), error: "is not a JSON object".into() }),
        Err(error) => Err(TextError::Malformed { file: file.into(), error: error.to_string() }),
    }
}

/// `NaN`, `Infinity` and `-Infinity` outside of strings become `null`: no field that is read here may be one.
fn without_words(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut inside) = (text, false);
    while let Some(c) = rest.chars().next() {
        let word =
            ["-Infinity", "Infinity", "NaN"].into_iter().find(|word| !inside && rest.starts_with(word));
        let width = match (word, c) {
            (Some(word), _) => {
                out.push_str("null");
                rest = &rest[word.len()..];
                continue;
            }
            (None, '\\') if inside => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, '"') => {
                inside = !inside;
                1
            }
            (None, c) => c.len_utf8(),
        };
        out.push_str(&rest[..width]);
        rest = &rest[width..];
    }
    out
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_python_writes_for_numbers_are_nothing() {
        let text = r#"{"a": NaN, "b": [-Infinity, Infinity], "c": "NaN \" Infinity", "é": 1}"#;
        let value: Value = serde_json::from_str(&without_words(text)).unwrap();
        assert_eq!(value, serde_json::json!({"a": null, "b": [null, null], "c": "NaN \" Infinity", "é": 1}));
    }
}
