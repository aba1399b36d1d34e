//! The status of an InferenceModel: conditions from what was found, one write where it differs, and events.
//!
//! [`status`] is pure. Conditions keep the time of their last change, carry the generation that they are about,
//! and have a reason of the closed list. What changes all the time (backlog, utilisation) is written at most
//! every few seconds, and nothing is written for a model that is settled.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, Resource, ResourceExt};
use kube_runtime::events::{Event, EventType, Recorder, Reporter};
use millrace_autoscaler::QueueReading;
use millrace_crds::load::Phase;
use millrace_crds::model::InferenceModel;
use millrace_crds::model::reason::{ConditionType, Reason};
use millrace_crds::model::status::{ClassBacklogs, Condition, ConditionStatus, InferenceModelStatus};
use millrace_crds::names::Class;
use serde_json::json;

use crate::apply::ApplyError;
use crate::build;
use crate::fetch::Facts;
use crate::names::{self, FIELD_MANAGER, REVISION_ANNOTATION};
use crate::queue::QueueError;
use crate::scaling::{ScalingState, Sized};
use crate::validate::{Plan, Sizing, SpecRefusal};
use crate::workers::{self, Trouble};

/// Pause between two writes of numbers that change all the time.
const NUMBERS_PAUSE: Duration = Duration::from_secs(5);
/// Longest note of an event; Kubernetes allows 1 kB.
const NOTE_MAX: usize = 1000;

/// Why the status could not be written.
#[derive(Debug, thiserror::Error)]
#[error("the status was not written: {0}")]
pub struct StatusError(#[from] Box<kube::Error>);

/// Everything that a status says.
#[derive(Debug)]
pub struct StatusView<'a> {
    /// The object.
    pub object: &'a InferenceModel,
    /// Its status until now; see [`former`].
    pub former: &'a InferenceModelStatus,
    /// The plan, or why there is none.
    pub plan: Result<&'a Plan, &'a SpecRefusal>,
    /// What was read, unless the spec was refused before.
    pub facts: Option<&'a Facts>,
    /// How many workers there should be.
    pub sized: Option<&'a Sized>,
    /// Streams and consumers, as far as they were looked at.
    pub queue: Option<&'a Result<(), QueueError>>,
    /// Why the objects could not be applied.
    pub unapplied: Option<&'a ApplyError>,
    /// What the autoscaler shows.
    pub scaling: &'a ScalingState,
}

/// What is wrong or under way, worked out once.
struct Found<'a> {
    view: &'a StatusView<'a>,
    desired: u32,
    live: u32,
    ready: u32,
    leaving: u32,
    rolling: bool,
    trouble: Option<Trouble>,
}

type Finding = (ConditionStatus, Reason, String);

fn finding(status: ConditionStatus, reason: Reason, message: impl Into<String>) -> Finding {
    (status, reason, message.into())
}

/// Works the status out. `now` is the time of conditions that change.
pub fn status(view: &StatusView<'_>, now: Timestamp) -> InferenceModelStatus {
    let found = Found::new(view);
    let former = view.former;
    let generation = view.object.meta().generation.unwrap_or_default();
    let findings = [
        (ConditionType::Ready, found.ready_condition()),
        (ConditionType::Progressing, found.progressing()),
        (ConditionType::Degraded, found.degraded(former)),
        (ConditionType::WeightsAvailable, found.weights(former)),
        (ConditionType::QueueReady, found.queue_ready(former)),
        (ConditionType::WorkersAvailable, found.workers()),
        (ConditionType::ScalingActive, found.scaling()),
    ];
    let conditions = findings.map(|(kind, (status, reason, message))| {
        let before = former.conditions.iter().find(|condition| condition.kind == kind);
        let since = before.filter(|before| before.status == status);
        Condition {
            kind,
            status,
            observed_generation: generation,
            last_transition_time: since
                .map_or_else(|| whole_seconds(now), |b| b.last_transition_time.clone()),
            reason,
            message,
        }
    });
    let reading = view.facts.and_then(|facts| facts.queue.as_ref().ok());
    InferenceModelStatus {
        observed_generation: generation,
        replicas: found.live,
        ready_replicas: found.ready,
        desired_replicas: found.desired,
        workers: format!("{}/{}", found.ready, found.desired),
        selector: names::selector_text(&view.object.name_any()),
        backlog: reading.map(QueueReading::left),
        classes: reading.map(backlogs),
        kv_utilization: view.facts.and_then(|facts| workers::kv_percent(&facts.load)),
        revision_hash: view.plan.map_or_else(|_| former.revision_hash.clone(), build::revision),
        cold_start: view.scaling.cold_start(),
        scaling: view.scaling.status(),
        conditions: conditions.to_vec(),
    }
}

