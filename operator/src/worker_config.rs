//! From a spec to the file that workers read, and to what must be mounted so that its paths are true.
//!
//! Pure. Secrets are only ever paths in it.

use std::path::PathBuf;

use millrace_crds::config::{
    EngineConfig, ModelConfig, NatsConfig, ObjectStoreConfig, ResultsConfig, ServerConfig, StoreConfig,
    WebIdentityConfig, WorkerConfig,
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
/// The key of a Secret that holds a certificate authority.
pub const CA_FILE: &str = "ca.crt";
/// The file of a token.
pub const TOKEN_FILE: &str = "token";
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
    /// Tokens of the service account: volume, audience, folder.
    pub tokens: Vec<TokenMount>,
}

/// A token of the pod's service account in a folder, as the file [`TOKEN_FILE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMount {
    /// The volume's name.
    pub volume: &'static str,
    /// Whom the token is for.
    pub audience: String,
    /// The folder.
    pub path: &'static str,
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
        web_identity: spec.model.web_identity.clone(),
        ca_secret_ref: spec.model.ca_secret_ref.clone(),
        proxy: spec.model.proxy.clone(),
    };
    one_login("spec.model.webIdentity", &weights)?;
    if let Some(results) = &spec.results.object_store {
        one_login("spec.results.objectStore.webIdentity", results)?;
    }
    let store = store(&weights, &OF_MODEL, &mut mounts);
    let object_store = spec.results.object_store.as_ref().map(|results| ObjectStoreConfig {
        uri: results.uri.clone(),
        store: self::store(results, &OF_RESULTS, &mut mounts),
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
        nats: nats(spec, config, &mut mounts),
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

fn one_login(field: &'static str, spec: &ObjectStoreSpec) -> Result<(), SpecRefusal> {
    match spec.credentials_secret_ref.is_some() && spec.web_identity.is_some() {
        true => Err(refuse(field, "stands beside credentialsSecretRef; give one of them")),
        false => Ok(()),
    }
}

/// Names of the volumes of one store, and where they are mounted.
struct StoreMounts {
    volume: &'static str,
    path: &'static str,
    ca_volume: &'static str,
    ca_path: &'static str,
    token_volume: &'static str,
    token_path: &'static str,
}

/// Of the weights' store.
const OF_MODEL: StoreMounts = StoreMounts {
    volume: "model-credentials",
    path: MODEL_CREDENTIALS_DIR,
    ca_volume: "model-ca",
    ca_path: "/etc/millrace/model-ca",
    token_volume: "model-token",
    token_path: "/etc/millrace/model-token",
};
/// Of the outcomes' store.
const OF_RESULTS: StoreMounts = StoreMounts {
    volume: "results-credentials",
    path: RESULTS_CREDENTIALS_DIR,
    ca_volume: "results-ca",
    ca_path: "/etc/millrace/results-ca",
    token_volume: "results-token",
    token_path: "/etc/millrace/results-token",
};

fn store(spec: &ObjectStoreSpec, of: &StoreMounts, mounts: &mut Mounts) -> StoreConfig {
    let credentials_dir = spec.credentials_secret_ref.as_ref().map(|SecretRef { name }| {
        mounts.secrets.push(SecretMount { volume: of.volume, secret: name.clone(), path: of.path });
        PathBuf::from(of.path)
    });
    let ca_file = spec.ca_secret_ref.as_ref().map(|SecretRef { name }| {
        let (volume, path) = (of.ca_volume, of.ca_path);
        mounts.secrets.push(SecretMount { volume, secret: name.clone(), path });
        PathBuf::from(path).join(CA_FILE)
    });
    let web_identity = spec.web_identity.as_ref().map(|identity| {
        let (volume, path, audience) = (of.token_volume, of.token_path, identity.audience.clone());
        mounts.tokens.push(TokenMount { volume, audience, path });
        WebIdentityConfig {
            token_file: PathBuf::from(path).join(TOKEN_FILE),
            role_arn: identity.role_arn.clone(),
            endpoint: identity.endpoint.clone(),
        }
    });
    StoreConfig {
        endpoint: spec.endpoint.clone(),
        region: spec.region.clone(),
        path_style: spec.path_style,
        credentials_dir,
        web_identity,
        ca_file,
        proxy: spec.proxy.clone(),
    }
}

fn nats(spec: &InferenceModelSpec, config: &Config, mounts: &mut Mounts) -> NatsConfig {
    let of_model = spec.queue.credentials_secret_ref.as_ref().map(|secret| &secret.name);
    let secret = of_model.or(config.worker_nats_secret.as_ref());
    if let Some(secret) = secret {
        mounts.secrets.push(SecretMount { volume: "nats", secret: secret.clone(), path: NATS_DIR });
    }
    let keys = &config.worker_nats_keys;
    let file = |key: &String| {
        let mounted = secret.is_some() && !key.is_empty();
        mounted.then(|| PathBuf::from(NATS_DIR).join(key))
    };
    let others = [&keys.worker_nats_nkey_key, &keys.worker_nats_user_key, &keys.worker_nats_token_key];
    let by_jwt = others.into_iter().all(String::is_empty);
    NatsConfig {
        servers: config.servers_of_workers().to_vec(),
        credentials_file: file(&keys.worker_nats_credentials_key).filter(|_| by_jwt),
        nkey_file: file(&keys.worker_nats_nkey_key),
        user_file: file(&keys.worker_nats_user_key),
        password_file: file(&keys.worker_nats_password_key),
        token_file: file(&keys.worker_nats_token_key),
        ca_file: file(&keys.worker_nats_ca_key),
        certificate_file: file(&keys.worker_nats_certificate_key),
        key_file: file(&keys.worker_nats_private_key_key),
        tls_first: config.nats_login.nats_tls_first,
        domain: config.nats_login.nats_domain.clone(),
        api_prefix: config.nats_login.nats_api_prefix.clone(),
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

    fn spec(json: serde_json::Value) -> InferenceModelSpec {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn logins_are_files_of_the_secret_that_the_model_or_the_operator_names() {
        use serde_json::json;

        let model = ModelRef::new("default", "m").unwrap();
        let built = |spec: &InferenceModelSpec, options: &[&str]| {
            let (worker, mounts) = build(spec, &model, &crate::config::tests::sample(options)).unwrap();
            let secrets: Vec<String> = mounts.secrets.into_iter().map(|mount| mount.secret).collect();
            (worker.nats, secrets)
        };
        let plain = spec(json!({"model": {"uri": "s3://b/m"}, "replicas": 1}));
        assert_eq!(built(&plain, &[]).0.credentials_file, None, "no Secret is named");
        let (nats, secrets) = built(&plain, &["--worker-nats-secret", "all"]);
        assert_eq!(nats.credentials_file, Some("/etc/millrace/nats/nats.creds".into()));
        assert_eq!(secrets, ["all"]);
        let own = spec(json!({"model": {"uri": "s3://b/m"}, "replicas": 1,
            "queue": {"credentialsSecretRef": {"name": "own"}}}));
        let user = ["--worker-nats-user-key", "user", "--worker-nats-password-key", "password"];
        let (nats, secrets) =
            built(&own, &[&user[..], &["--worker-nats-secret", "all", "--nats-domain", "hub"]].concat());
        assert_eq!(secrets, ["own"]);
        assert_eq!((nats.credentials_file, nats.domain.as_deref()), (None, Some("hub")));
        assert_eq!(nats.user_file, Some("/etc/millrace/nats/user".into()));
    }

    #[test]
    fn a_store_has_one_login_whose_files_are_mounted() {
        use serde_json::json;

        let model = ModelRef::new("default", "m").unwrap();
        let built = |of_model: serde_json::Value| {
            let spec = spec(json!({"model": of_model, "replicas": 1}));
            build(&spec, &model, &crate::config::tests::sample(&[]))
        };
        let identity = json!({"roleArn": "arn:aws:iam::1:role/m"});
        let (worker, mounts) =
            built(json!({"uri": "s3://b/m", "webIdentity": identity, "caSecretRef": {"name": "ca"}}))
                .unwrap();
        let store = worker.model.store;
        assert_eq!(store.web_identity.unwrap().token_file, PathBuf::from("/etc/millrace/model-token/token"));
        assert_eq!(store.ca_file, Some("/etc/millrace/model-ca/ca.crt".into()));
        assert_eq!(mounts.tokens[0].audience, "sts.amazonaws.com");
        assert_eq!(mounts.secrets[0].secret, "ca");
        let both =
            json!({"uri": "s3://b/m", "webIdentity": identity, "credentialsSecretRef": {"name": "keys"}});
        assert_eq!(built(both).unwrap_err().field, "spec.model.webIdentity");
    }
}
