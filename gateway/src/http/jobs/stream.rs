//! `/v1/jobs/{id}/stream`: a job while it is worked on, in events of our own.
//!
//! `delta` events carry text, their ids the places behind it, so that `Last-Event-ID` says where to go on; `outcome`
//! carries the job with its stored outcome and is the last.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use bytes::Bytes;
use millrace_crds::tokens::TokenDelta;
use serde_json::{Value, json};

use crate::http::awaited::answer_of;
use crate::http::caller::RequestContext;
use crate::http::error::{ApiCode, ApiError};
use crate::http::followed::{FollowWriter, FollowedJob};
use crate::http::front::Front;
use crate::http::inference::text;
use crate::http::jobs::{self, JobName};
use crate::http::keys::Verb;
use crate::http::texts::{JobTexts, places_of, places_text};
use crate::outcome::CollectedOutcome;

/// The header of a client that comes back.
const LAST_EVENT_ID: &str = "last-event-id";

/// Streams a job: its text as it comes, and its outcome
///
/// Events are `delta`, whose ids are places in the text, and at the end `outcome`, or `error`.
#[utoipa::path(get, path = "/v1/jobs/{id}/stream", tag = "Jobs",
    params(("id" = String, Path, description = "The job's id"),
        ("Last-Event-ID" = Option<String>, Header, pattern = "^[0-9]{1,9}$",
            description = "The id of the last event that the client has")),
    responses((status = 200, description = "The events", body = String, content_type = "text/event-stream")))]
pub async fn stream(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let place = front.admit()?;
    let places = match text(&headers, LAST_EVENT_ID)? {
        None | Some("") => Vec::new(),
        Some(id) => places_of(id).ok_or_else(|| {
            let shown: String = id.chars().take(80).collect();
            ApiError::of(ApiCode::InvalidParameter, LAST_EVENT_ID, format_args!("{shown:?} is no event's id"))
        })?,
    };
    let name = jobs::named(&front, &context, &id, Verb::Jobs).await?;
    let job = FollowedJob::find(&front, name.clone()).await?;
    // One that was never there has its own status, and no stream.
    jobs::state_of(&front, &name).await?;
    let texts = JobTexts::new(jobs::choices_of(&front, &name).await?, &places);
    job.respond(&front, JobEvents { front: front.clone(), name, texts }, false, place).await
}

struct JobEvents {
    front: Arc<Front>,
    name: JobName,
    texts: JobTexts,
}

impl JobEvents {
    fn waiting(&mut self) -> Vec<Bytes> {
        let mut lines = Vec::new();
        while let Some(piece) = self.texts.pop() {
            let id = places_text(&self.texts.places());
            let data = json!({"index": piece.index, "text": piece.text});
            lines.push(format!("id: {id}\nevent: delta\ndata: {data}\n\n").into());
        }
        lines
    }
}

impl FollowWriter for JobEvents {
    fn open(&mut self) -> Vec<Bytes> {
        Vec::new()
    }

    fn take(&mut self, attempt: u64, delta: TokenDelta) -> Vec<Bytes> {
        self.texts.take(attempt, delta);
        self.waiting()
    }

    fn end(&mut self, outcome: Result<CollectedOutcome, ApiError>) -> (Vec<Bytes>, bool) {
        let ended = outcome.and_then(|outcome| {
            if let Ok((_, body)) = answer_of(&outcome)
                && let Ok(answer) = serde_json::from_slice::<Value>(&body)
            {
                self.texts.end(&answer)?;
            }
            let job = jobs::object(&self.front, &self.name, Some(&outcome))?;
            Ok(serde_json::to_string(&job).expect("our own types are JSON"))
        });
        let mut lines = self.waiting();
        lines.push(match ended {
            Ok(job) => format!("event: outcome\ndata: {job}\n\n").into(),
            Err(error) => format!("event: error\ndata: {}\n\n", error.body()).into(),
        });
        (lines, self.texts.healed)
    }
}
