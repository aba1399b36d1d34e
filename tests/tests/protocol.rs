//! The queue's protocol against a real broker, with a runner that does as each job says.
//!
//! Every job here ends with exactly one outcome and an empty queue, whatever happens on the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::jetstream::{self, Message};
use async_nats::{Client, HeaderMap};
use futures::StreamExt;
use millrace_crds::config::{NatsConfig, QueueConfig, ResultsConfig};
use millrace_crds::job::header;
use millrace_crds::names::{Class, JobId, ModelRef, Token};
use millrace_crds::result::{ErrorCode, OutputLine};
use millrace_crds::tokens::TokenDelta;
use millrace_crds::units::Span;
use millrace_tests::nats::{self, NatsServer};
use millrace_tests::tools;
use millrace_worker::broker::Broker;
use millrace_worker::claim::Claims;
use millrace_worker::engine::handle::{Limits, Load};
use millrace_worker::fault::Fault;
use millrace_worker::metrics::Metrics;
use millrace_worker::provision::{Mode, State, provision};
use millrace_worker::run::{Answer, Run, Work};
use millrace_worker::serve::{Line, LineParts, serve};
use millrace_worker::watchdog::Watch;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// A test waits this long for something before it fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Does what the body's first word says: `echo`, `fail`, `once` (fails the first time), `hang` (with steps),
/// `stall` (without), `late` (answers after 300 ms), `stream` (three deltas).
#[derive(Debug, Default)]
struct Scripted {
    load: Load,
    runs: AtomicU64,
    failed_once: AtomicBool,
    at_once: AtomicU64,
}

#[derive(Debug, Clone, Default)]
struct Runner(Arc<Scripted>);

impl std::ops::Deref for Runner {
    type Target = Scripted;
    fn deref(&self) -> &Scripted {
        &self.0
    }
}

impl Run for Runner {
    async fn run(&self, work: Work, deltas: Option<mpsc::Sender<TokenDelta>>) -> Result<Answer, Fault> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.at_once.fetch_add(1, Ordering::SeqCst);
        let word = String::from_utf8_lossy(&work.body).split(' ').next().unwrap_or_default().to_owned();
        let failure = Fault::Inference { message: "scripted".into() };
        match word.as_str() {
            "fail" => return Err(failure),
            "refuse" => return Err(Fault::Invalid { message: "scripted".into() }),
            "once" if !self.failed_once.swap(true, Ordering::SeqCst) => return Err(failure),
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
        Ok(Answer { body: work.body, prompt_tokens: 1, output_tokens: 1, sequences: 1, first_token_ms: None })
    }

    fn limits(&self) -> Limits {
        Limits { max_model_len: 64, max_sequences: 64, block_tokens: 16, kv_blocks: 4096, vocabulary: 9 }
    }

    fn load(&self) -> &Load {
        &self.load
    }
}

struct Worker {
    runner: Runner,
    metrics: Arc<Metrics>,
    line: Arc<Line<Runner>>,
    drain: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), String>>,
}

struct Bench {
    server: NatsServer,
    client: Client,
    context: jetstream::Context,
    model: ModelRef,
    queue: QueueConfig,
}

impl Bench {
    async fn start() -> Result<Option<Self>> {
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
        provision(&context, &model, &queue, &ResultsConfig::default(), Mode::Create).await?;
        Ok(Some(Self { server, client, context, model, queue }))
    }

    async fn worker(&self, name: &str) -> Result<Worker> {
        let config = NatsConfig {
            servers: vec![self.server.url()],
            credentials_file: None,
            ca_file: None,
            monitor: None,
            provision: false,
        };
        let worker: Token = name.parse()?;
        let broker = Broker::connect(&config, &worker).await?;
        broker.ready().await;
        let runner = Runner::default();
        let metrics = Arc::new(Metrics::new(&self.model));
        let line = Line::new(LineParts {
            run: runner.clone(),
            broker,
            model: self.model.clone(),
            worker,
            digest: "sha256:0".into(),
            queue: self.queue.clone(),
            claims: Claims::without_store(1 << 20),
            metrics: metrics.clone(),
            watch: Watch::default(),
        });
        let drain = CancellationToken::new();
        let task = tokio::spawn({
            let (line, drain) = (line.clone(), drain.clone());
            async move {
                serve(&line, &drain, Duration::from_millis(500)).await.map_err(|error| error.to_string())
            }
        });
        Ok(Worker { runner, metrics, line, drain, task })
    }

