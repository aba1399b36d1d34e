//! Objects as an API server takes them: each is read as the type of its kind, and nothing of it may get lost on the
//! way, as an unknown field would.

use std::collections::BTreeMap;

use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What the Prometheus operator's kinds have in common.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Monitoring<S> {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: S,
}

/// As far as PodMonitors and ServiceMonitors are used here.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Monitor {
    selector: MonitorSelector,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    endpoints: Vec<Endpoint>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pod_metrics_endpoints: Vec<Endpoint>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct MonitorSelector {
    match_labels: BTreeMap<String, String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Endpoint {
    port: String,
    path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    honor_labels: Option<bool>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    groups: Vec<RuleGroup>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleGroup {
    name: String,
    rules: Vec<AlertRule>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AlertRule {
    alert: String,
    expr: String,
    #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
    pending: Option<String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

/// Reads an object as its kind.
///
/// # Errors
/// With the kind and what is wrong with it.
pub fn check(object: &Value) -> Result<(), String> {
    let word = |key: &str| object[key].as_str().unwrap_or_default();
    let kind = (word("apiVersion"), word("kind"));
    let checked = match kind {
        ("v1", "ConfigMap") => as_type::<ConfigMap>(object),
        ("v1", "Service") => as_type::<Service>(object),
        ("v1", "ServiceAccount") => as_type::<ServiceAccount>(object),
        ("apps/v1", "Deployment") => as_type::<Deployment>(object),
        ("apps/v1", "StatefulSet") => as_type::<StatefulSet>(object),
        ("networking.k8s.io/v1", "NetworkPolicy") => as_type::<NetworkPolicy>(object),
        ("policy/v1", "PodDisruptionBudget") => as_type::<PodDisruptionBudget>(object),
        ("rbac.authorization.k8s.io/v1", "Role") => as_type::<Role>(object),
        ("rbac.authorization.k8s.io/v1", "RoleBinding") => as_type::<RoleBinding>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => as_type::<ClusterRole>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => as_type::<ClusterRoleBinding>(object),
        ("apiextensions.k8s.io/v1", "CustomResourceDefinition") => {
            as_type::<CustomResourceDefinition>(object)
        }
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy") => {
            as_type::<ValidatingAdmissionPolicy>(object)
        }
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding") => {
            as_type::<ValidatingAdmissionPolicyBinding>(object)
        }
        ("monitoring.coreos.com/v1", "PodMonitor" | "ServiceMonitor") => {
            as_type::<Monitoring<Monitor>>(object)
        }
        ("monitoring.coreos.com/v1", "PrometheusRule") => as_type::<Monitoring<Rules>>(object),
        _ => Err("no kind that is known here".to_owned()),
    };
    checked.map_err(|error| format!("{kind:?} {}: {error}", object["metadata"]["name"]))
}

fn as_type<T: Serialize + DeserializeOwned>(object: &Value) -> Result<(), String> {
    let read: T = serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
    let back = serde_json::to_value(read).map_err(|error| error.to_string())?;
    match lost(&back, object, "") {
        None => Ok(()),
        Some(path) => Err(format!("{path} is no field of it, or has another form")),
    }
}

/// The first place of a value that is not in what was read of it.
fn lost(back: &Value, sent: &Value, path: &str) -> Option<String> {
    match (back, sent) {
        (Value::Object(back), Value::Object(sent)) => sent.iter().find_map(|(key, sent)| {
            let path = format!("{path}.{key}");
            match back.get(key) {
                Some(back) => lost(back, sent, &path),
                None if sent.is_null() => None,
                None => Some(path),
            }
        }),
        (Value::Array(back), Value::Array(sent)) if back.len() == sent.len() => {
            back.iter().zip(sent).find_map(|(back, sent)| lost(back, sent, &format!("{path}[]")))
        }
        (Value::Number(back), Value::Number(sent)) if back.as_f64() == sent.as_f64() => None,
        _ if back == sent => None,
        _ => Some(path.to_owned()),
    }
}
