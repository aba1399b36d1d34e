//! The gateway's own pages: `/healthz`, `/readyz`, `/metrics`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;

use crate::http::front::Front;

/// Alive: it answers
#[utoipa::path(get, path = "/healthz", tag = "Gateway",
    responses((status = 200, description = "It is", body = String, content_type = "text/plain")))]
pub async fn healthz() -> &'static str {
    "ok\n"
}

/// Ready, or all that is missing, one a line
#[utoipa::path(get, path = "/readyz", tag = "Gateway", responses(
    (status = 200, description = "It is", body = String, content_type = "text/plain"),
    (status = 503, description = "What is missing", body = String, content_type = "text/plain")))]
pub async fn readyz(State(front): State<Arc<Front>>) -> (StatusCode, String) {
    let missing = front.missing();
    match missing.is_empty() {
        true => (StatusCode::OK, "ready\n".to_owned()),
        false => (StatusCode::SERVICE_UNAVAILABLE, missing.join("\n") + "\n"),
    }
}

/// The metrics in Prometheus's text form
#[utoipa::path(get, path = "/metrics", tag = "Gateway",
    responses((status = 200, description = "The page", body = String, content_type = "text/plain")))]
pub async fn metrics(State(front): State<Arc<Front>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], front.metrics.text(&front))
}