/// Kubernetes' own conditions know whole seconds.
fn whole_seconds(now: Timestamp) -> String {
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

fn backlogs(reading: &QueueReading) -> ClassBacklogs {
    let of = |class: Class| {
        let found = reading.classes.iter().find(|found| found.class == class);
        found.map_or(0, |found| found.pending.saturating_add(found.unacked))
    };
    ClassBacklogs { high: of(Class::High), normal: of(Class::Normal), low: of(Class::Low) }
}

impl<'a> Found<'a> {
    fn new(view: &'a StatusView<'a>) -> Self {
        let none = Vec::new();
        let pods = view.facts.map_or(&none, |facts| &facts.pods);
        let count = |test: &dyn Fn(&Pod) -> bool| {
            u32::try_from(pods.iter().filter(|pod| test(pod)).count()).unwrap_or(u32::MAX)
        };
        let over = |pod: &Pod| workers::reading(pod, None).is_none();
        let leaving = |pod: &Pod| !over(pod) && pod.metadata.deletion_timestamp.is_some();
        let live = |pod: &Pod| !over(pod) && pod.metadata.deletion_timestamp.is_none();
        let revision = view.plan.map(build::revision).unwrap_or_default();
        let old = |pod: &Pod| {
            live(pod) && pod.annotations().get(REVISION_ANNOTATION).is_some_and(|found| *found != revision)
        };
        Self {
            view,
            desired: view.sized.map_or(0, |sized| sized.replicas),
            live: count(&live),
            ready: count(&workers::is_ready),
            leaving: count(&leaving),
            rolling: view.plan.is_ok() && count(&old) > 0,
            trouble: view
                .facts
                .and_then(|facts| workers::trouble(&facts.pods, facts.at_ms))
                .or_else(|| view.facts.and_then(replica_failure)),
        }
    }

    /// What stands in the way of everything else.
    fn obstacle(&self) -> Option<(Reason, String)> {
        if self.view.object.meta().deletion_timestamp.is_some() {
            let message = match self.view.queue {
                Some(Err(error)) => format!("the streams cannot be deleted yet: {error}"),
                _ => "workers drain before the model goes".into(),
            };
            return Some((Reason::Deleting, message));
        }
        if let Err(refusal) = self.view.plan {
            return Some((Reason::InvalidSpec, refusal.to_string()));
        }
        match self.view.unapplied {
            Some(error @ ApplyError::Foreign { .. }) => {
                return Some((Reason::NameConflict, error.to_string()));
            }
            Some(error) => return Some((Reason::ApiRefused, error.to_string())),
            None => {}
        }
        None
    }

    fn queue_obstacle(&self) -> Option<(Reason, String)> {
        match self.view.queue {
            Some(Err(error @ QueueError::Unreachable(_))) => {
                Some((Reason::QueueUnreachable, error.to_string()))
            }
            Some(Err(error)) => Some((Reason::QueueRefused, error.to_string())),
            _ => None,
        }
    }

    /// What keeps jobs from workers though the queue is as the spec asks. While jobs come and go they cannot be
    /// counted: then what was found before stays.
    fn queue_trouble(&self, former: &InferenceModelStatus) -> Option<(Reason, String)> {
        let health = &self.view.facts.filter(|facts| facts.queue.is_ok())?.health;
        if !health.paused.is_empty() {
            let message = format!("paused: {}; {} jobs wait", health.paused.join(", "), health.held_back);
            return Some((Reason::ConsumerPaused, message));
        }
        let before = former.conditions.iter().find(|condition| condition.kind == ConditionType::QueueReady);
        match health.undeliverable {
            Some(0) => None,
            Some(jobs) => {
                Some((Reason::JobsUndeliverable, format!("{jobs} jobs that no consumer will deliver")))
            }
            None => before
                .filter(|before| before.reason == Reason::JobsUndeliverable)
                .map(|before| (before.reason, before.message.clone())),
        }
    }

    fn ready_condition(&self) -> Finding {
        if let Some((reason, message)) = self.obstacle().or_else(|| self.queue_obstacle()) {
            return finding(ConditionStatus::False, reason, message);
        }
        if self.desired == 0 {
            return finding(ConditionStatus::True, Reason::ScaledToZero, self.sleep_message());
        }
        if self.ready > 0 {
            let reason = match () {
                () if self.rolling => Reason::RollingOut,
                () if self.ready < self.desired => Reason::WorkersStarting,
                () => Reason::WorkersReady,
            };
            return finding(ConditionStatus::True, reason, self.counts());
        }
        match &self.trouble {
            Some(trouble) => finding(ConditionStatus::False, trouble.reason, trouble.message.clone()),
            None => finding(ConditionStatus::False, Reason::WorkersStarting, self.counts()),
        }
    }

    fn counts(&self) -> String {
        format!("{} of {} workers take jobs", self.ready, self.desired)
    }

    fn sleep_message(&self) -> &'static str {
        match self.view.plan.map(|plan| &plan.sizing) {
            Ok(Sizing::Fixed(_)) => "spec.replicas is 0; jobs wait until it is raised",
            _ => "no work; the next job starts a worker",
        }
    }

    fn progressing(&self) -> Finding {
        let (yes, no) = (ConditionStatus::True, ConditionStatus::False);
        if let Some((reason, message)) = self.obstacle() {
            let status = if reason == Reason::Deleting { yes } else { no };
            return finding(status, reason, message);
        }
        if self.view.plan.is_ok_and(|plan| plan.paused) {
            return finding(no, Reason::Paused, "millrace.dev/paused is true; nothing is changed");
        }
        if self.rolling {
            return finding(yes, Reason::RollingOut, "workers of the former spec are being replaced");
        }
        if self.ready < self.desired {
            return finding(yes, Reason::WorkersStarting, self.counts());
        }
        if self.leaving > 0 || self.live > self.desired {
            return finding(yes, Reason::WorkersDraining, "workers finish what they hold");
        }
        finding(no, Reason::AsExpected, "")
    }

    fn degraded(&self, former: &InferenceModelStatus) -> Finding {
        let yes = ConditionStatus::True;
        let obstacle = self.obstacle().filter(|(reason, _)| *reason != Reason::Deleting);
        if let Some((reason, message)) = obstacle.or_else(|| self.queue_obstacle()) {
            return finding(yes, reason, message);
        }
        if let Some(trouble) = &self.trouble {
            return finding(yes, trouble.reason, trouble.message.clone());
        }
        if let Some(Err(error)) = self.view.facts.map(|facts| &facts.queue) {
            return finding(yes, Reason::SignalLost, error.to_string());
        }
        if let Some((reason, message)) = self.queue_trouble(former) {
            return finding(yes, reason, message);
        }
        if self.view.facts.is_some_and(|facts| facts.pod_monitors_undefined) {
            let message = "the API server does not know PodMonitors (monitoring.coreos.com/v1)";
            return finding(yes, Reason::PodMonitorsUndefined, message);
        }
        finding(ConditionStatus::False, Reason::AsExpected, "")
    }

    fn weights(&self, former: &InferenceModelStatus) -> Finding {
        if let Some(trouble) = self.trouble.as_ref().filter(|t| t.reason == Reason::WeightsMissing) {
            return finding(ConditionStatus::False, trouble.reason, trouble.message.clone());
        }
        let loads = self.view.facts.map(|facts| &facts.load);
        let phase = |phases: &[Phase]| {
            loads.is_some_and(|loads| loads.values().any(|report| phases.contains(&report.phase)))
        };
        if self.ready > 0 || phase(&[Phase::Loading, Phase::Ready, Phase::Draining]) {
            return finding(ConditionStatus::True, Reason::WeightsReady, "");
        }
        if phase(&[Phase::Pulling]) {
            return finding(ConditionStatus::False, Reason::WeightsPulling, "");
        }
        let before = former.conditions.iter().find(|c| c.kind == ConditionType::WeightsAvailable);
        let same = self.view.plan.is_ok_and(|plan| build::revision(plan) == former.revision_hash);
        match before.filter(|before| same && before.status == ConditionStatus::True) {
            Some(_) => finding(ConditionStatus::True, Reason::WeightsReady, ""),
            None => finding(ConditionStatus::Unknown, Reason::WeightsUnknown, ""),
        }
    }

    fn queue_ready(&self, former: &InferenceModelStatus) -> Finding {
        let trouble = self.queue_obstacle().or_else(|| self.queue_trouble(former));
        match (trouble, self.view.queue) {
            (Some((reason, message)), _) => finding(ConditionStatus::False, reason, message),
            (None, Some(_)) => finding(ConditionStatus::True, Reason::QueueProvisioned, ""),
            (None, None) => match self.obstacle() {
                Some((reason, message)) => finding(ConditionStatus::Unknown, reason, message),
                None => finding(ConditionStatus::Unknown, Reason::Paused, "not looked at"),
            },
        }
    }

    fn workers(&self) -> Finding {
        if self.desired == 0 {
            return finding(ConditionStatus::True, Reason::ScaledToZero, "");
        }
        if self.ready >= self.desired {
            return finding(ConditionStatus::True, Reason::WorkersReady, self.counts());
        }
        match &self.trouble {
            Some(trouble) => finding(ConditionStatus::False, trouble.reason, trouble.message.clone()),
            None => finding(ConditionStatus::False, Reason::WorkersStarting, self.counts()),
        }
    }

    fn scaling(&self) -> Finding {
        match (self.view.plan.map(|plan| &plan.sizing), self.view.facts.map(|facts| &facts.queue)) {
            (Err(refusal), _) => finding(ConditionStatus::Unknown, Reason::InvalidSpec, refusal.to_string()),
            (Ok(Sizing::Fixed(_)), _) => finding(
                ConditionStatus::False,
                Reason::FixedReplicas,
                "spec.replicas sets the number of workers",
            ),
            (Ok(Sizing::Follow(_)), Some(Err(error))) => {
                finding(ConditionStatus::False, Reason::SignalLost, error.to_string())
            }
            (Ok(Sizing::Follow(_)), _) => finding(ConditionStatus::True, Reason::FollowingQueue, ""),
        }
    }
}

