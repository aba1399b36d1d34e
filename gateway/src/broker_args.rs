//! Options of the connection to the broker, of `millrace` and of `millrace-gateway`.

use std::path::PathBuf;

use clap::Args;
use millrace_crds::units::Span;

/// Where replies come unless `--inbox-prefix` says otherwise.
pub const INBOX_PREFIX_DEFAULT: &str = "_INBOX";

/// How to log in to the broker: in one way. Files are read again at each connect, and when they change.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Login to the broker, one of these")]
pub struct LoginArgs {
    /// File with the JWT and nkey seed of a user
    #[arg(long, env = "NATS_CREDS", global = true, value_name = "FILE")]
    pub creds: Option<PathBuf>,
    /// File with the seed of an nkey
    #[arg(long, env = "NATS_NKEY", global = true, value_name = "FILE")]
    pub nkey: Option<PathBuf>,
    /// Name of a user; its password stands in NATS_PASSWORD or in --password-file
    #[arg(long, env = "NATS_USER", global = true, value_name = "NAME")]
    pub user: Option<String>,
    /// File with the password of --user
    #[arg(long, env = "NATS_PASSWORD_FILE", global = true, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// File with a token; or it stands in NATS_TOKEN
    #[arg(long, env = "NATS_TOKEN_FILE", global = true, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// How to reach the broker.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection and output")]
pub struct BrokerArgs {
    /// Broker address; several are separated by commas
    #[arg(
        long,
        env = "NATS_URL",
        hide_env_values = true,
        default_value = "nats://127.0.0.1:4222",
        global = true,
        value_name = "URL"
    )]
    pub server: String,
    /// How to log in.
    #[command(flatten)]
    pub login: LoginArgs,
    /// File with the broker's certificate authority; demands TLS
    #[arg(long, env = "NATS_CA", global = true, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// File with a client certificate (PEM); demands TLS
    #[arg(long, env = "NATS_CERT", global = true, value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// File with its private key (PEM)
    #[arg(long, env = "NATS_KEY", global = true, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Begin with TLS, as the broker's handshake_first asks for
    #[arg(long, env = "NATS_TLS_FIRST", global = true)]
    pub tls_first: bool,
    /// JetStream's domain, where the broker is a leaf node and the streams are elsewhere
    #[arg(long, env = "NATS_JS_DOMAIN", global = true, value_name = "NAME")]
    pub js_domain: Option<String>,
    /// Prefix of JetStream's API, where an account imports it under another name
    #[arg(long, env = "NATS_JS_API_PREFIX", global = true, value_name = "SUBJECT")]
    pub js_api_prefix: Option<String>,
    /// First token of the subjects on which replies arrive, where the broker gives each user its own
    #[arg(
        long,
        env = "MILLRACE_INBOX_PREFIX",
        default_value = INBOX_PREFIX_DEFAULT,
        global = true,
        value_name = "SUBJECT"
    )]
    pub inbox_prefix: String,
    /// How long the first connection may take
    #[arg(long, default_value = "5s", global = true, value_name = "SPAN")]
    pub connect_timeout: Span,
}
