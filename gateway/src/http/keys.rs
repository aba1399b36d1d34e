//! API keys: shown once, kept as a hash in a bucket of the broker, each with what it may do.
//!
//! A key is `mr-<id>-<secret>`. The id finds the record and may be logged; of the secret, 256 random bits, the broker
//! has only the SHA-256, which is compared in constant time. A record is believed for [`FRESH`], so that a revocation
//! reaches every gateway within that time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::stream::DirectGetErrorKind;
use async_nats::jetstream::{Context, ErrorCode};
use hex::ToHex;
use millrace_crds::names::{Class, ModelRef, SubjectToken};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use time::OffsetDateTime;

use crate::http::cache::CacheUse;
use crate::http::error::{ApiCode, ApiError};
use crate::http::limits::set::LimitSet;

/// The bucket of keys.
pub const BUCKET: &str = "MILLRACE_KEYS";
/// How long a record is believed.
const FRESH: Duration = Duration::from_secs(5);
/// Most records that are remembered.
const REMEMBERED_MAX: usize = 10_000;
/// Random bytes of an id and of a secret.
const ID_BYTES: usize = 8;
const SECRET_BYTES: usize = 32;
/// What a key begins with.
const PREFIX: &str = "mr";

/// What a caller wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// See the models.
    Models,
    /// Have requests answered.
    Infer,
    /// Submit jobs, look at them and cancel them.
    Jobs,
    /// Upload files, list, read and delete them.
    Files,
    /// Make batches of files, look at them and cancel them.
    Batches,
    /// See the tenant's dead letters, and have their jobs run again.
    Dead,
    /// See how the models stand, and the dead letters of all tenants; only where a key names it.
    Admin,
}

impl Verb {
    /// All verbs.
    pub const ALL: [Verb; 7] =
        [Verb::Models, Verb::Infer, Verb::Jobs, Verb::Files, Verb::Batches, Verb::Dead, Verb::Admin];
}

/// What a key may do. An empty list allows all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyScopes {
    /// Namespaces of models.
    #[serde(default)]
    pub namespaces: Vec<SubjectToken>,
    /// Models, by name, in all of these namespaces.
    #[serde(default)]
    pub models: Vec<SubjectToken>,
    /// What may be done.
    #[serde(default)]
    pub verbs: Vec<Verb>,
    /// Classes of jobs.
    #[serde(default)]
    pub classes: Vec<Class>,
}

fn allowed<T: PartialEq>(list: &[T], wanted: &T) -> bool {
    list.is_empty() || list.contains(wanted)
}

impl KeyScopes {
    /// Whether a model may be seen and used.
    pub fn allow_model(&self, model: &ModelRef) -> bool {
        allowed(&self.namespaces, &model.namespace) && allowed(&self.models, &model.name)
    }

    /// Whether something may be done. An empty list allows all but [`Verb::Admin`].
    pub fn allow_verb(&self, verb: Verb) -> bool {
        match verb {
            Verb::Admin => self.verbs.contains(&verb),
            _ => allowed(&self.verbs, &verb),
        }
    }

    /// Whether jobs may have this class.
    pub fn allow_class(&self, class: Class) -> bool {
        allowed(&self.classes, &class)
    }
}

/// A key as the bucket holds it, under its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// The SHA-256 of the secret in hex.
    pub sha256: String,
    /// Whose it is: who sees which jobs, and a label in the audit log.
    pub tenant: String,
    /// What it is for, in its maker's words.
    #[serde(default)]
    pub label: String,
    /// When it was made.
    #[serde(with = "time::serde::rfc3339")]
    pub created: OffsetDateTime,
    /// When it ends.
    #[serde(default, with = "time::serde::rfc3339::option")]
    pub expires: Option<OffsetDateTime>,
    /// When it was revoked.
    #[serde(default, with = "time::serde::rfc3339::option")]
    pub revoked: Option<OffsetDateTime>,
    /// What it may do.
    #[serde(default)]
    pub scopes: KeyScopes,
    /// How much it may.
    #[serde(default)]
    pub limits: LimitSet,
    /// How much its tenant may, with all its keys.
    #[serde(default)]
    pub tenant_limits: LimitSet,
    /// The weight of its tenant where tenants share a model.
    #[serde(default = "one")]
    pub weight: u32,
    /// Whether answers may come from stored outcomes; the gateway says where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheUse>,
}

