//! The worker's own pages: `/metrics`, `/healthz` and `/readyz`.
//!
//! Alive means that the engine does not hang. Ready means all of: weights loaded, warm-up done, broker
//! connected, not draining. The answer to "not ready" says which is missing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;

use millrace_crds::load::ColdStart;

use crate::broker::Broker;
use crate::engine::handle::EngineHandle;
use crate::metrics::Metrics;
use crate::watchdog::Watch;

/// What the pages show. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Health(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    metrics: Arc<Metrics>,
    watch: Watch,
    broker: OnceLock<Broker>,
    engine: OnceLock<EngineHandle>,
    cold_start: OnceLock<ColdStart>,
    draining: AtomicBool,
}

impl Health {
    /// At the start, when nothing is ready.
    pub fn new(metrics: Arc<Metrics>, watch: Watch) -> Self {
        Self(Arc::new(Parts {
            metrics,
            watch,
            broker: OnceLock::new(),
            engine: OnceLock::new(),
            cold_start: OnceLock::new(),
            draining: AtomicBool::new(false),
        }))
    }

    /// The connection, from which "connected" is read.
    pub fn set_broker(&self, broker: Broker) {
        let _ = self.0.broker.set(broker);
    }

    /// The weights are loaded.
    pub fn set_engine(&self, engine: EngineHandle) {
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

    /// What is missing until ready.
    pub fn missing(&self) -> Option<&'static str> {
        let parts = &self.0;
        if parts.draining.load(Ordering::Relaxed) {
            return Some("draining");
        }
        if parts.engine.get().is_none() {
            return Some("weights are not loaded");
        }
        if parts.cold_start.get().is_none() {
            return Some("the warm-up step is not through");
        }
        if !parts.broker.get().is_some_and(Broker::connected) {
            return Some("the broker is not connected");
        }
        parts.watch.hung().then_some("the engine hangs")
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
    match health.missing() {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

#[cfg(test)]
mod tests {
    use millrace_crds::names::ModelRef;

    use super::*;

    #[test]
    fn not_ready_says_what_is_missing() {
        let metrics = Arc::new(Metrics::new(&ModelRef::new("default", "m").unwrap()));
        let health = Health::new(metrics, Watch::default());
        assert_eq!(health.missing(), Some("weights are not loaded"));
        let limits = crate::engine::handle::Limits {
            max_model_len: 8,
            max_sequences: 1,
            block_tokens: 4,
            kv_blocks: 4,
            vocabulary: 4,
        };
        let (engine, _inbox) = crate::engine::handle::channel(limits);
        health.set_engine(engine);
        assert_eq!(health.missing(), Some("the warm-up step is not through"));
        let zero = ColdStart { connect_ms: 0.0, pull_ms: 0.0, load_ms: 0.0, warm_up_ms: 0.0, total_ms: 0.0 };
        health.set_warm(zero);
        assert_eq!(health.missing(), Some("the broker is not connected"));
        health.set_draining();
        assert_eq!(health.missing(), Some("draining"));
    }
}