fn replica_failure(facts: &Facts) -> Option<Trouble> {
    let status = facts.existing.deployment.as_ref()?.status.as_ref()?;
    let failure = status.conditions.as_ref()?.iter().find(|c| c.type_ == "ReplicaFailure")?;
    (failure.status == "True").then(|| Trouble {
        reason: Reason::PodsRefused,
        message: failure.message.clone().unwrap_or_default().chars().take(NOTE_MAX).collect(),
    })
}

/// The last status written, and when.
pub type Written = Option<(InferenceModelStatus, Instant)>;

/// The status until now: the last one written while the cache may not show it yet, else the cache's.
pub fn former(object: &InferenceModel, written: &Written) -> InferenceModelStatus {
    match written {
        Some((status, at)) if at.elapsed() < NUMBERS_PAUSE => status.clone(),
        _ => object.status.clone().unwrap_or_default(),
    }
}

/// Whether a status has to be written over the one before.
pub fn differs(new: &InferenceModelStatus, old: &InferenceModelStatus, since: Duration) -> bool {
    let without_numbers = |status: &InferenceModelStatus| InferenceModelStatus {
        backlog: None,
        classes: None,
        kv_utilization: None,
        ..status.clone()
    };
    new != old && (since >= NUMBERS_PAUSE || without_numbers(new) != without_numbers(old))
}

