//! From a spec to the file that workers read, and to what must be mounted so that its paths are true.
//!
//! Pure. Secrets are only ever paths in it.

use std::path::PathBuf;

use millrace_crds::config::{
    EngineConfig, ModelConfig, NatsConfig, ObjectStoreConfig, ResultsConfig, ServerConfig, StoreConfig,
    WorkerConfig,
};
use millrace_crds::model::pods::SecretRef;
use millrace_crds::model::{InferenceModelSpec, ObjectStoreSpec};
use millrace_crds::names::ModelRef;
use millrace_crds::units::Bytes;

use crate::config::Config;
use crate::validate::{SpecRefusal, refuse};

/// Where the configuration is mounted.
pub const CONFIG_DIR: &str = "/etc/millrace/config";
/// The configuration's file name.
pub const CONFIG_FILE: &str = "worker.yaml";
/// Where pulled weights are kept.
pub const CACHE_DIR: &str = "/var/cache/millrace";
/// Where a claim with weights is mounted.
pub const MODEL_DIR: &str = "/var/lib/millrace/model";
/// Where the credentials of the weights' store are mounted.
pub const MODEL_CREDENTIALS_DIR: &str = "/etc/millrace/model-credentials";
/// Where the credentials of the outcomes' store are mounted.
pub const RESULTS_CREDENTIALS_DIR: &str = "/etc/millrace/results-credentials";
/// Where the credentials of the broker are mounted.
pub const NATS_DIR: &str = "/etc/millrace/nats";
/// The port of metrics and health.
pub const PORT: u16 = 9090;

/// What is mounted into the pods beside the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mounts {
    /// A claim with weights, read only.
    pub model_claim: Option<String>,
    /// A claim that keeps pulled weights.
    pub cache_claim: Option<String>,
    /// Room for pulled weights where there is no such claim.
    pub cache_bytes: u64,
    /// Secrets: volume, Secret, folder.
    pub secrets: Vec<SecretMount>,
}

/// A Secret in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretMount {
    /// The volume's name.
    pub volume: &'static str,
    /// The Secret's name.
    pub secret: String,
    /// The folder.
    pub path: &'static str,
}

/// Makes the workers' configuration.
///
/// # Errors
/// When a field cannot be carried out.
pub(crate) fn build(
    spec: &InferenceModelSpec,
    model: &ModelRef,
    config: &Config,
) -> Result<(WorkerConfig, Mounts), SpecRefusal> {
    let mut mounts = Mounts {
        cache_claim: spec.model.cache_claim.clone(),
        cache_bytes: spec.model.cache_size.0,
        ..Mounts::default()
    };
    let (uri, claim) = files(&spec.model.uri)?;
    mounts.model_claim = claim;
    let weights = ObjectStoreSpec {
        uri: spec.model.uri.clone(),
        endpoint: spec.model.endpoint.clone(),
        region: spec.model.region.clone(),
        path_style: spec.model.path_style,
        credentials_secret_ref: spec.model.credentials_secret_ref.clone(),
    };
    let store = store(&weights, ("model-credentials", MODEL_CREDENTIALS_DIR), &mut mounts);
    let object_store = spec.results.object_store.as_ref().map(|results| ObjectStoreConfig {
        uri: results.uri.clone(),
        store: self::store(results, ("results-credentials", RESULTS_CREDENTIALS_DIR), &mut mounts),
    });
    let worker = WorkerConfig {
        model: ModelConfig {
            namespace: model.namespace.clone(),
            name: model.name.clone(),
            uri,
            digest: spec.model.digest.clone(),
            store,
            cache_dir: CACHE_DIR.into(),
            bytes_max: Bytes(spec.model.cache_size.0),
        },
        nats: nats(config, &mut mounts),
        engine: engine(spec),
        queue: spec.queue.config(),
        results: ResultsConfig {
            ttl: spec.results.ttl,
            max_bytes: spec.results.max_bytes,
            dead_ttl: spec.results.dead_ttl,
            dead_max_bytes: spec.results.dead_max_bytes,
            inline_bytes_max: spec.results.inline_bytes_max,
            object_store,
        },
        drain: spec.drain.clone(),
        server: ServerConfig { listen: ([0, 0, 0, 0], PORT).into() },
    };
    Ok((worker, mounts))
}

