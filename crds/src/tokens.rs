//! Token deltas of a running job, on core NATS: best effort, so a reader must tolerate gaps.
//!
//! The stored outcome is the truth. A delta says where it belongs: which attempt wrote it (header
//! `Millrace-Attempt`), which request and choice of the job it extends, and its number there.

use serde::{Deserialize, Serialize};

/// A piece of text of one choice of one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenDelta {
    /// Number of this delta within its attempt, request and choice, from 0 without gaps.
    pub number: u64,
    /// Which request or prompt of the job, from 0.
    #[serde(default)]
    pub request: u32,
    /// Which choice of the request, from 0.
    #[serde(default)]
    pub choice: u32,
    /// The text that is new.
    pub text: String,
    /// `stop` or `length` on the last delta of a choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn form_on_the_wire() {
        let delta = TokenDelta { number: 3, request: 0, choice: 1, text: " a\n".into(), finish_reason: None };
        let json = serde_json::to_string(&delta).unwrap();
        assert_eq!(json, r#"{"number":3,"request":0,"choice":1,"text":" a\n"}"#);
        assert_eq!(serde_json::from_str::<TokenDelta>(&json).unwrap(), delta);
    }
}
