//! `millrace-gateway` as it is started.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser};
use millrace_crds::names::{Class, SubjectToken};
use millrace_crds::units::{Bytes, Span};
use millrace_queue::args::StoreArgs;

use crate::broker_args::BrokerArgs;
use crate::failure::Failure;
use crate::http::cache::CacheUse;
use crate::http::cors;
use crate::http::limits::set::{LimitRule, LimitSet};

/// Least `--memory-max`: room for a few of the largest requests.
const MEMORY_MIN: u64 = 16 << 20;

/// An identity provider whose tokens are let in beside keys.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Tokens of an identity provider (OIDC)")]
pub struct OidcArgs {
    /// Its address, as tokens say it
    #[arg(long, env = "MILLRACE_OIDC_ISSUER", requires = "oidc_audience", value_name = "URL")]
    pub oidc_issuer: Option<String>,
    /// Whom its tokens must be for
    #[arg(long, env = "MILLRACE_OIDC_AUDIENCE", requires = "oidc_issuer", value_name = "TEXT")]
    pub oidc_audience: Option<String>,
    /// Where its keys are; without it, where its description says
    #[arg(long, env = "MILLRACE_OIDC_JWKS", requires = "oidc_issuer", value_name = "URL")]
    pub oidc_jwks: Option<String>,
    /// Claim that says whose a request is
    #[arg(long, env = "MILLRACE_OIDC_TENANT_CLAIM", default_value = "sub", value_name = "NAME")]
    pub oidc_tenant_claim: String,
    /// Claim that lists the namespaces whose models may be used; all without it
    #[arg(long, env = "MILLRACE_OIDC_NAMESPACES_CLAIM", value_name = "NAME")]
    pub oidc_namespaces_claim: Option<String>,
}

/// How much is let in.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits")]
pub struct BoundArgs {
    /// Most requests for an answer at once; more are told to come again
    #[arg(long, default_value = "4096", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub requests_max: u32,
    /// Most connections at once; 8192 without it, as far as the system lets so many files be open
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub connections_max: Option<u32>,
    /// Most bytes of requests and answers that are held at once
    #[arg(long, default_value = "128Mi", value_name = "SIZE")]
    pub memory_max: Bytes,
    /// How long a new connection may take for the head of its first request
    #[arg(long, default_value = "15s", value_name = "SPAN")]
    pub head_timeout: Span,
    /// How long a connection may be idle between two requests, the head of the next included
    #[arg(long, default_value = "60s", value_name = "SPAN")]
    pub idle_timeout: Span,
    /// Limit of each key that has none of its own, such as requests=60/min; may be repeated
    #[arg(long, value_name = "LIMIT")]
    pub key_limit: Vec<LimitRule>,
    /// Limit of each tenant of which its key says none, such as output-tokens=100k/min; may be repeated
    #[arg(long, value_name = "LIMIT")]
    pub tenant_limit: Vec<LimitRule>,
    /// Whether deterministic requests are answered from stored outcomes, where their key does not say
    #[arg(long, env = "MILLRACE_CACHE", value_enum, default_value = "asked", value_name = "WHEN")]
    pub cache: CacheUse,
    /// Copies of what gateways share in the broker, where this one makes the buckets
    #[arg(long, default_value = "1", value_name = "N", value_parser = clap::value_parser!(u8).range(1..=5))]
    pub state_replicas: u8,
}

impl BoundArgs {
    /// The limits of keys, and those of tenants.
    ///
    /// # Errors
    /// [`Failure::Usage`].
    pub fn limits(&self) -> Result<(LimitSet, LimitSet), Failure> {
        let of = |name: &str, rules: &[LimitRule]| {
            LimitSet::of(rules).map_err(|reason| Failure::Usage(format!("{name}: {reason}")))
        };
        Ok((of("--key-limit", &self.key_limit)?, of("--tenant-limit", &self.tenant_limit)?))
    }
}

