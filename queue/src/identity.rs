//! What makes two messages of one job id the same job: their body, or the address of it.
//!
//! An outcome carries the digest of the body that it answers. A later message of the same id with another body is
//! another job, which must not get that answer. An outcome without a digest, of an older worker, answers any body.

use async_nats::HeaderMap;
use millrace_crds::job::header;
use sha2::{Digest, Sha256};

/// SHA-256 of a job's body, or of the address of a body behind a claim check: `sha256:` and 64 hex digits.
pub fn body_digest(body: &[u8], input: Option<&str>) -> String {
    let hash = match input {
        None => Sha256::new().chain_update(body),
        // Kept apart from a body that is the text of an address.
        Some(address) => Sha256::new().chain_update(b"Millrace-Input\n").chain_update(address),
    };
    format!("sha256:{}", hex::encode(hash.finalize()))
}

/// Whose answer a stored outcome is, as far as it says so.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AnswerOf {
    /// The digest of the job's body; see [`body_digest`].
    pub body: Option<String>,
    /// The digest of the manifest of the model's files.
    pub model: Option<String>,
}

impl AnswerOf {
    /// Reads an outcome's headers.
    pub fn read(headers: Option<&HeaderMap>) -> Self {
        let text = |name: &str| Some(headers?.get(name)?.as_str().to_owned());
        Self { body: text(header::BODY_DIGEST), model: text(header::MODEL_DIGEST) }
    }

    /// Whether the outcome is that of a job with this body.
    pub fn is_of_body(&self, digest: &str) -> bool {
        self.body.as_deref().is_none_or(|own| own == digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_tell_bodies_and_addresses_apart() {
        // As `printf abc | sha256sum` says.
        let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(body_digest(b"abc", None), abc);
        let address = body_digest(b"", Some("abc"));
        assert!(
            address != abc && address != body_digest(b"", Some("abd")) && address != body_digest(b"", None)
        );
    }

    #[test]
    fn an_outcome_without_a_digest_answers_any_body() {
        assert!(AnswerOf::read(None).is_of_body("sha256:1"));
        let mut headers = HeaderMap::new();
        headers.insert(header::BODY_DIGEST, "sha256:1");
        let of = AnswerOf::read(Some(&headers));
        assert!(of.is_of_body("sha256:1") && !of.is_of_body("sha256:2"));
        assert_eq!(of.model, None);
    }
}
