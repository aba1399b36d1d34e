//! The real operator at a real API server: it is quiet when nothing changes, wakes a sleeping model at once, and
//! carries many models cheaply. No node runs here: what is looked at are the operator's decisions and writes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use kube::api::{DeleteParams, PostParams};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, ResourceExt};
use millrace_crds::model::reason::Reason;
use millrace_crds::model::status::InferenceModelStatus;
use millrace_crds::names::{Class, ModelRef};
use millrace_tests::kube::audit::{self, AuditEntry};
use millrace_tests::kube::cluster::{Cluster, OPERATOR_USER, ready_reason, wait};
use millrace_tests::kube::control_plane::ControlPlaneOptions;
use millrace_tests::kube::operator::Operator;
use millrace_tests::kube::programs;
use serde_json::{Value, json};

/// The bars.
const WAKE_P99: Duration = Duration::from_secs(2);
const SETTLED_LIMIT: Duration = Duration::from_secs(60);
const MEMORY_MAX: u64 = 150 << 20;
const PROCESSOR_SHARE_MAX: f64 = 0.05;
const QUIET_RECONCILES: f64 = 100.0;

/// Models in the run that every test run makes, and in the long one.
const MODELS: usize = 100;
const MODELS_LONG: usize = 500;
/// Models that are woken; the 99th percentile is the second slowest.
const WOKEN: usize = 100;
/// Requests of the test at once.
const PARALLEL: usize = 16;
/// How long the idle operator is measured.
const IDLE: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(60);

fn sleeping() -> Value {
    json!({
        "model": {"uri": "s3://models/tiny"},
        "scaling": {"minReplicas": 0, "maxReplicas": 2},
        "queue": {"maxBytes": "1Mi"},
    })
}

/// Writes to objects: leases and events are not part of any object's state.
fn writes(entries: &[AuditEntry]) -> Vec<String> {
    let object = |entry: &AuditEntry| {
        entry.object_ref.as_ref().map(|object| object.resource.clone()).unwrap_or_default()
    };
    entries
        .iter()
        .filter(|entry| entry.is_write() && !matches!(object(entry).as_str(), "leases" | "events"))
        .map(|entry| format!("{} {} {}", entry.verb, entry.uri, entry.code()))
        .collect()
}

/// Settled objects cost no write, however often they are looked at.
#[tokio::test(flavor = "multi_thread")]
async fn a_settled_model_is_not_written() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let options = ControlPlaneOptions {
        audit_rules: Some(audit::rule_for(OPERATOR_USER)),
        ..ControlPlaneOptions::default()
    };
    let cluster = Cluster::start(&options).await?;
    cluster.namespace("quiet", &[]).await?;
    let operator =
        cluster.operator(&["--poll-active", "100ms", "--poll-idle", "100ms", "--poll-queue", "1s"])?;
    cluster.apply("quiet", "asleep", &sleeping()).await?;
    let mut fixed = sleeping();
    fixed.as_object_mut().map(|spec| spec.remove("scaling"));
    fixed["replicas"] = json!(1);
    cluster.apply("quiet", "fixed", &fixed).await?;
    let asleep = |status: &_| ready_reason(status).as_deref() == Some("ScaledToZero");
    cluster
        .wait_status(("quiet", "asleep"), "asleep", LIMIT, asleep)
        .await
        .with_context(|| operator.log_tail())?;
    // Its pod stays pending, since there is no node; all that the operator can do is done then.
    cluster.wait_status(("quiet", "fixed"), "deployed", LIMIT, |status| status.desired_replicas == 1).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;

    let before = writes(&audit::read(&cluster.plane.audit_log())?).len();
    ensure!(before > 0, "the audit log holds none of the operator's writes: it proves nothing");
    let reconciles = || operator.metric("millrace_operator_reconcile_total");
    let start = reconciles()?;
    let began = Instant::now();
    while reconciles()? < start + QUIET_RECONCILES {
        ensure!(began.elapsed() < LIMIT, "{} reconciles in {LIMIT:?}", reconciles()? - start);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let counted = reconciles()? - start;
    let all = writes(&audit::read(&cluster.plane.audit_log())?);
    ensure!(all.len() == before, "{counted} reconciles wrote {:#?}", &all[before..]);
    eprintln!("{counted} reconciles of settled models, 0 writes ({before} before)");
    Ok(())
}

/// The ack wait of each consumer of a model, if they are all the same.
async fn ack_wait(cluster: &Cluster, model: &ModelRef) -> Result<Option<Duration>> {
    let jetstream = async_nats::jetstream::new(cluster.nats.connect().await?);
    let Ok(stream) = jetstream.get_stream(model.jobs_stream()).await else { return Ok(None) };
    let mut waits = Vec::new();
    for class in Class::ALL {
        let Ok(info) = stream.consumer_info(model.consumer(class)).await else { return Ok(None) };
        waits.push(info.config.ack_wait);
    }
    waits.dedup();
    Ok((waits.len() == 1).then(|| waits[0]))
}

