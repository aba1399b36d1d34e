//! The conditions of a model, situation by situation.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use millrace_autoscaler::QueueReading;
use millrace_crds::load::LoadReport;
use millrace_crds::model::InferenceModel;
use millrace_crds::model::reason::{ConditionType, Reason};
use millrace_crds::model::status::{ConditionStatus, InferenceModelStatus};
use millrace_operator::apply::ApplyError;
use millrace_operator::build::revision;
use millrace_operator::config::Config;
use millrace_operator::fetch::{Existing, Facts};
use millrace_operator::queue::{QueueError, QueueHealth};
use millrace_operator::scaling::{ScalingState, Sized};
use millrace_operator::status::{StatusView, differs, status};
use millrace_operator::validate::{Plan, SpecRefusal, plan};

const FOLLOW: &str = "{model: {uri: 's3://bucket/m'}, scaling: {}}";
const FIXED: &str = "{model: {uri: 's3://bucket/m'}, replicas: 1}";

/// One situation: what is there, and what went wrong.
struct Situation {
    object: InferenceModel,
    plan: Result<Plan, SpecRefusal>,
    pods: Vec<Arc<Pod>>,
    load: HashMap<String, LoadReport>,
    backlog: Result<QueueReading, QueueError>,
    health: QueueHealth,
    queue: Result<(), QueueError>,
    unapplied: Option<ApplyError>,
    pod_monitors_undefined: bool,
    replicas: u32,
    former: InferenceModelStatus,
}

impl Situation {
    fn new(spec: &str, replicas: u32) -> Self {
        let text = format!(
            "apiVersion: millrace.dev/v1alpha1\nkind: InferenceModel\n\
             metadata: {{name: m, namespace: team, uid: u, generation: 7}}\nspec: {spec}"
        );
        let object: InferenceModel = serde_yaml::from_str(&text).expect("an object");
        let args = ["o", "--nats-servers=nats://n:4222", "--worker-image=w"];
        Self {
            plan: plan(&object, &Config::parse_from(args)),
            object,
            pods: Vec::new(),
            load: HashMap::new(),
            backlog: Ok(QueueReading::default()),
            health: QueueHealth { undeliverable: Some(0), ..QueueHealth::default() },
            queue: Ok(()),
            unapplied: None,
            pod_monitors_undefined: false,
            replicas,
            former: InferenceModelStatus::default(),
        }
    }

    fn pod(mut self, status: &str) -> Self {
        let revision = self.plan.as_ref().map(revision).expect("a plan");
        self.pods.push(pod(status, &revision));
        self
    }

    fn status(&self) -> InferenceModelStatus {
        let facts = Facts {
            at_ms: 100_000,
            existing: Existing::default(),
            pod_monitors_undefined: self.pod_monitors_undefined,
            pods: self.pods.clone(),
            queue: self.backlog.clone(),
            health: self.health.clone(),
            load: self.load.clone(),
        };
        let sized = Sized { replicas: self.replicas, before: self.replicas, decision: None };
        let view = StatusView {
            object: &self.object,
            former: &self.former,
            plan: self.plan.as_ref(),
            facts: self.plan.is_ok().then_some(&facts),
            sized: self.plan.is_ok().then_some(&sized),
            queue: self.plan.is_ok().then_some(&self.queue),
            unapplied: self.unapplied.as_ref(),
            scaling: &ScalingState::default(),
        };
        status(&view, Timestamp::from_second(1_000).expect("a moment"))
    }

    fn check(&self, expected: &[(ConditionType, ConditionStatus, Reason)]) {
        let status = self.status();
        assert_eq!(status.observed_generation, 7);
        assert_eq!(status.conditions.len(), ConditionType::ALL.len());
        for (kind, holds, reason) in expected {
            let found =
                status.conditions.iter().find(|condition| condition.kind == *kind).expect("a condition");
            assert_eq!((found.status, found.reason), (*holds, *reason), "{kind}: {}", found.message);
            assert_eq!(found.observed_generation, 7);
        }
    }
}

fn pod(status: &str, revision: &str) -> Arc<Pod> {
    let text = format!(
        "metadata: {{name: p, creationTimestamp: '1970-01-01T00:00:10Z', annotations: \
         {{millrace.dev/revision: '{revision}'}}}}\nstatus: {status}\n"
    );
    Arc::new(serde_yaml::from_str(&text).expect("a pod"))
}

const READY: &str =
    "{conditions: [{type: Ready, status: 'True', lastTransitionTime: '1970-01-01T00:00:30Z'}]}";
const STARTING: &str = "{phase: Pending}";
const UNSCHEDULABLE: &str = "{conditions: [{type: PodScheduled, status: 'False', message: 'no GPU'}]}";

use ConditionStatus::{False, True, Unknown};
use ConditionType::{
    Degraded, Progressing, QueueReady, Ready, ScalingActive, WeightsAvailable, WorkersAvailable,
};

/// A queue that is as the spec asks may still keep its jobs.
#[test]
fn jobs_that_no_worker_gets_are_a_condition() {
    let mut found = Situation::new(FOLLOW, 0);
    found.health.paused = vec!["workers-high for 9 s more".into()];
    found.health.held_back = 3;
    found.check(&[(QueueReady, False, Reason::ConsumerPaused), (Degraded, True, Reason::ConsumerPaused)]);
    found.health = QueueHealth { undeliverable: Some(2), ..QueueHealth::default() };
    found.check(&[(QueueReady, False, Reason::JobsUndeliverable), (Ready, True, Reason::ScaledToZero)]);
    // While jobs come and go nobody can tell, so what was found stays.
    found.former = found.status();
    found.health.undeliverable = None;
    found.check(&[(QueueReady, False, Reason::JobsUndeliverable)]);
    found.health.undeliverable = Some(0);
    found.check(&[(QueueReady, True, Reason::QueueProvisioned), (Degraded, False, Reason::AsExpected)]);
}