/// The engine with the step sizes of its device written out: the ConfigMap says what runs.
fn engine(spec: &InferenceModelSpec) -> EngineConfig {
    let limits = spec.engine.step_limits(spec.engine.uses_gpu(|| spec.resources.gpus() > 0));
    EngineConfig {
        max_sequences: Some(limits.sequences),
        max_batch_tokens: Some(limits.tokens),
        ..spec.engine.clone()
    }
}

/// The address as the worker sees it, and the claim to mount for it.
fn files(uri: &str) -> Result<(String, Option<String>), SpecRefusal> {
    let bad = || {
        let expected = "it must be s3://bucket/prefix, pvc://claim/path or file:///path";
        refuse("spec.model.uri", format!("is {uri:?}; {expected}"))
    };
    if uri.split('/').any(|part| part == "..") {
        return Err(bad());
    }
    if let Some(rest) = uri.strip_prefix("pvc://") {
        let (claim, path) = rest.split_once('/').unwrap_or((rest, ""));
        if claim.is_empty() {
            return Err(bad());
        }
        let path = path.trim_matches('/');
        let folder = if path.is_empty() { MODEL_DIR.to_owned() } else { format!("{MODEL_DIR}/{path}") };
        return Ok((format!("file://{folder}"), Some(claim.to_owned())));
    }
    let rest = uri.strip_prefix("s3://").or_else(|| uri.strip_prefix("file:///"));
    match rest {
        Some(rest) if !rest.is_empty() => Ok((uri.to_owned(), None)),
        _ => Err(bad()),
    }
}

fn store(
    spec: &ObjectStoreSpec,
    (volume, path): (&'static str, &'static str),
    mounts: &mut Mounts,
) -> StoreConfig {
    let credentials_dir = spec.credentials_secret_ref.as_ref().map(|SecretRef { name }| {
        mounts.secrets.push(SecretMount { volume, secret: name.clone(), path });
        PathBuf::from(path)
    });
    StoreConfig {
        endpoint: spec.endpoint.clone(),
        region: spec.region.clone(),
        path_style: spec.path_style,
        credentials_dir,
    }
}

fn nats(config: &Config, mounts: &mut Mounts) -> NatsConfig {
    let file = |key: &String| {
        let mounted = config.worker_nats_secret.is_some() && !key.is_empty();
        mounted.then(|| PathBuf::from(NATS_DIR).join(key))
    };
    if let Some(secret) = &config.worker_nats_secret {
        mounts.secrets.push(SecretMount { volume: "nats", secret: secret.clone(), path: NATS_DIR });
    }
    NatsConfig {
        servers: config.servers_of_workers().to_vec(),
        credentials_file: file(&config.worker_nats_credentials_key),
        ca_file: file(&config.worker_nats_ca_key),
        monitor: config.worker_nats_monitor.clone(),
        provision: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_files() {
        let cases = [
            ("s3://b/m", ("s3://b/m", None)),
            ("pvc://claim/a/b/", ("file:///var/lib/millrace/model/a/b", Some("claim"))),
            ("pvc://claim", ("file:///var/lib/millrace/model", Some("claim"))),
            ("file:///models/m", ("file:///models/m", None)),
        ];
        for (uri, (expected, claim)) in cases {
            assert_eq!(files(uri).unwrap(), (expected.to_owned(), claim.map(str::to_owned)));
        }
        for uri in ["", "s3://", "http://x", "pvc://", "pvc://c/../x", "file://x"] {
            assert!(files(uri).is_err(), "{uri}");
        }
    }
}