/// The pods' template of the model `m`, and its revision, once the operator has made it.
async fn template(cluster: &Cluster) -> Result<Option<(PodTemplateSpec, String)>> {
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), "default");
    let Some(found) = deployments.get_opt("m-worker").await? else { return Ok(None) };
    let template = found.spec.context("a spec")?.template;
    let annotations = template.metadata.as_ref().and_then(|meta| meta.annotations.as_ref());
    let revision = annotations.and_then(|map| map.get("millrace.dev/revision")).cloned();
    Ok(Some((template, revision.context("a revision")?)))
}

/// Waits for a template that is of none of these revisions, and makes a pod of it, as a Deployment's controller would.
async fn make_pod(cluster: &Cluster, name: &str, former: &[String]) -> Result<String> {
    let other = async || Ok(template(cluster).await?.filter(|(_, revision)| !former.contains(revision)));
    let (template, revision) = wait("template of a new revision", LIMIT, other).await?;
    let meta = template.metadata.unwrap_or_default();
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": meta.labels, "annotations": meta.annotations}, "spec": template.spec,
    }))?;
    Api::namespaced(cluster.client(), "default").create(&PostParams::default(), &pod).await?;
    Ok(revision)
}

/// Workers that run send their keep-alives at the pace of the ack wait with which they were started. A longer one holds
/// for their jobs at once, a shorter one only when the last of them is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_shorter_ack_wait_waits_for_the_workers_that_run() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let cluster =
        Cluster::start(&ControlPlaneOptions { api_only: true, ..ControlPlaneOptions::default() }).await?;
    let poll = ["--no-leader-election", "--poll-active", "100ms", "--poll-queue", "500ms"];
    let operator = cluster.operator(&poll)?;
    let model = ModelRef::new("default", "m")?;
    let set = async |wait: &str| {
        let spec = json!({"model": {"uri": "s3://models/tiny"}, "replicas": 1,
            "queue": {"maxBytes": "1Mi", "ackWait": wait}});
        cluster.apply("default", "m", &spec).await
    };
    let is = async |seconds: u64| {
        let wanted = Some(Duration::from_secs(seconds));
        let reached = async || Ok((ack_wait(&cluster, &model).await? == wanted).then_some(()));
        wait("ack wait", LIMIT, reached)
            .await
            .with_context(|| format!("{seconds} s\n{}", operator.log_tail()))
    };
    set("2m").await?;
    is(120).await?;
    let first = make_pod(&cluster, "first", &[]).await?;

    set("4m").await?;
    is(240).await?;
    let second = make_pod(&cluster, "second", std::slice::from_ref(&first)).await?;
    set("1m").await?;
    // The Deployment follows the spec; the consumers do not, for as long as an old pod is there.
    make_pod(&cluster, "third", &[first, second]).await?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    ensure!(ack_wait(&cluster, &model).await? == Some(Duration::from_secs(240)), "{}", operator.log_tail());
    let pods: Api<Pod> = Api::namespaced(cluster.client(), "default");
    for name in ["first", "second"] {
        pods.delete(name, &DeleteParams::default().grace_period(0)).await?;
    }
    is(60).await
}

/// A queue that goes with its model waits for the broker, and the model says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_waits_for_the_broker_says_so() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let mut cluster = Cluster::start(&ControlPlaneOptions::default()).await?;
    cluster.namespace("ending", &[]).await?;
    let operator = cluster.operator(&["--no-leader-election", "--poll-idle", "1s"])?;
    let mut spec = sleeping();
    spec["queue"]["onDelete"] = json!("Delete");
    cluster.apply("ending", "m", &spec).await?;
    let asleep = |status: &_| ready_reason(status).as_deref() == Some("ScaledToZero");
    let settled = cluster.wait_status(("ending", "m"), "asleep", LIMIT, asleep).await;
    settled.with_context(|| operator.log_tail())?;

    cluster.nats.kill()?;
    cluster.models("ending").delete("m", &DeleteParams::default()).await?;
    let waits = |status: &InferenceModelStatus| {
        status.conditions.iter().any(|condition| {
            condition.reason == Reason::Deleting && condition.message.contains("streams cannot be deleted")
        })
    };
    let told = cluster.wait_status(("ending", "m"), "waiting for the broker", LIMIT, waits).await;
    told.with_context(|| operator.log_tail())?;

    cluster.nats.restart()?;
    let gone = async || Ok(cluster.models("ending").get_opt("m").await?.is_none().then_some(()));
    wait("end of the model", LIMIT, gone).await.with_context(|| operator.log_tail())?;
    let jetstream = async_nats::jetstream::new(cluster.nats.connect().await?);
    let stream = ModelRef::new("ending", "m")?.jobs_stream();
    ensure!(jetstream.get_stream(&stream).await.is_err(), "the queue was to be deleted with the model");
    Ok(())
}

