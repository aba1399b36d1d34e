//! A job that is followed: its deltas as they come, and its outcome, whoever published it.
//!
//! The outcome of somebody else's job is heard as it is stored, and looked up now and then for what was not heard. What
//! follows (a response, a job, a generation on a socket) says by [`FollowWriter`] what its client gets to see.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Message, Subscriber};
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt;
use millrace_crds::names::{JobId, ModelRef};
use millrace_crds::tokens::TokenDelta;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::http::awaited::{AwaitedJob, JobOrder, answer_of};
use crate::http::chunk::PING;
use crate::http::claimed;
use crate::http::error::{ApiCode, ApiError};
use crate::http::front::Front;
use crate::http::jobs::{self, JobName};
use crate::http::stream::{CHUNKS_MAX, ClientLeft, HEAD_PATIENCE, Piece, sse};
use crate::live::delta_of;
use crate::outcome::CollectedOutcome;

/// Pause between two looks for an outcome that was not heard.
const LOOK_PAUSE: Duration = Duration::from_secs(5);
/// How soon what was heard is stored; the pause doubles with each look.
const STORED_PAUSE: Duration = Duration::from_millis(2);
/// Looks for what was heard.
const STORED_LOOKS: u32 = 6;

/// Where the outcome comes from.
#[derive(Debug)]
pub enum OutcomeSource {
    /// This gateway published the job.
    Own(Box<AwaitedJob>),
    /// Somebody did.
    Other(OtherJob),
}

/// A job that somebody published.
#[derive(Debug)]
pub struct OtherJob {
    front: Arc<Front>,
    name: JobName,
    heard: Subscriber,
}

/// A followed job.
#[derive(Debug)]
pub struct FollowedJob {
    /// Its outcome.
    pub source: OutcomeSource,
    /// Its deltas.
    pub deltas: Subscriber,
}

/// What a client gets to see of a job that it follows.
pub trait FollowWriter: Send + 'static {
    /// What comes first.
    fn open(&mut self) -> Vec<Bytes>;
    /// Takes a delta; gives what it adds.
    fn take(&mut self, attempt: u64, delta: TokenDelta) -> Vec<Bytes>;
    /// Ends with the outcome; gives what is missing, and whether there was text among it.
    fn end(&mut self, outcome: Result<CollectedOutcome, ApiError>) -> (Vec<Bytes>, bool);
}

async fn listen(front: &Front, model: &ModelRef, subject: String) -> Result<Subscriber, ApiError> {
    front.connection(model).client.subscribe(subject).await.map_err(|error| {
        tracing::warn!(%error, "a job cannot be followed");
        ApiError::new(ApiCode::BrokerUnavailable, "the broker does not answer")
    })
}

impl FollowedJob {
    /// Publishes a job. Dropped before its outcome came, it is cancelled, unless it was let go.
    ///
    /// # Errors
    /// As [`AwaitedJob::publish`].
    pub async fn publish(front: &Arc<Front>, order: JobOrder) -> Result<Self, ApiError> {
        // Asked for on the same connection as the job, and before it: the broker knows of it first.
        let deltas = listen(front, &order.model, order.model.tokens_subject(&order.id)).await?;
        let job = AwaitedJob::publish(front, order).await?;
        Ok(Self { source: OutcomeSource::Own(Box::new(job)), deltas })
    }

    /// Follows a job that is there.
    ///
    /// # Errors
    /// [`ApiCode::BrokerUnavailable`].
    pub async fn find(front: &Arc<Front>, name: JobName) -> Result<Self, ApiError> {
        let (model, job): (&ModelRef, &JobId) = (&name.model, &name.job);
        let deltas = listen(front, model, model.tokens_subject(job)).await?;
        let heard = listen(front, model, model.result_subject(job)).await?;
        Ok(Self { deltas, source: OutcomeSource::Other(OtherJob { front: front.clone(), name, heard }) })
    }

    /// From now on the job runs, whatever becomes of its client.
    pub fn let_go(&mut self) {
        if let OutcomeSource::Own(job) = &mut self.source {
            job.let_go();
        }
    }

    /// Streams a job as an answer.
    ///
    /// With `refusable` the head waits a little for the first delta: a job that is refused soon has its own status.
    ///
    /// # Errors
    /// What the outcome says, if it came before.
    pub async fn respond(
        mut self,
        front: &Arc<Front>,
        mut writer: impl FollowWriter,
        refusable: bool,
        place: OwnedSemaphorePermit,
    ) -> Result<Response, ApiError> {
        let mut first = writer.open();
        let mut early = None;
        if refusable {
            tokio::select! {
                biased;
                message = self.deltas.next() => first.extend(taken(&mut writer, message)),
                outcome = self.source.outcome() => early = Some(outcome.and_then(|outcome| {
                    answer_of(&outcome).map(|_| outcome)
                })?),
                () = tokio::time::sleep(HEAD_PATIENCE) => {}
            }
        }
        front.metrics.streams.inc();
        let (client, pieces) = mpsc::channel(CHUNKS_MAX);
        let following = Following { front: front.clone(), job: self, writer, client, _place: place };
        tokio::spawn(following.run(first, early));
        Ok(sse(pieces))
    }
}

