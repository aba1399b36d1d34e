//! The whole product with the operator as a pod under its chart's rights, in namespaces where the API server itself
//! demands restricted pods: jobs wake the model and are answered, everything the operator does is allowed, and
//! everything that it is allowed is needed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule, Role};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, PostParams};
use millrace_crds::names::ModelRef;
use millrace_tests::jobs::{Job, Queue, Record};
use millrace_tests::kube::audit::{self, Right};
use millrace_tests::kube::cluster::{ready_reason, reason_of, wait};
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
/// Requests with which an operator has made one model: fewer would show nothing.
const MODEL_ENTRIES_MIN: usize = 30;

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

async fn started() -> Result<Platform> {
    let platform = Platform::start().await?;
    let folder = tempfile::tempdir()?;
    tiny::write(folder.path(), 1)?;
    platform.upload(folder.path(), "tiny").await?;
    platform.install(&json!({"operator": {"pollQueue": "1s"}})).await?;
    Ok(platform)
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_wake_the_model_under_the_charts_rights() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let platform = started().await?;
    let flows = flows(&platform).await;
    flows.with_context(|| platform.why())?;
    rights(&platform).await
}

/// The operator of one namespace has rights nowhere else: it serves its own namespace and leaves others alone. It
/// makes PodMonitors, where they are known.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_of_one_namespace_needs_no_other() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    define_pod_monitors(&platform.cluster.client()).await?;
    let values = json!({"scope": "namespace", "monitoring": {"podMonitors": true}});
    platform.install(&values).await?;
    let cluster = &platform.cluster;
    for namespace in [NAMESPACE, SYSTEM] {
        let mut spec = spec(&platform);
        spec["queue"]["onDelete"] = json!("Retain");
        cluster.apply(namespace, MODEL, &spec).await?;
    }
    let asleep = |status: &_| ready_reason(status).as_deref() == Some("ScaledToZero");
    let settled = cluster.wait_status((SYSTEM, MODEL), "asleep", LIMIT, asleep).await;
    settled.with_context(|| platform.why())?;
    let monitors: Api<DynamicObject> = Api::namespaced_with(cluster.client(), SYSTEM, &pod_monitor_kind());
    let made = monitors.list(&Default::default()).await?;
    ensure!(made.items.len() == 1, "{} PodMonitors", made.items.len());

    ensure!(cluster.models(NAMESPACE).get(MODEL).await?.status.is_none(), "a model elsewhere was touched");
    let client = cluster.client();
    ensure!(
        Api::<ClusterRole>::all(client.clone()).get_opt(RELEASE).await?.is_none(),
        "a role on the cluster"
    );
    let elsewhere = Api::<Deployment>::namespaced(client, NAMESPACE).list(&Default::default()).await?;
    ensure!(elsewhere.items.is_empty(), "workers elsewhere");
    let entries = audit::read(&cluster.plane.audit_log())?;
    let denied: Vec<&str> =
        entries.iter().filter(|entry| entry.code() == 403).map(|entry| entry.uri.as_str()).collect();
    ensure!(
        entries.len() >= MODEL_ENTRIES_MIN && denied.is_empty(),
        "{} requests, denied: {denied:#?}",
        entries.len()
    );
    Ok(())
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
async fn flows(platform: &Platform) -> Result<()> {
    let cluster = &platform.cluster;
    let mut spec = spec(platform);
    cluster.apply(NAMESPACE, MODEL, &spec).await?;
    let timeline = Timeline::start(&cluster.client(), NAMESPACE, MODEL, false);
    let asleep = |seen: &millrace_tests::kube::timeline::Seen| {
        seen.asked == 0
            && seen.status.replicas == 0
            && ready_reason(&seen.status).as_deref() == Some("ScaledToZero")
    };
    timeline.wait("asleep", LIMIT, asleep).await?;

    let queue = Queue::connect(&cluster.nats, &ModelRef::new(NAMESPACE, MODEL)?).await?;
    let jobs: Vec<Job> = (0..JOBS).map(|at| Job::completion(&format!("job-{at}"), "wake up", 8)).collect();
    let published = Instant::now();
    queue.publish_all(&jobs).await?;
    let mut record = Record::default();
    record.wait(&queue, JOBS, LIMIT).await?;
    record.check(&queue, &jobs).await?;
    ensure!(record.kinds() == [JOBS, 0, 0], "{:?}", record.kinds());
    let woken = timeline.seen().woken.context("never woken")?;
    eprintln!("woken after {:?}, {JOBS} results after {:?}", woken - published, published.elapsed());
    timeline.wait("back at zero", LIMIT, asleep).await?;

    // Two workers and one again: the one to go is marked.
    spec["scaling"]["minReplicas"] = json!(2);
    cluster.apply(NAMESPACE, MODEL, &spec).await?;
    timeline.wait("two workers", LIMIT, |seen| seen.status.ready_replicas == 2).await?;
    spec["scaling"]["minReplicas"] = json!(1);
    cluster.apply(NAMESPACE, MODEL, &spec).await?;
    timeline.wait("one worker", LIMIT, |seen| seen.asked == 1 && seen.status.replicas == 1).await?;

    // Its own service account is no longer wanted.
    spec["template"] = json!({"serviceAccountName": "default"});
    cluster.apply(NAMESPACE, MODEL, &spec).await?;

    // Somebody deletes a stream, twice: it is made again, and told.
    let jetstream = async_nats::jetstream::new(cluster.nats.connect().await?);
    let stream = ModelRef::new(NAMESPACE, MODEL)?.dead_stream();
    for _ in 0..2 {
        jetstream.delete_stream(&stream).await?;
        wait("repaired stream", LIMIT, async || Ok(jetstream.get_stream(&stream).await.ok().map(drop)))
            .await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
    }

    cluster.models(NAMESPACE).delete(MODEL, &DeleteParams::default()).await?;
    let ending = |status: &_| reason_of(status, "Ready").as_deref() == Some("Deleting");
    cluster.wait_status((NAMESPACE, MODEL), "ending", LIMIT, ending).await?;
    let gone = async || Ok(cluster.models(NAMESPACE).get_opt(MODEL).await?.is_none().then_some(()));
    wait("end of the model", LIMIT, gone).await?;
    ensure!(jetstream.get_stream(&stream).await.is_err(), "the queue was to be deleted with the model");
    Ok(())
}

