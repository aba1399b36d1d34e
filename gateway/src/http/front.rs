//! What all requests of a gateway share. None of it outlives the process, and none of it is missed by another one.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Client;
use async_nats::jetstream::Context;
use hex::ToHex;
use millrace_crds::names::{JobId, ModelRef};
use millrace_queue::link::{Link, redact};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connect::{self, Connection};
use crate::failure::Failure;
use crate::http::archive::Archive;
use crate::http::audit::AuditLog;
use crate::http::cache::AnswerCache;
use crate::http::catalog::Catalog;
use crate::http::connections::connections_max;
use crate::http::error::{ApiCode, ApiError};
use crate::http::fair::desk::FairDesk;
use crate::http::keys::KeyStore;
use crate::http::limits::RateLimits;
use crate::http::memory::MemoryBudget;
use crate::http::meters::GatewayMetrics;
use crate::http::options::GatewayArgs;
use crate::http::responses::records::ResponseRecords;
use crate::http::room::QueueRoom;
use crate::http::token::Provider;
use crate::http::waiting::Waiters;
use crate::plan::MESSAGE_BODY_BYTES_MAX;
use crate::store::Bodies;

/// Room for headers in a message, beside its body.
const HEADER_BYTES: usize = 8 << 10;
/// Largest body of one request; larger ones are refused by the workers too.
const REQUEST_BYTES_MAX: usize = 4 << 20;
/// Pause between two looks whether requests run.
const SETTLE_PAUSE: Duration = Duration::from_millis(10);
/// Bytes of a random id.
const ID_BYTES: usize = 16;

/// The shared state.
#[derive(Debug)]
pub struct Front {
    /// As it was started.
    pub args: GatewayArgs,
    /// The models.
    pub catalog: Catalog,
    /// The API keys.
    pub keys: KeyStore,
    /// Whose tokens are let in.
    pub provider: Option<Provider>,
    /// Who did what.
    pub audit: AuditLog,
    /// Who waits for an outcome.
    pub waiters: Arc<Waiters>,
    /// Bodies that are too large for a message.
    pub bodies: Bodies,
    /// How much keys and tenants may.
    pub limits: RateLimits,
    /// Which tenant's turn it is.
    pub fair: Arc<FairDesk>,
    /// Whether the queues have room.
    pub room: Arc<QueueRoom>,
    /// What was asked for as a response.
    pub responses: ResponseRecords,
    /// What was answered before.
    pub cache: AnswerCache,
    /// The bytes that may be held.
    pub memory: MemoryBudget,
    /// The places of connections.
    pub connection_places: Arc<Semaphore>,
    /// Files, uploads and batches.
    pub archive: Archive,
    /// What is counted.
    pub metrics: GatewayMetrics,
    /// Cancelled when the drain begins.
    pub draining: CancellationToken,
    /// Cancelled when the drain is over: what still runs is cut off.
    pub over: CancellationToken,
    /// The sockets that are open.
    pub sockets: TaskTracker,
    /// The cancelling of jobs that nobody waits for any more.
    pub cancels: TaskTracker,
    link: Link,
    client: Client,
    jetstream: Context,
    places: Arc<Semaphore>,
    connections_max: usize,
}

