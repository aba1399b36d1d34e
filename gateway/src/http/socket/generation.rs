//! One generation on a socket: its text waits for room on the connection, and for its client to want it.
//!
//! Each has a task and a bounded buffer of its own, and all take turns for the connection: one that its client does not
//! take stalls no other.

use std::sync::Arc;

use axum::extract::ws::Message;
use futures::StreamExt;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::http::awaited::answer_of;
use crate::http::error::ApiError;
use crate::http::followed::FollowedJob;
use crate::http::front::Front;
use crate::http::jobs::{self, JobName};
use crate::http::socket::protocol;
use crate::http::texts::JobTexts;
use crate::live::delta_of;
use crate::outcome::CollectedOutcome;

/// What a client says of a generation that runs.
#[derive(Debug)]
pub enum GenerationCommand {
    /// It takes so many more messages.
    More(u32),
    /// It wants no more of it.
    Cancel,
}

/// A generation.
#[derive(Debug)]
pub struct SocketGeneration {
    /// What all share.
    pub front: Arc<Front>,
    /// The client's id of it.
    pub id: String,
    /// Its job's name.
    pub name: JobName,
    /// Its job.
    pub job: FollowedJob,
    /// Its text.
    pub texts: JobTexts,
    /// Messages that it may send before the client asks for more; `None` is any number.
    pub window: Option<u32>,
    /// Its place among the requests that run.
    pub place: OwnedSemaphorePermit,
}

impl SocketGeneration {
    /// Sends what there is until the outcome was sent, or the connection has ended. A job that does not run in the
    /// background is cancelled when this is dropped before.
    pub async fn run(self, client: mpsc::Sender<Message>, mut commands: mpsc::Receiver<GenerationCommand>) {
        let Self { front, id, name, job, mut texts, mut window, place } = self;
        let FollowedJob { mut source, mut deltas } = job;
        let outcome = source.outcome();
        tokio::pin!(outcome);
        let (mut listening, mut hearing) = (true, true);
        let mut last: Option<String> = None;
        loop {
            let open = window != Some(0);
            let ready = open && (texts.is_waiting() || last.is_some());
            tokio::select! {
                permit = client.reserve(), if ready => {
                    let Ok(permit) = permit else { return };
                    window = window.map(|left| left - 1);
                    match texts.pop() {
                        Some(piece) => permit.send(Message::text(protocol::delta(&id, &piece))),
                        None => {
                            permit.send(Message::text(last.take().unwrap_or_default()));
                            break;
                        }
                    }
                }
                command = commands.recv(), if hearing => match command {
                    Some(GenerationCommand::More(count)) => window = window.map(|left| left.saturating_add(count)),
                    Some(GenerationCommand::Cancel) => {
                        if let Err(error) = jobs::mark(&front, &name).await {
                            tracing::warn!(job = %name.job, error = %error.message, "a generation was not cancelled");
                        }
                    }
                    None => hearing = false,
                },
                message = deltas.next(), if listening && last.is_none() => {
                    listening = message.is_some();
                    if let Some((attempt, delta)) = message.as_ref().and_then(delta_of) {
                        texts.take(attempt, delta);
                    }
                }
                outcome = &mut outcome, if last.is_none() => {
                    last = Some(end(&id, &mut texts, outcome));
                    if texts.healed {
                        front.metrics.healed.inc();
                    }
                }
            }
        }
        drop(place);
    }
}

/// The last message of a generation; what is missing of its text waits before it.
fn end(id: &str, texts: &mut JobTexts, outcome: Result<CollectedOutcome, ApiError>) -> String {
    let ended = outcome.and_then(|outcome| {
        if let Ok((_, body)) = answer_of(&outcome)
            && let Ok(answer) = serde_json::from_slice::<Value>(&body)
        {
            texts.end(&answer)?;
        }
        Ok(outcome)
    });
    match ended {
        Ok(outcome) => protocol::done(id, String::from_utf8_lossy(outcome.body.trim_ascii()).as_ref()),
        Err(error) => protocol::error(Some(id), &error),
    }
}