/// Nothing that the operator did was denied, and nothing that it may do is idle.
async fn rights(platform: &Platform) -> Result<()> {
    let entries = audit::read(&platform.cluster.plane.audit_log())?;
    ensure!(entries.len() >= ENTRIES_MIN, "{} requests in the audit log", entries.len());
    let denied: BTreeSet<String> = entries
        .iter()
        .filter(|entry| entry.code() == 403)
        .map(|entry| format!("{} {}", entry.verb, entry.uri))
        .collect();
    ensure!(denied.is_empty(), "denied: {denied:#?}");
    let used = audit::rights_used(&entries);
    let granted = granted(platform).await?;
    let unused: Vec<&Right> = granted.difference(&used).collect();
    ensure!(unused.is_empty(), "granted and never used: {unused:#?}");
    let beyond: Vec<&Right> = used.difference(&granted).collect();
    eprintln!(
        "{} requests, {} rights granted, all used; {} from elsewhere",
        entries.len(),
        granted.len(),
        beyond.len()
    );
    Ok(())
}

async fn granted(platform: &Platform) -> Result<BTreeSet<Right>> {
    let client = platform.cluster.client();
    let cluster_role = Api::<ClusterRole>::all(client.clone()).get(RELEASE).await?;
    let lease = Api::<Role>::namespaced(client, SYSTEM).get(&format!("{RELEASE}-lease")).await?;
    let rules = cluster_role.rules.into_iter().chain(lease.rules).flatten();
    Ok(rules.flat_map(|rule| rights_of(&rule)).collect())
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