fn one() -> u32 {
    1
}

/// A key that was just made: the only time that it can be read.
#[derive(Debug)]
pub struct FreshKey {
    /// Its id.
    pub id: String,
    /// The key itself.
    pub key: String,
    /// The SHA-256 of its secret.
    pub sha256: String,
}

impl FreshKey {
    /// A key from the system's random bytes.
    pub fn make() -> Self {
        let random = |bytes: &mut [u8]| getrandom::fill(bytes).expect("Linux has random bytes once it is up");
        let (mut id, mut secret) = ([0; ID_BYTES], [0; SECRET_BYTES]);
        random(&mut id);
        random(&mut secret);
        let (id, secret): (String, String) = (id.encode_hex(), secret.encode_hex());
        Self { key: format!("{PREFIX}-{id}-{secret}"), sha256: hash(&secret), id }
    }
}

fn hash(secret: &str) -> String {
    Sha256::digest(secret).encode_hex()
}

/// Whether a text has the form of a key.
pub fn is_key(text: &str) -> bool {
    parse(text).is_some()
}

/// Id and secret of a key, if it has the form of one.
fn parse(key: &str) -> Option<(&str, &str)> {
    let (id, secret) = key.strip_prefix(PREFIX)?.strip_prefix('-')?.split_once('-')?;
    let is_hex = |text: &str, bytes: usize| {
        text.len() == 2 * bytes && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    (is_hex(id, ID_BYTES) && is_hex(secret, SECRET_BYTES)).then_some((id, secret))
}

/// Whether a secret is the record's, and the record holds now.
fn holds(record: &KeyRecord, secret: &str, now: OffsetDateTime) -> bool {
    let same = bool::from(hash(secret).as_bytes().ct_eq(record.sha256.as_bytes()));
    same && record.revoked.is_none() && record.expires.is_none_or(|end| now < end)
}

type Remembered = HashMap<String, (Instant, Option<KeyRecord>)>;

/// The keys, as far as they were asked for.
#[derive(Debug)]
pub struct KeyStore {
    jetstream: Context,
    seen: Mutex<Remembered>,
}

impl KeyStore {
    /// The keys in the bucket of this broker.
    pub fn new(jetstream: Context) -> Self {
        Self { jetstream, seen: Mutex::default() }
    }

    /// The id and the record of a key that holds now.
    ///
    /// # Errors
    /// [`ApiCode::InvalidApiKey`], whatever is wrong with it; [`ApiCode::BrokerUnavailable`].
    pub async fn check(&self, key: &str) -> Result<(String, KeyRecord), ApiError> {
        let (id, secret) = parse(key).ok_or_else(refused)?;
        let record = self.record(id).await?.ok_or_else(refused)?;
        match holds(&record, secret, OffsetDateTime::now_utc()) {
            true => Ok((id.to_owned(), record)),
            false => Err(refused()),
        }
    }

    async fn record(&self, id: &str) -> Result<Option<KeyRecord>, ApiError> {
        let lock = || self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, record)) = lock().get(id)
            && at.elapsed() < FRESH
        {
            return Ok(record.clone());
        }
        let record = self.read(id).await?;
        let mut seen = lock();
        if seen.len() >= REMEMBERED_MAX {
            seen.retain(|_, (at, _)| at.elapsed() < FRESH);
        }
        if seen.len() < REMEMBERED_MAX {
            seen.insert(id.to_owned(), (Instant::now(), record.clone()));
        }
        Ok(record)
    }

    async fn read(&self, id: &str) -> Result<Option<KeyRecord>, ApiError> {
        let away = |e: &dyn std::fmt::Display| {
            tracing::warn!(error = %e, "a key cannot be read");
            ApiError::new(ApiCode::BrokerUnavailable, "the broker does not answer")
        };
        let name = format!("KV_{BUCKET}");
        let stream = self.jetstream.get_stream_no_info(&name).await.map_err(|e| away(&e))?;
        let message = match stream.direct_get_last_for_subject(format!("$KV.{BUCKET}.{id}")).await {
            Ok(message) => message,
            Err(error) if error.kind() == DirectGetErrorKind::NotFound => return Ok(None),
            // Without a bucket nobody answers; there is none before the first key is made.
            Err(error) => match self.jetstream.get_stream(&name).await.map_err(|error| error.kind()) {
                Err(GetStreamErrorKind::JetStream(said))
                    if said.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    return Ok(None);
                }
                _ => return Err(away(&error)),
            },
        };
        // What is no record, such as the mark of a deletion, lets nobody in.
        Ok(serde_json::from_slice(&message.payload).ok())
    }
}

