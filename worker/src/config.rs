//! Reads the worker's configuration file and checks what its types alone cannot.
//!
//! The file is YAML (JSON is YAML too). Unknown fields are refused, and every refusal names the field, the
//! value and the limit. Nothing is started before all of it has passed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use millrace_crds::config::{StoreConfig, WorkerConfig};
use millrace_crds::units::Span;

/// Largest configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Shortest ack wait: a keep-alive goes out three times in it, and a broker may take a second to answer.
const ACK_WAIT_MIN: Duration = Duration::from_secs(1);
/// Longest duration that is not a mistake.
const SPAN_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Longest life of dead letters, and of what speaks of a job that has no outcome.
const DEAD_TTL_MAX: Duration = Duration::from_secs(365 * 86_400);
/// Least room for KV blocks.
const KV_CACHE_BYTES_MIN: u64 = 1 << 20;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum WorkerConfigError {
    /// The file cannot be read.
    #[error("{}: {message}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// It is not what it must be: unknown field, wrong type, missing field.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Field, place and reason.
        message: String,
    },
    /// A value is out of bounds.
    #[error("{field}: {value} is not {expected}")]
    Value {
        /// The field, with its path.
        field: &'static str,
        /// The refused value.
        value: String,
        /// What it must be.
        expected: String,
    },
}