impl Front {
    /// Connects to the broker, which need not be there yet, and begins to hear outcomes.
    ///
    /// # Errors
    /// When an option is wrong.
    pub async fn connect(mut args: GatewayArgs) -> Result<Arc<Self>, Failure> {
        let connections_max = connections_max(args.bounds.connections_max)? as usize;
        args.broker.inbox_prefix = connect::gateway_inbox(&args.broker);
        let link = connect::connect_for_good(&args.broker, "millrace-gateway").await?;
        let (client, jetstream) = (link.client().clone(), connect::jetstream_of(&link));
        let gateway = random_id();
        let inbox = format!("{}.{gateway}", args.broker.inbox_prefix);
        let memory = MemoryBudget::new(args.bounds.memory_max.0);
        let waiters = Waiters::new(inbox, memory.clone());
        let replicas = usize::from(args.bounds.state_replicas);
        let limits = RateLimits::new(jetstream.clone(), (gateway.clone(), replicas), args.bounds.limits()?);
        let (fair, cache) =
            (FairDesk::new(client.clone(), gateway), AnswerCache::new(jetstream.clone(), replicas));
        let deaf = |error| Failure::Refused(format!("the broker cannot be subscribed to: {error}"));
        waiters.clone().listen(client.clone()).await.map_err(deaf)?;
        fair.clone().run().await.map_err(deaf)?;
        cache.listen(&client).await.map_err(deaf)?;
        let sweeping = link.clone();
        let connection = move |model| Connection::of(sweeping.clone(), model);
        tokio::spawn(waiters.clone().sweep(connection));
        Ok(Arc::new(Self {
            catalog: Catalog::new(jetstream.clone(), args.namespace()?),
            keys: KeyStore::new(jetstream.clone()),
            provider: Provider::new(&args.oidc)?,
            audit: AuditLog::open(args.audit.as_deref())?,
            waiters,
            limits,
            fair,
            room: QueueRoom::new(jetstream.clone()),
            responses: ResponseRecords::new(jetstream.clone(), replicas),
            cache,
            memory,
            connection_places: Arc::new(Semaphore::new(connections_max)),
            connections_max,
            archive: Archive::new(
                (link.clone(), jetstream.clone()),
                (&args.files, replicas),
                (args.object_store.as_deref(), args.store.config()),
            ),
            bodies: Bodies::new(args.store.config()),
            metrics: GatewayMetrics::new(),
            cancels: TaskTracker::new(),
            link,
            client,
            jetstream,
            places: Arc::new(Semaphore::new(args.bounds.requests_max as usize)),
            draining: CancellationToken::new(),
            over: CancellationToken::new(),
            sockets: TaskTracker::new(),
            args,
        }))
    }

    /// The broker, for one model.
    pub fn connection(&self, model: &ModelRef) -> Connection {
        let (client, jetstream) = (self.client.clone(), self.jetstream.clone());
        Connection { link: self.link.clone(), client, jetstream, model: model.clone() }
    }

    /// Waits until it is sure that the broker will not let this gateway in.
    pub async fn refused(&self) -> Failure {
        Failure::Unreachable {
            server: redact(&self.args.broker.server),
            reason: format!("it refuses the login: {}", self.link.refused().await),
        }
    }

    /// Largest body that a request may have, in bytes.
    pub fn body_bytes_max(&self) -> usize {
        if self.args.object_store.is_some() { REQUEST_BYTES_MAX } else { self.message_bytes_max() }
    }

    /// Largest body that goes into a message, in bytes.
    pub fn message_bytes_max(&self) -> usize {
        // Before the first connection the broker's limit is not known.
        match self.client.max_payload() {
            0 => MESSAGE_BODY_BYTES_MAX,
            limit => MESSAGE_BODY_BYTES_MAX.min(limit.saturating_sub(HEADER_BYTES)),
        }
    }

    /// A place for one request, held until it is answered.
    ///
    /// # Errors
    /// [`ApiCode::Overloaded`].
    pub fn admit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.places.clone().try_acquire_owned().map_err(|_| {
            let limit = self.args.bounds.requests_max;
            ApiError::new(ApiCode::Overloaded, format!("this gateway runs {limit} requests already"))
        })
    }

    /// Requests that run.
    pub fn running(&self) -> usize {
        self.args.bounds.requests_max as usize - self.places.available_permits()
    }

    /// Connections that are open.
    pub fn connections(&self) -> usize {
        self.connections_max - self.connection_places.available_permits()
    }

    /// Whether it takes no more requests.
    pub fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// From now on not ready.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// Waits until no request runs and all jobs that nobody waits for are cancelled.
    pub async fn settle(&self) {
        // A request gives its place back after its job.
        while self.running() > 0 {
            tokio::time::sleep(SETTLE_PAUSE).await;
        }
        self.cancels.close();
        self.cancels.wait().await;
    }

    /// All that is missing until ready.
    pub fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.draining.is_cancelled() {
            missing.push("draining".to_owned());
        }
        if !self.link.connected() {
            let reason = self.link.trouble().map_or(String::new(), |reason| format!(": {reason}"));
            missing.push(format!("the broker is not connected{reason}"));
        }
        if self.places.available_permits() == 0 {
            missing.push(format!("{} requests run, as many as may", self.args.bounds.requests_max));
        }
        if self.memory.is_short() {
            missing.push(format!("{} bytes are held, about as many as may", self.memory.held()));
        }
        missing
    }
}

/// 128 random bits in hex, from the system: nobody guesses one.
pub fn random_id() -> String {
    let mut bytes = [0; ID_BYTES];
    getrandom::fill(&mut bytes).expect("Linux has random bytes once it is up");
    bytes.encode_hex()
}

/// The id of a request, which is that of its job.
pub fn request_id() -> JobId {
    format!("req-{}", random_id()).parse().expect("hex makes an id")
}
