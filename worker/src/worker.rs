//! `millrace-worker serve`: from a configuration file to a worker that takes jobs, and to its end.
//!
//! Order: configuration, own pages, then the broker and the weights side by side, the engine, a warm-up
//! that must repeat itself, and only then jobs. Each phase is timed; its durations are logged, reported and
//! counted. The first SIGTERM or SIGINT drains, the second ends the process at once, which is safe at any
//! moment.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use millrace_crds::config::WorkerConfig;
use millrace_crds::load::{ColdStart, Phase};
use millrace_crds::names::SubjectToken;
use millrace_engine::schedule::handle::EngineHandle;
use millrace_engine::schedule::request::{Event, Request, Sampling};
use millrace_queue::broker::{Broker, BrokerError};
use millrace_queue::claim::Claims;
use millrace_queue::monitor::{self, Fsync};
use millrace_queue::provision::{Mode, Provisioned, provision};
use millrace_queue::store::{Store, StoreError};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::broken::Broken;
use crate::health::Health;
use crate::load::{self, Model};
use crate::metrics::WorkerMetrics;
use crate::report::{CurrentPhase, Reporter};
use crate::run::EngineRun;
use crate::serve::{LineParts, ServingLine, serve};
use crate::watchdog::{self, Watch};
use crate::weights::{Folder, PullError};
use crate::{config, failpoint, telemetry, weights};

/// Threads of the async side. The engine has its own; the queue's work is small beside it.
const ASYNC_THREADS: usize = 2;
/// Tokens of the warm-up's prompt, if the model takes as many.
const WARM_UP_PROMPT: u32 = 32;
/// Tokens that the warm-up generates.
const WARM_UP_OUTPUT: u32 = 4;
/// How long one warm-up run may take.
const WARM_UP_TIMEOUT: Duration = Duration::from_secs(300);
/// How long an object store that does not answer is waited for; the process then ends with the reason.
const PULL_PATIENCE: Duration = Duration::from_secs(600);
/// Pause before the second pull, and the end of its doubling.
const PULL_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Random characters in a worker's name: two of a billion rarely share one.
const NAME_RANDOM_CHARS: usize = 6;

/// Arguments of `serve`.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// The configuration file (YAML).
    #[arg(long, value_name = "FILE", env = "MILLRACE_CONFIG")]
    pub config: PathBuf,
    /// The worker's name in records and reports; the host's name and some random letters if absent.
    #[arg(long, value_name = "NAME")]
    pub name: Option<SubjectToken>,
    /// The address of the worker's own pages, in place of the one in `server.listen`; the port stays.
    #[arg(long, value_name = "IP", env = "MILLRACE_LISTEN_ADDRESS")]
    pub listen_address: Option<IpAddr>,
}

/// Runs until it is drained.
///
/// # Errors
/// When the configuration, the weights, the engine or the broker refuse to start, or the engine stops.
pub fn run(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    telemetry::start().map_err(anyhow::Error::msg)?;
    let broken = Broken::default();
    telemetry::abort_on_panic(broken.clone());
    failpoint::arm().map_err(anyhow::Error::msg)?;
    let mut config = config::read(&args.config)?;
    if let Some(address) = args.listen_address {
        config.server.listen.set_ip(address);
    }
    let name = args.name.clone().unwrap_or_else(worker_name);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(ASYNC_THREADS)
        .thread_name("async")
        .enable_all()
        .build()?;
    let ended = runtime.block_on(Start::new(config, name, (started, broken)).go());
    // What still runs there (a stuck transfer, a lookup) must not hold up the end.
    runtime.shutdown_background();
    ended.map(|()| ExitCode::SUCCESS)
}

/// What exists from the first moment.
#[derive(Debug)]
struct Start {
    config: WorkerConfig,
    name: SubjectToken,
    started: Instant,
    metrics: Arc<WorkerMetrics>,
    watch: Watch,
    broken: Broken,
    health: Health,
    phase: CurrentPhase,
}

impl Start {
    fn new(config: WorkerConfig, name: SubjectToken, (started, broken): (Instant, Broken)) -> Self {
        let metrics = Arc::new(WorkerMetrics::new(&config.model_ref()));
        let watch = Watch::default();
        let health = Health::new(metrics.clone(), watch.clone());
        Self { config, name, started, metrics, watch, broken, health, phase: CurrentPhase::default() }
    }

    async fn go(self) -> anyhow::Result<()> {
        let drain = CancellationToken::new();
        listen_for_signals(drain.clone())?;
        let listen = self.config.server.listen;
        let bound = self.health.clone().listen(listen).await;
        let bound = bound.with_context(|| format!("server.listen: cannot bind {listen}"))?;
        tracing::info!(worker = %self.name, model = %self.config.model_ref(), listen = %bound, "starting");
        let line = tokio::select! {
            line = self.make_ready() => line?,
            () = drain.cancelled() => {
                tracing::info!("ended before it was ready");
                return Ok(());
            }
        };
        let draining = {
            let (drain, health, phase) = (drain.clone(), self.health.clone(), self.phase.clone());
            async move {
                drain.cancelled().await;
                health.set_draining();
                phase.set(Phase::Draining);
            }
        };
        tokio::spawn(draining);
        tokio::select! {
            served = serve(&line, &drain, self.config.drain.timeout.0) => served?,
            // What is held comes again elsewhere: nothing of it can be told to this broker.
            reason = line.broker.link().refused() => return Err(BrokerError::Refused(reason).into()),
        }
        tracing::info!(uptime_s = self.started.elapsed().as_secs_f64(), "drained");
        Ok(())
    }

