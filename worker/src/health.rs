//! The worker's own pages: `/metrics`, `/healthz` and `/readyz`.
//!
//! Alive means that the engine does not hang. Ready means all of: weights loaded, warm-up done, broker
//! connected, pulls answered, not draining. The answer to "not ready" says what is missing, and why.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;

use millrace_crds::load::ColdStart;
use millrace_engine::schedule::handle::EngineHandle;
use millrace_queue::broker::Broker;
use millrace_queue::delivery::PullTrouble;
use millrace_queue::link::Link;

use crate::metrics::WorkerMetrics;
use crate::watchdog::Watch;

/// What the pages show. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Health(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    metrics: Arc<WorkerMetrics>,
    watch: Watch,
    broker: OnceLock<Broker>,
    engine: OnceLock<EngineHandle>,
    model_digest: OnceLock<String>,
    cold_start: OnceLock<ColdStart>,
    draining: AtomicBool,
    waiting: Mutex<Option<String>>,
    trouble: PullTrouble,
}

impl Health {
    /// At the start, when nothing is ready.
    pub fn new(metrics: Arc<WorkerMetrics>, watch: Watch) -> Self {
        Self(Arc::new(Parts {
            metrics,
            watch,
            broker: OnceLock::new(),
            engine: OnceLock::new(),
            model_digest: OnceLock::new(),
            cold_start: OnceLock::new(),
            draining: AtomicBool::new(false),
            waiting: Mutex::default(),
            trouble: PullTrouble::default(),
        }))
    }

    /// Where the pulling side says why it cannot pull.
    pub fn pull_trouble(&self) -> PullTrouble {
        self.0.trouble.clone()
    }

    /// What the weights wait for, while they cannot be pulled.
    pub fn set_waiting(&self, reason: Option<String>) {
        *self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    /// The connection, from which "connected" is read.
    pub fn set_broker(&self, broker: Broker) {
        let _ = self.0.broker.set(broker);
    }

    /// The digest of the weights that are loaded.
    pub fn set_model_digest(&self, digest: String) {
        let _ = self.0.model_digest.set(digest);
    }

    /// The digest of the weights, once they are loaded.
    pub fn model_digest(&self) -> Option<String> {
        self.0.model_digest.get().cloned()
    }

    /// The weights are loaded.
    pub fn set_engine(&self, engine: EngineHandle) {
        self.0.metrics.loaded(engine.limits());
        let _ = self.0.engine.set(engine);
    }

    /// The engine, once it is loaded.
    pub fn engine(&self) -> Option<&EngineHandle> {
        self.0.engine.get()
    }

    /// The warm-up step was through, and so the start is over.
    pub fn set_warm(&self, cold_start: ColdStart) {
        self.0.metrics.started(&cold_start);
        let _ = self.0.cold_start.set(cold_start);
    }

    /// How long the start took, once it is over.
    pub fn cold_start(&self) -> Option<ColdStart> {
        self.0.cold_start.get().copied()
    }

    /// No more jobs are pulled.
    pub fn set_draining(&self) {
        self.0.draining.store(true, Ordering::Relaxed);
    }

    /// All that is missing until ready, each with its reason if it is known.
    pub fn missing(&self) -> Vec<String> {
        let parts = &self.0;
        let mut missing = Vec::new();
        if parts.draining.load(Ordering::Relaxed) {
            missing.push("draining".to_owned());
        }
        if parts.engine.get().is_none() {
            let waiting = parts.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let reason = waiting.as_deref().map_or(String::new(), |reason| format!(": {reason}"));
            missing.push(format!("the weights are not loaded{reason}"));
        } else if parts.cold_start.get().is_none() {
            missing.push("the warm-up step is not through".to_owned());
        }
        let link = parts.broker.get().map(Broker::link);
        if !link.is_some_and(Link::connected) {
            let reason = link.and_then(Link::trouble).map_or(String::new(), |reason| format!(": {reason}"));
            missing.push(format!("the broker is not connected{reason}"));
        } else if let Some(reason) = parts.trouble.get() {
            let denied = link.and_then(Link::denied).map_or(String::new(), |said| format!(" ({said})"));
            missing.push(format!("no job can be pulled: {reason}{denied}"));
        }
        if parts.watch.hung() {
            missing.push("the engine hangs".to_owned());
        }
        missing
    }

    /// Binds the address and answers until the process ends. Returns the address bound.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn listen(self, address: SocketAddr) -> std::io::Result<SocketAddr> {
        let listener = tokio::net::TcpListener::bind(address).await?;
        let bound = listener.local_addr()?;
        let pages = Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .with_state(self);
        tokio::spawn(async move { axum::serve(listener, pages).await });
        Ok(bound)
    }
}

async fn metrics(State(health): State<Health>) -> impl IntoResponse {
    let engine = health.0.engine.get();
    let text = health.0.metrics.text(engine.map(|engine| (engine.load(), engine.limits())));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

async fn healthz(State(health): State<Health>) -> (StatusCode, &'static str) {
    match health.0.watch.hung() {
        false => (StatusCode::OK, "ok\n"),
        true => (StatusCode::SERVICE_UNAVAILABLE, "the engine hangs\n"),
    }
}

async fn readyz(State(health): State<Health>) -> (StatusCode, String) {
    let missing = health.missing();
    match missing.is_empty() {
        true => (StatusCode::OK, "ready\n".to_owned()),
        false => (StatusCode::SERVICE_UNAVAILABLE, missing.join("\n") + "\n"),
    }
}

#[cfg(test)]
mod tests {
    use millrace_crds::names::ModelRef;

    use super::*;

    #[test]
    fn not_ready_says_what_is_missing() {
        let metrics = Arc::new(WorkerMetrics::new(&ModelRef::new("default", "m").unwrap()));
        let health = Health::new(metrics, Watch::default());
        let no_broker = "the broker is not connected";
        assert_eq!(health.missing(), ["the weights are not loaded", no_broker]);
        health.set_waiting(Some("s3://a/b: refused".into()));
        assert_eq!(health.missing(), ["the weights are not loaded: s3://a/b: refused", no_broker]);
        let limits = millrace_engine::schedule::handle::Limits {
            max_model_len: 8,
            max_sequences: 1,
            block_tokens: 4,
            kv_blocks: 4,
            vocabulary: 4,
        };
        let (engine, _inbox) = millrace_engine::schedule::handle::channel(limits);
        health.set_engine(engine);
        assert_eq!(health.missing(), ["the warm-up step is not through", no_broker]);
        let zero = ColdStart { connect_ms: 0.0, pull_ms: 0.0, load_ms: 0.0, warm_up_ms: 0.0, total_ms: 0.0 };
        health.set_warm(zero);
        assert_eq!(health.missing(), [no_broker]);
        health.set_draining();
        assert_eq!(health.missing(), ["draining", no_broker]);
    }
}
