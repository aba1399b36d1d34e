//! Bodies that are too large for a message: where inputs go, where outcomes come from.
//!
//! An input's name is the hash of its bytes, so putting it again changes nothing. An outcome's body is
//! handed out only when its length and hash are those that the outcome states.

use bytes::Bytes;
use hex::ToHex;
use millrace_crds::config::StoreConfig;
use millrace_crds::job::INPUT_BYTES_MAX;
use millrace_crds::names::JobId;
use millrace_crds::result::OutputReference;
use millrace_queue::store::{RangeBody, S3Uri, Store};
use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;

use crate::failure::Failure;
use crate::outcome::CollectedOutcome;

/// Largest body of an outcome that is fetched: what a pack of the largest input can come to in practice.
const OUTPUT_BYTES_MAX: u64 = 1 << 30;

/// Access to bodies in an object store; connected when first needed.
#[derive(Debug, Default)]
pub struct Bodies {
    config: StoreConfig,
    store: OnceCell<Store>,
}

impl Bodies {
    /// Bodies in the store that the configuration names.
    pub fn new(config: StoreConfig) -> Self {
        Self { config, store: OnceCell::new() }
    }

    async fn store(&self) -> Result<&Store, Failure> {
        let connecting = async { Store::connect(&self.config).await };
        self.store.get_or_try_init(|| connecting).await.map_err(|error| Failure::Usage(error.to_string()))
    }

    /// The body of an outcome, checked against what the outcome says of it.
    ///
    /// # Errors
    /// [`Failure::Refused`] when it cannot be read or is another one.
    async fn get(&self, job: &JobId, reference: &OutputReference) -> Result<Bytes, Failure> {
        let refused = |reason: String| {
            Failure::Refused(format!("job {job}: the outcome's body at {}: {reason}", reference.output))
        };
        if reference.bytes > OUTPUT_BYTES_MAX {
            return Err(refused(format!("{} bytes; {OUTPUT_BYTES_MAX} are allowed", reference.bytes)));
        }
        let uri: S3Uri = reference.output.parse().map_err(|e| refused(format!("{e}")))?;
        let body =
            self.store().await?.get(&uri, reference.bytes).await.map_err(|e| refused(e.to_string()))?;
        let found = sha256(&body);
        if body.len() as u64 != reference.bytes || found != reference.sha256 {
            return Err(refused(format!(
                "{} bytes with SHA-256 {found}; the outcome says {} bytes with {}",
                body.len(),
                reference.bytes,
                reference.sha256
            )));
        }
        Ok(body)
    }

    /// Replaces a reference by the body that it names. A body that is gone or is another one gives the reason, which
    /// must not hide the outcomes of other jobs.
    ///
    /// # Errors
    /// When there is no object store to ask.
    pub async fn fetch(&self, outcome: &mut CollectedOutcome) -> Result<Result<(), String>, Failure> {
        let Some(reference) = outcome.reference() else { return Ok(Ok(())) };
        match self.get(&outcome.job, &reference).await {
            Ok(body) => outcome.body = body,
            Err(Failure::Refused(reason)) => return Ok(Err(reason)),
            Err(failure) => return Err(failure),
        }
        Ok(Ok(()))
    }

    /// The body of an outcome as it comes, checked at its end.
    ///
    /// # Errors
    /// [`Failure::Refused`] when it cannot be read or has another length.
    pub async fn open(&self, job: &JobId, reference: &OutputReference) -> Result<ClaimedBody, Failure> {
        let refused = |reason: String| {
            Failure::Refused(format!("job {job}: the outcome's body at {}: {reason}", reference.output))
        };
        let (said, limit) = (reference.bytes, OUTPUT_BYTES_MAX);
        if said == 0 || said > limit {
            return Err(refused(format!("{said} bytes; 1 to {limit} are allowed")));
        }
        let uri: S3Uri = reference.output.parse().map_err(|e| refused(format!("{e}")))?;
        let store = self.store().await?;
        let head = store.head(&uri).await.map_err(|e| refused(e.to_string()))?;
        if head.bytes != said {
            return Err(refused(format!("{} bytes; the outcome says {said}", head.bytes)));
        }
        let body = store.get_range(&uri, &head, 0, said).await.map_err(|e| refused(e.to_string()))?;
        Ok(ClaimedBody { body, hash: Sha256::new(), expected: reference.sha256.clone(), last: None })
    }

    /// Puts a job's input below `prefix` and gives its address.
    ///
    /// # Errors
    /// [`Failure::Usage`] for a wrong or too large one, [`Failure::Refused`] when the store refuses.
    pub async fn put(&self, prefix: &str, body: Bytes) -> Result<String, Failure> {
        let prefix: S3Uri =
            prefix.parse().map_err(|e| Failure::Usage(format!("--object-store {prefix:?}: {e}")))?;
        if body.len() as u64 > INPUT_BYTES_MAX {
            let message =
                format!("a job of {} bytes; {INPUT_BYTES_MAX} are allowed: use a smaller --pack", body.len());
            return Err(Failure::Usage(message));
        }
        let uri = prefix.join("inputs").join(&sha256(&body));
        let put = self.store().await?.put(&uri, body).await;
        put.map_err(|error| Failure::Refused(format!("--object-store: {uri}: {error}")))?;
        Ok(uri.to_string())
    }
}

/// A body that comes from the object store. Its last piece is held back until all of it is known to be right.
#[derive(Debug)]
pub struct ClaimedBody {
    body: RangeBody,
    hash: Sha256,
    expected: String,
    last: Option<Bytes>,
}

impl ClaimedBody {
    /// The next piece; none after the last.
    ///
    /// # Errors
    /// [`Failure::Refused`] when the transfer breaks off, or what came is not what the outcome says.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            let piece = self.body.next().await.map_err(|error| Failure::Refused(error.to_string()))?;
            match piece {
                Some(piece) => {
                    self.hash.update(&piece);
                    if let Some(before) = self.last.replace(piece) {
                        return Ok(Some(before));
                    }
                }
                None => {
                    let found: String = std::mem::take(&mut self.hash).finalize().encode_hex();
                    return match self.last.take() {
                        Some(_) if found != self.expected => Err(Failure::Refused(format!(
                            "SHA-256 {found}; the outcome says {}",
                            self.expected
                        ))),
                        last => Ok(last),
                    };
                }
            }
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).encode_hex()
}
