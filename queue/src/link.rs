//! The one connection to the broker, of worker, command line, gateway and operator.
//!
//! A [`Link`] stays connected for as long as the process lives. Whoever it is ([`Login`]), and the certificates that it
//! shows and believes, are read anew for each connection. When their files change while the connection stands, another
//! one is tried first, and only if it gets in does the link move over: a secret that comes before the broker knows it
//! breaks nothing.
//!
//! A broker that lets nobody in is told from one that is away. The first refusals may be a matter of order, of a secret
//! and of the broker's own configuration; after [`REFUSED_FIRST`] or [`REFUSED_LATER`] of nothing else the process is
//! to end ([`Link::refused`]), so that whoever started it sees it.

mod standing;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_nats::connection::State;
use async_nats::jetstream::Context;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::{AuthError, Client, ConnectError, ConnectOptions, Event, ServerAddr};
use millrace_crds::config::NatsConfig;
use tokio::sync::watch;

use crate::broker::BrokerError;
use crate::login::Login;
use standing::{Standing, errors};

/// How long a process that has never got in goes on trying where it is refused.
pub const REFUSED_FIRST: Duration = Duration::from_secs(15);
/// The same for one that was in before: a broker may come back with its old configuration for a while.
pub const REFUSED_LATER: Duration = Duration::from_secs(60);
/// Pause between two looks at the files of the login.
const LOOK_PAUSE: Duration = Duration::from_secs(5);
/// How long a connection may take to be made, handshakes included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between attempts to connect, and its growth's end.
const CONNECT_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// For so long what the broker denied is worth telling.
const DENIED_FRESH: Duration = Duration::from_secs(60);

/// How to reach the broker, and as whom.
#[derive(Clone)]
pub struct Access {
    servers: Vec<ServerAddr>,
    login: Login,
    authority: Option<PathBuf>,
    identity: Option<(PathBuf, PathBuf)>,
    tls_first: bool,
    api: String,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Addresses may hold passwords.
        f.debug_struct("Access").field("login", &self.login).field("api", &self.api).finish_non_exhaustive()
    }
}

impl Access {
    /// As a configuration says it. The files are looked at, so that what can never do is told at once.
    ///
    /// # Errors
    /// With the field that is wrong.
    pub fn of(config: &NatsConfig) -> Result<Self, BrokerError> {
        Self::with_login(config, Login::default())
    }

