//! `millrace queue`: how deep each class is, how old its oldest job, what runs, who works.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::stream::DirectGetErrorKind;
use async_nats::jetstream::stream::Stream;
use futures::StreamExt;
use millrace_crds::backlog::{self, StreamCount};
use millrace_crds::load::LoadReport;
use millrace_crds::names::Class;
use serde::Serialize;
use time::OffsetDateTime;

use crate::args::{Global, QueueArgs};
use crate::connect::{self, Connection};
use crate::failure::{Failure, Verdict};
use crate::output::{Printer, table};

/// How long load reports are listened to: workers send one each second.
pub const LISTEN: Duration = Duration::from_millis(1200);
/// Most workers that are shown.
const WORKERS_MAX: usize = 4096;

/// One class's part of the queue.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassDepth {
    /// The class.
    pub class: Class,
    /// Jobs that wait for a worker.
    pub pending: u64,
    /// Jobs that a worker holds.
    pub in_flight: u64,
    /// Whether somebody paused the class's consumer.
    pub paused: bool,
    /// Jobs that were delivered more than once and are not done.
    redelivered: u64,
    /// Age of the oldest job, waiting or held.
    oldest_s: Option<f64>,
}

/// The whole picture, as `--json` prints it.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Picture {
    model: String,
    jobs: u64,
    bytes: u64,
    jobs_max: i64,
    bytes_max: i64,
    classes: Vec<ClassDepth>,
    /// Jobs that no consumer will deliver; absent if jobs came or went while they were counted.
    undeliverable: Option<u64>,
    /// Outcomes, and the cancel markers and ledgers of attempts that lie beside them.
    records: u64,
    dead: u64,
    workers: Vec<LoadReport>,
}

/// Runs the command.
///
/// # Errors
/// See [`Failure`].
pub async fn run(global: &Global, args: &QueueArgs) -> Result<Verdict, Failure> {
    let printer = Printer { json: global.json };
    let broker = connect::connect(global).await?;
    loop {
        let picture = look(&broker).await?;
        printer.object(&picture);
        printer.say(&picture.text());
        if !args.watch {
            return Ok(Verdict::Well);
        }
        printer.say("");
        tokio::time::sleep(args.interval.0).await;
    }
}

async fn look(broker: &Connection) -> Result<Picture, Failure> {
    let jobs = broker.stream(broker.model.jobs_stream()).await?;
    let (workers, counted) = tokio::join!(workers(broker), count(broker, &jobs));
    let (classes, undeliverable) = counted?;
    let results = broker.stream(broker.model.results_stream()).await?;
    let dead = broker.stream(broker.model.dead_stream()).await?;
    let info = jobs.cached_info();
    Ok(Picture {
        model: broker.model.to_string(),
        jobs: info.state.messages,
        bytes: info.state.bytes,
        jobs_max: info.config.max_messages,
        bytes_max: info.config.max_bytes,
        classes,
        undeliverable,
        records: results.cached_info().state.messages,
        dead: dead.cached_info().state.messages,
        workers: workers?,
    })
}

/// The classes, and how many jobs none of their consumers will deliver. `jobs` was read just before.
///
/// # Errors
/// [`Failure::Refused`].
pub async fn count(broker: &Connection, jobs: &Stream) -> Result<(Vec<ClassDepth>, Option<u64>), Failure> {
    let of = |stream: &Stream| {
        let state = &stream.cached_info().state;
        StreamCount { messages: state.messages, last_sequence: state.last_sequence }
    };
    let classes = classes(broker, jobs).await?;
    let after = broker.stream(broker.model.jobs_stream()).await?;
    let known = classes.iter().map(|class| class.pending.saturating_add(class.in_flight)).sum();
    Ok((classes, backlog::undeliverable(of(jobs), of(&after), known)))
}

