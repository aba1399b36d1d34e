//! Outcomes whose body lies in an object store: sent on as they come, and held only where they must be read.

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use millrace_crds::result::OutputReference;

use crate::http::error::{ApiCode, ApiError};
use crate::http::front::Front;
use crate::outcome::CollectedOutcome;
use crate::store::ClaimedBody;

/// Largest body that is held whole, to be read.
const HELD_BYTES_MAX: u64 = 64 << 20;

fn unreadable(outcome: &CollectedOutcome, reason: &dyn std::fmt::Display) -> ApiError {
    tracing::error!(job = %outcome.job, %reason, "an outcome cannot be read");
    ApiError::new(ApiCode::OutcomeUnreadable, "the stored outcome cannot be read")
}

/// Fetches an outcome's body from wherever it is; it counts as held until its last user is gone.
///
/// # Errors
/// [`ApiCode::OutcomeUnreadable`], [`ApiCode::Overloaded`].
pub async fn fetch(front: &Front, outcome: &mut CollectedOutcome) -> Result<(), ApiError> {
    let Some(OutputReference { bytes, .. }) = outcome.reference() else { return Ok(()) };
    if bytes > HELD_BYTES_MAX {
        let message = format!(
            "the answer has {bytes} bytes; {HELD_BYTES_MAX} are allowed here: `millrace results --job {}` reads it",
            outcome.job
        );
        return Err(ApiError::new(ApiCode::OutcomeUnreadable, message));
    }
    let mut held = front.memory.nothing();
    held.grow(bytes as usize)?;
    match front.bodies.fetch(outcome).await {
        Ok(Ok(())) => {
            outcome.body = held.with(std::mem::take(&mut outcome.body));
            Ok(())
        }
        Ok(Err(reason)) => Err(unreadable(outcome, &reason)),
        Err(failure) => Err(unreadable(outcome, &failure)),
    }
}

/// A JSON answer of `before`, the outcome's body and `after`, as the body comes from the object store. A body that is
/// not what the outcome says of it breaks the answer off before its end.
///
/// # Errors
/// [`ApiCode::OutcomeUnreadable`].
pub async fn sent_on(
    front: &Front,
    outcome: &CollectedOutcome,
    reference: &OutputReference,
    (before, after): (String, &'static str),
) -> Result<Response, ApiError> {
    let opened = front.bodies.open(&outcome.job, reference).await;
    let claimed = opened.map_err(|failure| unreadable(outcome, &failure))?;
    let length = before.len() as u64 + reference.bytes + after.len() as u64;
    let headers =
        [(header::CONTENT_TYPE, "application/json".to_owned()), (header::CONTENT_LENGTH, length.to_string())];
    let pieces = futures::stream::unfold(Piece::Before(before, claimed, after), next);
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// Where such an answer is.
enum Piece {
    Before(String, ClaimedBody, &'static str),
    Body(ClaimedBody, &'static str),
    End,
}

async fn next(piece: Piece) -> Option<(Result<Bytes, std::io::Error>, Piece)> {
    match piece {
        Piece::Before(before, claimed, after) => Some((Ok(before.into()), Piece::Body(claimed, after))),
        Piece::Body(mut claimed, after) => match claimed.next().await {
            Ok(Some(bytes)) => Some((Ok(bytes), Piece::Body(claimed, after))),
            Ok(None) => Some((Ok(Bytes::from_static(after.as_bytes())), Piece::End)),
            Err(failure) => {
                tracing::error!(%failure, "an answer broke off");
                Some((Err(std::io::Error::other("the answer broke off")), Piece::End))
            }
        },
        Piece::End => None,
    }
}