    /// The same with a login that is used where the configuration has none.
    ///
    /// # Errors
    /// With the field that is wrong.
    pub fn with_login(config: &NatsConfig, otherwise: Login) -> Result<Self, BrokerError> {
        let wrong = |field, message: String| BrokerError::Config { field, message };
        if config.servers.is_empty() {
            return Err(wrong("servers", "no address; at least 1 is needed".into()));
        }
        let address = |server: &String| {
            server
                .parse::<ServerAddr>()
                .map_err(|error| wrong("servers", format!("{:?} is not an address: {error}", redact(server))))
        };
        let servers = config.servers.iter().map(address).collect::<Result<Vec<_>, _>>()?;
        let login = match Login::of(config, &servers)? {
            Login::Nobody => otherwise,
            login => login,
        };
        login.auth(b"").map_err(|message| wrong("login", message))?;
        let identity = match (&config.certificate_file, &config.key_file) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            (None, None) => None,
            (Some(_), None) => return Err(wrong("certificateFile", "keyFile is missing beside it".into())),
            (None, Some(_)) => return Err(wrong("keyFile", "certificateFile is missing beside it".into())),
        };
        for (field, file) in [
            ("caFile", &config.ca_file),
            ("certificateFile", &config.certificate_file),
            ("keyFile", &config.key_file),
        ] {
            if let Some(path) = file {
                let read = std::fs::read(path);
                read.map_err(|error| wrong(field, format!("{}: {error}", path.display())))?;
            }
        }
        check_api(config)?;
        let (authority, tls_first) = (config.ca_file.clone(), config.tls_first);
        Ok(Self { servers, login, authority, identity, tls_first, api: config.api() })
    }

    /// What all files hold, in one number.
    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let identity = self.identity.iter().flat_map(|(certificate, key)| [certificate, key]);
        let others = self.authority.iter().chain(identity).map(PathBuf::as_path);
        for path in self.login.files().into_iter().chain(others) {
            // One that cannot be read differs from all that could be.
            std::fs::read(path).ok().hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Options of one connection; `used` learns of which files it is made.
    fn options(&self, profile: &Profile, used: Arc<AtomicU64>) -> ConnectOptions {
        let access = self.clone();
        let mut options = ConnectOptions::with_auth_callback(move |nonce| {
            let fingerprint = access.fingerprint();
            let auth = access.login.auth(&nonce).map_err(AuthError::new);
            used.store(fingerprint, Ordering::Relaxed);
            async move { auth }
        })
        .name(&profile.name)
        .custom_inbox_prefix(&profile.inbox_prefix)
        .connection_timeout(CONNECT_TIMEOUT)
        .request_timeout(Some(profile.request_timeout))
        .client_capacity(profile.commands_max)
        .subscription_capacity(profile.messages_max)
        .max_reconnects(None)
        .reconnect_delay_callback(|tries| {
            CONNECT_PAUSE.0.saturating_mul(1 << tries.min(10)).min(CONNECT_PAUSE.1)
        });
        if let Some(path) = &self.authority {
            options = options.add_root_certificates(path.clone()).require_tls(true);
        }
        if let Some((certificate, key)) = &self.identity {
            options = options.add_client_certificate(certificate.clone(), key.clone()).require_tls(true);
        }
        if self.tls_first {
            options = options.tls_first().require_tls(true);
        }
        options
    }

    /// Whether the broker lets one in with the files as they are now.
    async fn admits(&self, profile: &Profile) -> Result<(), String> {
        let options = self.options(profile, Arc::default());
        let connecting = options.connect(self.servers.clone());
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no answer".to_owned()),
        }
    }
}

/// Subjects of the API are made of these.
fn check_api(config: &NatsConfig) -> Result<(), BrokerError> {
    let wrong = |field, text: &String, expected: &str| {
        Err(BrokerError::Config { field, message: format!("{text:?} is not {expected}") })
    };
    let token = |text: &str| !text.is_empty() && !text.contains(['.', '*', '>']) && is_visible(text);
    match (&config.domain, &config.api_prefix) {
        (Some(_), Some(prefix)) => wrong("apiPrefix", prefix, "needed beside nats.domain; give one of them"),
        (Some(domain), None) if !token(domain) => wrong("domain", domain, "one token of a subject"),
        (None, Some(prefix)) if !prefix.split('.').all(token) => {
            wrong("apiPrefix", prefix, "the beginning of a subject, such as $JS.hub.API")
        }
        _ => Ok(()),
    }
}

fn is_visible(text: &str) -> bool {
    text.chars().all(|c| !c.is_whitespace() && !c.is_control())
}

/// The address without a user, for messages.
pub fn redact(servers: &str) -> String {
    let hide = |server: &str| match (server.split_once("://"), server.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://***@{host}"),
        (None, Some((_, host))) => format!("***@{host}"),
        _ => server.to_owned(),
    };
    servers.split(',').map(|server| hide(server.trim())).collect::<Vec<_>>().join(",")
}

/// Who holds a connection, and its sizes.
#[derive(Debug, Clone)]
pub struct Profile {
    /// Its name in the broker's pages.
    pub name: String,
    /// What the subjects of replies begin with.
    pub inbox_prefix: String,
    /// How long one request may take.
    pub request_timeout: Duration,
    /// Commands that may wait for the connection; more publishers wait.
    pub commands_max: usize,
    /// Messages that may wait for one subscriber.
    pub messages_max: usize,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answered in time.
    #[error("no answer within {0:?}")]
    Silent(Duration),
    /// What the broker or the network said.
    #[error(transparent)]
    Failed(#[from] ConnectError),
}

/// The connection. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Link {
    client: Client,
    api: Arc<str>,
    timeout: Duration,
    connections: watch::Receiver<u64>,
    refused: watch::Receiver<Option<String>>,
    standing: Arc<Mutex<Standing>>,
    _held: Arc<()>,
}