    async fn make_ready(&self) -> anyhow::Result<Arc<ServingLine<EngineRun>>> {
        let broker = Broker::connect(&self.config.nats, &self.config.model_ref(), &self.name).await?;
        self.health.set_broker(broker.clone());
        tokio::spawn(self.reporter(broker.clone()).run());
        let connecting = async {
            broker.ready().await;
            let connected = self.started.elapsed();
            self.check_broker(&broker).await?;
            anyhow::Ok(connected)
        };
        let pulling = async {
            let began = Instant::now();
            let folder = self.pull().await?;
            tracing::info!(bytes = folder.bytes, pulled_bytes = folder.pulled_bytes, "weights are here");
            anyhow::Ok((folder, began.elapsed()))
        };
        let (connected, (folder, pulled)) = tokio::select! {
            ready = async { tokio::try_join!(connecting, pulling) } => ready?,
            reason = broker.link().refused() => return Err(BrokerError::Refused(reason).into()),
        };
        self.phase.set(Phase::Loading);
        let began = Instant::now();
        let model = load::load(&self.config, folder).await?;
        let loaded = began.elapsed();
        self.health.set_engine(model.engine.clone());
        self.health.set_model_digest(model.digest.clone());
        let began = Instant::now();
        warm_up(&model.engine).await?;
        let ms = |duration: Duration| duration.as_secs_f64() * 1000.0;
        let cold_start = ColdStart {
            connect_ms: ms(connected),
            pull_ms: ms(pulled),
            load_ms: ms(loaded),
            warm_up_ms: ms(began.elapsed()),
            total_ms: ms(self.started.elapsed()),
        };
        self.begin(broker, model, cold_start).await
    }

    /// The weights, as soon as the object store gives them: a store that is away for a while is waited for,
    /// what is wrong with the model itself ends the start at once.
    async fn pull(&self) -> Result<Folder, PullError> {
        let (began, mut pause) = (Instant::now(), PULL_PAUSE.0);
        loop {
            match weights::pull(&self.config.model).await {
                Err(PullError::Store(error @ StoreError::Service { .. }))
                    if began.elapsed() < PULL_PATIENCE =>
                {
                    let pause_s = pause.as_secs_f64();
                    tracing::warn!(%error, pause_s, "the model cannot be pulled yet");
                    self.health.set_waiting(Some(error.to_string()));
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PULL_PAUSE.1);
                }
                ended => {
                    self.health.set_waiting(None);
                    return ended;
                }
            }
        }
    }

    async fn begin(
        &self,
        broker: Broker,
        model: Model,
        cold_start: ColdStart,
    ) -> anyhow::Result<Arc<ServingLine<EngineRun>>> {
        let engine = model.engine.clone();
        let steps = move || millrace_engine::schedule::handle::EngineLoad::get(&engine.load().steps);
        let limit = self.config.engine.step_timeout.0;
        watchdog::start(self.watch.clone(), self.broken.clone(), limit, steps)?;
        let line = ServingLine::new(LineParts {
            run: EngineRun::new(model.text, model.engine),
            broker,
            model: self.config.model_ref(),
            worker: self.name.clone(),
            digest: model.digest,
            queue: self.config.queue.clone(),
            outcome_ttl: self.config.results.ttl.0,
            claims: self.claims().await?,
            metrics: self.metrics.clone(),
            watch: self.watch.clone(),
            trouble: self.health.pull_trouble(),
            broken: self.broken.clone(),
        });
        self.health.set_warm(cold_start);
        self.phase.set(Phase::Ready);
        tracing::info!(
            connect_ms = cold_start.connect_ms,
            pull_ms = cold_start.pull_ms,
            load_ms = cold_start.load_ms,
            warm_up_ms = cold_start.warm_up_ms,
            total_ms = cold_start.total_ms,
            "ready"
        );
        Ok(line)
    }

    async fn claims(&self) -> anyhow::Result<Claims> {
        let results = &self.config.results;
        let inline = results.inline_bytes_max.0;
        match &results.object_store {
            None => Ok(Claims::without_store(inline)),
            Some(place) => {
                let store = Store::connect(&place.store).await.context("results.objectStore.store")?;
                Ok(Claims::new(Arc::new(store), &place.uri, inline))
            }
        }
    }

    fn reporter(&self, broker: Broker) -> Reporter {
        Reporter {
            broker,
            model: self.config.model_ref(),
            worker: self.name.clone(),
            metrics: self.metrics.clone(),
            phase: self.phase.clone(),
            started: self.started,
            health: self.health.clone(),
        }
    }

    /// What the promises need of the broker: a policy of fsync, and the model's streams and consumers.
    async fn check_broker(&self, broker: &Broker) -> anyhow::Result<()> {
        let nats = &self.config.nats;
        match &nats.monitor {
            Some(address) => match monitor::fsync(address).await {
                Ok(Fsync::Always) => tracing::info!("the broker fsyncs each write"),
                Ok(Fsync::Every(interval)) => tracing::warn!(
                    interval,
                    "the broker acknowledges before it fsyncs; set jetstream.sync_interval to always, or a \
                     power cut loses jobs"
                ),
                Err(error) => tracing::warn!(error, "the broker's fsync policy is unknown"),
            },
            None => tracing::info!("nats.monitor is not set: the broker's fsync policy is not checked"),
        }
        if !nats.provision {
            return Ok(());
        }
        let context = broker.link().jetstream();
        let (model, queue, results) = (self.config.model_ref(), &self.config.queue, &self.config.results);
        for item in provision(&context, &model, queue, results, Mode::Create).await? {
            match item.state {
                Provisioned::Same | Provisioned::Updated(_) => {}
                Provisioned::Differs(drift) => {
                    tracing::warn!(name = item.name, ?drift, "differs from its settings")
                }
                state => tracing::info!(name = item.name, ?state, "provisioned"),
            }
        }
        Ok(())
    }
}

