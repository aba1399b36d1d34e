//! Outcomes whose body lies in an object store: sent on as they come, and held only where they must be read.

use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, Bytes, BytesMut};
use millrace_crds::result::{OutcomeKind, OutputReference};
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;

use crate::http::awaited::AwaitedJob;
use crate::http::error::{ApiCode, ApiError};
use crate::http::front::Front;
use crate::http::limits::window::Amounts;
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
    // On the heap only where it is needed: the object store's client would make each waiting request large.
    match Box::pin(front.bodies.fetch(outcome)).await {
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
    let opened = Box::pin(front.bodies.open(&outcome.job, reference)).await;
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

/// What a worker writes before an answer's status, and before and after its bytes.
const STATUS: &str = "\"response\":{\"status_code\":";
const BODY: &str = ",\"body\":";
const END: &[u8] = b"},\"error\":null}";
/// Of a line this much is looked at for the beginning of its answer.
const HEAD_BYTES_MAX: usize = 4 << 10;
/// The end of a line that is held back: more than comes after an answer, and room for its usage.
const TAIL_BYTES: usize = 4 << 10;

/// A line with one answer, of which the bytes before the answer were read.
#[derive(Debug)]
pub struct ClaimedLine {
    claimed: ClaimedBody,
    status: u16,
    /// Bytes that came and were not sent yet.
    tail: BytesMut,
    job: Option<(AwaitedJob, OwnedSemaphorePermit)>,
}

/// Status and place of an answer in a line that begins so.
fn begin_of(head: &[u8]) -> Option<(u16, usize)> {
    let text = std::str::from_utf8(&head[..head.len().min(HEAD_BYTES_MAX)]).ok()?;
    let at = text.find(STATUS)? + STATUS.len();
    let digits = text[at..].find(|c: char| !c.is_ascii_digit())?;
    let status = text[at..at + digits].parse().ok()?;
    let body = at + text[at..].find(BODY)? + BODY.len();
    Some((status, body))
}

/// The usage that stands at the end of an answer.
fn usage_of(tail: &[u8]) -> Option<Amounts> {
    const NAME: &[u8] = b"\"usage\":";
    let at = tail.windows(NAME.len()).rposition(|window| window == NAME)? + NAME.len();
    let usage: Value = serde_json::Deserializer::from_slice(&tail[at..]).into_iter().next()?.ok()?;
    Some([1, usage["prompt_tokens"].as_u64()?, usage["completion_tokens"].as_u64()?])
}

impl ClaimedLine {
    /// Opens the line of an outcome; `None` where it is none with an answer, or is written in another way.
    ///
    /// # Errors
    /// [`ApiCode::OutcomeUnreadable`].
    pub async fn open(
        front: &Front,
        outcome: &CollectedOutcome,
        reference: &OutputReference,
    ) -> Result<Option<Self>, ApiError> {
        if outcome.kind != OutcomeKind::Completed {
            return Ok(None);
        }
        let broken = |failure| unreadable(outcome, &failure);
        let mut claimed = Box::pin(front.bodies.open(&outcome.job, reference)).await.map_err(broken)?;
        let mut tail = BytesMut::new();
        while tail.len() < HEAD_BYTES_MAX
            && let Some(piece) = claimed.next().await.map_err(broken)?
        {
            tail.extend_from_slice(&piece);
        }
        let Some((status, begin)) = begin_of(&tail) else { return Ok(None) };
        tail.advance(begin);
        Ok(Some(Self { claimed, status, tail, job: None }))
    }

    /// Sends the answer on; its request runs until then.
    pub fn send(mut self, job: AwaitedJob, place: OwnedSemaphorePermit) -> Response {
        self.job = Some((job, place));
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::OK);
        let pieces = futures::stream::unfold(Some(self), |line| async { line?.next().await });
        (status, [(header::CONTENT_TYPE, "application/json")], Body::from_stream(pieces)).into_response()
    }

    async fn next(mut self) -> Option<(Result<Bytes, std::io::Error>, Option<Self>)> {
        loop {
            if self.tail.len() > 2 * TAIL_BYTES {
                let bytes = self.tail.split_to(self.tail.len() - TAIL_BYTES).freeze();
                return Some((Ok(bytes), Some(self)));
            }
            let reason = match self.claimed.next().await {
                Ok(Some(piece)) => {
                    self.tail.extend_from_slice(&piece);
                    continue;
                }
                Ok(None) => match self.tail.trim_ascii_end().strip_suffix(END) {
                    Some(last) => {
                        if let (Some((job, _)), Some(usage)) = (&mut self.job, usage_of(last)) {
                            job.settle(usage);
                        }
                        return Some((Ok(Bytes::copy_from_slice(last)), None));
                    }
                    None => "it does not end as a line does".to_owned(),
                },
                Err(failure) => failure.to_string(),
            };
            tracing::error!(%reason, "an answer broke off");
            return Some((Err(std::io::Error::other("the answer broke off")), None));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_lies_in_its_line() {
        let answer =
            r#"{"choices":[{"text":"\"body\":"}],"usage":{"prompt_tokens":5,"completion_tokens":9}}"#;
        let line = format!(
            r#"{{"id":"j","custom_id":"j",{STATUS}200,"request_id":"j"{BODY}{answer}}},"error":null}}"#
        );
        let (status, begin) = begin_of(line.as_bytes()).unwrap();
        let rest = line.as_bytes()[begin..].strip_suffix(END).unwrap();
        assert_eq!((status, rest), (200, answer.as_bytes()));
        assert_eq!(usage_of(rest), Some([1, 5, 9]));
        let refused =
            r#"{"id":"j","custom_id":"j","response":null,"error":{"code":"CANCELLED","message":""}}"#;
        assert_eq!(begin_of(refused.as_bytes()), None);
        assert_eq!((begin_of(b""), usage_of(b"{}")), (None, None));
    }
}
