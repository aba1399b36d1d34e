//! A worker's whole queue side in this process, with a scripted runner in place of the engine.
//!
//! The protocol is tested with it against a real broker: what the engine would do (fail, stall, be slow) is
//! said by each job's body.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::jetstream::{self, message::StreamMessage};
use async_nats::{Client, HeaderMap};
use millrace_crds::config::{NatsConfig, QueueConfig, ResultsConfig};
use millrace_crds::job::header;
use millrace_crds::names::{Class, JobId, ModelRef, SubjectToken};
use millrace_crds::result::{ErrorCode, OutputLine};
use millrace_crds::tokens::TokenDelta;
use millrace_crds::units::Span;
use millrace_engine::schedule::handle::{EngineLoad, Limits};
use millrace_queue::broker::Broker;
use millrace_queue::claim::Claims;
use millrace_queue::delivery::PullTrouble;
use millrace_queue::fault::Fault;
use millrace_queue::provision::{Mode, provision};
use millrace_worker::broken::Broken;
use millrace_worker::metrics::WorkerMetrics;
use millrace_worker::run::{Answer, Run, Work};
use millrace_worker::serve::{LineParts, ServingLine, serve};
use millrace_worker::watchdog::Watch;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::nats::{self, NatsServer};
use crate::tools;

/// A test waits this long for something before it fails.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What a scripted runner did.
#[derive(Debug, Default)]
pub struct Scripted {
    /// The counters that a real engine would keep.
    pub load: EngineLoad,
    /// Attempts begun.
    pub runs: AtomicU64,
    /// Attempts that run now.
    pub at_once: AtomicU64,
    /// The most that ran at once.
    pub at_once_max: AtomicU64,
    /// The most neighbours of a job `alone`.
    pub beside_alone_max: AtomicU64,
    /// The ids of the jobs, in the order in which their attempts began.
    pub order: Mutex<Vec<String>>,
    failed_once: AtomicBool,
}

/// Does what the body's first word says: `echo`, `fail`, `refuse`, `once` (fails the first time), `hang`
/// (with steps), `stall` (without), `late` (answers after 300 ms), `brief` (after 20 ms), `alone`
/// (after 100 ms, and looks who runs beside it), `stream` (three deltas).
#[derive(Debug, Clone, Default)]
pub struct ScriptedRunner(pub Arc<Scripted>);

impl std::ops::Deref for ScriptedRunner {
    type Target = Scripted;
    fn deref(&self) -> &Scripted {
        &self.0
    }
}

/// An attempt that runs, until dropped.
struct Running<'a>(&'a Scripted);

