//! The connection to the broker, and the model that a command is about.
//!
//! It refuses to hang: the first connection is bounded by `--connect-timeout`. After that the client
//! reconnects by itself, and each command bounds its own waiting.

use std::time::Duration;

use async_nats::jetstream::context::{ContextBuilder, GetStreamErrorKind};
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{self, Context};
use async_nats::{Client, ConnectErrorKind};
use millrace_crds::config::NatsConfig;
use millrace_crds::names::ModelRef;
use millrace_queue::broker::BrokerError;
use millrace_queue::link::{Access, Link, LinkError, Profile, redact};
use millrace_queue::login::{Login, Secret};

use crate::args::Global;
use crate::broker_args::{BrokerArgs, INBOX_PREFIX_DEFAULT, LoginArgs};
use crate::failure::Failure;

/// Most publish acknowledgements outstanding at once over all of a command.
pub const ACKS_OUTSTANDING_MAX: usize = 512;
/// How long one publish may wait for its acknowledgement, or one request for its answer, before it is
/// repeated. A broker that syncs every write to a slow disk answers a window of 256 within this time.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Commands that may wait for the connection; more publishers wait.
const COMMANDS_MAX: usize = 2048;
/// Messages of one subscription of a command that wait to be read.
const MESSAGES_MAX: usize = 65_536;

/// Messages of one subscription of a gateway that wait to be read; more are lost, which every reader of one has to
/// bear. One read of a stream asks for fewer.
const UNREAD_MAX: usize = 1024;

/// A connected broker and the model that the command is about.
#[derive(Debug, Clone)]
pub struct Connection {
    /// The connection itself.
    pub link: Link,
    /// Core NATS.
    pub client: Client,
    /// JetStream.
    pub jetstream: Context,
    /// The model.
    pub model: ModelRef,
}

/// Connects to the broker of a command.
///
/// # Errors
/// [`Failure::Usage`] for an option that is wrong, [`Failure::Unreachable`] when no server answers.
pub async fn connect(global: &Global) -> Result<Connection, Failure> {
    let model = global.model()?;
    Ok(Connection::of(connect_without_model(global).await?, model))
}

/// Connects to the broker of a command that is about no model.
///
/// # Errors
/// As [`connect`].
pub async fn connect_without_model(global: &Global) -> Result<Link, Failure> {
    let (broker, limit) = (&global.broker, global.broker.connect_timeout);
    let access = access(broker)?;
    let reached =
        Link::reach(&access, &profile(broker, "millrace command line", MESSAGES_MAX), limit.0).await;
    reached.map_err(|error| {
        let reason = match error {
            LinkError::Silent(_) => format!("no answer within --connect-timeout {limit}"),
            LinkError::Failed(error) => explain(&error),
        };
        Failure::Unreachable { server: redact(&broker.server), reason }
    })
}

/// Connects for as long as the process lives: a broker that is not there yet is waited for in the background.
///
/// # Errors
/// [`Failure::Usage`] for an option that is wrong.
pub async fn connect_for_good(broker: &BrokerArgs, name: &str) -> Result<Link, Failure> {
    Link::hold(&access(broker)?, &profile(broker, name, UNREAD_MAX)).await.map_err(wrong_option)
}

/// What the subjects of a gateway's replies begin with: a place of its own, unless it was given one.
pub fn gateway_inbox(broker: &BrokerArgs) -> String {
    match broker.inbox_prefix.as_str() {
        INBOX_PREFIX_DEFAULT => format!("{INBOX_PREFIX_DEFAULT}.gateway"),
        given => given.to_owned(),
    }
}

fn profile(broker: &BrokerArgs, name: &str, messages_max: usize) -> Profile {
    Profile {
        name: name.to_owned(),
        inbox_prefix: broker.inbox_prefix.clone(),
        request_timeout: REPLY_TIMEOUT,
        commands_max: COMMANDS_MAX,
        messages_max,
    }
}

/// JetStream as commands and the HTTP API use it.
pub fn jetstream_of(link: &Link) -> Context {
    ContextBuilder::new()
        .api_prefix(link.api_prefix())
        .timeout(REPLY_TIMEOUT)
        .max_ack_inflight(ACKS_OUTSTANDING_MAX)
        .backpressure_on_inflight(true)
        .build(link.client().clone())
}

impl Connection {
    /// A connection, for one model.
    pub fn of(link: Link, model: ModelRef) -> Self {
        Self { client: link.client().clone(), jetstream: jetstream_of(&link), link, model }
    }

