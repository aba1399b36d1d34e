//! Reads everything that one reconcile looks at, once: a [`Facts`] of one moment.
//!
//! Objects come from the caches, the backlog from the broker, load from the reports. Nothing here decides.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::api::DynamicObject;
use kube_runtime::reflector::ObjectRef;
use millrace_autoscaler::QueueReading;
use millrace_crds::load::LoadReport;
use millrace_crds::model::MODEL_LABEL;
use millrace_crds::names::ModelRef;

use crate::build::pod_monitor_kind;
use crate::caches::Caches;
use crate::load::LoadBook;
use crate::names;
use crate::pod_monitors::PodMonitors;
use crate::queue::{QueueClient, QueueError, QueueHealth};

/// The objects of a model that are there, by kind.
#[derive(Debug, Clone, Default)]
pub struct Existing {
    /// The service account.
    pub service_account: Option<Arc<ServiceAccount>>,
    /// The configuration.
    pub config_map: Option<Arc<ConfigMap>>,
    /// The network policy.
    pub network_policy: Option<Arc<NetworkPolicy>>,
    /// The disruption budget.
    pub disruption_budget: Option<Arc<PodDisruptionBudget>>,
    /// The pod monitor.
    pub pod_monitor: Option<Arc<DynamicObject>>,
    /// The workload.
    pub deployment: Option<Arc<Deployment>>,
}

/// What was read, at one moment.
#[derive(Debug)]
pub struct Facts {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// The objects.
    pub existing: Existing,
    /// PodMonitors are wanted, and the API server does not know them.
    pub pod_monitors_undefined: bool,
    /// The pods.
    pub pods: Vec<Arc<Pod>>,
    /// The backlog, or why it could not be read.
    pub queue: Result<QueueReading, QueueError>,
    /// What keeps jobs from workers.
    pub health: QueueHealth,
    /// The workers' load, by pod.
    pub load: HashMap<String, LoadReport>,
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(0)
}

/// The objects of a model.
pub fn existing(caches: &Caches, model: &ModelRef) -> Existing {
    let (name, namespace) = (names::objects(model.name.as_str()), model.namespace.as_str());
    Existing {
        service_account: caches.service_accounts.get(&ObjectRef::new(&name).within(namespace)),
        config_map: caches.config_maps.get(&ObjectRef::new(&name).within(namespace)),
        network_policy: caches.network_policies.get(&ObjectRef::new(&name).within(namespace)),
        disruption_budget: caches.disruption_budgets.get(&ObjectRef::new(&name).within(namespace)),
        pod_monitor: match pod_monitors(caches) {
            Some(PodMonitors::Known(store)) => {
                store.get(&ObjectRef::new_with(&name, pod_monitor_kind()).within(namespace))
            }
            _ => None,
        },
        deployment: caches.deployments.get(&ObjectRef::new(&name).within(namespace)),
    }
}

/// The state of PodMonitors, where they are wanted.
fn pod_monitors(caches: &Caches) -> Option<PodMonitors> {
    caches.pod_monitors.as_ref().map(|state| state.borrow().clone())
}

/// The pods of a model.
pub fn pods(caches: &Caches, model: &ModelRef) -> Vec<Arc<Pod>> {
    caches.pods.state_filter(|pod| {
        pod.labels().get(MODEL_LABEL).is_some_and(|name| name == model.name.as_str())
            && pod.namespace().is_some_and(|namespace| namespace == model.namespace.as_str())
    })
}

/// Reads everything.
pub async fn facts(caches: &Caches, queue: &QueueClient, load: &LoadBook, model: &ModelRef) -> Facts {
    let (backlog, health) = match queue.read(model).await {
        Ok((backlog, health)) => (Ok(backlog), health),
        Err(error) => (Err(error), QueueHealth::default()),
    };
    // The clock is read last, so that nothing in the reading is younger than the reading.
    Facts {
        existing: existing(caches, model),
        pod_monitors_undefined: matches!(pod_monitors(caches), Some(PodMonitors::Undefined)),
        pods: pods(caches, model),
        queue: backlog,
        health,
        load: load.of(model, Instant::now()),
        at_ms: now_ms(),
    }
}
