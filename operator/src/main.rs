//! `millrace-operator`: options, connections, the Lease, and then one loop until a signal.
//!
//! It ends with an error when a part that it cannot work without ends, or when the Lease is lost: Kubernetes
//! starts it again, and whoever holds the Lease by then works.

use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Parser;
use futures::future::select_all;
use kube::Client;
use millrace_operator::apply::Applier;
use millrace_operator::caches::{CHANGES_MAX, Caches, ModelKey, Scope};
use millrace_operator::config::{Config, OptionError};
use millrace_operator::controller::{self, Context};
use millrace_operator::lease::Election;
use millrace_operator::load::LoadBook;
use millrace_operator::metrics::OperatorMetrics;
use millrace_operator::queue::QueueClient;
use millrace_operator::status::StatusWriter;
use millrace_operator::wake::Wakes;
use millrace_operator::{server, telemetry};
use millrace_queue::broker::BrokerError;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, watch};

/// Pause between two sweeps of what is remembered of models that are gone.
const SWEEP: Duration = Duration::from_secs(30);
/// Exit codes beside 0 and 1.
const CONFIG_INVALID: u8 = 2;
const BROKER_REFUSED: u8 = 5;
/// How long a reconcile that is under way may take at the end.
const END_TIMEOUT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let config = Config::parse();
    let ended = telemetry::start().and_then(|()| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let ended = runtime.block_on(run(config));
        runtime.shutdown_background();
        ended
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("millrace-operator: {error:#}");
            exit_code(&error)
        }
    }
}

/// As a worker's exit codes: the configuration is wrong, the broker lets nobody in, or anything else.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    let of_broker = |error: &BrokerError| match error {
        BrokerError::Config { .. } => Some(CONFIG_INVALID),
        BrokerError::Refused(_) => Some(BROKER_REFUSED),
        _ => None,
    };
    if error.downcast_ref::<OptionError>().is_some() {
        return CONFIG_INVALID.into();
    }
    error.downcast_ref::<BrokerError>().and_then(of_broker).map_or(ExitCode::FAILURE, ExitCode::from)
}

async fn run(config: Config) -> anyhow::Result<()> {
    config.check()?;
    let stop = stop_signal()?;
    let metrics = Arc::new(OperatorMetrics::new()?);
    let broker = server::BrokerPlace::default();
    let bound = server::listen(config.listen, metrics.clone(), broker.clone()).await;
    let bound = bound.with_context(|| format!("--listen: cannot bind {}", config.listen))?;
    let client = Client::try_default().await.context("the API server's address and credentials")?;
    tracing::info!(listen = %bound, identity = config.identity, "starting");
    let mut election =
        Election::new(client.clone(), &config.lease_namespace, &config.lease_name, &config.identity);
    let lease = format!("{}/{}", config.lease_namespace, config.lease_name);
    let elected = !config.no_leader_election;
    if elected {
        tokio::select! {
            () = election.acquire() => tracing::info!("the Lease is held; beginning"),
            () = stopped(stop.clone()) => return Ok(()),
        }
    }
    metrics.leader.set(1);
    let working = work(config, client, (metrics.clone(), broker), stop);
    let ended = if elected {
        tokio::select! {
            ended = working => ended,
            () = election.hold() => bail!("the Lease {lease} is lost: another operator may work by now"),
        }
    } else {
        working.await
    };
    metrics.leader.set(0);
    if elected {
        election.release().await;
    }
    ended
}

async fn work(
    config: Config,
    client: Client,
    (metrics, broker): (Arc<OperatorMetrics>, server::BrokerPlace),
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let queue = QueueClient::connect(&config).await?;
    let link = broker.get_or_init(|| queue.link().clone()).clone();
    let (changes, receiver) = mpsc::channel(CHANGES_MAX);
    let scope = Scope { client: client.clone(), namespace: config.watch_namespace.clone() };
    let (caches, watches) = Caches::new(&scope, config.pod_monitors, &changes);
    let watches: Vec<_> = watches.into_iter().map(tokio::spawn).collect();
    let load = LoadBook::default();
    let listening = load.clone().listen(queue.client().clone(), config.watch_namespace.clone());
    let (wakes, woken) = Wakes::new(queue.client().clone());
    let connections = queue.connections();
    let context = Arc::new(Context {
        applier: Applier::new(client.clone()),
        status: StatusWriter::new(client.clone(), &config.identity),
        turns: Semaphore::new(config.concurrency.into()),
        states: Mutex::default(),
        config,
        client,
        caches: caches.clone(),
        queue,
        load,
        wakes,
        metrics,
    });
    tokio::select! {
        (ready, ()) = async { tokio::join!(caches.ready(), context.queue.first_connection()) } => ready?,
        () = stopped(stop.clone()) => return Ok(()),
        reason = link.refused() => return Err(BrokerError::Refused(reason).into()),
    }
    let end = stop.clone();
    let reconciling = async {
        tokio::select! {
            () = controller::run(context.clone(), receiver, stopped(stop.clone())) => {}
            () = async { stopped(end).await; tokio::time::sleep(END_TIMEOUT).await } => {
                tracing::warn!("a reconcile still runs {END_TIMEOUT:?} after the signal; ending without it");
            }
        }
        anyhow::Ok(())
    };
    tokio::select! {
        ended = reconciling => ended,
        ended = listening => ended,
        _ = select_all(watches) => bail!("a watch ended"),
        () = forward_wakes(woken, &context, changes.clone()) => bail!("the wakes ended"),
        () = look_again(connections, &context, changes.clone()) => bail!("the connection's events ended"),
        () = sweep(&context) => Ok(()),
        reason = link.refused() => Err(BrokerError::Refused(reason).into()),
    }
}

/// A job has come for a sleeping model.
async fn forward_wakes(
    mut woken: mpsc::Receiver<millrace_crds::names::ModelRef>,
    context: &Context,
    changes: mpsc::Sender<ModelKey>,
) {
    while let Some(model) = woken.recv().await {
        context.metrics.wakes.inc();
        context.wakes.hear(&model);
        if changes.send(controller::key_of(&model)).await.is_err() {
            return;
        }
    }
}

/// After a new connection to the broker, messages may have been missed: look at all models.
async fn look_again(
    mut connections: watch::Receiver<u64>,
    context: &Context,
    changes: mpsc::Sender<ModelKey>,
) {
    while connections.changed().await.is_ok() {
        for model in context.caches.models.state() {
            if changes.send(ModelKey::from_obj(model.as_ref())).await.is_err() {
                return;
            }
        }
    }
}

async fn sweep(context: &Context) {
    loop {
        tokio::time::sleep(SWEEP).await;
        context.forget_gone();
    }
}

fn stop_signal() -> anyhow::Result<watch::Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("ending");
        // The receivers may be gone already.
        let _ = sender.send(true);
        // Kept, so that nobody takes its end for the signal.
        std::future::pending::<()>().await;
    });
    Ok(receiver)
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    if stop.wait_for(|stopped| *stopped).await.is_err() {
        std::future::pending::<()>().await;
    }
}
