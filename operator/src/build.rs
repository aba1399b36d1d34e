//! From a [`Plan`] to the objects that carry it out.
//!
//! Pure: the same plan gives the same bytes, on every run and every operator. Every object has the owner
//! reference and the labels of its model; the workload's number of replicas comes from outside.

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, TypeMeta};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::validate::Plan;
use crate::worker_config::CONFIG_FILE;
use crate::{names, network, pod_template};

/// Old ReplicaSets kept, for `kubectl rollout undo`'s sake; the spec is the truth.
const REVISIONS_KEPT: i32 = 2;
/// Hex digits of a revision: enough that two specs of one model never meet.
const REVISION_DIGITS: usize = 16;

/// All objects of one model. [`apply`](crate::apply) takes it apart without a rest, so a new kind that nobody
/// applies does not compile.
#[derive(Debug, Clone)]
pub struct ModelObjects {
    /// The pods' identity, without any right; absent where the user names one.
    pub service_account: Option<ServiceAccount>,
    /// What workers read.
    pub config_map: ConfigMap,
    /// Whom workers talk to.
    pub network_policy: NetworkPolicy,
    /// How many workers may be evicted at once.
    pub disruption_budget: PodDisruptionBudget,
    /// Where Prometheus finds the workers, if asked for.
    pub pod_monitor: Option<DynamicObject>,
    /// The workers.
    pub deployment: Deployment,
}

/// The kind of [`ModelObjects::pod_monitor`].
pub fn pod_monitor_kind() -> ApiResource {
    ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("monitoring.coreos.com", "v1", "PodMonitor"),
        "podmonitors",
    )
}

/// A hash of anything that serialises, in hex.
pub(crate) fn hash(value: &impl Serialize) -> String {
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    hex::encode(Sha256::digest(bytes)).chars().take(REVISION_DIGITS).collect()
}

/// The hash of what workers read at start: a change rolls them out. The number of replicas is no part of it.
pub fn revision(plan: &Plan) -> String {
    hash(&(&plan.worker, pod_template::template(plan, "")))
}

/// Makes all objects.
pub fn build(plan: &Plan, replicas: u32) -> ModelObjects {
    let model = plan.model.name.as_str();
    let own_account = plan.pod.template.service_account_name.is_none();
    ModelObjects {
        service_account: own_account.then(|| ServiceAccount {
            metadata: metadata(plan),
            automount_service_account_token: Some(false),
            ..ServiceAccount::default()
        }),
        config_map: ConfigMap {
            metadata: metadata(plan),
            data: Some([(CONFIG_FILE.to_owned(), config_text(plan))].into_iter().collect()),
            ..ConfigMap::default()
        },
        network_policy: NetworkPolicy {
            metadata: metadata(plan),
            spec: Some(network::policy(model, &plan.peers)),
        },
        disruption_budget: PodDisruptionBudget {
            metadata: metadata(plan),
            spec: Some(PodDisruptionBudgetSpec {
                max_unavailable: Some(IntOrString::Int(1)),
                selector: Some(names::label_selector(model)),
                // A worker that is not ready holds no job, and must not hold up a node's drain.
                unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
                ..PodDisruptionBudgetSpec::default()
            }),
            ..PodDisruptionBudget::default()
        },
        pod_monitor: plan.pod.monitored.then(|| pod_monitor(plan)),
        deployment: deployment(plan, replicas),
    }
}

/// The configuration as the worker reads it. JSON is YAML, and its form does not depend on a printer's taste.
fn config_text(plan: &Plan) -> String {
    serde_json::to_string_pretty(&plan.worker).unwrap_or_default()
}

fn metadata(plan: &Plan) -> ObjectMeta {
    let model = plan.model.name.as_str();
    ObjectMeta {
        name: Some(names::objects(model)),
        namespace: Some(plan.model.namespace.as_str().to_owned()),
        labels: Some(names::labels(model)),
        owner_references: Some(vec![plan.owner.clone()]),
        ..ObjectMeta::default()
    }
}

fn deployment(plan: &Plan, replicas: u32) -> Deployment {
    let model = plan.model.name.as_str();
    // A spare GPU is rarely there, so a worker goes before its successor comes; a CPU is shared.
    let (surge, unavailable) = if plan.pod.gpus > 0 { (0, 1) } else { (1, 0) };
    Deployment {
        metadata: metadata(plan),
        spec: Some(DeploymentSpec {
            replicas: Some(i32::try_from(replicas).unwrap_or(i32::MAX)),
            revision_history_limit: Some(REVISIONS_KEPT),
            selector: names::label_selector(model),
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(IntOrString::Int(surge)),
                    max_unavailable: Some(IntOrString::Int(unavailable)),
                }),
            }),
            progress_deadline_seconds: Some(progress_deadline(plan)),
            template: pod_template::template(plan, &revision(plan)),
            ..DeploymentSpec::default()
        }),
        ..Deployment::default()
    }
}

/// A rollout is stuck when one worker takes longer than to end and to start.
fn progress_deadline(plan: &Plan) -> i32 {
    let span = plan.pod.start_timeout.saturating_add(plan.pod.grace);
    i32::try_from(pod_template::seconds(span)).unwrap_or(i32::MAX)
}

fn pod_monitor(plan: &Plan) -> DynamicObject {
    let kind = pod_monitor_kind();
    DynamicObject {
        types: Some(TypeMeta { api_version: kind.api_version.clone(), kind: kind.kind.clone() }),
        metadata: metadata(plan),
        data: json!({
            "spec": {
                "selector": {"matchLabels": names::selector(plan.model.name.as_str())},
                "podMetricsEndpoints": [{"port": "metrics", "path": "/metrics"}],
            }
        }),
    }
}
