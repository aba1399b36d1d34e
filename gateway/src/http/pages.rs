//! The gateway's own pages: `/healthz`, `/readyz`, `/metrics`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;

use crate::http::front::Front;

/// Alive: it answers.
pub async fn healthz() -> &'static str {
    "ok\n"
}

/// Ready, or all that is missing, one a line.
pub async fn readyz(State(front): State<Arc<Front>>) -> (StatusCode, String) {
    let missing = front.missing();
    match missing.is_empty() {
        true => (StatusCode::OK, "ready\n".to_owned()),
        false => (StatusCode::SERVICE_UNAVAILABLE, missing.join("\n") + "\n"),
    }
}

/// The numbers.
pub async fn metrics(State(front): State<Arc<Front>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], front.metrics.text(&front))
}