impl Link {
    /// Connects in the background, and stays connected: waits for a broker that is not there yet, and comes back to
    /// one that went away.
    ///
    /// # Errors
    /// [`BrokerError::Config`] when the client library refuses an address.
    pub async fn hold(access: &Access, profile: &Profile) -> Result<Self, BrokerError> {
        let made = Self::make(access, profile, ConnectOptions::retry_on_initial_connect).await;
        made.map_err(|error| BrokerError::Config { field: "servers", message: error.to_string() })
    }

    /// Connects within `limit`, and stays connected after that.
    ///
    /// # Errors
    /// When nobody lets it in within that time.
    pub async fn reach(access: &Access, profile: &Profile, limit: Duration) -> Result<Self, LinkError> {
        let connecting = Self::make(access, profile, |options| options.connection_timeout(limit));
        match tokio::time::timeout(limit, connecting).await {
            Ok(made) => Ok(made?),
            Err(_) => Err(LinkError::Silent(limit)),
        }
    }

    async fn make(
        access: &Access,
        profile: &Profile,
        how: impl FnOnce(ConnectOptions) -> ConnectOptions,
    ) -> Result<Self, ConnectError> {
        let (counter, connections) = watch::channel(0);
        let (verdict, refused) = watch::channel(None);
        let (used, standing) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Standing::default())));
        let (told, looked, login) = (standing.clone(), standing.clone(), access.login.clone());
        let options = access
            .options(profile, used.clone())
            .event_callback(move |event| {
                hear(&event, &counter, &told);
                async {}
            })
            .reconnect_to_server_callback(move |servers, _| {
                let now = Instant::now();
                let reason = lock(&looked).look(&errors(&servers, &login), now);
                if reason.is_some() {
                    verdict.send_replace(reason);
                }
                async { None }
            });
        let client = how(options).connect(access.servers.clone()).await?;
        let held = Arc::new(());
        let look =
            Look { access: access.clone(), profile: profile.clone(), used, standing: standing.clone() };
        tokio::spawn(look.go(client.clone(), Arc::downgrade(&held)));
        let (api, timeout) = (access.api.as_str().into(), profile.request_timeout);
        Ok(Self { client, api, timeout, connections, refused, standing, _held: held })
    }

    /// The client underneath.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// JetStream, under the prefix of its API.
    pub fn jetstream(&self) -> Context {
        ContextBuilder::new().api_prefix(self.api_prefix()).timeout(self.timeout).build(self.client.clone())
    }

    /// What subjects of JetStream's API begin with.
    pub fn api_prefix(&self) -> &str {
        &self.api
    }

    /// A subject of JetStream's API.
    pub fn api(&self, rest: &str) -> String {
        format!("{}.{rest}", self.api)
    }

    /// Counts the connections made: a change says that what was in flight may be gone.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.connections.clone()
    }

    /// Waits until the broker answers.
    pub async fn ready(&self) {
        let mut connections = self.connections();
        // The sender lives in the client's options, so an error means that the process ends.
        let _ = connections.wait_for(|&count| count > 0).await;
    }

    /// Whether the connection stands now.
    pub fn connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Why it does not stand, as far as that is known.
    pub fn trouble(&self) -> Option<String> {
        if self.connected() { None } else { lock(&self.standing).trouble.clone() }
    }

    /// Why it does not stand, where the broker answers and does not let this process in.
    pub fn refusal(&self) -> Option<String> {
        lock(&self.standing).refusal()
    }

    /// What the broker denied this user in the last minute, in its own words.
    pub fn denied(&self) -> Option<String> {
        let fresh = |(at, _): &&(Instant, String)| at.elapsed() < DENIED_FRESH;
        lock(&self.standing).denied.as_ref().filter(fresh).map(|(_, said)| said.clone())
    }

    /// Waits until it is sure that the broker will not let this process in, and says why. Waits for ever otherwise.
    pub async fn refused(&self) -> String {
        let mut refused = self.refused.clone();
        let reason = refused.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        match reason {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }
}