    /// One of the model's streams.
    ///
    /// # Errors
    /// [`Failure::NotProvisioned`] when it does not exist.
    pub async fn stream(&self, name: String) -> Result<Stream, Failure> {
        self.jetstream.get_stream(&name).await.map_err(|error| match error.kind() {
            GetStreamErrorKind::JetStream(e) if e.error_code() == jetstream::ErrorCode::STREAM_NOT_FOUND => {
                Failure::NotProvisioned {
                    stream: name,
                    namespace: self.model.namespace.to_string(),
                    model: self.model.name.to_string(),
                }
            }
            _ => Failure::Refused(format!("stream {name}: {error}")),
        })
    }
}

fn servers(text: &str) -> Vec<String> {
    text.split(',').map(|server| server.trim().to_owned()).filter(|server| !server.is_empty()).collect()
}

/// What the options say, in the words of a worker's configuration.
fn access(broker: &BrokerArgs) -> Result<Access, Failure> {
    let login = &broker.login;
    let config = NatsConfig {
        servers: servers(&broker.server),
        credentials_file: login.creds.clone(),
        nkey_file: login.nkey.clone(),
        token_file: login.token_file.clone(),
        ca_file: broker.ca.clone(),
        certificate_file: broker.cert.clone(),
        key_file: broker.key.clone(),
        tls_first: broker.tls_first,
        domain: broker.js_domain.clone(),
        api_prefix: broker.js_api_prefix.clone(),
        ..NatsConfig::default()
    };
    let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let otherwise = spoken(login, variable("NATS_PASSWORD"), variable("NATS_TOKEN"))?;
    Access::with_login(&config, otherwise).map_err(wrong_option)
}

/// The login that is no file alone: a user's name and password, or a token of the environment.
fn spoken(args: &LoginArgs, password: Option<String>, token: Option<String>) -> Result<Login, Failure> {
    let password = args.password_file.clone().map(Secret::File).or(password.map(Secret::Text));
    match (&args.user, password, token) {
        (Some(user), Some(password), _) => Ok(Login::User(Secret::Text(user.clone()), password)),
        (Some(user), None, _) => {
            let fix = "give its password in NATS_PASSWORD or --password-file";
            Err(Failure::Usage(format!("--user {user:?}: {fix}")))
        }
        (None, _, Some(token)) => Ok(Login::Token(Secret::Text(token))),
        (None, _, None) => Ok(Login::Nobody),
    }
}

/// The options have other names than the fields of a worker's configuration.
fn wrong_option(error: BrokerError) -> Failure {
    const OPTIONS: [(&str, &str); 10] = [
        ("servers", "--server"),
        ("login", "the login"),
        ("credentialsFile", "--creds"),
        ("nkeyFile", "--nkey"),
        ("tokenFile", "--token-file"),
        ("caFile", "--ca"),
        ("certificateFile", "--cert"),
        ("keyFile", "--key"),
        ("domain", "--js-domain"),
        ("apiPrefix", "--js-api-prefix"),
    ];
    let BrokerError::Config { field, message } = error else { return Failure::Usage(error.to_string()) };
    let option = OPTIONS.iter().find(|(name, _)| *name == field).map_or(field, |(_, option)| *option);
    let is_file = field == "login" || field.ends_with("File");
    match is_file && !message.contains("is missing beside it") {
        true => Failure::file(option, std::io::Error::other(message)),
        false => Failure::Usage(format!("{option}: {message}")),
    }
}

fn explain(error: &async_nats::ConnectError) -> String {
    let text = error.to_string();
    let fix = match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            "; give the right login, such as a file with --creds"
        }
        ConnectErrorKind::Tls => "; give the certificate authority with --ca",
        // What the TLS library refuses is told as an input/output error.
        ConnectErrorKind::Io if text.contains("certificate") => "; give the certificate authority with --ca",
        ConnectErrorKind::ServerParse => "; it must look like nats://host:4222",
        _ => "; is the server running, and is the port open?",
    };
    format!("{text}{fix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_needs_a_password_and_a_token_none() {
        let of = |user: Option<&str>, password: Option<&str>, token: Option<&str>| {
            let args = LoginArgs { user: user.map(str::to_owned), ..LoginArgs::default() };
            spoken(&args, password.map(str::to_owned), token.map(str::to_owned))
        };
        assert_eq!(of(None, Some("p"), None).unwrap(), Login::Nobody);
        assert!(matches!(of(Some("u"), Some("p"), Some("t")).unwrap(), Login::User(..)));
        assert!(matches!(of(None, None, Some("t")).unwrap(), Login::Token(_)));
        let error = of(Some("u"), None, None).unwrap_err().to_string();
        assert!(error.contains("NATS_PASSWORD"), "{error}");
    }

    #[test]
    fn lists_of_servers() {
        assert_eq!(servers("a:1, b:2,"), ["a:1", "b:2"]);
    }
}