    async fn publish(&self, id: &str, body: &str, headers: &[(&str, &str)]) -> Result<()> {
        self.publish_as(Class::Normal, id, body, headers).await
    }

    async fn publish_as(&self, class: Class, id: &str, body: &str, headers: &[(&str, &str)]) -> Result<()> {
        let mut map = HeaderMap::new();
        map.insert(header::JOB_ID, id);
        for (name, value) in headers {
            map.insert(*name, *value);
        }
        let subject = self.model.jobs_subject(class);
        self.context.publish_with_headers(subject, map, body.to_owned().into()).await?.await?;
        Ok(())
    }

    async fn outcome(&self, id: &str) -> Result<async_nats::jetstream::message::StreamMessage> {
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

    async fn failure(&self, id: &str) -> Result<(String, ErrorCode, String)> {
        let outcome = self.outcome(id).await?;
        let kind = outcome.headers.get(header::OUTCOME).context("no kind")?.to_string();
        let line: OutputLine = serde_json::from_slice(&outcome.payload)?;
        let error = line.error.context("no error")?;
        Ok((kind, error.code, error.message))
    }

    async fn jobs_left(&self) -> Result<u64> {
        let mut stream = self.context.get_stream(self.model.jobs_stream()).await?;
        Ok(stream.info().await?.state.messages)
    }

    async fn until_empty(&self) -> Result<()> {
        let began = Instant::now();
        while self.jobs_left().await? > 0 {
            anyhow::ensure!(began.elapsed() < PATIENCE, "{} jobs stay in the queue", self.jobs_left().await?);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

fn text(message: &async_nats::jetstream::message::StreamMessage, name: &str) -> String {
    message.headers.get(name).map(ToString::to_string).unwrap_or_default()
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_each_kind_end_with_one_outcome() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut copies = bench.client.subscribe("replies.a").await?;
    bench.publish("a", "echo", &[(header::TRACEPARENT, trace), (header::REPLY_SUBJECT, "replies.a")]).await?;
    bench.publish("b", "once", &[]).await?;
    bench.publish("c", "fail", &[]).await?;
    bench.publish("d", "refuse", &[]).await?;
    bench.publish("e", "echo", &[(header::DEADLINE, "2020-01-01T00:00:00Z")]).await?;
    bench.publish("f", "echo", &[(header::STREAM, "maybe")]).await?;
    bench.publish_as(Class::Low, "g", "echo", &[]).await?;
    let a = bench.outcome("a").await?;
    assert_eq!((text(&a, header::OUTCOME).as_str(), a.payload.as_ref()), ("completed", &b"echo"[..]));
    assert_eq!(text(&a, header::TRACEPARENT), trace);
    assert_eq!((text(&a, header::WORKER).as_str(), text(&a, header::ATTEMPT).as_str()), ("w", "1"));
    assert!(text(&a, header::QUEUE_WAIT_MS).parse::<f64>()? >= 0.0);
    let copy = tokio::time::timeout(PATIENCE, copies.next()).await?.context("no copy")?;
    assert_eq!(copy.payload.as_ref(), b"echo");
    assert_eq!(text(&bench.outcome("b").await?, header::ATTEMPT), "2");
    let (kind, code, message) = bench.failure("c").await?;
    assert_eq!((kind.as_str(), code), ("dead", ErrorCode::InferenceError));
    assert!(message.contains("attempt 3"), "{message}");
    assert_eq!(bench.failure("d").await?.1, ErrorCode::InvalidRequest);
    let (kind, code, message) = bench.failure("e").await?;
    assert_eq!((kind.as_str(), code), ("rejected", ErrorCode::DeadlineExceeded));
    assert!(message.contains("2020-01-01T00:00:00Z"), "{message}");
    let (_, code, message) = bench.failure("f").await?;
    assert_eq!(code, ErrorCode::InvalidRequest);
    assert!(message.contains("Millrace-Stream") && message.contains("maybe"), "{message}");
    bench.outcome("g").await?;
    bench.until_empty().await?;
    let dead = bench.context.get_stream(bench.model.dead_stream()).await?;
    let letter = dead.direct_get_last_for_subject(bench.model.dead_subject(&"c".parse()?)).await?;
    assert_eq!(letter.payload.as_ref(), b"fail");
    assert!(text(&letter, header::REASON).starts_with("INFERENCE_ERROR: attempt 3"));
    assert_eq!(text(&letter, header::CLASS), "normal");
    // A job that has an outcome is only acknowledged. The broker drops duplicates by the exact header name;
    // written otherwise it stands for one whose window is over, or whose ids the broker forgot.
    let runs = worker.runner.runs.load(Ordering::SeqCst);
    let mut map = HeaderMap::new();
    map.insert("nats-msg-id", "a");
    let subject = bench.model.jobs_subject(Class::High);
    bench.context.publish_with_headers(subject, map, "echo".into()).await?.await?;
    bench.until_empty().await?;
    assert_eq!(worker.metrics.already_done.get(), 1);
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), runs);
    worker.drain.cancel();
    worker.task.await?.map_err(anyhow::Error::msg)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_outcome_is_only_acknowledged_and_a_dead_one_gets_its_copy() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    // As a worker leaves it that died between the outcome and the rest.
    let mut map = HeaderMap::new();
    map.insert(header::OUTCOME, "dead");
    map.insert(header::ATTEMPT, "3");
    let line =
        r#"{"id":"x","custom_id":"x","response":null,"error":{"code":"WORKER_LOST","message":"lost"}}"#;
    let subject = bench.model.result_subject(&"x".parse()?);
    bench.context.publish_with_headers(subject, map, line.into()).await?.await?;
    bench.publish("x", "echo", &[]).await?;
    let worker = bench.worker("w").await?;
    bench.until_empty().await?;
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 0);
    assert_eq!(worker.metrics.already_done.get(), 1);
    let dead = bench.context.get_stream(bench.model.dead_stream()).await?;
    let letter = dead.direct_get_last_for_subject(bench.model.dead_subject(&"x".parse()?)).await?;
    assert_eq!(text(&letter, header::REASON), "WORKER_LOST: lost");
    assert_eq!(text(&letter, header::ATTEMPT), "3");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_holders_of_one_job_make_one_outcome() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    bench.publish("j", "late", &[]).await?;
    until("it runs", || worker.runner.runs.load(Ordering::SeqCst) == 1).await;
    // Another holder is first.
    let mut map = HeaderMap::new();
    map.insert(header::OUTCOME, "completed");
    let subject = bench.model.result_subject(&"j".parse()?);
    bench.context.publish_with_headers(subject, map, "theirs".into()).await?.await?;
    bench.until_empty().await?;
    assert_eq!(bench.outcome("j").await?.payload.as_ref(), b"theirs");
    assert_eq!(worker.metrics.create_races_lost.get(), 1);
    assert_eq!(worker.metrics.stored_total(), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_before_and_while_running() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let cancel = |id: &str| {
        let subject = bench.model.cancel_subject(&id.parse::<JobId>().expect("an id"));
        let context = bench.context.clone();
        async move { context.publish(subject, "".into()).await?.await.map_err(anyhow::Error::from) }
    };
    cancel("before").await?;
    bench.publish("before", "hang", &[]).await?;
    bench.publish("while", "hang", &[]).await?;
    let soon = time::OffsetDateTime::now_utc() + Duration::from_secs(2);
    let soon = soon.format(&time::format_description::well_known::Rfc3339)?;
    bench.publish("deadline", "hang", &[(header::DEADLINE, &soon)]).await?;
    let worker = bench.worker("w").await?;
    assert_eq!(bench.failure("before").await?.1, ErrorCode::Cancelled);
    until("both run", || worker.runner.runs.load(Ordering::SeqCst) == 2).await;
    let asked = Instant::now();
    cancel("while").await?;
    assert_eq!(bench.failure("while").await?.1, ErrorCode::Cancelled);
    assert!(asked.elapsed() < Duration::from_millis(500), "it is heard at once: {:?}", asked.elapsed());
    let (kind, code, _) = bench.failure("deadline").await?;
    assert_eq!((kind.as_str(), code), ("rejected", ErrorCode::DeadlineExceeded));
    bench.until_empty().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_engine_loses_its_jobs_and_a_moving_one_keeps_them() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let first = bench.worker("w1").await?;
    bench.publish("moving", "hang", &[]).await?;
    until("it runs", || first.runner.runs.load(Ordering::SeqCst) == 1).await;
    let second = bench.worker("w2").await?;
    tokio::time::sleep(bench.queue.ack_wait.0 * 2).await;
    assert_eq!(second.runner.runs.load(Ordering::SeqCst), 0, "two ack waits long it stayed where it moves");
    assert_eq!(first.metrics.keep_alives_withheld.get(), 0);
    first.task.abort();
    first.line.broker.client().drain().await?;
    drop(first);
    // The second one stalls: its job comes again, to the same worker, which is the only one.
    bench.publish("stalled", "stall", &[]).await?;
    until("it came again", || second.metrics.redeliveries.get() >= 1).await;
    until("keep-alives are withheld", || second.metrics.keep_alives_withheld.get() >= 1).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_finishes_what_it_can_and_hands_back_the_rest_uncounted() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let first = bench.worker("w1").await?;
    bench.publish("short", "late", &[]).await?;
    bench.publish("long", "hang", &[]).await?;
    until("both run", || first.runner.runs.load(Ordering::SeqCst) == 2).await;
    first.drain.cancel();
    first.task.await?.map_err(anyhow::Error::msg)?;
    assert_eq!(text(&bench.outcome("short").await?, header::WORKER), "w1");
    let second = bench.worker("w2").await?;
    let back = Instant::now();
    until("the rest runs elsewhere", || second.runner.runs.load(Ordering::SeqCst) == 1).await;
    assert!(back.elapsed() < bench.queue.ack_wait.0, "handed back, not timed out: {:?}", back.elapsed());
    bench.context.publish(bench.model.cancel_subject(&"long".parse()?), "".into()).await?.await?;
    let outcome = bench.outcome("long").await?;
    assert_eq!(text(&outcome, header::ATTEMPT), "1", "a drain is no attempt");
    bench.until_empty().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_consumer_makes_the_ack_fail_honestly() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    bench.publish("j", "late", &[]).await?;
    until("it runs", || worker.runner.runs.load(Ordering::SeqCst) == 1).await;
    let jobs = bench.context.get_stream(bench.model.jobs_stream()).await?;
    jobs.delete_consumer(&bench.model.consumer(Class::Normal)).await?;
    bench.outcome("j").await?;
    until("the ack failed", || worker.metrics.ack_failures.get() == 1).await;
    assert_eq!(bench.jobs_left().await?, 1, "the job is still there");
    // With the consumer back, it is finished without running again.
    provision(&bench.context, &bench.model, &bench.queue, &ResultsConfig::default(), Mode::Create).await?;
    bench.until_empty().await?;
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_broker_is_waited_for() -> Result<()> {
    let Some(mut bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    bench.publish("before", "echo", &[]).await?;
    bench.outcome("before").await?;
    bench.server.kill()?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    bench.server.restart()?;
    bench.client = bench.server.connect().await?;
    bench.context = jetstream::new(bench.client.clone());
    let back = Instant::now();
    bench.publish("after", "echo", &[]).await?;
    bench.outcome("after").await?;
    assert!(back.elapsed() < Duration::from_secs(5), "resumed after {:?}", back.elapsed());
    assert!(!worker.task.is_finished());
    bench.until_empty().await
}

#[tokio::test(flavor = "multi_thread")]
async fn deltas_are_numbered_and_tagged() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let mut deltas = bench.client.subscribe(bench.model.tokens_subject(&"s".parse()?)).await?;
    bench.client.flush().await?;
    let _worker = bench.worker("w").await?;
    bench.publish("s", "stream", &[(header::STREAM, "true")]).await?;
    for number in 0..3 {
        let message = tokio::time::timeout(PATIENCE, deltas.next()).await?.context("no delta")?;
        let delta: TokenDelta = serde_json::from_slice(&message.payload)?;
        assert_eq!((delta.number, delta.text.as_str()), (number, "x"));
        let headers = message.headers.context("no headers")?;
        assert_eq!(headers.get(header::ATTEMPT).map(ToString::to_string).as_deref(), Some("1"));
    }
    bench.outcome("s").await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn provisioning_is_idempotent_and_names_drift() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let results = ResultsConfig::default();
    let same = provision(&bench.context, &bench.model, &bench.queue, &results, Mode::Check).await?;
    assert!(same.iter().all(|item| item.state == State::Same) && same.len() == 6, "{same:?}");
    let other = QueueConfig { max_jobs: 5, max_deliver: 4, ..bench.queue.clone() };
    let drift = provision(&bench.context, &bench.model, &other, &results, Mode::Create).await?;
    let differ = drift.iter().filter(|item| matches!(item.state, State::Differs(_))).count();
    assert_eq!(differ, 4, "the stream and three consumers: {drift:?}");
    let applied = provision(&bench.context, &bench.model, &other, &results, Mode::Apply).await?;
    assert_eq!(applied.iter().filter(|item| matches!(item.state, State::Updated(_))).count(), 4);
    let same = provision(&bench.context, &bench.model, &other, &results, Mode::Check).await?;
    assert!(same.iter().all(|item| item.state == State::Same), "{same:?}");
    let missing = ModelRef::new("default", "other")?;
    let missing = provision(&bench.context, &missing, &other, &results, Mode::Check).await?;
    assert!(missing.iter().all(|item| item.state == State::Missing), "{missing:?}");
    Ok(())
}

/// A delivery as a process leaves it that was killed while it held the job.
async fn take_and_forget(bench: &Bench) -> Result<Message> {
    let jobs = bench.context.get_stream(bench.model.jobs_stream()).await?;
    let name = bench.model.consumer(Class::Normal);
    let consumer: jetstream::consumer::PullConsumer =
        jobs.get_consumer(&name).await.map_err(anyhow::Error::msg)?;
    let mut batch = consumer.fetch().max_messages(1).expires(PATIENCE).messages().await?;
    batch.next().await.context("nothing to take")?.map_err(anyhow::Error::msg)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_processes_die_is_given_up_and_held_neighbours_are_not() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    bench.publish("poison", "echo", &[]).await?;
    let message = take_and_forget(&bench).await?;
    message.ack_with(jetstream::AckKind::Nak(None)).await.map_err(anyhow::Error::msg)?;
    // Three begun attempts in the ledger, and none ended.
    let subject = bench.model.attempts_subject(&"poison".parse()?);
    bench.context.publish(subject, r#"{"starts":3,"worker":"w-dead"}"#.into()).await?.await?;
    // Delivered five times and begun once: its neighbours died, it did not.
    bench.publish("neighbour", "echo", &[]).await?;
    let subject = bench.model.attempts_subject(&"neighbour".parse()?);
    bench.context.publish(subject, r#"{"starts":1,"worker":"w-dead"}"#.into()).await?.await?;
    let worker = bench.worker("w").await?;
    let (kind, code, message) = bench.failure("poison").await?;
    assert_eq!((kind.as_str(), code), ("dead", ErrorCode::WorkerLost));
    assert!(message.contains("3 attempts of 3") && message.contains("w-dead"), "{message}");
    let neighbour = bench.outcome("neighbour").await?;
    assert_eq!(text(&neighbour, header::OUTCOME), "completed");
    assert_eq!(text(&neighbour, header::ATTEMPT), "2");
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 1, "the poison did not run again");
    bench.until_empty().await
}
