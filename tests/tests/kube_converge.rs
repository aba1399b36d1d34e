//! The operator is killed after its n-th write, for every n, while a model is created, changed, scaled up and down
//! and deleted; its watches are cut and its lists are stale. A fresh operator always ends in the same state, and the
//! next one finds nothing to write.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{DeleteParams, ListParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Resource};
use millrace_crds::names::{Class, ModelRef};
use millrace_tests::kube::cluster::{Cluster, wait};
use millrace_tests::kube::control_plane::ControlPlaneOptions;
use millrace_tests::kube::faults::{Faults, FaultyApi};
use millrace_tests::kube::operator::Operator;
use millrace_tests::kube::programs;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

const MODEL: &str = "m";
/// On a pod: what its deletion costs.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// How the names of its pods begin.
const POD: &str = "m-worker-";
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// A state that does not change for so long is the end state.
const CALM: Duration = Duration::from_millis(1500);
/// No flow has so many writes.
const WRITES_MAX: u64 = 40;
/// Namespaces in which crash points are tried at once.
const PARALLEL: usize = 4;

/// What happens to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Create,
    Update,
    ScaleUp,
    ScaleDown,
    Delete,
}

const FLOWS: [Flow; 5] = [Flow::Create, Flow::Update, Flow::ScaleUp, Flow::ScaleDown, Flow::Delete];

impl Flow {
    /// The workers that there are in the end, where that is what the flow is about.
    fn workers(self) -> Option<usize> {
        matches!(self, Flow::ScaleUp | Flow::ScaleDown).then_some(1)
    }
}

fn spec(queue_deleted: bool) -> Value {
    json!({
        "model": {"uri": "s3://models/tiny"},
        "scaling": {"minReplicas": 0, "maxReplicas": 2},
        "queue": {"maxBytes": "1Mi", "onDelete": if queue_deleted { "Delete" } else { "Retain" }},
    })
}

/// So many workers, whatever happens.
fn exactly(workers: usize) -> Value {
    let mut spec = spec(true);
    spec["scaling"] =
        json!({"minReplicas": workers, "maxReplicas": workers, "stabilization": {"down": "1s"}});
    spec
}

fn changed() -> Value {
    let mut spec = spec(true);
    spec["engine"] = json!({"maxSequences": 7});
    spec["drain"] = json!({"timeout": "7s"});
    spec["template"] = json!({"labels": {"team": "search"}});
    spec
}

struct Trial<'a> {
    cluster: &'a Cluster,
    namespace: String,
}

