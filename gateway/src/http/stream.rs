//! An answer while it is made: token deltas become chunks, and the stored outcome ends them.
//!
//! Deltas are best effort; what is lost is in the outcome, so that the chunks together always are the stored answer. A
//! client takes the end of a body for the end of an answer, so a stream that cannot be finished is broken off in the
//! middle of its transfer, never ended.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::http::awaited::{AwaitedJob, JobOrder, answer_of};
use crate::http::chunk::{ChunkForm, ChunkWriter, DONE, PING, event};
use crate::http::error::{ApiCode, ApiError};
use crate::http::front::Front;
use crate::live::delta_of;
use crate::outcome::CollectedOutcome;

/// How long the head of an answer waits for the first delta: a job that is refused soon gets its own status.
pub const HEAD_PATIENCE: Duration = Duration::from_secs(2);
/// Chunks that may wait for a slow client; deltas wait in the subscription then.
pub const CHUNKS_MAX: usize = 64;
/// How long a client may take none of them before it counts as one that left.
const CLIENT_PATIENCE: Duration = Duration::from_secs(60);

/// A piece of a body.
#[derive(Debug)]
pub enum Piece {
    /// Some of it.
    Bytes(Bytes),
    /// The answer is whole.
    End,
}

/// One stream.
struct Streaming {
    front: Arc<Front>,
    job: AwaitedJob,
    deltas: async_nats::Subscriber,
    writer: ChunkWriter,
    client: mpsc::Sender<Piece>,
    _place: OwnedSemaphorePermit,
}

/// The client has left.
#[derive(Debug)]
pub struct ClientLeft;

/// Publishes the job and streams its answer.
///
/// # Errors
/// What is known before the first delta, the job's refusal among it.
pub async fn respond(
    front: &Arc<Front>,
    order: JobOrder,
    (form, n): (ChunkForm, u32),
    place: OwnedSemaphorePermit,
) -> Result<Response, ApiError> {
    let broker = front.connection(&order.model);
    // Asked for on the same connection as the job, and before it: the broker knows of it first.
    let listening = broker.client.subscribe(order.model.tokens_subject(&order.id)).await;
    let mut deltas = listening.map_err(|error| {
        tracing::warn!(%error, "token deltas cannot be subscribed to");
        ApiError::new(ApiCode::BrokerUnavailable, "the broker does not answer")
    })?;
    let mut job = AwaitedJob::publish(front, order).await?;
    let mut writer = ChunkWriter::new(form, n);
    let mut first = Vec::new();
    let mut early = None;
    tokio::select! {
        biased;
        message = deltas.next() => {
            if let Some((attempt, delta)) = message.as_ref().and_then(delta_of) {
                first = writer.take(attempt, delta);
            }
        }
        outcome = job.outcome() => early = Some(answer(&outcome?)?),
        () = tokio::time::sleep(HEAD_PATIENCE) => {}
    }
    front.metrics.streams.inc();
    let (client, pieces) = mpsc::channel(CHUNKS_MAX);
    let streaming = Streaming { front: front.clone(), job, deltas, writer, client, _place: place };
    tokio::spawn(streaming.run(first, early));
    Ok(sse(pieces))
}

/// A stream as an answer.
pub fn sse(pieces: mpsc::Receiver<Piece>) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
        // A proxy that collects the answer would undo the streaming.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, body_of(pieces)).into_response()
}

/// A body that ends only where the answer does.
fn body_of(pieces: mpsc::Receiver<Piece>) -> Body {
    let next = |mut pieces: mpsc::Receiver<Piece>| async move {
        match pieces.recv().await {
            Some(Piece::Bytes(bytes)) => Some((Ok(bytes), pieces)),
            Some(Piece::End) => None,
            None => Some((Err(std::io::Error::other("the stream broke off")), pieces)),
        }
    };
    Body::from_stream(futures::stream::unfold(pieces, next))
}