/// Files, and what keeps them.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Files and batches")]
pub struct FileArgs {
    /// Largest file
    #[arg(long, env = "MILLRACE_FILE_BYTES", default_value = "1Gi", value_name = "BYTES")]
    pub file_bytes: Bytes,
    /// All files together, where they lie in the broker
    #[arg(long, env = "MILLRACE_FILES_BYTES", default_value = "8Gi", value_name = "BYTES")]
    pub files_bytes: Bytes,
    /// Most lines of a batch
    #[arg(
        long,
        default_value = "50000",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub batch_lines: u32,
    /// Most lines of a batch that are in the queue at once
    #[arg(long, default_value = "8192", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub batch_flight: u32,
    /// Most batches that this gateway runs at once; others wait
    #[arg(long, default_value = "4", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=64))]
    pub batches_at_once: u32,
    /// Let webhooks reach private addresses, and without TLS
    #[arg(long, env = "MILLRACE_WEBHOOK_PRIVATE")]
    pub webhook_private: bool,
}

/// OpenAI's API over the queue: every request is a durable job, every answer its one outcome.
#[derive(Debug, Clone, Parser)]
#[command(name = "millrace-gateway", version, max_term_width = 100)]
pub struct GatewayArgs {
    /// How to reach the broker.
    #[command(flatten)]
    pub broker: BrokerArgs,
    /// Where to listen
    #[arg(long, env = "MILLRACE_LISTEN", default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// File with the certificate chain, PEM; read again when it changes
    #[arg(long, env = "MILLRACE_TLS_CERT", requires = "tls_key", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// File with its private key, PEM
    #[arg(long, env = "MILLRACE_TLS_KEY", requires = "tls_cert", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// File with the authorities of client certificates, PEM: without a certificate of theirs nobody connects
    #[arg(long, env = "MILLRACE_TLS_CLIENT_CA", requires = "tls_cert", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// Origin whose pages may use the API, such as https://chat.example, or *; may be repeated
    #[arg(long, env = "MILLRACE_CORS_ORIGIN", value_delimiter = ',', value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
    /// Whose tokens are let in beside keys.
    #[command(flatten)]
    pub oidc: OidcArgs,
    /// Let everybody in who reaches the address, which must be a loopback one; without it a key is needed
    #[arg(long, env = "MILLRACE_ANONYMOUS")]
    pub anonymous: bool,
    /// File for the audit log: a JSON object for each request, of who did what
    #[arg(long, env = "MILLRACE_AUDIT", value_name = "FILE")]
    pub audit: Option<PathBuf>,
    /// Namespace of models that are named without one
    #[arg(long, short, env = "MILLRACE_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// Class of jobs whose request names none
    #[arg(long, env = "MILLRACE_CLASS", default_value_t)]
    pub class: Class,
    /// How long a request may take; its job's deadline, and the latest that a request can ask for
    #[arg(long, default_value = "10m", value_name = "SPAN")]
    pub timeout: Span,
    /// How long a client may take to send a request's body
    #[arg(long, default_value = "30s", value_name = "SPAN")]
    pub body_timeout: Span,
    /// Longest silence within a stream
    #[arg(long, default_value = "10s", value_name = "SPAN")]
    pub keep_alive: Span,
    /// How long requests that run may go on after SIGTERM
    #[arg(long, default_value = "30s", value_name = "SPAN")]
    pub drain_timeout: Span,
    /// How much is let in.
    #[command(flatten)]
    pub bounds: BoundArgs,
    /// What keeps files.
    #[command(flatten)]
    pub files: FileArgs,
    /// s3://bucket/prefix for files, and for bodies that are too large for a message
    #[arg(long, env = "MILLRACE_OBJECT_STORE", value_name = "URI")]
    pub object_store: Option<String>,
    /// How to reach it, and outcomes that are too large for a message
    #[command(flatten)]
    pub store: StoreArgs,
}