impl Trial<'_> {
    async fn new<'a>(cluster: &'a Cluster, namespace: &str) -> Result<Trial<'a>> {
        cluster.namespace(namespace, &[]).await?;
        Ok(Trial { cluster, namespace: namespace.to_owned() })
    }

    /// An operator of this namespace alone, through a proxy.
    async fn operator(&self, faults: Faults) -> Result<(FaultyApi, Operator)> {
        let api = FaultyApi::start(&self.cluster.plane, "faulty", faults).await?;
        let arguments =
            ["--no-leader-election", "--watch-namespace", &self.namespace, "--poll-idle", "500ms"];
        let operator = Operator::start(api.kubeconfig(), &self.cluster.nats.url(), &arguments)?;
        Ok((api, operator))
    }

    /// Does the user's part of a flow.
    async fn act(&self, flow: Flow) -> Result<()> {
        match flow {
            Flow::Create => drop(self.cluster.apply(&self.namespace, MODEL, &spec(true)).await?),
            Flow::Update => drop(self.cluster.apply(&self.namespace, MODEL, &changed()).await?),
            Flow::ScaleDown => drop(self.cluster.apply(&self.namespace, MODEL, &exactly(1)).await?),
            Flow::ScaleUp => {
                let subject = ModelRef::new(&self.namespace, MODEL)?.jobs_subject(Class::Normal);
                let jetstream = async_nats::jetstream::new(self.cluster.nats.connect().await?);
                jetstream.publish(subject, r#"{"prompt":"x"}"#.into()).await?.await?;
            }
            Flow::Delete => {
                let models = self.cluster.models(&self.namespace);
                drop(models.delete(MODEL, &DeleteParams::default()).await?);
            }
        }
        Ok(())
    }

    /// What a flow begins with, made by an undisturbed operator.
    async fn prepare(&self, flow: Flow) -> Result<()> {
        let (spec, workers) = match flow {
            Flow::Create => return Ok(()),
            Flow::ScaleDown => (exactly(3), Some(3)),
            _ => (spec(true), None),
        };
        let (_api, _operator) = self.operator(Faults::default()).await?;
        self.cluster.apply(&self.namespace, MODEL, &spec).await?;
        self.end_state(workers).await.map(drop)
    }

    /// The state once the model's present spec and so many workers are seen and it no longer changes.
    async fn end_state(&self, workers: Option<usize>) -> Result<Value> {
        let start = Instant::now();
        let (mut last, mut since) = (self.state().await?, Instant::now());
        while since.elapsed() < CALM || !self.is_observed(workers, &last).await? {
            if start.elapsed() > LIMIT {
                bail!("{} does not come to rest: {last:#}", self.namespace);
            }
            tokio::time::sleep(POLL).await;
            let now = self.state().await?;
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(last)
    }

    /// The operator has seen the model's present spec and its workers, or the model is gone.
    async fn is_observed(&self, workers: Option<usize>, state: &Value) -> Result<bool> {
        let pods = state["pods"].as_array().map_or(0, Vec::len);
        let asked = &state["deployments"][0]["spec"]["replicas"];
        if workers.is_some_and(|workers| pods != workers || *asked != json!(workers)) {
            return Ok(false);
        }
        // A broker that is not there yet is looked for again; that is no end state.
        let conditions = state["model"]["status"]["conditions"].as_array();
        let made = |condition: &Value| condition["type"] == "QueueReady" && condition["status"] == "True";
        if conditions.is_some_and(|conditions| !conditions.iter().any(made)) {
            return Ok(false);
        }
        let Some(model) = self.cluster.models(&self.namespace).get_opt(MODEL).await? else { return Ok(true) };
        let observed = model.status.map_or(0, |status| status.observed_generation);
        Ok(model.metadata.generation == Some(observed))
    }

    /// All objects with the operator's labels, the model itself and its streams, without what differs by nature.
    async fn state(&self) -> Result<Value> {
        let mut state = json!({
            "deployments": self.objects::<Deployment>().await?,
            "configMaps": self.objects::<ConfigMap>().await?,
            "serviceAccounts": self.objects::<ServiceAccount>().await?,
            "networkPolicies": self.objects::<NetworkPolicy>().await?,
            "disruptionBudgets": self.objects::<PodDisruptionBudget>().await?,
            "pods": self.pods().await?,
            "streams": self.streams().await?,
            "model": self.cluster.models(&self.namespace).get_opt(MODEL).await?,
        });
        strip(&mut state);
        name_hashes(&mut state, &mut BTreeMap::new());
        let text = state.to_string().replace(&self.namespace, "NAMESPACE");
        Ok(serde_json::from_str(&text)?)
    }

    /// As they were wished for: what controllers report of them is not the operator's.
    async fn objects<K>(&self) -> Result<Vec<Value>>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + Serialize
            + std::fmt::Debug,
    {
        let api: Api<K> = Api::namespaced(self.cluster.client(), &self.namespace);
        let found = api.list(&ListParams::default().labels("millrace.dev/model")).await?;
        let wish = |object: &K| {
            let mut object = serde_json::to_value(object)?;
            object.as_object_mut().map(|map| map.remove("status"));
            Ok(object)
        };
        found.items.iter().map(wish).collect()
    }

    /// What the deletion of each pod costs that is not ending, in order.
    async fn pods(&self) -> Result<Vec<Option<String>>> {
        let api: Api<Pod> = Api::namespaced(self.cluster.client(), &self.namespace);
        let found = api.list(&ListParams::default().labels("millrace.dev/model")).await?.items;
        let live = found.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
        let cost = |pod: &Pod| pod.metadata.annotations.as_ref()?.get(DELETION_COST).cloned();
        let mut costs: Vec<Option<String>> = live.map(cost).collect();
        costs.sort();
        Ok(costs)
    }

    async fn streams(&self) -> Result<Vec<String>> {
        let jetstream = async_nats::jetstream::new(self.cluster.nats.connect().await?);
        let mut names = Vec::new();
        let mut found = jetstream.stream_names();
        while let Some(name) = futures::TryStreamExt::try_next(&mut found).await? {
            if name.contains(&format!("_{}_", self.namespace)) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// One flow with an operator that dies after so many writes, then with one that does not. `None` when the
    /// first one never made so many.
    async fn crash(&self, flow: Flow, after: u64) -> Result<Option<Value>> {
        self.prepare(flow).await?;
        let faults = Faults { stop_after: Some(after), ..Faults::default() };
        let (api, mut operator) = self.operator(faults).await?;
        self.act(flow).await?;
        let reached = tokio::time::timeout(LIMIT, async {
            tokio::select! {
                () = api.wait_writes(after) => Ok(true),
                state = self.end_state(flow.workers()) => state.map(|_| api.writes() >= after),
            }
        });
        let reached = reached.await.context("neither so many writes nor rest")??;
        operator.kill()?;
        if !reached {
            return Ok(None);
        }
        self.settled(flow, Faults::default()).await.map(Some)
    }

    /// The end state of an operator, after which the next one finds nothing to write.
    async fn settled(&self, flow: Flow, faults: Faults) -> Result<Value> {
        let (_api, mut operator) = self.operator(faults).await?;
        let state = self.end_state(flow.workers()).await.with_context(|| operator.log_tail())?;
        operator.kill()?;
        let (api, operator) = self.operator(Faults::default()).await?;
        let again = self.end_state(flow.workers()).await.with_context(|| operator.log_tail())?;
        ensure!(again == state, "the next operator ends with {again:#}\nthis one: {state:#}");
        let writes = api.writes();
        ensure!(writes == 0, "the next operator makes {writes} writes\n{}", operator.log_tail());
        Ok(state)
    }

    /// One flow without a crash.
    async fn whole(&self, flow: Flow, faults: Faults) -> Result<Value> {
        self.prepare(flow).await?;
        let (_api, operator) = self.operator(faults).await?;
        self.act(flow).await?;
        self.end_state(flow.workers()).await.with_context(|| operator.log_tail())
    }
}

/// Removes what differs between two runs by nature.
fn strip(value: &mut Value) {
    const NATURAL: [&str; 14] = [
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "managedFields",
        "generation",
        "observedGeneration",
        "lastTransitionTime",
        "lastUpdateTime",
        "at",
        // Of the status: what was decided when, and how long starts took.
        "lastDecision",
        "history",
        "coldStart",
        "disruptedPods",
        "atMs",
    ];
    match value {
        Value::Object(map) => {
            let kept = std::mem::take(map).into_iter().filter(|(key, _)| !NATURAL.contains(&key.as_str()));
            *map = kept.collect::<Map<_, _>>();
            map.values_mut().for_each(strip);
        }
        Value::Array(list) => list.iter_mut().for_each(strip),
        // The names of pods end at random.
        Value::String(text) if text.contains(POD) => {
            let words = text.split(' ').map(|word| if word.contains(POD) { "pod-name" } else { word });
            *text = words.collect::<Vec<_>>().join(" ");
        }
        _ => {}
    }
}

/// Writes each hash as its number, in the order in which they come: namespaces differ, so hashes do too, but objects
/// that name the same one must go on doing so.
fn name_hashes(value: &mut Value, seen: &mut BTreeMap<String, usize>) {
    match value {
        Value::Object(map) => map.values_mut().for_each(|value| name_hashes(value, seen)),
        Value::Array(list) => list.iter_mut().for_each(|value| name_hashes(value, seen)),
        Value::String(text) if text.len() >= 16 && text.bytes().all(|b| b.is_ascii_hexdigit()) => {
            let next = seen.len();
            *text = format!("hash {}", seen.entry(text.clone()).or_insert(next));
        }
        _ => {}
    }
}

/// Tries the crash points of one flow until one is never reached; returns how many there were.
async fn crash_points(cluster: &Cluster, flow: Flow) -> Result<u64> {
    let name = format!("{flow:?}").to_lowercase();
    let reference =
        Trial::new(cluster, &format!("{name}-whole")).await?.whole(flow, Faults::default()).await?;
    let mut tried = 0;
    loop {
        let trials = (1..=PARALLEL as u64).map(|step| {
            let (after, name) = (tried + step, name.clone());
            async move {
                let trial = Trial::new(cluster, &format!("{name}-{after}")).await?;
                let state = trial.crash(flow, after).await;
                anyhow::Ok((after, state.with_context(|| format!("{flow:?}, killed after write {after}"))?))
            }
        });
        for (after, state) in futures::future::try_join_all(trials).await? {
            let Some(state) = state else { return Ok(after - 1) };
            ensure!(
                state == reference,
                "{flow:?}, killed after write {after}: ends with {state:#}\nundisturbed: {reference:#}"
            );
        }
        tried += PARALLEL as u64;
        ensure!(tried < WRITES_MAX, "{flow:?} does not stop writing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_operator_ends_where_an_undisturbed_one_does() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let cluster = Cluster::start(&ControlPlaneOptions::default()).await?;
    let start = Instant::now();
    let mut all = 0;
    for flow in FLOWS {
        let points = crash_points(&cluster, flow).await?;
        eprintln!(
            "{flow:?}: {points} crash points, all end as undisturbed ({:.1} s)",
            start.elapsed().as_secs_f64()
        );
        ensure!(points > 0, "{flow:?} makes no write: it proves nothing");
        all += points;
    }
    eprintln!("{all} crash points in all");
    // Nothing is left of the deleted models but what the user asked to keep.
    let left = Trial { cluster: &cluster, namespace: "delete-1".into() };
    wait("end of garbage collection", LIMIT, async || {
        let state = left.state().await?;
        let empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
        Ok(state.as_object().is_some_and(|map| map.values().all(empty)).then_some(()))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_watches_and_stale_lists_change_nothing_in_the_end() -> Result<()> {
    if !programs::have() {
        return Ok(());
    }
    let cluster = Cluster::start(&ControlPlaneOptions::default()).await?;
    for flow in [Flow::Create, Flow::Update, Flow::ScaleUp, Flow::ScaleDown] {
        let name = format!("{flow:?}").to_lowercase();
        let reference =
            Trial::new(&cluster, &format!("{name}-whole")).await?.whole(flow, Faults::default()).await?;
        let cut = Faults { cut_watches: Some(Duration::from_millis(700)), ..Faults::default() };
        let state = Trial::new(&cluster, &format!("{name}-cut")).await?.whole(flow, cut).await?;
        ensure!(state == reference, "{flow:?} with cut watches: {state:#}\nundisturbed: {reference:#}");
        let stale = Faults {
            cut_watches: Some(Duration::from_millis(700)),
            stale_lists: Some(Duration::from_secs(5)),
            ..Faults::default()
        };
        let state = Trial::new(&cluster, &format!("{name}-stale")).await?.whole(flow, stale).await?;
        ensure!(state == reference, "{flow:?} with stale lists: {state:#}\nundisturbed: {reference:#}");
    }
    Ok(())
}
