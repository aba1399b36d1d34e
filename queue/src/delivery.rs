//! The job queue: deliveries in, and each one handed to its end.
//!
//! [`Queue`] pulls as [`crate::pull`] plans, so never more than the worker can hold. A [`Delivery`] ends in
//! one of three ways: finished (a confirmed ack, only after its outcome is stored), handed back with a
//! pause, or silently lost with its process, which the broker's ack wait turns into a redelivery.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::{Message, StatusCode, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::SelectAll;
use millrace_crds::config::ClassWeights;
use millrace_crds::names::{Class, ModelRef};
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::broker::{Broker, BrokerError};
use crate::classes::PerClass;
use crate::pull::{PullPlan, PullRequest, Status, WATCH_EXPIRES, WATCH_HEARTBEAT};

/// One delivery of one job.
#[derive(Debug)]
pub struct Delivery {
    /// The class it was published with.
    pub class: Class,
    /// Its place in the JOBS stream.
    pub stream_sequence: u64,
    /// How often the broker says it delivered it, this time included.
    pub delivered: u32,
    /// When the broker stored it.
    pub published: OffsetDateTime,
    /// The job's body.
    pub body: Bytes,
    /// The job's headers, as they came.
    pub headers: Vec<(String, String)>,
    reply: String,
    broker: Broker,
}

impl Delivery {
    /// Reads a message of the class's consumer; `None` if it is no delivery.
    fn read(class: Class, message: &Message, broker: &Broker) -> Option<Self> {
        let reply = message.reply.as_ref()?.to_string();
        let delivery = async_nats::jetstream::Message {
            message: message.clone(),
            context: async_nats::jetstream::new(broker.client().clone()),
        };
        let info = delivery.info().ok()?;
        let headers = message
            .headers
            .iter()
            .flat_map(|map| map.iter())
            .filter_map(|(name, values)| Some((name.to_string(), values.first()?.as_str().to_owned())))
            .collect();
        Some(Self {
            class,
            stream_sequence: info.stream_sequence,
            delivered: u32::try_from(info.delivered).unwrap_or(u32::MAX),
            published: info.published,
            body: message.payload.clone(),
            headers,
            reply,
            broker: broker.clone(),
        })
    }

    /// The job's headers by name.
    pub fn header_pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Ends the job: removes it from the queue. Only after its outcome is stored.
    ///
    /// # Errors
    /// When the broker did not confirm it; the job comes again, finds its outcome and is finished then.
    pub async fn finish(&self) -> Result<(), BrokerError> {
        self.broker.ack(&self.reply).await
    }

    /// Hands the job back, to come again after the pause.
    ///
    /// # Errors
    /// When the broker did not confirm it; the job comes again after the ack wait then.
    pub async fn retry(&self, after: Duration) -> Result<(), BrokerError> {
        self.broker.nak(&self.reply, after).await
    }

    /// Begins the ack wait anew. Without an answer, so that a stalled broker stalls nothing here.
    pub async fn keep_alive(&self) {
        let body = Bytes::from_static(b"+WPI");
        // A keep-alive that does not go out is one that the broker does not get: it redelivers.
        let _ = self.broker.client().publish(self.reply.clone(), body).await;
    }
}

/// Why no job can be pulled at the moment, for whoever asks whether the worker is ready. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct PullTrouble(Arc<Mutex<Option<String>>>);

impl PullTrouble {
    /// The reason, if there is trouble.
    pub fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, reason: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }
}

/// The pulling side. One a worker.
#[derive(Debug)]
pub struct Queue {
    broker: Broker,
    model: ModelRef,
    plan: PullPlan,
    inbox: String,
    replies: SelectAll<Replies>,
    connections: watch::Receiver<u64>,
    failing: PerClass<bool>,
    last_refusal: String,
    trouble: PullTrouble,
    /// Requests sent, for the metrics.
    pub pulls: u64,
    /// Requests that failed, for the metrics.
    pub pull_errors: u64,
}

impl Queue {
    /// Listens for deliveries; asks for none yet.
    ///
    /// # Errors
    /// When the connection is closed for good.
    pub async fn open(
        broker: Broker,
        model: ModelRef,
        weights: &ClassWeights,
        trouble: PullTrouble,
    ) -> Result<Self, BrokerError> {
        let mut connections = broker.connections();
        connections.mark_unchanged();
        let mut queue = Self {
            plan: PullPlan::new(weights),
            inbox: String::new(),
            replies: SelectAll::new(),
            connections,
            failing: PerClass::default(),
            last_refusal: String::new(),
            trouble,
            pulls: 0,
            pull_errors: 0,
            broker,
            model,
        };
        queue.subscribe().await?;
        Ok(queue)
    }

    async fn subscribe(&mut self) -> Result<(), BrokerError> {
        self.inbox = self.broker.client().new_inbox();
        let mut replies = SelectAll::new();
        for class in Class::ALL {
            let subject = format!("{}.{class}.*", self.inbox);
            let subscriber = self.broker.client().subscribe(subject).await;
            let subscriber = subscriber
                .map_err(|error| BrokerError::Request { what: "subscribe", message: error.to_string() })?;
            replies.push(Replies { class, subscriber });
        }
        self.replies = replies;
        Ok(())
    }

