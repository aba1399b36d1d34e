//! The whole product with the operator as a pod under its chart's rights, in namespaces where the API server itself
//! demands restricted pods: jobs wake the model and are answered, everything the operator does is allowed, and
//! everything that it is allowed is needed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule, Role};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, PostParams};
use millrace_crds::names::{Class, ModelRef};
use millrace_tests::jobs::{NewJob, OutcomeLog, Pipeline};
use millrace_tests::kube::audit::{self, Right};
use millrace_tests::kube::cluster::{Cluster, ready_reason, reason_of, wait};
use millrace_tests::kube::platform::{BUCKET, NAMESPACE, Platform, RELEASE, S3_SECRET, SYSTEM};
use millrace_tests::kube::programs;
use millrace_tests::kube::timeline::Timeline;
use millrace_tests::tiny;
use serde_json::{Value, json};

const MODEL: &str = "tiny";
const JOBS: usize = 60;
const LIMIT: Duration = Duration::from_secs(120);
/// Flows that must have happened before unused rights mean something.
const ENTRIES_MIN: usize = 50;
/// The model whose queue stays when it goes.
const KEPT: &str = "kept";

fn spec(platform: &Platform) -> Value {
    json!({
        "model": {
            "uri": format!("s3://{BUCKET}/tiny"), "endpoint": platform.s3.endpoint(), "pathStyle": true,
            "credentialsSecretRef": {"name": S3_SECRET}, "revision": "v1", "cacheSize": "1Gi",
        },
        "engine": {"kvCacheBytes": "32Mi", "maxBatchTokens": 256, "threads": 1},
        "queue": {"maxBytes": "16Mi", "onDelete": "Delete"},
        "scaling": {
            "minReplicas": 0, "maxReplicas": 2, "idleAfter": "3s", "stabilization": {"down": "1s"}, "maxStep": 1,
        },
        "drain": {"timeout": "10s"},
    })
}

fn kept(platform: &Platform) -> Value {
    let mut spec = spec(platform);
    spec["queue"]["onDelete"] = json!("Retain");
    spec
}

async fn started(platform: Platform, values: &Value) -> Result<Platform> {
    let folder = tempfile::tempdir()?;
    tiny::write(folder.path(), 1)?;
    platform.upload(folder.path(), "tiny").await?;
    platform.install(values).await?;
    Ok(platform)
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_wake_the_model_under_the_charts_rights() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    define_pod_monitors(&platform.cluster.client()).await?;
    let values = json!({"monitoring": {"podMonitors": true}, "operator": {"pollQueue": "1s"}});
    let platform = started(platform, &values).await?;
    let flows = flows(&platform, NAMESPACE).await;
    flows.with_context(|| platform.why())?;
    let role = Api::<ClusterRole>::all(platform.cluster.client()).get(RELEASE).await?;
    rights(&platform, role.rules.unwrap_or_default()).await
}

/// The operator of one namespace has rights nowhere else: it serves its own namespace and leaves others alone. Its
/// broker takes only TLS and known users, so the workers get in with the Secret that the chart names. It makes
/// PodMonitors from when they are known.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_of_one_namespace_needs_no_other() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let values =
        json!({"scope": "namespace", "monitoring": {"podMonitors": true}, "operator": {"pollQueue": "1s"}});
    let platform = started(Platform::start_secured().await?, &values).await?;
    let cluster = &platform.cluster;
    cluster.apply(NAMESPACE, MODEL, &spec(&platform)).await?;
    let through = async {
        monitored(&platform).await?;
        taken_over(&platform).await?;
        flows(&platform, SYSTEM).await
    };
    through.await.with_context(|| platform.why())?;

    ensure!(cluster.models(NAMESPACE).get(MODEL).await?.status.is_none(), "a model elsewhere was touched");
    let client = cluster.client();
    ensure!(
        Api::<ClusterRole>::all(client.clone()).get_opt(RELEASE).await?.is_none(),
        "a role on the cluster"
    );
    let elsewhere =
        Api::<Deployment>::namespaced(client.clone(), NAMESPACE).list(&Default::default()).await?;
    ensure!(elsewhere.items.is_empty(), "workers elsewhere");
    let role = Api::<Role>::namespaced(client, SYSTEM).get(RELEASE).await?;
    rights(&platform, role.rules.unwrap_or_default()).await
}

