//! The operator's own pages: `/metrics`, `/healthz` and `/readyz`.
//!
//! Ready means that it could take over: a candidate without the Lease is ready too, so that a rollout of two
//! operators ends. Alive means that the process answers; a holder that cannot renew ends itself.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;

use millrace_queue::link::Link;

use crate::metrics::OperatorMetrics;

/// Where the pages find the connection to the broker, once it is made. Cheap to clone.
pub type BrokerPlace = Arc<OnceLock<Link>>;

/// Binds the address and answers until the process ends. Returns the address bound.
///
/// # Errors
/// When the address cannot be bound.
pub async fn listen(
    address: SocketAddr,
    metrics: Arc<OperatorMetrics>,
    broker: BrokerPlace,
) -> std::io::Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    let pages = Router::new()
        .route("/metrics", get(page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(move || async move { readyz(broker.get()) }))
        .with_state(metrics);
    tokio::spawn(async move { axum::serve(listener, pages).await });
    Ok(bound)
}

/// Ready, or why the broker does not let this operator in. One that is only away says nothing of the operator.
fn readyz(link: Option<&Link>) -> (StatusCode, String) {
    match link.and_then(Link::refusal) {
        Some(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("the broker refuses the login: {reason}\n"))
        }
        None => (StatusCode::OK, "ready\n".to_owned()),
    }
}

async fn page(State(metrics): State<Arc<OperatorMetrics>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.text())
}
