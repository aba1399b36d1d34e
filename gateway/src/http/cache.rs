//! Answers that were given before: a deterministic request is answered from the outcome that is stored of another one.
//!
//! A request is deterministic where it names a seed or a temperature of 0: the engine's answer depends on nothing but
//! the model's files and the request. An index in the broker leads from the tenant, the digest of the model's files
//! and the request to a job, whose outcome is looked up as that of any job. So an answer lives as long as its outcome,
//! its bytes are those of the stored one, and nothing is answered for another tenant or from other files. Which files
//! those are the workers say each second; where none says it, or they differ, nothing is answered from here.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Client;
use async_nats::jetstream::Context;
use async_nats::jetstream::stream::{DiscardPolicy, StorageType};
use bytes::Bytes;
use hex::ToHex;
use millrace_crds::names::{JobId, ModelRef};
use millrace_crds::result::OutcomeKind;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use crate::connect::Connection;
use crate::follow;
use crate::http::caller::Caller;
use crate::http::digests::ModelDigests;
use crate::http::error::{ApiCode, ApiError};
use crate::http::state::{BucketForm, StateBucket};
use crate::outcome::CollectedOutcome;

/// The request header that says whether an answer may come from here: `on` or `off`.
pub const CACHE: &str = "millrace-cache";
/// The header of an answer that came from here: the job whose outcome it is.
pub const CACHED_JOB: &str = "millrace-cached-job";

/// The index. On disk, since outcomes are; what is oldest makes room.
const BUCKET: BucketForm = BucketForm {
    name: "MILLRACE_ANSWERS",
    description: "Which job's outcome answers which deterministic request",
    bytes_max: 64 << 20,
    discard: DiscardPolicy::Old,
    storage: StorageType::File,
};
/// How long an entry lives: as long as outcomes do by default.
const ENTRY_TTL: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a look may take; a request is not worth waiting for longer.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// Entries that are written at once; more are left out.
const WRITES_MAX: usize = 64;
/// Fields that do not change an answer.
const NEUTRAL: [&str; 4] = ["model", "stream", "stream_options", "user"];

/// Which requests of a key may be answered from stored outcomes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CacheUse {
    /// None.
    Never,
    /// Deterministic ones that ask for it.
    #[default]
    Asked,
    /// Deterministic ones that do not forbid it.
    Always,
}

impl CacheUse {
    /// Whether a request with this header may.
    ///
    /// # Errors
    /// [`ApiCode::InvalidParameter`].
    pub fn allows(self, header: Option<&str>) -> Result<bool, ApiError> {
        match (self, header) {
            (_, Some("off")) | (CacheUse::Never, Some("on") | None) | (CacheUse::Asked, None) => Ok(false),
            (CacheUse::Asked | CacheUse::Always, Some("on")) | (CacheUse::Always, None) => Ok(true),
            (_, Some(other)) => {
                let shown: String = other.chars().take(80).collect();
                let message = format_args!("{shown:?} is neither on nor off");
                Err(ApiError::of(ApiCode::InvalidParameter, CACHE, message))
            }
        }
    }
}

/// An entry of the index.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Entry {
    job: Option<JobId>,
}

/// What a request is called in the index, and of which files an answer must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheKey {
    name: String,
    digest: String,
}

/// The answers that are stored.
#[derive(Debug)]
pub struct AnswerCache {
    bucket: StateBucket,
    digests: Arc<ModelDigests>,
    writes: Arc<Semaphore>,
}

impl AnswerCache {
    /// The answers in this broker.
    pub fn new(jetstream: Context, replicas: usize) -> Self {
        Self {
            bucket: StateBucket::new(jetstream, BUCKET, replicas),
            digests: Arc::default(),
            writes: Arc::new(Semaphore::new(WRITES_MAX)),
        }
    }

    /// Hears which files the models have.
    ///
    /// # Errors
    /// When the subscription cannot be made.
    pub async fn listen(&self, client: &Client) -> Result<(), async_nats::SubscribeError> {
        self.digests.clone().listen(client).await
    }

    /// What a request is called, if it is deterministic and its model's files are known.
    pub fn key(&self, caller: &Caller, model: &ModelRef, body: &[u8]) -> Option<CacheKey> {
        let digest = self.digests.current(model)?;
        let name = name_of(&caller.tenant, (model, &digest), body)?;
        Some(CacheKey { name, digest })
    }

    /// The stored outcome that answers a request. What cannot be read is as good as none.
    pub async fn find(&self, broker: &Connection, key: &CacheKey) -> Option<CollectedOutcome> {
        let looking = async {
            let (entry, _): (Entry, u64) = self.bucket.read(&key.name).await.ok()?;
            let outcomes = follow::stored(broker, &[entry.job?]).await.ok()?;
            outcomes.into_iter().find(|outcome| {
                outcome.kind == OutcomeKind::Completed && outcome.of.model.as_deref() == Some(&key.digest)
            })
        };
        tokio::time::timeout(LOOK_TIMEOUT, looking).await.ok()?
    }

