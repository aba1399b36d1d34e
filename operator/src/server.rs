//! The operator's own pages: `/metrics`, `/healthz` and `/readyz`.
//!
//! Ready means that it could take over: a candidate without the Lease is ready too, so that a rollout of two
//! operators ends. Alive means that the process answers; a holder that cannot renew ends itself.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;

use crate::metrics::OperatorMetrics;

/// Binds the address and answers until the process ends. Returns the address bound.
///
/// # Errors
/// When the address cannot be bound.
pub async fn listen(address: SocketAddr, metrics: Arc<OperatorMetrics>) -> std::io::Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    let pages = Router::new()
        .route("/metrics", get(page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ready\n" }))
        .with_state(metrics);
    tokio::spawn(async move { axum::serve(listener, pages).await });
    Ok(bound)
}

async fn page(State(metrics): State<Arc<OperatorMetrics>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.text())
}