/// Many sleeping models: settled soon, cheap while asleep, and each awake within two seconds of its first job.
#[tokio::test(flavor = "multi_thread")]
async fn many_models_sleep_cheaply_and_wake_fast() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let count = if std::env::var_os("MILLRACE_SOAK").is_some() { MODELS_LONG } else { MODELS };
    let cluster =
        Cluster::start(&ControlPlaneOptions { api_only: true, ..ControlPlaneOptions::default() }).await?;
    let names: Vec<String> = (0..count).map(|at| format!("model-{at:03}")).collect();
    let made = |name: &String| {
        let (cluster, name) = (&cluster, name.clone());
        async move { cluster.apply("default", &name, &sleeping()).await }
    };
    stream::iter(&names).map(made).buffer_unordered(PARALLEL).try_for_each(|_| async { Ok(()) }).await?;

    let start = Instant::now();
    let operator = cluster.operator(&["--no-leader-election"])?;
    for name in &names {
        let asleep = |status: &_| ready_reason(status).as_deref() == Some("ScaledToZero");
        let left = (2 * SETTLED_LIMIT).saturating_sub(start.elapsed());
        let settled = cluster.wait_status(("default", name), "asleep", left, asleep).await;
        settled.with_context(|| operator.log_tail())?;
    }
    let settled = start.elapsed();
    let share = idle_share(&operator).await?;
    let waits = wake(&cluster, &names[..WOKEN]).await.with_context(|| operator.log_tail())?;
    let (_, memory) = operator.memory()?;
    let (p50, p99) = (waits[waits.len() / 2], waits[waits.len() * 99 / 100 - 1]);
    let line = json!({
        "models": count, "settled_s": settled.as_secs_f64(), "memory_mib": memory >> 20, "idle_cpu_share": share,
        "woken": waits.len(), "wake_over_1s": waits.iter().filter(|wait| wait.as_secs() >= 1).count(),
        "wake_p50_ms": p50.as_millis() as u64, "wake_p99_ms": p99.as_millis() as u64,
    });
    eprintln!("{line}");
    ensure!(settled <= SETTLED_LIMIT && memory <= MEMORY_MAX && share <= PROCESSOR_SHARE_MAX, "{line}");
    ensure!(p99 <= WAKE_P99, "{line}");
    Ok(())
}

/// The share of one core that the operator uses while all models sleep.
async fn idle_share(operator: &Operator) -> Result<f64> {
    let (before, start) = (operator.processor_s()?, Instant::now());
    tokio::time::sleep(IDLE).await;
    Ok((operator.processor_s()? - before) / start.elapsed().as_secs_f64())
}

/// Publishes one job for each model and returns the sorted times until its Deployment was given a worker.
async fn wake(cluster: &Cluster, names: &[String]) -> Result<Vec<Duration>> {
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), "default");
    let mut events = std::pin::pin!(watcher(deployments, watcher::Config::default()));
    // All are known first, so that what comes later is a change.
    while !matches!(events.try_next().await?.context("the watch ended")?, Event::InitDone) {}
    let jetstream = async_nats::jetstream::new(cluster.nats.connect().await?);
    let published = async {
        let mut times = BTreeMap::new();
        for name in names {
            let subject = ModelRef::new("default", name)?.jobs_subject(Class::Normal);
            times.insert(name.clone(), Instant::now());
            jetstream.publish(subject, r#"{"prompt":"wake"}"#.into()).await?.await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(times)
    };
    let woken = async {
        let mut times: BTreeMap<String, Instant> = BTreeMap::new();
        while times.len() < names.len() {
            let event = events.try_next().await?.context("the watch ended")?;
            if let Event::Apply(deployment) = event
                && deployment.spec.as_ref().is_some_and(|spec| spec.replicas.unwrap_or(0) > 0)
                && let Some(model) = deployment.labels().get("millrace.dev/model")
            {
                times.entry(model.clone()).or_insert_with(Instant::now);
            }
        }
        anyhow::Ok(times)
    };
    let (published, woken) =
        tokio::time::timeout(LIMIT, async { tokio::try_join!(published, woken) }).await??;
    let mut waits: Vec<Duration> = Vec::new();
    for (name, at) in &published {
        let woken = woken.get(name).with_context(|| format!("{name} was not woken"))?;
        waits.push(woken.duration_since(*at));
    }
    waits.sort();
    Ok(waits)
}