async fn classes(broker: &Connection, jobs: &Stream) -> Result<Vec<ClassDepth>, Failure> {
    let mut depths = Vec::new();
    for class in Class::ALL {
        let name = broker.model.consumer(class);
        let refused = |e: &dyn std::fmt::Display| {
            Failure::Refused(format!(
                "consumer {name}: {e}; `millrace provision --check` says what is missing"
            ))
        };
        let consumer: PullConsumer = jobs.get_consumer(&name).await.map_err(|e| refused(&e))?;
        let info = consumer.cached_info();
        let oldest = match jobs.direct_get_first_for_subject(broker.model.jobs_subject(class)).await {
            Ok(message) => Some((OffsetDateTime::now_utc() - message.time).as_seconds_f64().max(0.0)),
            Err(error) if error.kind() == DirectGetErrorKind::NotFound => None,
            Err(error) => return Err(refused(&error)),
        };
        depths.push(ClassDepth {
            class,
            pending: info.num_pending,
            in_flight: info.num_ack_pending as u64,
            paused: info.paused,
            redelivered: info.num_redelivered as u64,
            oldest_s: oldest.map(|age| (age * 10.0).round() / 10.0),
        });
    }
    Ok(depths)
}

/// The last load report of each worker that sends one now.
///
/// # Errors
/// [`Failure::Refused`].
pub async fn workers(broker: &Connection) -> Result<Vec<LoadReport>, Failure> {
    let refused = |e: &dyn std::fmt::Display| Failure::Refused(format!("load reports: {e}"));
    let mut reports = broker.client.subscribe(broker.model.load_wildcard()).await.map_err(|e| refused(&e))?;
    let mut workers = BTreeMap::new();
    let listening = async {
        while let Some(message) = reports.next().await {
            // A report of a later version with other fields is not ours to fail on.
            if let Ok(report) = serde_json::from_slice::<LoadReport>(&message.payload)
                && workers.len() < WORKERS_MAX
            {
                workers.insert(report.worker.to_string(), report);
            }
        }
    };
    // The time runs out unless the connection ends first; either way the reports heard count.
    let _ = tokio::time::timeout(LISTEN, listening).await;
    Ok(workers.into_values().collect())
}

impl Picture {
    fn text(&self) -> String {
        let age = |oldest: Option<f64>| oldest.map_or("-".to_owned(), |age| format!("{age:.1} s"));
        let classes: Vec<Vec<String>> = self
            .classes
            .iter()
            .map(|c| {
                vec![
                    c.class.to_string(),
                    format!("{}{}", c.pending, if c.paused { " (paused)" } else { "" }),
                    c.in_flight.to_string(),
                    age(c.oldest_s),
                    c.redelivered.to_string(),
                ]
            })
            .collect();
        let workers: Vec<Vec<String>> = self
            .workers
            .iter()
            .map(|w| {
                let share = 100.0 * w.kv_blocks_used as f64 / (w.kv_blocks_total.max(1)) as f64;
                vec![
                    w.worker.to_string(),
                    format!("{:?}", w.phase).to_lowercase(),
                    w.jobs_held.to_string(),
                    w.sequences_running.to_string(),
                    w.sequences_waiting.to_string(),
                    format!("{share:.0}%"),
                    format!("{:.0}", w.output_tokens_per_s),
                    w.jobs_finished.to_string(),
                ]
            })
            .collect();
        let mut head = format!(
            "{}: {} of {} jobs, {} of {} bytes; {} records of outcomes, {} dead",
            self.model, self.jobs, self.jobs_max, self.bytes, self.bytes_max, self.records, self.dead
        );
        if let Some(jobs @ 1..) = self.undeliverable {
            head += &format!("\n{jobs} jobs that no consumer will deliver: see `millrace doctor`");
        }
        let classes = table(&["CLASS", "PENDING", "IN FLIGHT", "OLDEST", "REDELIVERED"], &classes);
        let workers = match workers.is_empty() {
            true => "no workers".to_owned(),
            false => {
                let head = ["WORKER", "PHASE", "JOBS", "RUNNING", "WAITING", "KV", "TOKENS/S", "FINISHED"];
                table(&head, &workers)
            }
        };
        format!("{head}\n{classes}\n{workers}")
    }
}