/// Looks at the files of the login for as long as somebody holds the link.
struct Look {
    access: Access,
    profile: Profile,
    used: Arc<AtomicU64>,
    standing: Arc<Mutex<Standing>>,
}

impl Look {
    async fn go(self, client: Client, held: Weak<()>) {
        let mut told = 0;
        while held.strong_count() > 0 {
            tokio::time::sleep(LOOK_PAUSE).await;
            let found = self.access.fingerprint();
            let connected = client.connection_state() == State::Connected;
            if !connected || found == self.used.load(Ordering::Relaxed) {
                continue;
            }
            match self.access.admits(&self.profile).await {
                Ok(()) => {
                    tracing::info!("the files of the broker's login have changed; connecting anew");
                    // It fails only where the connection is closed for good.
                    let _ = client.force_reconnect().await;
                }
                Err(error) if told != found => {
                    tracing::warn!(
                        error,
                        "the files of the broker's login have changed, and it does not take them yet"
                    );
                    lock(&self.standing).trouble = Some(error);
                    told = found;
                }
                Err(_) => {}
            }
        }
    }
}

fn lock(standing: &Mutex<Standing>) -> std::sync::MutexGuard<'_, Standing> {
    standing.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hear(event: &Event, counter: &watch::Sender<u64>, standing: &Mutex<Standing>) {
    match event {
        Event::Connected => {
            lock(standing).connected();
            counter.send_modify(|count| *count += 1);
            tracing::info!("broker connected");
        }
        Event::Disconnected => tracing::warn!("broker disconnected"),
        // The server's words may quote a subject, never a body.
        Event::ServerError(error) => {
            let said = error.to_string();
            tracing::warn!(said, "the broker says an error");
            let mut standing = lock(standing);
            if said.to_lowercase().contains("permissions violation") {
                standing.denied = Some((Instant::now(), said));
            } else {
                standing.trouble = Some(said);
            }
        }
        // Each attempt that failed: why is told by `trouble`.
        Event::ClientError(error) => tracing::warn!(%error, "the broker cannot be reached"),
        other => tracing::warn!(event = %other, "broker event"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(yaml: &str) -> NatsConfig {
        serde_yaml::from_str(yaml).unwrap()
    }

    #[test]
    fn what_can_never_do_is_refused_by_its_field() {
        for (yaml, parts) in [
            ("{servers: []}", ["nats.servers", "at least 1"]),
            ("{servers: ['nats://u:secret@h:port']}", ["nats.servers", "***@h:port"]),
            ("{servers: [x], tokenFile: /no/such}", ["nats.login", "/no/such"]),
            ("{servers: [x], caFile: /no/such}", ["nats.caFile", "/no/such"]),
            ("{servers: [x], keyFile: /k}", ["nats.keyFile", "certificateFile is missing"]),
            ("{servers: [x], domain: a.b}", ["nats.domain", "a.b"]),
            ("{servers: [x], apiPrefix: 'a.>'}", ["nats.apiPrefix", "a.>"]),
            ("{servers: [x], apiPrefix: a, domain: b}", ["nats.apiPrefix", "nats.domain"]),
        ] {
            let error = Access::of(&config(yaml)).expect_err(yaml).to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{yaml}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
        assert_eq!(Access::of(&config("{servers: [x], domain: hub}")).unwrap().api, "$JS.hub.API");
    }

    #[test]
    fn addresses_are_shown_without_a_user() {
        assert_eq!(redact("nats://me:secret@host:4222, b:1"), "nats://***@host:4222,b:1");
        assert_eq!(redact("me:secret@host"), "***@host");
    }
}