/// One message for all that can be wrong with a key.
fn refused() -> ApiError {
    ApiError::new(ApiCode::InvalidApiKey, "the API key is wrong, expired or revoked")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &FreshKey) -> KeyRecord {
        KeyRecord {
            sha256: key.sha256.clone(),
            tenant: "t".into(),
            label: String::new(),
            created: OffsetDateTime::UNIX_EPOCH,
            expires: None,
            revoked: None,
            scopes: KeyScopes::default(),
            limits: LimitSet::default(),
            tenant_limits: LimitSet::default(),
            weight: 1,
            cache: None,
        }
    }

    #[test]
    fn a_key_holds_until_its_end_or_its_revocation() {
        let (key, other) = (FreshKey::make(), FreshKey::make());
        let (id, secret) = parse(&key.key).unwrap();
        assert_eq!(id, key.id);
        let now = OffsetDateTime::UNIX_EPOCH + Duration::from_secs(10);
        let good = record(&key);
        assert!(holds(&good, secret, now));
        assert!(!holds(&good, parse(&other.key).unwrap().1, now));
        let later = now + Duration::from_secs(1);
        assert!(holds(&KeyRecord { expires: Some(later), ..good.clone() }, secret, now));
        assert!(!holds(&KeyRecord { expires: Some(now), ..good.clone() }, secret, now));
        assert!(!holds(&KeyRecord { revoked: Some(later), ..good.clone() }, secret, now));
        let text = serde_json::to_string(&good).unwrap();
        assert!(!text.contains(secret) && serde_json::from_str::<KeyRecord>(&text).unwrap() == good);
    }

    #[test]
    fn a_record_of_an_older_version_has_no_limits() {
        let old = r#"{"sha256":"x","tenant":"t","created":"2026-11-30T10:00:00Z"}"#;
        let record: KeyRecord = serde_json::from_str(old).unwrap();
        assert_eq!((record.limits, record.weight, record.cache), (LimitSet::default(), 1, None));
    }

    #[test]
    fn what_is_no_key_is_not_looked_up() {
        let key = FreshKey::make().key;
        for wrong in ["", "none", "mr-", "mr-1-2", &key[1..], &key[..key.len() - 1], &key.to_uppercase()] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
        assert_eq!(parse(&key.replacen('-', "-*", 1)), None);
    }

    #[test]
    fn an_empty_list_allows_all() {
        let model = ModelRef::new("team-a", "m").unwrap();
        let all = KeyScopes::default();
        assert!(!all.allow_verb(Verb::Admin), "what is meant for few must be named");
        assert!(all.allow_model(&model) && all.allow_verb(Verb::Infer) && all.allow_class(Class::High));
        let some = KeyScopes {
            namespaces: vec!["team-a".parse().unwrap()],
            models: vec!["m".parse().unwrap()],
            verbs: vec![Verb::Models],
            classes: vec![Class::Low],
        };
        assert!(some.allow_model(&model) && !some.allow_model(&ModelRef::new("team-b", "m").unwrap()));
        assert!(!some.allow_model(&ModelRef::new("team-a", "n").unwrap()));
        assert!(!some.allow_verb(Verb::Infer) && !some.allow_class(Class::High));
    }
}