/// Writes statuses and events. Cheap to clone.
#[derive(Clone)]
pub struct StatusWriter {
    client: Client,
    recorder: Recorder,
}

impl StatusWriter {
    /// Over a client; `identity` is the name of this operator.
    pub fn new(client: Client, identity: &str) -> Self {
        let reporter = Reporter { controller: FIELD_MANAGER.into(), instance: Some(identity.to_owned()) };
        Self { recorder: Recorder::new(client.clone(), reporter), client }
    }

    /// Writes a status if it differs, and an event for each change of Ready and Degraded. Returns the writes.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn write(
        &self,
        object: &InferenceModel,
        status: InferenceModelStatus,
        written: &mut Written,
    ) -> Result<u32, StatusError> {
        let former = former(object, written);
        let since = written.as_ref().map_or(NUMBERS_PAUSE, |(_, at)| at.elapsed());
        if !differs(&status, &former, since) {
            return Ok(0);
        }
        let patch = json!({
            "apiVersion": InferenceModel::api_version(&()),
            "kind": InferenceModel::kind(&()),
            "metadata": {"name": object.name_any(), "uid": object.uid()},
            "status": status,
        });
        let namespace = object.namespace().unwrap_or_default();
        let api: Api<InferenceModel> = Api::namespaced(self.client.clone(), &namespace);
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let patched = api.patch_status(&object.name_any(), &params, &Patch::Apply(&patch)).await;
        match patched {
            Ok(_) => {}
            Err(error) if crate::apply::is_gone(&error) => return Ok(0),
            Err(error) => return Err(StatusError(Box::new(error))),
        }
        for (condition, warning) in changes(&former, &status) {
            self.event(object, condition.reason, condition.message.clone(), warning).await;
        }
        *written = Some((status, Instant::now()));
        Ok(1)
    }

    /// Says of an object that cannot be read why it cannot.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn write_unreadable(&self, object: &ObjectReference, message: &str) -> Result<(), StatusError> {
        let condition = |kind: ConditionType, status: ConditionStatus| {
            json!({
                "type": kind, "status": status, "reason": Reason::InvalidSpec, "message": message,
                "lastTransitionTime": whole_seconds(Timestamp::now()),
            })
        };
        let patch = json!({
            "apiVersion": object.api_version, "kind": object.kind,
            "metadata": {"name": object.name, "uid": object.uid},
            "status": {"conditions": [
                condition(ConditionType::Ready, ConditionStatus::False),
                condition(ConditionType::Degraded, ConditionStatus::True),
            ]},
        });
        let namespace = object.namespace.clone().unwrap_or_default();
        let name = object.name.clone().unwrap_or_default();
        let api: Api<InferenceModel> = Api::namespaced(self.client.clone(), &namespace);
        let params = PatchParams::apply(FIELD_MANAGER).force();
        match api.patch_status(&name, &params, &Patch::Apply(&patch)).await {
            // The answer cannot be read as an InferenceModel either; the write was made.
            Ok(_) | Err(kube::Error::SerdeError(_)) => Ok(()),
            Err(error) => Err(StatusError(Box::new(error))),
        }
    }

    /// Publishes an event. A lost event is logged and nothing else: the status is the truth.
    pub async fn event(&self, object: &InferenceModel, reason: Reason, note: String, warning: bool) {
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: reason.as_str().to_owned(),
            note: Some(note.chars().take(NOTE_MAX).collect()),
            action: "Reconcile".into(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &object.object_ref(&())).await {
            tracing::warn!(%error, %reason, "an event was not published");
        }
    }
}

/// The conditions whose change deserves an event, and whether it is a warning.
fn changes<'s>(
    former: &InferenceModelStatus,
    status: &'s InferenceModelStatus,
) -> Vec<(&'s Condition, bool)> {
    let changed = status.conditions.iter().filter(|condition| {
        let before = former.conditions.iter().find(|before| before.kind == condition.kind);
        before.is_none_or(|before| (before.status, before.reason) != (condition.status, condition.reason))
    });
    let told = changed.filter_map(|condition| match (condition.kind, condition.status) {
        (ConditionType::Degraded, ConditionStatus::True) => Some((condition, true)),
        (ConditionType::Ready, ConditionStatus::True) => Some((condition, false)),
        _ => None,
    });
    told.collect()
}
