//! The whole product with the operator as a pod under its chart's rights, in namespaces where the API server itself
//! demands restricted pods: jobs wake the model and are answered, everything the operator does is allowed, and
//! everything that it is allowed is needed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule, Role};
use kube::Api;
use kube::api::DeleteParams;
use millrace_crds::names::ModelRef;
use millrace_tests::jobs::{Job, Queue, Record};
use millrace_tests::kube::audit::{self, Right};
use millrace_tests::kube::cluster::{ready_reason, wait};
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