#[test]
fn a_model_that_sleeps_is_ready() {
    Situation::new(FOLLOW, 0).check(&[
        (Ready, True, Reason::ScaledToZero),
        (Progressing, False, Reason::AsExpected),
        (Degraded, False, Reason::AsExpected),
        (WeightsAvailable, Unknown, Reason::WeightsUnknown),
        (QueueReady, True, Reason::QueueProvisioned),
        (WorkersAvailable, True, Reason::ScaledToZero),
        (ScalingActive, True, Reason::FollowingQueue),
    ]);
}

#[test]
fn workers_make_a_model_ready() {
    Situation::new(FOLLOW, 1).pod(STARTING).check(&[
        (Ready, False, Reason::WorkersStarting),
        (Progressing, True, Reason::WorkersStarting),
        (Degraded, False, Reason::AsExpected),
    ]);
    Situation::new(FOLLOW, 2).pod(READY).pod(STARTING).check(&[
        (Ready, True, Reason::WorkersStarting),
        (WorkersAvailable, False, Reason::WorkersStarting),
        (WeightsAvailable, True, Reason::WeightsReady),
    ]);
    let situation = Situation::new(FIXED, 1).pod(READY);
    situation.check(&[
        (Ready, True, Reason::WorkersReady),
        (Progressing, False, Reason::AsExpected),
        (ScalingActive, False, Reason::FixedReplicas),
    ]);
    assert_eq!(situation.status().workers, "1/1");
}

#[test]
fn a_rollout_is_progress_and_a_model_stays_ready_in_it() {
    let mut situation = Situation::new(FIXED, 1).pod(STARTING);
    situation.pods.push(pod(READY, "another"));
    situation.check(&[(Ready, True, Reason::RollingOut), (Progressing, True, Reason::RollingOut)]);
}

#[test]
fn what_is_wrong_is_said() {
    Situation::new(FOLLOW, 1).pod(UNSCHEDULABLE).check(&[
        (Ready, False, Reason::Unschedulable),
        (Degraded, True, Reason::Unschedulable),
        (WorkersAvailable, False, Reason::Unschedulable),
    ]);
    let mut lost = Situation::new(FOLLOW, 1).pod(READY);
    lost.backlog = Err(QueueError::Unreachable("timed out".into()));
    lost.check(&[
        (Ready, True, Reason::WorkersReady),
        (Degraded, True, Reason::SignalLost),
        (ScalingActive, False, Reason::SignalLost),
    ]);
    assert_eq!(lost.status().backlog, None, "unknown is not zero");
    let mut unmonitored = Situation::new(FOLLOW, 1).pod(READY);
    unmonitored.pod_monitors_undefined = true;
    unmonitored.check(&[
        (Ready, True, Reason::WorkersReady),
        (Progressing, False, Reason::AsExpected),
        (Degraded, True, Reason::PodMonitorsUndefined),
    ]);
    let mut refused = Situation::new(FOLLOW, 0);
    refused.queue = Err(QueueError::Refused { name: "stream S".into(), message: "no space".into() });
    refused.check(&[(Ready, False, Reason::QueueRefused), (QueueReady, False, Reason::QueueRefused)]);
    let mut foreign = Situation::new(FOLLOW, 0);
    foreign.unapplied = Some(ApplyError::Foreign { kind: "ConfigMap".into(), name: "m-worker".into() });
    foreign.check(&[(Ready, False, Reason::NameConflict), (Degraded, True, Reason::NameConflict)]);
    Situation::new("{model: {uri: 'x'}, replicas: 1}", 0).check(&[
        (Ready, False, Reason::InvalidSpec),
        (Degraded, True, Reason::InvalidSpec),
        (ScalingActive, Unknown, Reason::InvalidSpec),
    ]);
}

#[test]
fn a_status_that_is_kept_keeps_its_times() {
    let mut situation = Situation::new(FOLLOW, 0);
    let mut former = situation.status();
    for condition in &mut former.conditions {
        condition.last_transition_time = "then".into();
    }
    situation.former = former;
    let again = situation.status();
    assert!(again.conditions.iter().all(|condition| condition.last_transition_time == "then"));
    assert!(!differs(&again, &situation.former, Duration::from_secs(60)), "a settled model writes nothing");
    situation.replicas = 1;
    let woken = situation.status();
    let ready = woken.conditions.iter().find(|condition| condition.kind == Ready).expect("a condition");
    assert_eq!(ready.last_transition_time, "1970-01-01T00:16:40Z");
}

#[test]
fn numbers_alone_are_written_seldom() {
    let situation = Situation::new(FOLLOW, 0);
    let old = situation.status();
    let new = InferenceModelStatus { backlog: Some(7), kv_utilization: Some(50), ..old.clone() };
    assert!(!differs(&new, &old, Duration::from_secs(1)));
    assert!(differs(&new, &old, Duration::from_secs(5)));
    let woken = InferenceModelStatus { desired_replicas: 1, ..old.clone() };
    assert!(differs(&woken, &old, Duration::ZERO));
}

#[test]
fn weights_once_seen_are_known_until_the_spec_changes() {
    let mut situation = Situation::new(FOLLOW, 1).pod(READY);
    situation.former = situation.status();
    situation.pods.clear();
    situation.replicas = 0;
    situation.check(&[(WeightsAvailable, True, Reason::WeightsReady)]);
    situation.former.revision_hash = "another".into();
    situation.check(&[(WeightsAvailable, Unknown, Reason::WeightsUnknown)]);
}