    /// Sends the requests that are due, given the free slots of the worker.
    ///
    /// # Errors
    /// When the connection is closed for good.
    pub async fn ask(&mut self, free: PerClass<usize>) -> Result<(), BrokerError> {
        if self.connections.has_changed().unwrap_or(false) {
            self.connections.mark_unchanged();
            self.plan.reconnected();
        }
        if !self.broker.connected() {
            return Ok(());
        }
        if self.plan.take_rebuild() {
            self.subscribe().await?;
        }
        for request in self.plan.plan(free, Instant::now()) {
            self.send(request).await?;
        }
        self.tell();
        Ok(())
    }

    /// Says once when pulls begin to fail, and once when all of them work again.
    fn tell(&mut self) {
        let failing = self.plan.failing();
        if failing == self.failing {
            return;
        }
        self.failing = failing;
        let consumers: Vec<String> = Class::ALL
            .into_iter()
            .filter(|&class| failing[class as usize])
            .map(|class| format!("{}/{}", self.model.jobs_stream(), self.model.consumer(class)))
            .collect();
        if consumers.is_empty() {
            self.trouble.set(None);
            tracing::info!("pulling again");
            return;
        }
        let said = if self.last_refusal.is_empty() { "no answer" } else { &self.last_refusal };
        let reason = format!("{}: {said}", consumers.join(", "));
        tracing::warn!(reason, "pulls fail; asking again and again, at most every few seconds");
        self.trouble.set(Some(reason));
    }

    async fn send(&mut self, request: PullRequest) -> Result<(), BrokerError> {
        self.pulls += 1;
        let consumer = self.model.consumer(request.class);
        let api =
            self.broker.link().api(&format!("CONSUMER.MSG.NEXT.{}.{consumer}", self.model.jobs_stream()));
        let body = if request.watch {
            format!(
                "{{\"batch\":{},\"expires\":{},\"idle_heartbeat\":{}}}",
                request.batch,
                WATCH_EXPIRES.as_nanos(),
                WATCH_HEARTBEAT.as_nanos()
            )
        } else {
            format!("{{\"batch\":{},\"no_wait\":true}}", request.batch)
        };
        let reply = format!("{}.{}.{}", self.inbox, request.class, request.number);
        let sent = self.broker.client().publish_with_reply(api, reply, body.into()).await;
        sent.map_err(|error| BrokerError::Request { what: "pull", message: error.to_string() })
    }

    /// The next delivery, or `None` when something else happened and [`Queue::ask`] is due again.
    /// Safe to drop at any point.
    pub async fn next(&mut self) -> Option<Delivery> {
        let wake_at = self.plan.wake_at();
        let timer = async {
            match wake_at {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let (class, message) = tokio::select! {
            biased;
            reply = self.replies.next() => reply?,
            _ = self.connections.changed() => {
                self.plan.reconnected();
                return None;
            }
            () = timer => {
                // Here too, and not only when asking: nobody asks while the broker is away, or in a drain.
                self.plan.expire(Instant::now());
                return None;
            }
        };
        // What a job's publisher wrote as its status is none: those of the broker come under the name of the inbox.
        match message.status.filter(|_| message.subject.starts_with(&self.inbox)) {
            None => {
                self.plan.delivered(class, Instant::now());
                Delivery::read(class, &message, &self.broker)
            }
            Some(status) => {
                self.hear(class, status, &message);
                None
            }
        }
    }

    fn hear(&mut self, class: Class, status: StatusCode, message: &Message) {
        let number = message.subject.rsplit('.').next().and_then(|token| token.parse().ok());
        let meaning = meaning_of(status);
        if meaning == Status::Failed {
            self.pull_errors += 1;
            let said = message.description.as_deref().unwrap_or_default();
            // 503 has no words of its own: nobody answers for the consumer.
            let missing = if status == StatusCode::NO_RESPONDERS {
                "no such stream or consumer, or no leader"
            } else {
                said
            };
            self.last_refusal = format!("status {} {missing}", status.as_u16());
        }
        if let Some(number) = number {
            self.plan.status(class, number, meaning, Instant::now());
        }
    }
}

/// What a status of the pull API means. 409 with "Batch Completed" and the like is not sent to requests of
/// this form; every 409 that is sent says that the request was dropped.
fn meaning_of(status: StatusCode) -> Status {
    match status {
        StatusCode::IDLE_HEARTBEAT => Status::Alive,
        StatusCode::NOT_FOUND | StatusCode::TIMEOUT => Status::Over,
        _ => Status::Failed,
    }
}

/// One class's replies, so that a delivery's class is known by where it arrived.
#[derive(Debug)]
struct Replies {
    class: Class,
    subscriber: Subscriber,
}

impl futures::Stream for Replies {
    type Item = (Class, Message);
    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let class = self.class;
        self.subscriber.poll_next_unpin(context).map(|message| message.map(|message| (class, message)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses() {
        let table = [
            (100, Status::Alive),
            (404, Status::Over),
            (408, Status::Over),
            (409, Status::Failed),
            (423, Status::Failed),
            (503, Status::Failed),
        ];
        for (code, meaning) in table {
            assert_eq!(meaning_of(StatusCode::from_u16(code).expect("a status")), meaning, "{code}");
        }
    }
}