impl<'a> Running<'a> {
    fn begin(scripted: &'a Scripted) -> Self {
        scripted.runs.fetch_add(1, Ordering::SeqCst);
        let now = scripted.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        scripted.at_once_max.fetch_max(now, Ordering::SeqCst);
        Self(scripted)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.at_once.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Run for ScriptedRunner {
    async fn run(&self, work: Work, deltas: Option<mpsc::Sender<TokenDelta>>) -> Result<Answer, Fault> {
        let _running = Running::begin(self);
        self.order.lock().expect("no writer panics").push(work.headers.id.to_string());
        let word = String::from_utf8_lossy(&work.body).split(' ').next().unwrap_or_default().to_owned();
        let failure = Fault::Inference { message: "scripted".into() };
        match word.as_str() {
            "fail" => return Err(failure),
            "refuse" => return Err(Fault::Invalid { message: "scripted".into() }),
            "once" if !self.failed_once.swap(true, Ordering::SeqCst) => return Err(failure),
            "brief" => tokio::time::sleep(Duration::from_millis(20)).await,
            "alone" => {
                for _ in 0..10 {
                    let beside = self.at_once.load(Ordering::SeqCst) - 1;
                    self.beside_alone_max.fetch_max(beside, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            "late" => tokio::time::sleep(Duration::from_millis(300)).await,
            "stall" => std::future::pending().await,
            "hang" => loop {
                tokio::time::sleep(Duration::from_millis(20)).await;
                self.load.steps.fetch_add(1, Ordering::SeqCst);
            },
            "stream" => {
                for number in 0..3 {
                    let delta =
                        TokenDelta { number, request: 0, choice: 0, text: "x".into(), finish_reason: None };
                    deltas.as_ref().expect("asked for").try_send(delta).expect("room");
                }
            }
            _ => {}
        }
        self.load.steps.fetch_add(1, Ordering::SeqCst);
        Ok(Answer {
            body: work.body,
            prompt_tokens: 1,
            output_tokens: 1,
            sequences: 1,
            stopped: 0,
            first_token_ms: None,
            ignored_fields: Vec::new(),
        })
    }

    fn limits(&self) -> Limits {
        Limits { max_model_len: 64, max_sequences: 64, block_tokens: 16, kv_blocks: 4096, vocabulary: 9 }
    }

    fn load(&self) -> &EngineLoad {
        &self.load
    }
}

/// A worker's queue side, in this process.
#[derive(Debug)]
pub struct ScriptedWorker {
    /// What stands for its engine.
    pub runner: ScriptedRunner,
    /// Its counters.
    pub metrics: Arc<WorkerMetrics>,
    /// Its line.
    pub line: Arc<ServingLine<ScriptedRunner>>,
    /// Cancelled: it drains.
    pub drain: CancellationToken,
    /// How its serving ended.
    pub task: tokio::task::JoinHandle<Result<(), String>>,
}

/// A real broker with the streams of one model.
#[derive(Debug)]
pub struct Bench {
    /// The broker.
    pub server: NatsServer,
    /// A connection of the test's own.
    pub client: Client,
    /// The same, for JetStream.
    pub context: jetstream::Context,
    /// The model whose streams there are.
    pub model: ModelRef,
    /// The queue's settings: three attempts, 2 s of ack wait, 50 ms of backoff.
    pub queue: QueueConfig,
    /// How long things live.
    pub results: ResultsConfig,
}

impl Bench {
    /// A broker with streams and consumers; `None` where there is no broker to start.
    ///
    /// # Errors
    /// When the broker does not do it.
    pub async fn start() -> Result<Option<Self>> {
        if !tools::have(&[nats::PROGRAM]) {
            return Ok(None);
        }
        let server = NatsServer::start()?;
        let client = server.connect().await?;
        let context = jetstream::new(client.clone());
        let model = ModelRef::new("default", "m")?;
        let queue = QueueConfig {
            max_deliver: 3,
            ack_wait: Span(Duration::from_secs(2)),
            backoff: vec![Span(Duration::from_millis(50))],
            ..QueueConfig::default()
        };
        let results = ResultsConfig::default();
        provision(&context, &model, &queue, &results, Mode::Create).await?;
        Ok(Some(Self { server, client, context, model, queue, results }))
    }

    /// A worker that serves already.
    ///
    /// # Errors
    /// When the broker does not do it.
    pub async fn worker(&self, name: &str) -> Result<ScriptedWorker> {
        let runner = ScriptedRunner::default();
        let metrics = Arc::new(WorkerMetrics::new(&self.model));
        let line = self.line(name, runner.clone(), metrics.clone()).await?;
        let drain = CancellationToken::new();
        let task = tokio::spawn({
            let (line, drain) = (line.clone(), drain.clone());
            async move {
                serve(&line, &drain, Duration::from_millis(500)).await.map_err(|error| error.to_string())
            }
        });
        Ok(ScriptedWorker { runner, metrics, line, drain, task })
    }

    /// What a worker is made of, with any runner; it is connected and does not serve yet.
    ///
    /// # Errors
    /// When the broker does not do it.
    pub async fn line<R: Run>(
        &self,
        name: &str,
        run: R,
        metrics: Arc<WorkerMetrics>,
    ) -> Result<Arc<ServingLine<R>>> {
        let config = NatsConfig { servers: vec![self.server.url()], ..NatsConfig::default() };
        let worker: SubjectToken = name.parse()?;
        let broker = Broker::connect(&config, &self.model, &worker).await?;
        broker.ready().await;
        Ok(ServingLine::new(LineParts {
            run,
            broker,
            model: self.model.clone(),
            worker,
            digest: "sha256:0".into(),
            queue: self.queue.clone(),
            outcome_ttl: self.results.ttl.0,
            claims: Claims::without_store(1 << 20),
            metrics,
            watch: Watch::default(),
            broken: Broken::default(),
            trouble: PullTrouble::default(),
        }))
    }

    /// Publishes a job of class normal.
    ///
    /// # Errors
    /// When the broker does not do it.
    pub async fn publish(&self, id: &str, body: &str, headers: &[(&str, &str)]) -> Result<()> {
        self.publish_as(Class::Normal, id, body, headers).await
    }

    /// Publishes a job.
    ///
    /// # Errors
    /// When the broker does not do it.
    pub async fn publish_as(
        &self,
        class: Class,
        id: &str,
        body: &str,
        headers: &[(&str, &str)],
    ) -> Result<()> {
        let mut map = HeaderMap::new();
        map.insert(header::JOB_ID, id);
        for (name, value) in headers {
            map.insert(*name, *value);
        }
        let subject = self.model.jobs_subject(class);
        self.context.publish_with_headers(subject, map, body.to_owned().into()).await?.await?;
        Ok(())
    }

    /// A job's outcome, as soon as there is one.
    ///
    /// # Errors
    /// When the broker does not do it.
    pub async fn outcome(&self, id: &str) -> Result<StreamMessage> {
        let job: JobId = id.parse()?;
        let stream = self.context.get_stream(self.model.results_stream()).await?;
        let began = Instant::now();
        loop {
            match stream.direct_get_last_for_subject(self.model.result_subject(&job)).await {
                Ok(message) => return Ok(message),
                Err(_) if began.elapsed() < PATIENCE => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(error) => return Err(error).with_context(|| format!("no outcome of {id}")),
            }
        }
    }

    /// A job's outcome that is none: its kind, code and message.
    ///
    /// # Errors
    /// When the broker does not do it.
    pub async fn failure(&self, id: &str) -> Result<(String, ErrorCode, String)> {
        let outcome = self.outcome(id).await?;
        let kind = outcome.headers.get(header::OUTCOME).context("no kind")?.to_string();
        let line: OutputLine = serde_json::from_slice(&outcome.payload)?;
        let error = line.error.context("no error")?;
        Ok((kind, error.code, error.message))
    }

    /// Jobs that are not acknowledged.
    ///
    /// # Errors
    /// When the broker does not do it.
    pub async fn jobs_left(&self) -> Result<u64> {
        let mut stream = self.context.get_stream(self.model.jobs_stream()).await?;
        Ok(stream.info().await?.state.messages)
    }

    /// Waits until all jobs are acknowledged.
    ///
    /// # Errors
    /// When the broker does not do it.
    pub async fn until_empty(&self) -> Result<()> {
        let began = Instant::now();
        while self.jobs_left().await? > 0 {
            anyhow::ensure!(began.elapsed() < PATIENCE, "{} jobs stay in the queue", self.jobs_left().await?);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

/// A header of a stored message; empty if it has none.
pub fn text(message: &StreamMessage, name: &str) -> String {
    message.headers.get(name).map(ToString::to_string).unwrap_or_default()
}

/// Waits for a condition.
///
/// # Panics
/// When it does not come true.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