    /// Remembers which job answered a request, soon.
    pub fn remember(&self, key: CacheKey, outcome: &CollectedOutcome) {
        let own = outcome.kind == OutcomeKind::Completed && outcome.of.model.as_ref() == Some(&key.digest);
        let Some(permit) = self.writes.clone().try_acquire_owned().ok().filter(|_| own) else { return };
        let (bucket, entry) = (self.bucket.clone(), Entry { job: Some(outcome.job.clone()) });
        tokio::spawn(async move {
            let _permit = permit;
            let write = async {
                let (_, revision): (Entry, u64) = bucket.read(&key.name).await?;
                bucket.write(&key.name, &entry, revision, ENTRY_TTL).await
            };
            if let Err(reason) = write.await {
                tracing::warn!(%reason, "an answer is not remembered");
            }
        });
    }
}

/// The name of a deterministic request: a hash of the tenant, the model and its files, and the request in one spelling.
fn name_of(tenant: &str, (model, digest): (&ModelRef, &str), body: &[u8]) -> Option<String> {
    let mut fields: Map<String, Value> = serde_json::from_slice(body).ok()?;
    fields.retain(|_, value| !value.is_null());
    let seeded = fields.get("seed").is_some_and(|seed| seed.is_i64() || seed.is_u64());
    let greedy = fields.get("temperature").and_then(Value::as_f64) == Some(0.0);
    if !seeded && !greedy {
        return None;
    }
    for name in NEUTRAL {
        fields.remove(name);
    }
    // Only here: within a schema the order of keys is the order of the answer.
    fields.sort_keys();
    let request = serde_json::to_vec(&Value::Object(fields)).ok()?;
    let mut hash = Sha256::new();
    for part in [tenant.as_bytes(), model.to_string().as_bytes(), digest.as_bytes(), &request] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    Some(hash.finalize().encode_hex())
}

/// Whether an outcome holds an answer, and not a refusal.
pub fn is_answer(body: &Bytes) -> bool {
    #[derive(Deserialize)]
    struct Line {
        response: Option<Status>,
    }
    #[derive(Deserialize)]
    struct Status {
        status_code: u16,
    }
    let line: Option<Line> = serde_json::from_slice(body).ok();
    line.and_then(|line| line.response).is_some_and(|response| response.status_code == 200)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(tenant: &str, digest: &str, body: &str) -> Option<String> {
        name_of(tenant, (&ModelRef::new("default", "m").unwrap(), digest), body.as_bytes())
    }

    #[test]
    fn deterministic_requests_have_a_name() {
        let greedy = name("t", "d", r#"{"model":"m","prompt":"x","temperature":0}"#).unwrap();
        let same = r#"{ "temperature": 0.0e0, "prompt":"x", "stream":true, "seed":null, "model":"default/m",
            "stream_options":{"include_usage":true}, "user":"u"}"#;
        // 0 and 0.0 are spelled apart.
        assert_ne!(name("t", "d", same).unwrap(), greedy);
        assert_eq!(name("t", "d", &same.replace("0.0e0", "0")).unwrap(), greedy);
        for (tenant, digest, body) in [
            ("u", "d", r#"{"prompt":"x","temperature":0}"#),
            ("t", "e", r#"{"prompt":"x","temperature":0}"#),
            ("t", "d", r#"{"prompt":"y","temperature":0}"#),
            ("t", "d", r#"{"prompt":"x","temperature":0,"seed":1}"#),
            ("t", "d", r#"{"prompt":"x","temperature":0,"n":2}"#),
        ] {
            assert_ne!(name(tenant, digest, body).unwrap(), greedy, "{tenant} {digest} {body}");
        }
        assert!(name("t", "d", r#"{"prompt":"x","seed":1}"#).is_some());
        for other in [
            r#"{"prompt":"x"}"#,
            r#"{"prompt":"x","temperature":0.1}"#,
            r#"{"prompt":"x","seed":"1"}"#,
            r#"{"prompt":"x","seed":null}"#,
            "[]",
            "",
        ] {
            assert_eq!(name("t", "d", other), None, "{other}");
        }
    }

    #[test]
    fn who_may_use_it() {
        use CacheUse::{Always, Asked, Never};
        for (use_, header, expected) in [
            (Never, None, false),
            (Never, Some("on"), false),
            (Asked, None, false),
            (Asked, Some("on"), true),
            (Asked, Some("off"), false),
            (Always, None, true),
            (Always, Some("off"), false),
        ] {
            assert_eq!(use_.allows(header), Ok(expected), "{use_:?} {header:?}");
        }
        assert_eq!(Always.allows(Some("yes")).unwrap_err().param.as_deref(), Some(CACHE));
    }

    #[test]
    fn a_refusal_is_no_answer() {
        let line =
            |response: &str| Bytes::from(format!(r#"{{"id":"j","response":{response},"error":null}}"#));
        assert!(is_answer(&line(r#"{"status_code":200,"request_id":"j","body":{}}"#)));
        assert!(!is_answer(&line(r#"{"status_code":400,"request_id":"j","body":{}}"#)));
        assert!(!is_answer(&line("null")) && !is_answer(&Bytes::new()));
    }
}
