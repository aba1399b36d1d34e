//! The operator's own options. Each can be given as an argument or an environment variable.
//!
//! No secret is an option: credentials are files, and the workers' credentials are the name of a Secret.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser};
use millrace_crds::config::NatsConfig;
use millrace_crds::units::Span;

/// Runs InferenceModels: makes their queues and keeps the right number of workers.
#[derive(Debug, Clone, Parser)]
#[command(name = "millrace-operator", version)]
pub struct Config {
    /// Watch this namespace only; all when absent.
    #[arg(long, env = "MILLRACE_WATCH_NAMESPACE")]
    pub watch_namespace: Option<String>,
    /// Addresses of the broker, such as `nats://nats.nats.svc:4222`.
    #[arg(long, env = "MILLRACE_NATS_SERVERS", value_delimiter = ',', required = true)]
    pub nats_servers: Vec<String>,
    /// The operator's login.
    #[command(flatten)]
    pub nats_login: NatsLogin,
    /// Addresses of the broker as workers reach it; the operator's own when absent.
    #[arg(long, env = "MILLRACE_WORKER_NATS_SERVERS", value_delimiter = ',')]
    pub worker_nats_servers: Vec<String>,
    /// The broker's monitoring address as workers reach it (`http://host:8222`).
    #[arg(long, env = "MILLRACE_WORKER_NATS_MONITOR")]
    pub worker_nats_monitor: Option<String>,
    /// A Secret in each model's namespace with the workers' broker credentials.
    #[arg(long, env = "MILLRACE_WORKER_NATS_SECRET")]
    pub worker_nats_secret: Option<String>,
    /// The keys of that Secret.
    #[command(flatten)]
    pub worker_nats_keys: WorkerNatsKeys,
    /// The workers' image for CPUs.
    #[arg(long, env = "MILLRACE_WORKER_IMAGE")]
    pub worker_image: String,
    /// The workers' image for GPUs; the image for CPUs when absent.
    #[arg(long, env = "MILLRACE_WORKER_IMAGE_CUDA")]
    pub worker_image_cuda: Option<String>,
    /// Make a PodMonitor for each model, once the API server knows the Prometheus operator's definitions.
    #[arg(long, env = "MILLRACE_POD_MONITORS")]
    pub pod_monitors: bool,
    /// Address of `/metrics`, `/healthz` and `/readyz`.
    #[arg(long, env = "MILLRACE_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Models reconciled at once.
    #[arg(long, env = "MILLRACE_CONCURRENCY", default_value_t = 16)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: u16,
    /// Pause between two looks at the queue of a model that has workers or work.
    #[arg(long, env = "MILLRACE_POLL_ACTIVE", default_value = "1s")]
    pub poll_active: Span,
    /// Pause between two looks at a model without workers and work. A job wakes it at once; the look is for
    /// wake-ups that got lost.
    #[arg(long, env = "MILLRACE_POLL_IDLE", default_value = "10s")]
    pub poll_idle: Span,
    /// Pause between two comparisons of streams and consumers with what they should be.
    #[arg(long, env = "MILLRACE_POLL_QUEUE", default_value = "60s")]
    pub poll_queue: Span,
    /// Work without a Lease. Only where nothing can start a second operator.
    #[arg(long, env = "MILLRACE_NO_LEADER_ELECTION")]
    pub no_leader_election: bool,
    /// The namespace of the Lease.
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    pub lease_namespace: String,
    /// The name of the Lease.
    #[arg(long, env = "MILLRACE_LEASE_NAME", default_value = "millrace-operator")]
    pub lease_name: String,
    /// This operator's name in the Lease and in events.
    #[arg(long, env = "POD_NAME", default_value = "millrace-operator")]
    pub identity: String,
}

/// How the operator logs in to the broker: in one way. Files are read again at each connect, and when they change.
#[derive(Debug, Clone, Default, Args)]
pub struct NatsLogin {
    /// File with the operator's JWT and nkey seed.
    #[arg(long, env = "MILLRACE_NATS_CREDENTIALS_FILE")]
    pub nats_credentials_file: Option<PathBuf>,
    /// File with the seed of an nkey.
    #[arg(long, env = "MILLRACE_NATS_NKEY_FILE")]
    pub nats_nkey_file: Option<PathBuf>,
    /// File with a user's name.
    #[arg(long, env = "MILLRACE_NATS_USER_FILE")]
    pub nats_user_file: Option<PathBuf>,
    /// File with the password of that user.
    #[arg(long, env = "MILLRACE_NATS_PASSWORD_FILE")]
    pub nats_password_file: Option<PathBuf>,
    /// File with a token.
    #[arg(long, env = "MILLRACE_NATS_TOKEN_FILE")]
    pub nats_token_file: Option<PathBuf>,
    /// File with the certificate authority of the broker; demands TLS.
    #[arg(long, env = "MILLRACE_NATS_CA_FILE")]
    pub nats_ca_file: Option<PathBuf>,
    /// File with a client certificate; demands TLS.
    #[arg(long, env = "MILLRACE_NATS_CERTIFICATE_FILE")]
    pub nats_certificate_file: Option<PathBuf>,
    /// File with its private key.
    #[arg(long, env = "MILLRACE_NATS_KEY_FILE")]
    pub nats_key_file: Option<PathBuf>,
    /// Begin with TLS, as the broker's handshake_first asks for; workers too.
    #[arg(long, env = "MILLRACE_NATS_TLS_FIRST")]
    pub nats_tls_first: bool,
    /// JetStream's domain, where the broker is a leaf node; for workers too.
    #[arg(long, env = "MILLRACE_NATS_DOMAIN")]
    pub nats_domain: Option<String>,
    /// Prefix of JetStream's API, where an account imports it under another name; for workers too.
    #[arg(long, env = "MILLRACE_NATS_API_PREFIX")]
    pub nats_api_prefix: Option<String>,
}

