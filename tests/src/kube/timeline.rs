//! What a user sees of an InferenceModel over time: the rows of `kubectl get imodel -w` with seconds, and the
//! autoscaler's decisions as sentences.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use futures::TryStreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client, ResourceExt};
use millrace_crds::model::status::InferenceModelStatus;
use millrace_crds::model::{InferenceModel, MODEL_LABEL};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// What was seen so far.
#[derive(Debug, Clone, Default)]
pub struct TimelineSeen {
    /// The last status.
    pub status: InferenceModelStatus,
    /// The most workers that took jobs at once.
    pub ready_max: u32,
    /// The most workers that were asked for.
    pub desired_max: u32,
    /// When the Deployment last went from no worker to some.
    pub woken: Option<Instant>,
    /// Workers that the Deployment asks for.
    pub asked: i32,
}

/// Watches one model, and prints what changes to standard output if told to.
#[derive(Debug)]
pub struct Timeline {
    _tasks: [AbortOnDropHandle<()>; 2],
    seen: watch::Receiver<TimelineSeen>,
    error: Arc<Mutex<Option<String>>>,
}

struct Rows {
    start: Instant,
    print: bool,
    row: String,
    decisions: BTreeSet<String>,
}

impl Timeline {
    /// Starts to watch.
    pub fn start(client: &Client, namespace: &str, name: &str, print: bool) -> Self {
        let (sender, seen) = watch::channel(TimelineSeen::default());
        let error: Arc<Mutex<Option<String>>> = Arc::default();
        let keep = |result: Result<()>, error: &Mutex<Option<String>>| {
            if let Err(cause) = result {
                *error.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{cause:#}"));
            }
        };
        let rows = Rows { start: Instant::now(), print, row: String::new(), decisions: BTreeSet::new() };
        let models: Api<InferenceModel> = Api::namespaced(client.clone(), namespace);
        let (to, why, field) = (sender.clone(), error.clone(), format!("metadata.name={name}"));
        let statuses = tokio::spawn(async move { keep(follow_model(models, &field, rows, &to).await, &why) });
        let deployments: Api<Deployment> = Api::namespaced(client.clone(), namespace);
        let (label, why) = (format!("{MODEL_LABEL}={name}"), error.clone());
        let workloads =
            tokio::spawn(async move { keep(follow_workload(deployments, &label, &sender).await, &why) });
        Self { _tasks: [AbortOnDropHandle::new(statuses), AbortOnDropHandle::new(workloads)], seen, error }
    }

    /// What was seen so far.
    pub fn seen(&self) -> TimelineSeen {
        self.seen.borrow().clone()
    }

    /// Waits until it is as wanted.
    ///
    /// # Errors
    /// When it is not within `limit`; the message holds the last status.
    pub async fn wait(
        &self,
        what: &str,
        limit: Duration,
        good: impl Fn(&TimelineSeen) -> bool,
    ) -> Result<TimelineSeen> {
        let mut seen = self.seen.clone();
        if let Ok(Ok(found)) = tokio::time::timeout(limit, seen.wait_for(|seen| good(seen))).await {
            return Ok(found.clone());
        }
        let error = self.error.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default();
        bail!("not {what} after {limit:?} {error}: {:#}", serde_json::to_value(self.seen().status)?)
    }
}

async fn follow_model(
    models: Api<InferenceModel>,
    field: &str,
    mut rows: Rows,
    seen: &watch::Sender<TimelineSeen>,
) -> Result<()> {
    let mut events = std::pin::pin!(watcher(models, Config::default().fields(field)));
    while let Some(event) = events.try_next().await? {
        let (Event::Apply(model) | Event::InitApply(model)) = event else { continue };
        rows.show(&model);
        let status = model.status.unwrap_or_default();
        seen.send_modify(|seen| {
            seen.ready_max = seen.ready_max.max(status.ready_replicas);
            seen.desired_max = seen.desired_max.max(status.desired_replicas);
            seen.status = status;
        });
    }
    Ok(())
}

async fn follow_workload(
    api: Api<Deployment>,
    label: &str,
    seen: &watch::Sender<TimelineSeen>,
) -> Result<()> {
    let mut events = std::pin::pin!(watcher(api, Config::default().labels(label)));
    while let Some(event) = events.try_next().await? {
        let (Event::Apply(workload) | Event::InitApply(workload)) = event else { continue };
        let asked = workload.spec.and_then(|spec| spec.replicas).unwrap_or(0);
        seen.send_modify(|seen| {
            if seen.asked == 0 && asked > 0 {
                seen.woken = Some(Instant::now());
            }
            seen.asked = asked;
        });
    }
    Ok(())
}

impl Rows {
    /// A row when a column changed, and each new decision.
    fn show(&mut self, model: &InferenceModel) {
        let Some(status) = &model.status else { return };
        let ready = serde_json::to_value(&status.conditions).unwrap_or_default();
        let ready = ready.as_array().and_then(|list| list.iter().find(|one| one["type"] == "Ready")).cloned();
        let ready = ready.unwrap_or_default();
        let text = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
        let row = format!(
            "{:<10} {:<6} {:<18} {:>8} {:>8} {:>4}",
            model.name_any(),
            ready["status"].as_str().unwrap_or("-"),
            ready["reason"].as_str().unwrap_or("-"),
            status.workers,
            text(status.backlog),
            text(status.kv_utilization.map(u64::from)),
        );
        let seconds = self.start.elapsed().as_secs_f64();
        if self.row.is_empty() && self.print {
            println!(
                "{:>9}  {:<10} {:<6} {:<18} {:>8} {:>8} {:>4}",
                "SECONDS", "NAME", "READY", "REASON", "REPLICAS", "BACKLOG", "KV%"
            );
        }
        if row != self.row && self.print {
            println!("{seconds:>9.1}  {row}");
        }
        self.row = row;
        let decision = status.scaling.as_ref().and_then(|scaling| scaling.last_decision.as_ref());
        if let Some(decision) = decision
            && self.decisions.insert(format!("{} {}", decision.at, decision.sentence))
            && self.print
        {
            println!("{:>9}  -> {}", "", decision.sentence);
        }
    }
}
