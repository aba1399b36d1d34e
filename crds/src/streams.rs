//! The streams and consumers of one model, as they are created and as they are checked.
//!
//! Why each setting: durability needs file storage, explicit acks and refusal instead of silent loss
//! (discard new). The consumer's own `max_deliver` is unlimited, because a broker that gives up leaves a job
//! without an outcome; the worker counts attempts and writes one.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};

use crate::config::{QueueConfig, ResultsConfig};
use crate::names::{Class, ModelRef};

/// The broker never gives a job up: behind a limit of its own the job would stay in the queue, undelivered
/// and without an outcome. The worker counts attempts, and bounds deliveries too.
const MAX_DELIVER_UNLIMITED: i64 = -1;
/// Most unacknowledged jobs of one class over all workers: far above what a pool of GPUs holds.
const MAX_ACK_PENDING: i64 = 50_000;
/// Most jobs that one pull may ask for.
pub const PULL_BATCH_MAX: i64 = 1024;
/// A publisher that retries within this time does not enqueue a job twice. Never longer than outcomes live: an id that
/// the broker knows and of which nothing else is left would only get in the way.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(600);
/// Everything is on disk.
const STORAGE: StorageType = StorageType::File;

/// Settings of the work-queue stream of jobs.
pub fn jobs(model: &ModelRef, queue: &QueueConfig, results: &ResultsConfig) -> Config {
    Config {
        name: model.jobs_stream(),
        description: Some(format!("Jobs of {model}")),
        subjects: Class::ALL.iter().map(|&class| model.jobs_subject(class)).collect(),
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        max_messages: i64::try_from(queue.max_jobs).unwrap_or(i64::MAX),
        max_bytes: i64::try_from(queue.max_bytes.0).unwrap_or(i64::MAX),
        max_message_size: i32::try_from(crate::job::JOB_BYTES_MAX + HEADER_BYTES_MAX).unwrap_or(i32::MAX),
        duplicate_window: DUPLICATE_WINDOW.min(results.ttl.0),
        storage: STORAGE,
        num_replicas: queue.replicas as usize,
        allow_direct: true,
        ..Config::default()
    }
}

/// Room for headers beside the largest body.
const HEADER_BYTES_MAX: usize = 16 << 10;

/// Settings of the stream of outcomes, cancel markers and ledgers of attempts. One message a subject: an
/// outcome never changes (writers create it only where there is none), a cancel marker may be written
/// again, and a ledger is replaced by compare-and-set.
///
/// Its age is that of markers and ledgers, which must outlive the wait of the job they speak of. Outcomes, and what
/// speaks of jobs that have one, carry `results.ttl` as a lifetime of their own.
pub fn results(model: &ModelRef, queue: &QueueConfig, results: &ResultsConfig) -> Config {
    Config {
        name: model.results_stream(),
        description: Some(format!("Outcomes, cancel markers and ledgers of attempts of {model}")),
        subjects: vec![model.results_wildcard(), model.cancel_wildcard(), model.attempts_wildcard()],
        max_bytes: i64::try_from(results.max_bytes.0).unwrap_or(i64::MAX),
        allow_message_ttl: true,
        ..kept(queue, results)
    }
}

/// Settings of the stream of dead letters.
pub fn dead(model: &ModelRef, queue: &QueueConfig, results: &ResultsConfig) -> Config {
    Config {
        name: model.dead_stream(),
        description: Some(format!("Dead letters of {model}")),
        subjects: vec![model.dead_wildcard()],
        max_bytes: i64::try_from(results.dead_max_bytes.0).unwrap_or(i64::MAX),
        ..kept(queue, results)
    }
}

/// One message a subject; what does not fit is refused, not made room for.
fn kept(queue: &QueueConfig, results: &ResultsConfig) -> Config {
    Config {
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::New,
        max_messages_per_subject: 1,
        max_age: results.dead_ttl.0,
        duplicate_window: DUPLICATE_WINDOW.min(results.ttl.0),
        storage: STORAGE,
        num_replicas: queue.replicas as usize,
        allow_direct: true,
        ..Config::default()
    }
}

/// Settings of the durable pull consumer of one class.
pub fn consumer(model: &ModelRef, class: Class, queue: &QueueConfig) -> pull::Config {
    let name = model.consumer(class);
    pull::Config {
        durable_name: Some(name.clone()),
        name: Some(name),
        description: Some(format!("Workers of {model}, class {class}")),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait: queue.ack_wait.0,
        max_deliver: MAX_DELIVER_UNLIMITED,
        max_ack_pending: MAX_ACK_PENDING,
        max_batch: PULL_BATCH_MAX,
        filter_subject: model.jobs_subject(class),
        ..pull::Config::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Span;

    #[test]
    fn jobs_are_refused_not_dropped() {
        let model = ModelRef::new("default", "m").unwrap();
        let config = jobs(&model, &QueueConfig::default(), &ResultsConfig::default());
        assert_eq!(config.discard, DiscardPolicy::New);
        assert_eq!(config.retention, RetentionPolicy::WorkQueue);
        assert_eq!(config.storage, StorageType::File);
        assert!(config.max_messages > 0 && config.max_bytes > 0);
    }

    #[test]
    fn what_speaks_of_a_job_lives_as_long_as_it() {
        let model = ModelRef::new("default", "m").unwrap();
        let (queue, config) = (QueueConfig::default(), ResultsConfig::default());
        assert!(config.dead_ttl > config.ttl && config.ttl == Span::seconds(7 * 86_400));
        for stream in [results(&model, &queue, &config), dead(&model, &queue, &config)] {
            assert_eq!((stream.max_age, stream.discard), (config.dead_ttl.0, DiscardPolicy::New));
            assert!(stream.max_bytes > 0);
        }
        assert!(results(&model, &queue, &config).allow_message_ttl, "outcomes carry their own lifetime");
        let short = ResultsConfig { ttl: Span::seconds(5), ..config };
        assert_eq!(jobs(&model, &queue, &short).duplicate_window, short.ttl.0);
    }

    #[test]
    fn each_class_has_its_consumer() {
        let model = ModelRef::new("default", "m").unwrap();
        let queue = QueueConfig::default();
        for class in Class::ALL {
            let config = consumer(&model, class, &queue);
            assert_eq!(config.filter_subject, model.jobs_subject(class));
            assert_eq!(config.max_deliver, -1, "the worker gives jobs up, with an outcome");
        }
    }
}