/// What the keys of the workers' Secret hold. A key that is empty is none. One of them is the login.
#[derive(Debug, Clone, Default, Args)]
pub struct WorkerNatsKeys {
    /// The key with JWT and nkey seed; it does not count where another login is named.
    #[arg(long, env = "MILLRACE_WORKER_NATS_CREDENTIALS_KEY", default_value = "nats.creds")]
    pub worker_nats_credentials_key: String,
    /// The key with an nkey seed.
    #[arg(long, env = "MILLRACE_WORKER_NATS_NKEY_KEY", default_value = "")]
    pub worker_nats_nkey_key: String,
    /// The key with a user's name.
    #[arg(long, env = "MILLRACE_WORKER_NATS_USER_KEY", default_value = "")]
    pub worker_nats_user_key: String,
    /// The key with the password of that user.
    #[arg(long, env = "MILLRACE_WORKER_NATS_PASSWORD_KEY", default_value = "")]
    pub worker_nats_password_key: String,
    /// The key with a token.
    #[arg(long, env = "MILLRACE_WORKER_NATS_TOKEN_KEY", default_value = "")]
    pub worker_nats_token_key: String,
    /// The key with the certificate authority.
    #[arg(long, env = "MILLRACE_WORKER_NATS_CA_KEY", default_value = "")]
    pub worker_nats_ca_key: String,
    /// The key with a client certificate.
    #[arg(long, env = "MILLRACE_WORKER_NATS_CERTIFICATE_KEY", default_value = "")]
    pub worker_nats_certificate_key: String,
    /// The key with its private key.
    #[arg(long, env = "MILLRACE_WORKER_NATS_PRIVATE_KEY_KEY", default_value = "")]
    pub worker_nats_private_key_key: String,
}

/// Why an option was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{option} is {value:?}; it must be {expected}")]
pub struct OptionError {
    /// The option.
    pub option: &'static str,
    /// Its value, unless that is secret.
    pub value: String,
    /// What it must be.
    pub expected: &'static str,
}

/// Shortest pause between two looks.
const POLL_MIN: Duration = Duration::from_millis(100);
/// Longest pause between two looks.
const POLL_MAX: Duration = Duration::from_secs(3600);

impl Config {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// With the first option that is wrong.
    pub fn check(&self) -> Result<(), OptionError> {
        for (option, servers) in
            [("nats-servers", &self.nats_servers), ("worker-nats-servers", &self.worker_nats_servers)]
        {
            for server in servers {
                // The workers' addresses stand in a ConfigMap, and all of them in logs.
                if server.contains('@') {
                    let value = "an address with credentials".into();
                    let expected = "an address without credentials; use the credentials file and the Secret";
                    return Err(OptionError { option, value, expected });
                }
                if server.parse::<async_nats::ServerAddr>().is_err() {
                    let expected = "an address such as nats://nats.nats.svc:4222";
                    return Err(OptionError { option, value: server.clone(), expected });
                }
            }
        }
        let polls = [
            ("poll-active", self.poll_active),
            ("poll-idle", self.poll_idle),
            ("poll-queue", self.poll_queue),
        ];
        for (option, span) in polls {
            if !(POLL_MIN..=POLL_MAX).contains(&span.0) {
                let expected = "between 100ms and 1h";
                return Err(OptionError { option, value: span.to_string(), expected });
            }
        }
        Ok(())
    }

    /// The operator's own connection, in the words of a worker's configuration.
    pub fn nats(&self) -> NatsConfig {
        let login = self.nats_login.clone();
        NatsConfig {
            servers: self.nats_servers.clone(),
            credentials_file: login.nats_credentials_file,
            nkey_file: login.nats_nkey_file,
            user_file: login.nats_user_file,
            password_file: login.nats_password_file,
            token_file: login.nats_token_file,
            ca_file: login.nats_ca_file,
            certificate_file: login.nats_certificate_file,
            key_file: login.nats_key_file,
            tls_first: login.nats_tls_first,
            domain: login.nats_domain,
            api_prefix: login.nats_api_prefix,
            ..NatsConfig::default()
        }
    }

    /// The broker's addresses as workers reach it.
    pub fn servers_of_workers(&self) -> &[String] {
        if self.worker_nats_servers.is_empty() { &self.nats_servers } else { &self.worker_nats_servers }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample(extra: &[&str]) -> Config {
        let base =
            ["millrace-operator", "--nats-servers", "nats://nats.nats.svc:4222", "--worker-image", "w:1"];
        Config::parse_from(base.iter().chain(extra))
    }

    #[test]
    fn refusals_name_option_value_and_fix() {
        sample(&[]).check().unwrap();
        let error = sample(&["--poll-idle", "1ms"]).check().unwrap_err().to_string();
        assert!(error.contains("--poll-idle is \"1ms\"") && error.contains("100ms"), "{error}");
        let error =
            sample(&["--worker-nats-servers", "nats://u:secret@h:1"]).check().unwrap_err().to_string();
        assert!(error.contains("worker-nats-servers") && !error.contains("secret"), "{error}");
        assert!(sample(&["--worker-nats-servers", "h:port"]).check().is_err());
    }
}