fn answer(outcome: &CollectedOutcome) -> Result<Value, ApiError> {
    let (_, body) = answer_of(outcome)?;
    let unreadable = |_| ApiError::new(ApiCode::OutcomeUnreadable, "the stored answer is no JSON");
    serde_json::from_slice(&body).map_err(unreadable)
}

impl Streaming {
    /// Sends chunks until the outcome has come or the client has left; in the second case the job is cancelled as
    /// it is dropped.
    async fn run(mut self, first: Vec<Value>, early: Option<Value>) {
        let sent = async {
            self.send_all(&first).await?;
            let answer = match early {
                Some(answer) => Ok(answer),
                None => self.follow().await?,
            };
            self.end(answer).await
        };
        // Who has left is told nothing.
        let _ = sent.await;
    }

    /// Sends deltas until there is an outcome.
    async fn follow(&mut self) -> Result<Result<Value, ApiError>, ClientLeft> {
        let mut silence = tokio::time::interval(self.front.args.keep_alive.0);
        silence.reset();
        let mut listening = true;
        loop {
            let chunks = tokio::select! {
                biased;
                () = self.client.closed() => return Err(ClientLeft),
                message = self.deltas.next(), if listening => match message {
                    Some(message) => match delta_of(&message) {
                        Some((attempt, delta)) => self.writer.take(attempt, delta),
                        None => Vec::new(),
                    },
                    None => {
                        listening = false;
                        Vec::new()
                    }
                },
                outcome = self.job.outcome() => return Ok(outcome.and_then(|outcome| answer(&outcome))),
                _ = silence.tick() => {
                    self.send(PING).await?;
                    continue;
                }
            };
            if !chunks.is_empty() {
                self.send_all(&chunks).await?;
                silence.reset();
            }
        }
    }

    async fn end(&mut self, answer: Result<Value, ApiError>) -> Result<(), ClientLeft> {
        match answer.and_then(|answer| self.writer.end(&answer)) {
            Ok(end) => {
                if end.healed {
                    self.front.metrics.healed.inc();
                }
                self.send_all(&end.chunks).await?;
            }
            Err(error) => self.send(event(&error.body())).await?,
        }
        self.send(DONE).await?;
        offer(&self.client, Piece::End, CLIENT_PATIENCE).await
    }

    async fn send_all(&self, chunks: &[Value]) -> Result<(), ClientLeft> {
        for chunk in chunks {
            self.send(event(chunk)).await?;
        }
        Ok(())
    }

    async fn send(&self, bytes: Bytes) -> Result<(), ClientLeft> {
        offer(&self.client, Piece::Bytes(bytes), CLIENT_PATIENCE).await
    }
}

impl Piece {
    /// Waits for room for it.
    ///
    /// # Errors
    /// When the client has left, or takes nothing for a minute.
    pub async fn offer(self, client: &mpsc::Sender<Piece>) -> Result<(), ClientLeft> {
        offer(client, self, CLIENT_PATIENCE).await
    }
}

/// Waits for room for a piece. Who stops reading would otherwise keep its place for as long as it likes.
async fn offer(client: &mpsc::Sender<Piece>, piece: Piece, patience: Duration) -> Result<(), ClientLeft> {
    client.send_timeout(piece, patience).await.map_err(|_| ClientLeft)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_that_reads_nothing_has_left() {
        let patience = Duration::from_millis(20);
        let (client, mut pieces) = mpsc::channel(1);
        assert!(offer(&client, Piece::End, patience).await.is_ok(), "there is room");
        assert!(offer(&client, Piece::End, patience).await.is_err(), "nobody reads");
        assert!(pieces.recv().await.is_some());
        assert!(offer(&client, Piece::End, patience).await.is_ok(), "it reads again");
        drop(pieces);
        assert!(offer(&client, Piece::End, Duration::from_secs(600)).await.is_err(), "it left");
    }
}
