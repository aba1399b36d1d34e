//! The paths, and what happens around every request: an id, a line in the log, a count.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router};
use serde_json::{Value, json};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::caller::RequestContext;
use crate::http::document::{self, Document};
use crate::http::error::{ApiCode, ApiError};
use crate::http::front::{self, Front};
use crate::http::keys::Verb;
use crate::http::{batches, caller, cors, files, inference, jobs, pages, responses, socket};

/// The header with the request's id, which is the id of its job.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The status that stands in the audit, the log and the metrics where the client left before its answer's head,
/// or the drain was over.
const CLIENT_LEFT: u16 = 499;

/// The paths of the API, and those of the gateway's own pages with the descriptions of all. A path is registered
/// together with its description, so that none lacks one.
pub fn paths() -> (Router<Arc<Front>>, OpenApiRouter<Arc<Front>>) {
    let api = OpenApiRouter::with_openapi(document::about())
        .routes(routes!(models))
        .routes(routes!(model))
        .routes(routes!(inference::chat))
        .routes(routes!(inference::completions))
        .routes(routes!(responses::create))
        .routes(routes!(responses::retrieve, responses::delete))
        .routes(routes!(responses::cancel))
        .routes(routes!(responses::input_items))
        .routes(routes!(jobs::submit))
        .routes(routes!(jobs::look))
        .routes(routes!(jobs::cancel))
        .routes(routes!(jobs::stream::stream))
        .routes(routes!(jobs::dead::list))
        .routes(routes!(jobs::dead::requeue))
        .routes(routes!(socket::open))
        .merge(files::routes())
        .merge(batches::routes());
    let pages = OpenApiRouter::new()
        .routes(routes!(pages::healthz))
        .routes(routes!(pages::readyz))
        .routes(routes!(pages::metrics))
        .routes(routes!(document::openapi))
        .routes(routes!(document::docs));
    let (api, described) = api.split_for_parts();
    (api, OpenApiRouter::with_openapi(described).merge(pages))
}

/// All paths of a gateway, with what happens around every request.
pub fn router(front: Arc<Front>) -> Router {
    let (api, pages) = paths();
    let (pages, described) = pages.split_for_parts();
    let pages = pages.layer(Extension(Arc::new(Document::new(&described))));
    let cors = cors::layer(&front.args.cors_origin).ok().flatten();
    let routes = api
        .fallback(unknown)
        .method_not_allowed_fallback(not_allowed)
        .layer(from_fn_with_state(front.clone(), caller::authenticate))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(front.clone(), observe))
        .merge(pages)
        .with_state(front);
    match cors {
        Some(cors) => routes.layer(cors),
        None => routes,
    }
}

/// The models that have a queue
#[utoipa::path(get, path = "/v1/models", tag = "Models",
    responses((status = 200, description = "All of them", body = ref("#/components/schemas/ModelList"))))]
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

/// One model
///
/// A slash in the id may be written as it is or as `%2F`.
#[utoipa::path(get, path = "/v1/models/{*id}", tag = "Models",
    params(("id" = String, Path, description = "`model` or `namespace/model`")),
    responses((status = 200, description = "The model", body = ref("#/components/schemas/Model"))))]
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
