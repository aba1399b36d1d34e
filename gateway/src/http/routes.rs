//! The paths, and what happens around every request: an id, a line in the log, a count.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde_json::{Value, json};
use tower_http::catch_panic::CatchPanicLayer;

use crate::http::caller::RequestContext;
use crate::http::error::{ApiCode, ApiError};
use crate::http::front::{self, Front};
use crate::http::keys::Verb;
use crate::http::{caller, inference, jobs, pages};

/// The header with the request's id, which is the id of its job.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The status that stands in the audit, the log and the metrics where the client left before its answer's head,
/// or the drain was over.
const CLIENT_LEFT: u16 = 499;

/// All paths of a gateway.
pub fn router(front: Arc<Front>) -> Router {
    let api = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(inference::chat))
        .route("/v1/completions", post(inference::completions))
        .route("/v1/jobs", post(jobs::submit))
        .route("/v1/jobs/{id}", get(jobs::look))
        .route("/v1/jobs/{id}/cancel", post(jobs::cancel));
    let pages = Router::new()
        .route("/healthz", get(pages::healthz))
        .route("/readyz", get(pages::readyz))
        .route("/metrics", get(pages::metrics));
    api.fallback(unknown)
        .method_not_allowed_fallback(not_allowed)
        .layer(from_fn_with_state(front.clone(), caller::authenticate))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(front.clone(), observe))
        .merge(pages)
        .with_state(front)
}

/// `GET /v1/models`
async fn models(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
) -> Result<Json<Value>, ApiError> {
    let caller = context.caller()?;
    caller.may(Verb::Models)?;
    let models = front.catalog.list().await?;
    let seen = models.iter().filter(|listed| caller.scopes.allow_model(&listed.model));
    let data: Vec<Value> = seen.map(|listed| front.catalog.object_of(listed)).collect();
    Ok(Json(json!({"object": "list", "data": data, "has_more": false})))
}

/// `GET /v1/models/{id}`; a slash in the id may be written as it is or as `%2F`.
async fn model(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let caller = context.caller()?;
    caller.may(Verb::Models)?;
    let listed = front.catalog.find(&id, &caller.scopes).await?;
    Ok(Json(front.catalog.object_of(&listed)))
}

async fn unknown(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    ApiError::new(ApiCode::UnknownUrl, format!("there is no {path}"))
}

async fn not_allowed(request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    ApiError::new(ApiCode::MethodNotAllowed, format!("{path} does not take {method}"))
}

/// The panic's message may quote what it failed on, so it is not told.
fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    tracing::error!("the handling of a request panicked");
    ApiError::new(ApiCode::Internal, "the gateway failed on this request").into_response()
}

/// What is written down of a request, once: when it is answered, or when it is dropped before that.
struct Observation {
    front: Arc<Front>,
    context: Arc<RequestContext>,
    began: Instant,
    method: Method,
    path: String,
    status: u16,
}

impl Drop for Observation {
    fn drop(&mut self) {
        let Self { front, context, began, method, path, status } = &*self;
        let (status, seconds) = (*status, began.elapsed().as_secs_f64());
        front.metrics.answered(path, status, seconds);
        front.audit.write(context, method.as_str(), path, status);
        let said = if status == CLIENT_LEFT { "left without an answer" } else { "answered" };
        tracing::info!(request = %context.id, %method, path, status, seconds, "{said}");
    }
}

async fn observe(State(front): State<Arc<Front>>, mut request: Request, next: Next) -> Response {
    let context = RequestContext::new(front::request_id());
    let matched = request.extensions().get::<MatchedPath>();
    let mut observation = Observation {
        front,
        context: context.clone(),
        began: Instant::now(),
        method: request.method().clone(),
        path: matched.map_or("other", MatchedPath::as_str).to_owned(),
        status: CLIENT_LEFT,
    };
    request.extensions_mut().insert(context.clone());
    let mut response = next.run(request).await;
    observation.status = response.status().as_u16();
    if let Ok(value) = HeaderValue::from_str(context.id.as_str()) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    context.write(response.headers_mut());
    response
}