fn taken(writer: &mut impl FollowWriter, message: Option<Message>) -> Vec<Bytes> {
    let delta = message.as_ref().and_then(delta_of);
    delta.map(|(attempt, delta)| writer.take(attempt, delta)).unwrap_or_default()
}

impl OutcomeSource {
    /// The job's place in its queue.
    pub fn sequence(&self) -> u64 {
        match self {
            OutcomeSource::Own(job) => job.sequence,
            OutcomeSource::Other(job) => job.name.sequence,
        }
    }

    /// The outcome, with its body. The call may be given up and made again.
    ///
    /// # Errors
    /// [`ApiCode::JobNotFound`], [`ApiCode::OutcomeUnreadable`]; a deadline exceeded when none came in time.
    pub async fn outcome(&mut self) -> Result<CollectedOutcome, ApiError> {
        match self {
            OutcomeSource::Own(job) => job.outcome().await,
            OutcomeSource::Other(job) => job.outcome().await,
        }
    }
}

impl OtherJob {
    async fn outcome(&mut self) -> Result<CollectedOutcome, ApiError> {
        loop {
            match jobs::state_of(&self.front, &self.name).await {
                Ok(None) => {}
                Ok(Some(outcome)) => return self.whole(outcome).await,
                // The broker comes back; until then the client is kept waiting.
                Err(error) if error.code == ApiCode::BrokerUnavailable => {}
                Err(error) => return Err(error),
            }
            match tokio::time::timeout(LOOK_PAUSE, self.heard.next()).await {
                Err(_) => continue,
                Ok(None) => tokio::time::sleep(LOOK_PAUSE).await,
                // Heard is not yet stored, and a second attempt's outcome never is.
                Ok(Some(_)) => {
                    for look in 0..STORED_LOOKS {
                        tokio::time::sleep(STORED_PAUSE * 2_u32.pow(look)).await;
                        if let Ok(Some(outcome)) = jobs::stored(&self.front, &self.name).await {
                            return self.whole(outcome).await;
                        }
                    }
                }
            }
        }
    }

    async fn whole(&self, mut outcome: CollectedOutcome) -> Result<CollectedOutcome, ApiError> {
        claimed::fetch(&self.front, &mut outcome).await?;
        Ok(outcome)
    }
}

/// A job on its way to a client.
struct Following<W> {
    front: Arc<Front>,
    job: FollowedJob,
    writer: W,
    client: mpsc::Sender<Piece>,
    _place: OwnedSemaphorePermit,
}

impl<W: FollowWriter> Following<W> {
    /// Sends until the outcome has come or the client has left. A job that was not let go is cancelled then, as it is
    /// dropped.
    async fn run(mut self, first: Vec<Bytes>, early: Option<CollectedOutcome>) {
        let sent = async {
            send(&self.client, first).await?;
            let outcome = match early {
                Some(outcome) => Ok(outcome),
                None => self.follow().await?,
            };
            let (pieces, healed) = self.writer.end(outcome);
            if healed {
                self.front.metrics.healed.inc();
            }
            send(&self.client, pieces).await?;
            Piece::End.offer(&self.client).await
        };
        // Who has left is told nothing.
        let _: Result<(), ClientLeft> = sent.await;
    }

    async fn follow(&mut self) -> Result<Result<CollectedOutcome, ApiError>, ClientLeft> {
        let mut silence = tokio::time::interval(self.front.args.keep_alive.0);
        silence.reset();
        let FollowedJob { source, deltas } = &mut self.job;
        let outcome = source.outcome();
        tokio::pin!(outcome);
        let mut listening = true;
        loop {
            tokio::select! {
                biased;
                () = self.client.closed() => return Err(ClientLeft),
                message = deltas.next(), if listening => {
                    listening = message.is_some();
                    let pieces = taken(&mut self.writer, message);
                    if !pieces.is_empty() {
                        send(&self.client, pieces).await?;
                        silence.reset();
                    }
                }
                outcome = &mut outcome => return Ok(outcome),
                _ = silence.tick() => send(&self.client, vec![PING]).await?,
            }
        }
    }
}

async fn send(client: &mpsc::Sender<Piece>, pieces: Vec<Bytes>) -> Result<(), ClientLeft> {
    for piece in pieces {
        Piece::Bytes(piece).offer(client).await?;
    }
    Ok(())
}