/// Without the definition of PodMonitors a model is served, and says that it is not monitored. When the definition
/// comes, so does the PodMonitor.
async fn monitored(platform: &Platform) -> Result<()> {
    let cluster = &platform.cluster;
    cluster.apply(SYSTEM, KEPT, &kept(platform)).await?;
    let degraded = |reason: &'static str| {
        move |status: &_| {
            ready_reason(status).as_deref() == Some("ScaledToZero")
                && reason_of(status, "Degraded").as_deref() == Some(reason)
        }
    };
    cluster.wait_status((SYSTEM, KEPT), "unmonitored", LIMIT, degraded("PodMonitorsUndefined")).await?;
    let events: Api<Event> = Api::namespaced(cluster.client(), SYSTEM);
    let told = async || {
        let list = events.list(&Default::default()).await?;
        let told = |event: &Event| event.reason.as_deref() == Some("PodMonitorsUndefined");
        Ok(list.items.iter().any(told).then_some(()))
    };
    wait("event", LIMIT, told).await?;

    define_pod_monitors(&cluster.client()).await?;
    let monitors: Api<DynamicObject> = Api::namespaced_with(cluster.client(), SYSTEM, &pod_monitor_kind());
    let made = async || Ok((monitors.list(&Default::default()).await?.items.len() == 1).then_some(()));
    wait("PodMonitor", LIMIT, made).await?;
    cluster.wait_status((SYSTEM, KEPT), "monitored", LIMIT, degraded("AsExpected")).await?;
    Ok(())
}

/// A model that is deleted with `queue.onDelete: Retain` leaves streams, consumers and jobs to the next of its name.
async fn taken_over(platform: &Platform) -> Result<()> {
    let cluster = &platform.cluster;
    let queue = Pipeline::connect(&cluster.nats, &ModelRef::new(SYSTEM, KEPT)?).await?;
    let jobs: Vec<NewJob> =
        (0..JOBS).map(|at| NewJob::completion(&format!("kept-{at}"), "stay", 32)).collect();
    let (before, after) = jobs.split_at(JOBS / 2);
    queue.publish_all(before).await?;
    queue.wait_stored(1, LIMIT).await?;
    let consumer = consumer_created(cluster, KEPT).await?;
    cluster.models(SYSTEM).delete(KEPT, &DeleteParams::default()).await?;
    let gone = async || Ok(cluster.models(SYSTEM).get_opt(KEPT).await?.is_none().then_some(()));
    wait("end of the model", LIMIT, gone).await?;
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), SYSTEM);
    let ended = async || Ok(deployments.get_opt(&format!("{KEPT}-worker")).await?.is_none().then_some(()));
    wait("end of the workers", LIMIT, ended).await?;
    // Nobody is there, and the queue still takes jobs.
    queue.publish_all(after).await?;
    ensure!(queue.jobs_left().await? >= after.len() as u64, "jobs vanished with the model");

    cluster.apply(SYSTEM, KEPT, &kept(platform)).await?;
    let mut record = OutcomeLog::default();
    record.wait(&queue, JOBS, LIMIT).await?;
    record.check(&queue, &jobs).await?;
    ensure!(record.kinds() == [JOBS, 0, 0], "{:?}", record.kinds());
    ensure!(consumer_created(cluster, KEPT).await? == consumer, "the consumer was made anew");
    cluster.models(SYSTEM).delete(KEPT, &DeleteParams::default()).await?;
    wait("end of the workers", LIMIT, ended).await
}

/// When the consumer of a model's normal jobs was made.
async fn consumer_created(cluster: &Cluster, model: &str) -> Result<String> {
    let model = ModelRef::new(SYSTEM, model)?;
    let jetstream = async_nats::jetstream::new(cluster.nats.connect().await?);
    let stream = jetstream.get_stream(model.jobs_stream()).await?;
    let info = stream.consumer_info(model.consumer(Class::Normal)).await?;
    Ok(info.created.to_string())
}

fn pod_monitor_kind() -> ApiResource {
    let kind = GroupVersionKind::gvk("monitoring.coreos.com", "v1", "PodMonitor");
    ApiResource::from_gvk_with_plural(&kind, "podmonitors")
}

/// Makes PodMonitors known, with no more than what can be seen of them here.
async fn define_pod_monitors(client: &kube::Client) -> Result<()> {
    let definition = json!({
        "metadata": {"name": "podmonitors.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com", "scope": "Namespaced",
            "names": {"kind": "PodMonitor", "plural": "podmonitors"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object", "x-kubernetes-preserve-unknown-fields": true,
            }}}],
        },
    });
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    definitions.create(&PostParams::default(), &serde_json::from_value(definition)?).await?;
    let monitors: Api<DynamicObject> = Api::all_with(client.clone(), &pod_monitor_kind());
    wait("served PodMonitors", LIMIT, async || Ok(monitors.list(&Default::default()).await.ok())).await?;
    Ok(())
}

