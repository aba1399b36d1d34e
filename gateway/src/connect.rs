//! The connection to the broker, and the model that a command is about.
//!
//! It refuses to hang: the first connection is bounded by `--connect-timeout`. After that the client
//! reconnects by itself, and each command bounds its own waiting.

use std::time::Duration;

use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{self, Context};
use async_nats::{Client, ConnectErrorKind, ConnectOptions};
use millrace_crds::names::ModelRef;
use millrace_queue::broker::with_login;

use crate::args::{BrokerArgs, Global};
use crate::failure::Failure;

/// Most publish acknowledgements outstanding at once over all of a command.
pub const ACKS_OUTSTANDING_MAX: usize = 512;
/// How long one publish may wait for its acknowledgement, or one request for its answer, before it is
/// repeated. A broker that syncs every write to a slow disk answers a window of 256 within this time.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// Messages of one subscription that wait to be read; more are lost, which every reader of one has to bear.
/// One read of a stream asks for fewer.
const UNREAD_MAX: usize = 1024;

/// A connected broker and the model that the command is about.
#[derive(Debug, Clone)]
pub struct Connection {
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
    let (client, jetstream) = connect_without_model(global).await?;
    Ok(Connection { client, jetstream, model })
}

/// Connects to the broker of a command that is about no model.
///
/// # Errors
/// As [`connect`].
pub async fn connect_without_model(global: &Global) -> Result<(Client, Context), Failure> {
    let (broker, limit) = (&global.broker, global.broker.connect_timeout);
    let unreachable = |reason: String| Failure::Unreachable { server: redact(&broker.server), reason };
    let connecting = async_nats::connect_with_options(servers(&broker.server), options(broker).await?);
    let client = tokio::time::timeout(limit.0, connecting)
        .await
        .map_err(|_| unreachable(format!("no answer within --connect-timeout {limit}")))?
        .map_err(|error| unreachable(explain(&error)))?;
    Ok((client.clone(), jetstream_of(&client)))
}

/// Connects for as long as the process lives: a broker that is not there yet is waited for in the background.
///
/// # Errors
/// [`Failure::Usage`] or [`Failure::File`] for an option that is wrong.
pub async fn connect_for_good(broker: &BrokerArgs, name: &str) -> Result<(Client, Context), Failure> {
    let options = options(broker).await?.name(name).retry_on_initial_connect();
    let options = options.subscription_capacity(UNREAD_MAX);
    let options = options.event_callback(|event| async move {
        tracing::warn!(event = %event, "broker");
    });
    let connecting = async_nats::connect_with_options(servers(&broker.server), options);
    let client = connecting
        .await
        .map_err(|error| Failure::Unreachable { server: redact(&broker.server), reason: explain(&error) })?;
    Ok((client.clone(), jetstream_of(&client)))
}

fn jetstream_of(client: &Client) -> Context {
    jetstream::context::ContextBuilder::new()
        .timeout(REPLY_TIMEOUT)
        .max_ack_inflight(ACKS_OUTSTANDING_MAX)
        .backpressure_on_inflight(true)
        .build(client.clone())
}

impl Connection {
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

async fn options(broker: &BrokerArgs) -> Result<ConnectOptions, Failure> {
    let mut options = ConnectOptions::new()
        .name("millrace command line")
        .connection_timeout(broker.connect_timeout.0)
        .request_timeout(Some(REPLY_TIMEOUT))
        .custom_inbox_prefix(&broker.inbox_prefix)
        .max_reconnects(None);
    let addresses: Vec<_> = servers(&broker.server).iter().filter_map(|server| server.parse().ok()).collect();
    options = with_login(options, &addresses);
    if let Some(path) = &broker.ca {
        std::fs::metadata(path).map_err(|e| Failure::file(format!("--ca {}", path.display()), e))?;
        options = options.add_root_certificates(path.clone()).require_tls(true);
    }
    if let Some(path) = &broker.creds {
        let shown = format!("--creds {}", path.display());
        let text = tokio::fs::read_to_string(path).await.map_err(|e| Failure::file(&shown, e))?;
        options = options.credentials(&text).map_err(|e| Failure::file(&shown, e))?;
    }
    Ok(options)
}

fn explain(error: &async_nats::ConnectError) -> String {
    let text = error.to_string();
    let fix = match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            "; give the right file with --creds"
        }
        ConnectErrorKind::Tls => "; give the certificate authority with --ca",
        // What the TLS library refuses is told as an input/output error.
        ConnectErrorKind::Io if text.contains("certificate") => "; give the certificate authority with --ca",
        ConnectErrorKind::ServerParse => "; it must look like nats://host:4222",
        _ => "; is the server running, and is the port open?",
    };
    format!("{text}{fix}")
}

/// The address without a password, for messages.
pub fn redact(servers: &str) -> String {
    let hide = |server: &str| match (server.split_once("://"), server.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://***@{host}"),
        (None, Some((_, host))) => format!("***@{host}"),
        _ => server.to_owned(),
    };
    servers.split(',').map(|server| hide(server.trim())).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_printed() {
        assert_eq!(redact("nats://me:secret@host:4222, b:1"), "nats://***@host:4222,b:1");
        assert_eq!(redact("me:secret@host"), "***@host");
    }

    #[test]
    fn lists_of_servers() {
        assert_eq!(servers("a:1, b:2,"), ["a:1", "b:2"]);
    }
}