/// Reads and checks a file.
///
/// # Errors
/// When it cannot be read or is refused.
pub fn read(path: &Path) -> Result<WorkerConfig, WorkerConfigError> {
    let fail = |message: String| WorkerConfigError::Read { path: path.to_owned(), message };
    let size = std::fs::metadata(path).map_err(|error| fail(error.to_string()))?.len();
    if size > FILE_BYTES_MAX {
        return Err(fail(format!("{size} bytes; at most {FILE_BYTES_MAX} are allowed")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
    let document = serde_yaml::Deserializer::from_str(&text);
    let config: WorkerConfig =
        serde_path_to_error::deserialize(document).map_err(|error| WorkerConfigError::Parse {
            path: path.to_owned(),
            message: format!("{}: {}", error.path(), error.inner()),
        })?;
    check(&config)?;
    Ok(config)
}

/// Checks the values against each other and their bounds.
///
/// # Errors
/// With the first value that is out of bounds.
pub fn check(config: &WorkerConfig) -> Result<(), WorkerConfigError> {
    check_model(config)?;
    check_engine(config)?;
    check_queue(config)?;
    check_results(config)
}

fn refuse(field: &'static str, value: impl ToString, expected: impl ToString) -> WorkerConfigError {
    WorkerConfigError::Value { field, value: value.to_string(), expected: expected.to_string() }
}

fn check_in(
    field: &'static str,
    value: u64,
    range: std::ops::RangeInclusive<u64>,
) -> Result<(), WorkerConfigError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(refuse(field, value, format!("in {} to {}", range.start(), range.end())))
}

fn check_span(field: &'static str, span: Span, min: Duration) -> Result<(), WorkerConfigError> {
    if (min..=SPAN_MAX).contains(&span.0) {
        return Ok(());
    }
    Err(refuse(field, span, format!("in {} to {}", Span(min), Span(SPAN_MAX))))
}

fn check_model(config: &WorkerConfig) -> Result<(), WorkerConfigError> {
    let uri = &config.model.uri;
    let rest = uri.strip_prefix("s3://").or_else(|| uri.strip_prefix("file:///"));
    if rest.is_none_or(str::is_empty) {
        return Err(refuse("model.uri", format!("{uri:?}"), "s3://bucket/prefix or file:///path"));
    }
    if let Some(digest) = &config.model.digest {
        let hex = digest.strip_prefix("sha256:").unwrap_or_default();
        let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if hex.len() != 64 || !hex.bytes().all(lower_hex) {
            return Err(refuse(
                "model.digest",
                format!("{digest:?}"),
                "sha256: and 64 lower-case hex digits",
            ));
        }
    }
    check_in("model.bytesMax", config.model.bytes_max.0, 1..=1 << 50)?;
    if config.nats.servers.is_empty() {
        return Err(refuse("nats.servers", "[]", "at least 1 address"));
    }
    check_store("model.store.webIdentity", &config.model.store)?;
    if let Some(monitor) = &config.nats.monitor
        && !monitor.starts_with("http://")
    {
        return Err(refuse("nats.monitor", format!("{monitor:?}"), "an http:// address"));
    }
    Ok(())
}

fn check_store(field: &'static str, store: &StoreConfig) -> Result<(), WorkerConfigError> {
    match store.credentials_dir.is_some() && store.web_identity.is_some() {
        true => Err(refuse(field, "given", "allowed beside credentialsDir; give one of them")),
        false => Ok(()),
    }
}

fn check_engine(config: &WorkerConfig) -> Result<(), WorkerConfigError> {
    let engine = &config.engine;
    if let Some(sequences) = engine.max_sequences {
        check_in("engine.maxSequences", sequences.into(), 1..=4096)?;
    }
    if let Some(tokens) = engine.max_batch_tokens {
        check_in("engine.maxBatchTokens", tokens.into(), 16..=65_536)?;
    }
    if let Some(length) = engine.max_model_len {
        check_in("engine.maxModelLen", length.into(), 2..=1 << 24)?;
    }
    if let Some(threads) = engine.threads {
        check_in("engine.threads", threads.into(), 1..=1024)?;
    }
    if let Some(bytes) = engine.kv_cache_bytes {
        check_in("engine.kvCacheBytes", bytes.0, KV_CACHE_BYTES_MIN..=1 << 50)?;
    }
    let fraction = engine.kv_cache_fraction;
    if !(fraction > 0.0 && fraction <= 0.95) {
        return Err(refuse("engine.kvCacheFraction", fraction, "above 0 and at most 0.95"));
    }
    check_span("engine.stepTimeout", engine.step_timeout, Duration::from_millis(100))
}

fn check_queue(config: &WorkerConfig) -> Result<(), WorkerConfigError> {
    let queue = &config.queue;
    check_in("queue.maxDeliver", queue.max_deliver.into(), 1..=100)?;
    check_span("queue.ackWait", queue.ack_wait, ACK_WAIT_MIN)?;
    let step_timeout = config.engine.step_timeout;
    if !queue.outlasts(step_timeout) {
        let expected = format!("at least twice engine.stepTimeout ({step_timeout})");
        return Err(refuse("queue.ackWait", queue.ack_wait, expected));
    }
    check_in("queue.backoff", queue.backoff.len() as u64, 1..=16).map_err(|_| {
        refuse("queue.backoff", format!("a list of {}", queue.backoff.len()), "a list of 1 to 16 durations")
    })?;
    for &pause in &queue.backoff {
        check_span("queue.backoff", pause, Duration::ZERO)?;
    }
    check_span("queue.attemptTimeout", queue.attempt_timeout, Duration::from_secs(1))?;
    check_in("queue.maxJobs", queue.max_jobs, 1..=i64::MAX as u64)?;
    check_in("queue.maxBytes", queue.max_bytes.0, 1..=i64::MAX as u64)?;
    check_in("queue.replicas", queue.replicas.into(), 1..=5)?;
    check_in("queue.weights.high", queue.weights.high.into(), 1..=1000)?;
    check_in("queue.weights.normal", queue.weights.normal.into(), 1..=1000)?;
    check_in("queue.weights.low", queue.weights.low.into(), 1..=1000)
}

fn check_results(config: &WorkerConfig) -> Result<(), WorkerConfigError> {
    let results = &config.results;
    check_span("results.ttl", results.ttl, Duration::from_secs(1))?;
    if !(results.ttl.0..=DEAD_TTL_MAX).contains(&results.dead_ttl.0) {
        let range = format!("in results.ttl ({}) to {}", results.ttl, Span(DEAD_TTL_MAX));
        return Err(refuse("results.deadTtl", results.dead_ttl, range));
    }
    check_in("results.maxBytes", results.max_bytes.0, 1..=i64::MAX as u64)?;
    check_in("results.deadMaxBytes", results.dead_max_bytes.0, 1..=i64::MAX as u64)?;
    check_in("results.inlineBytesMax", config.results.inline_bytes_max.0, 1..=64 << 20)?;
    if let Some(object_store) = &config.results.object_store {
        check_store("results.objectStore.store.webIdentity", &object_store.store)?;
        let uri = &object_store.uri;
        if uri.strip_prefix("s3://").is_none_or(str::is_empty) {
            return Err(refuse("results.objectStore.uri", format!("{uri:?}"), "s3://bucket/prefix"));
        }
    }
    check_span("drain.timeout", config.drain.timeout, Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "model: {name: m, uri: 's3://b/m'}\nnats: {servers: ['nats://127.0.0.1:4222']}\n";

    fn parse(text: &str) -> Result<WorkerConfig, WorkerConfigError> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("worker.yaml");
        std::fs::write(&path, text).expect("a file");
        read(&path)
    }

    #[test]
    fn a_short_file_is_enough() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.model_ref().to_string(), "default/m");
    }

    #[test]
    fn refusals_name_field_value_and_limit() {
        let with = |extra: &str| format!("{GOOD}{extra}\n");
        let model = |extra: &str| GOOD.replace("name: m", &format!("name: m, {extra}"));
        let table = [
            (with("engine: {maxSequences: 0}"), ["engine.maxSequences", "0", "1 to 4096"]),
            (with("engine: {maxBatchTokens: 8}"), ["engine.maxBatchTokens", "8", "16 to 65536"]),
            (with("engine: {maxModelLen: 1}"), ["engine.maxModelLen", "1", "2 to 16777216"]),
            (with("engine: {threads: 0}"), ["engine.threads", "0", "1 to 1024"]),
            (with("engine: {kvCacheFraction: 1.5}"), ["engine.kvCacheFraction", "1.5", "0.95"]),
            (with("engine: {kvCacheBytes: 1Ki}"), ["engine.kvCacheBytes", "1024", "1048576"]),
            (with("engine: {stepTimeout: 1ms}"), ["engine.stepTimeout", "1ms", "100ms"]),
            (with("engine: {dtype: f8}"), ["engine.dtype", "f8", "bf16"]),
            (with("engine: {speed: 3}"), ["engine", "speed", "unknown field"]),
            (with("queue: {maxDeliver: 0}"), ["queue.maxDeliver", "0", "1 to 100"]),
            (with("queue: {ackWait: 10ms}"), ["queue.ackWait", "10ms", "1s"]),
            (with("queue: {ackWait: 30s}"), ["queue.ackWait", "30s", "twice engine.stepTimeout (30s)"]),
            (with("engine: {stepTimeout: 31s}"), ["queue.ackWait", "1m", "twice engine.stepTimeout (31s)"]),
            (with("queue: {ackWait: soon}"), ["queue.ackWait", "soon", "30s, 5m"]),
            (with("queue: {backoff: []}"), ["queue.backoff", "0", "1 to 16"]),
            (with("queue: {weights: {low: 0}}"), ["queue.weights.low", "0", "1 to 1000"]),
            (with("queue: {replicas: 7}"), ["queue.replicas", "7", "1 to 5"]),
            (with("results: {deadTtl: 1h}"), ["results.deadTtl", "1h", "168h"]),
            (with("results: {maxBytes: 0}"), ["results.maxBytes", "0", "1 to"]),
            (with("results: {inlineBytesMax: 1Gi}"), ["results.inlineBytesMax", "1073741824", "67108864"]),
            (with("results: {objectStore: {uri: /x}}"), ["results.objectStore.uri", "/x", "s3://"]),
            (model("digest: 'sha256:abc'"), ["model.digest", "sha256:abc", "64"]),
            (GOOD.replace("s3://b/m", "http://x"), ["model.uri", "http://x", "s3://"]),
            (GOOD.replace("name: m", "name: a.b"), ["model.name", "a.b", "[a-z0-9]"]),
            (GOOD.replace("['nats://127.0.0.1:4222']", "[]"), ["nats.servers", "[]", "1"]),
            ("nats: {servers: [x]}".to_owned(), ["worker.yaml", "missing field", "model"]),
        ];
        for (text, fragments) in table {
            let error = parse(&text).expect_err(&text).to_string();
            for fragment in fragments {
                assert!(error.contains(fragment), "{text}: {error:?} lacks {fragment:?}");
            }
        }
        let error = read(Path::new("/no/such/file")).unwrap_err().to_string();
        assert!(error.contains("/no/such/file"), "{error}");
    }
}