impl GatewayArgs {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// [`Failure::Usage`].
    pub fn check(&self) -> Result<(), Failure> {
        self.namespace()?;
        for (name, span) in [
            ("--timeout", self.timeout),
            ("--body-timeout", self.body_timeout),
            ("--keep-alive", self.keep_alive),
            ("--head-timeout", self.bounds.head_timeout),
            ("--idle-timeout", self.bounds.idle_timeout),
        ] {
            if span.0.is_zero() {
                return Err(Failure::Usage(format!("{name} is 0; at least 1ms is needed")));
            }
        }
        self.bounds.limits()?;
        let least = MEMORY_MIN;
        if self.bounds.memory_max.0 < least {
            let message =
                format!("--memory-max {}: at least {} is needed", self.bounds.memory_max, Bytes(least));
            return Err(Failure::Usage(message));
        }
        cors::layer(&self.cors_origin)?;
        for (name, bytes) in
            [("--file-bytes", self.files.file_bytes), ("--files-bytes", self.files.files_bytes)]
        {
            if bytes.0 == 0 {
                return Err(Failure::Usage(format!("{name} is 0; at least 1 is needed")));
            }
        }
        if self.object_store.is_none() && self.files.file_bytes > self.files.files_bytes {
            let (one, all) = (self.files.file_bytes, self.files.files_bytes);
            return Err(Failure::Usage(format!("--file-bytes {one} is more than --files-bytes {all}")));
        }
        if self.anonymous && !self.listen.ip().is_loopback() {
            let message = format!(
                "--anonymous with --listen {}: only a loopback address may let everybody in",
                self.listen
            );
            return Err(Failure::Usage(message));
        }
        Ok(())
    }

    /// The namespace of models that are named without one.
    ///
    /// # Errors
    /// [`Failure::Usage`].
    pub fn namespace(&self) -> Result<SubjectToken, Failure> {
        let wrong = |error| Failure::Usage(format!("--namespace {:?}: {error}", self.namespace));
        self.namespace.parse().map_err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(words: &[&str]) -> Result<(), String> {
        let words = ["millrace-gateway"].iter().chain(words);
        let args = GatewayArgs::try_parse_from(words).map_err(|error| error.to_string())?;
        args.check().map_err(|error| error.to_string())
    }

    #[test]
    fn everybody_is_let_in_on_loopback_alone() {
        assert_eq!(checked(&["--anonymous"]), Ok(()));
        assert_eq!(checked(&["--anonymous", "--listen", "[::1]:0"]), Ok(()));
        let refused = checked(&["--anonymous", "--listen", "0.0.0.0:8080"]).unwrap_err();
        assert!(refused.contains("0.0.0.0:8080") && refused.contains("loopback"), "{refused}");
        assert_eq!(checked(&["--listen", "0.0.0.0:8080"]), Ok(()), "with keys");
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for (words, named) in [
            (&["--anonymous", "--timeout", "0s"][..], "--timeout"),
            (&["--anonymous", "--namespace", "A.b"], "A.b"),
            (&["--anonymous", "--tls-cert", "x"], "--tls-key"),
            (&["--anonymous", "--tls-client-ca", "x"], "--tls-cert"),
            (&["--anonymous", "--cors-origin", "chat.example"], "--cors-origin"),
            (&["--anonymous", "--requests-max", "0"], "--requests-max"),
            (&["--anonymous", "--head-timeout", "0s"], "--head-timeout"),
            (&["--anonymous", "--memory-max", "1Mi"], "--memory-max 1Mi: at least 16Mi"),
            (&["--anonymous", "--key-limit", "requests=60"], "requests=60/min"),
            (&["--anonymous", "--tenant-limit", "concurrent=1", "--tenant-limit", "concurrent=2"], "twice"),
            (&["--anonymous", "--file-bytes", "0"], "--file-bytes"),
            (&["--anonymous", "--file-bytes", "9Gi"], "--files-bytes"),
        ] {
            let refused = checked(words).unwrap_err();
            assert!(refused.contains(named), "{words:?}: {refused}");
        }
    }
}