/// The same tokens twice, the second time over the prefix cache: a device that computes wrongly, or one
/// result in one way and another in another, must not take jobs.
async fn warm_up(engine: &EngineHandle) -> anyhow::Result<()> {
    let limits = engine.limits();
    let length = WARM_UP_PROMPT.min(limits.max_model_len.saturating_sub(WARM_UP_OUTPUT)).max(1);
    let request = Request {
        prompt: (0..length).map(|n| n.wrapping_mul(7919) % limits.vocabulary.max(1)).collect(),
        max_tokens: WARM_UP_OUTPUT.min(limits.max_model_len.saturating_sub(length)).max(1),
        stop_tokens: Vec::new(),
        sampling: Sampling::default(),
        seed: 0,
    };
    let first = tokens_of(engine, request.clone()).await?;
    let second = tokens_of(engine, request).await?;
    ensure!(first == second, "the warm-up gave {first:?} and then {second:?}: the engine computes wrongly");
    Ok(())
}

async fn tokens_of(engine: &EngineHandle, request: Request) -> anyhow::Result<Vec<u32>> {
    let generating = async {
        let mut generation = engine.submit(request).await?;
        let mut tokens = Vec::new();
        while let Some(event) = generation.next().await {
            match event {
                Event::Token(token) => tokens.push(token.id),
                Event::Finished(..) => return Ok(tokens),
                Event::Failed(message) => bail!("the warm-up failed: {message}"),
            }
        }
        bail!("the engine stopped during the warm-up")
    };
    tokio::time::timeout(WARM_UP_TIMEOUT, generating)
        .await
        .with_context(|| format!("no end of the warm-up after {} s", WARM_UP_TIMEOUT.as_secs()))?
}

fn listen_for_signals(drain: CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if drain.is_cancelled() {
                tracing::warn!("a second signal: ending at once; what is held will be delivered again");
                std::process::exit(1);
            }
            drain.cancel();
        }
    });
    Ok(())
}

/// The host's name, as far as it fits into a token, and a few random letters.
fn worker_name() -> SubjectToken {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name_from(host.trim(), &random_letters())
}

fn name_from(host: &str, letters: &str) -> SubjectToken {
    let room = millrace_crds::names::TOKEN_BYTES_MAX - letters.len() - 1;
    let clean: String = host
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(room)
        .collect();
    let clean = clean.trim_matches('-');
    let host = if clean.is_empty() { "worker" } else { clean };
    format!("{host}-{letters}").parse().expect("letters, digits and inner dashes")
}

fn random_letters() -> String {
    use std::hash::{BuildHasher, Hasher};
    // The standard library seeds each of these from the system's randomness.
    let mut random = std::collections::hash_map::RandomState::new().build_hasher().finish();
    let mut letters = String::with_capacity(NAME_RANDOM_CHARS);
    for _ in 0..NAME_RANDOM_CHARS {
        letters.push(char::from(b'a' + (random % 26) as u8));
        random /= 26;
    }
    letters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_tokens() {
        let cases = [
            ("node-1.example.com", "node-1-example-com-abc"),
            ("", "worker-abc"),
            ("--", "worker-abc"),
            ("Müller", "m-ller-abc"),
        ];
        for (host, expected) in cases {
            assert_eq!(name_from(host, "abc").as_str(), expected);
        }
        assert_eq!(name_from(&"x".repeat(100), "abc").as_str().len(), 63);
        assert_ne!(random_letters(), random_letters());
    }
}