/// All that an InferenceModel can go through.
async fn flows(platform: &Platform, namespace: &str) -> Result<()> {
    let cluster = &platform.cluster;
    let mut spec = spec(platform);
    cluster.apply(namespace, MODEL, &spec).await?;
    let timeline = Timeline::start(&cluster.client(), namespace, MODEL, false);
    let asleep = |seen: &millrace_tests::kube::timeline::TimelineSeen| {
        seen.asked == 0
            && seen.status.replicas == 0
            && ready_reason(&seen.status).as_deref() == Some("ScaledToZero")
    };
    timeline.wait("asleep", LIMIT, asleep).await?;

    let queue = Pipeline::connect(&cluster.nats, &ModelRef::new(namespace, MODEL)?).await?;
    let jobs: Vec<NewJob> =
        (0..JOBS).map(|at| NewJob::completion(&format!("job-{at}"), "wake up", 8)).collect();
    let published = Instant::now();
    queue.publish_all(&jobs).await?;
    let mut record = OutcomeLog::default();
    record.wait(&queue, JOBS, LIMIT).await?;
    record.check(&queue, &jobs).await?;
    ensure!(record.kinds() == [JOBS, 0, 0], "{:?}", record.kinds());
    let woken = timeline.seen().woken.context("never woken")?;
    eprintln!("woken after {:?}, {JOBS} results after {:?}", woken - published, published.elapsed());
    timeline.wait("back at zero", LIMIT, asleep).await?;

    // Two workers and one again: the one to go is marked.
    spec["scaling"]["minReplicas"] = json!(2);
    cluster.apply(namespace, MODEL, &spec).await?;
    timeline.wait("two workers", LIMIT, |seen| seen.status.ready_replicas == 2).await?;
    spec["scaling"]["minReplicas"] = json!(1);
    cluster.apply(namespace, MODEL, &spec).await?;
    timeline.wait("one worker", LIMIT, |seen| seen.asked == 1 && seen.status.replicas == 1).await?;

    // Its own service account is no longer wanted.
    spec["template"] = json!({"serviceAccountName": "default"});
    cluster.apply(namespace, MODEL, &spec).await?;

    // Somebody deletes a stream, twice: it is made again, and told.
    let jetstream = async_nats::jetstream::new(cluster.nats.connect().await?);
    let stream = ModelRef::new(namespace, MODEL)?.dead_stream();
    for _ in 0..2 {
        jetstream.delete_stream(&stream).await?;
        wait("repaired stream", LIMIT, async || Ok(jetstream.get_stream(&stream).await.ok().map(drop)))
            .await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
    }

    cluster.models(namespace).delete(MODEL, &DeleteParams::default()).await?;
    let ending = |status: &_| reason_of(status, "Ready").as_deref() == Some("Deleting");
    cluster.wait_status((namespace, MODEL), "ending", LIMIT, ending).await?;
    let gone = async || Ok(cluster.models(namespace).get_opt(MODEL).await?.is_none().then_some(()));
    wait("end of the model", LIMIT, gone).await?;
    ensure!(jetstream.get_stream(&stream).await.is_err(), "the queue was to be deleted with the model");
    Ok(())
}

/// Nothing that the operator did was denied, all of it by the chart's rules, and nothing that it may do is idle.
async fn rights(platform: &Platform, rules: Vec<PolicyRule>) -> Result<()> {
    let entries = audit::read(&platform.cluster.plane.audit_log())?;
    ensure!(entries.len() >= ENTRIES_MIN, "{} requests in the audit log", entries.len());
    let denied: BTreeSet<String> = entries
        .iter()
        .filter(|entry| entry.code() == 403)
        .map(|entry| format!("{} {}", entry.verb, entry.uri))
        .collect();
    ensure!(denied.is_empty(), "denied: {denied:#?}");
    let used = audit::rights_used(&entries);
    let lease =
        Api::<Role>::namespaced(platform.cluster.client(), SYSTEM).get(&format!("{RELEASE}-lease")).await?;
    let rules = rules.iter().chain(lease.rules.iter().flatten());
    let granted: BTreeSet<Right> = rules.flat_map(rights_of).collect();
    let unused: Vec<&Right> = granted.difference(&used).collect();
    ensure!(unused.is_empty(), "granted and never used: {unused:#?}");
    let beyond: Vec<&Right> = used.difference(&granted).collect();
    ensure!(beyond.is_empty(), "used without the chart's rules: {beyond:#?}");
    eprintln!("{} requests, {} rights granted, all used and no others", entries.len(), granted.len());
    Ok(())
}

fn rights_of(rule: &PolicyRule) -> Vec<Right> {
    let mut rights = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            for verb in &rule.verbs {
                rights.push((group.clone(), resource.clone(), verb.clone()));
            }
        }
    }
    rights
}
