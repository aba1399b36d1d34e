//! A file as it is kept, and as clients see it.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::http::blobs::Blob;
use crate::http::error::{ApiCode, ApiError};

/// What an id begins with.
pub const PREFIX: &str = "file-";
/// What a file may be for.
const PURPOSES: [&str; 6] = ["assistants", "batch", "evals", "fine-tune", "user_data", "vision"];
/// Seconds that a file of a batch lives when nobody says otherwise: 30 days.
pub const BATCH_FILE_SECONDS: i64 = 30 * 24 * 3600;
/// Shortest and longest life of a file that is told one, in seconds: an hour and 30 days.
const LIFE_SECONDS: (i64, i64) = (3600, 30 * 24 * 3600);
/// Longest name, in bytes.
const NAME_BYTES_MAX: usize = 512;

/// A file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its id.
    pub id: String,
    /// Its name.
    pub filename: String,
    /// What it is for.
    pub purpose: String,
    /// When it was made, in Unix seconds.
    pub created_at: i64,
    /// When it ends.
    pub expires_at: Option<i64>,
    /// Whether all of it is there.
    pub complete: bool,
    /// Its content, one after another.
    pub blobs: Vec<Blob>,
}

impl FileRecord {
    /// Bytes of its content.
    pub fn bytes(&self) -> u64 {
        self.blobs.iter().map(|blob| blob.bytes).sum()
    }

    /// Whether clients see it at a time.
    pub fn is_seen(&self, now: i64) -> bool {
        self.complete && !self.is_over(now)
    }

    /// Whether its life is over.
    pub fn is_over(&self, now: i64) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }

    /// OpenAI's object.
    pub fn object(&self) -> Value {
        json!({
            "id": self.id, "object": "file", "bytes": self.bytes(), "created_at": self.created_at,
            "expires_at": self.expires_at, "filename": self.filename, "purpose": self.purpose,
            "status": "processed", "status_details": null,
        })
    }
}

/// What a file may be for.
///
/// # Errors
/// [`ApiCode::InvalidParameter`].
pub fn purpose(text: &str) -> Result<String, ApiError> {
    if PURPOSES.contains(&text) {
        return Ok(text.to_owned());
    }
    let shown: String = text.chars().take(80).collect();
    let message = format!("{shown:?} is not one of {}", PURPOSES.join(", "));
    Err(ApiError::of(ApiCode::InvalidParameter, "purpose", message))
}

/// A file's name.
///
/// # Errors
/// [`ApiCode::InvalidParameter`].
pub fn filename(text: &str) -> Result<String, ApiError> {
    let refuse = |why: String| ApiError::of(ApiCode::InvalidParameter, "filename", why);
    if text.is_empty() || text.len() > NAME_BYTES_MAX {
        return Err(refuse(format!("it has {} bytes; 1 to {NAME_BYTES_MAX} are allowed", text.len())));
    }
    if text.chars().any(char::is_control) {
        return Err(refuse("it holds a control character".into()));
    }
    Ok(text.to_owned())
}

/// When a file's life ends, of `expires_after` with its anchor and its seconds.
///
/// # Errors
/// [`ApiCode::InvalidParameter`].
pub fn life(field: &str, anchor: Option<&str>, seconds: Option<i64>) -> Result<Option<i64>, ApiError> {
    let refuse = |part: &str, why: String| {
        let param = format!("{field}{part}");
        Err(ApiError::of(ApiCode::InvalidParameter, &param, why))
    };
    let (least, most) = LIFE_SECONDS;
    match (anchor, seconds) {
        (None, None) => Ok(None),
        (Some("created_at"), Some(seconds)) if (least..=most).contains(&seconds) => Ok(Some(seconds)),
        (Some("created_at"), Some(seconds)) => {
            refuse(".seconds", format!("{seconds} is not within {least} to {most}"))
        }
        (Some("created_at"), None) => refuse(".seconds", "missing".into()),
        (None, Some(_)) => refuse(".anchor", "missing".into()),
        (Some(other), _) => {
            let shown: String = other.chars().take(80).collect();
            refuse(".anchor", format!("{shown:?} is not created_at"))
        }
    }
}

/// When a file for this purpose ends that is made now.
pub fn end(purpose: &str, life: Option<i64>, now: i64) -> Option<i64> {
    let default = matches!(purpose, "batch" | "batch_output").then_some(BATCH_FILE_SECONDS);
    life.or(default).map(|seconds| now + seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_has_limits() {
        let check = |anchor, seconds| life("expires_after", anchor, seconds).map_err(|e| e.param.unwrap());
        assert_eq!(check(None, None), Ok(None));
        assert_eq!(check(Some("created_at"), Some(3600)), Ok(Some(3600)));
        for (anchor, seconds, param) in [
            (Some("created_at"), Some(3599), "expires_after.seconds"),
            (Some("created_at"), Some(2_592_001), "expires_after.seconds"),
            (Some("created_at"), None, "expires_after.seconds"),
            (Some("later"), Some(3600), "expires_after.anchor"),
            (None, Some(3600), "expires_after.anchor"),
        ] {
            assert_eq!(check(anchor, seconds), Err(param.to_owned()));
        }
        assert_eq!(end("batch", None, 5), Some(5 + BATCH_FILE_SECONDS));
        assert_eq!((end("vision", None, 5), end("vision", Some(7), 5)), (None, Some(12)));
    }
}
