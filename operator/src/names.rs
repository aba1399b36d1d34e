//! Names, labels and annotations of what the operator makes.
//!
//! Names are fixed functions of the model's name, so that two runs that know nothing of each other make the
//! same objects.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use millrace_crds::model::MODEL_LABEL;

/// The field manager of all that the operator applies.
pub const FIELD_MANAGER: &str = "millrace-operator";
/// The value of `app.kubernetes.io/managed-by`; also selects what the operator watches.
pub const MANAGED_BY: &str = "millrace-operator";
/// The label that says who manages an object.
pub const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";
/// On each object: the hash of what was applied, so that a field that is no longer wanted is noticed.
pub const APPLIED_ANNOTATION: &str = "millrace.dev/applied";
/// On the pod template: the hash of all that workers read at start. A change rolls them out.
pub const REVISION_ANNOTATION: &str = "millrace.dev/revision";
/// On a pod: `spec.model.revision`. A new one rolls the workers out, even where the address stays.
pub const WEIGHTS_LABEL: &str = "millrace.dev/weights";
/// On a pod: what its deletion costs, read by the ReplicaSet controller when it removes pods.
pub const DELETION_COST_ANNOTATION: &str = "controller.kubernetes.io/pod-deletion-cost";
/// The name of the worker's container.
pub const CONTAINER: &str = "worker";

/// The name of all objects of a model.
pub fn objects(model: &str) -> String {
    format!("{model}-worker")
}

/// The labels that select a model's pods. They never change, because a Deployment's selector cannot.
pub fn selector(model: &str) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "millrace-worker"),
        ("app.kubernetes.io/instance", model),
        (MODEL_LABEL, model),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect()
}

/// The labels of each object of a model.
pub fn labels(model: &str) -> BTreeMap<String, String> {
    let mut labels = selector(model);
    labels.insert(MANAGED_BY_LABEL.into(), MANAGED_BY.into());
    labels.insert("app.kubernetes.io/part-of".into(), "millrace".into());
    labels.insert("app.kubernetes.io/component".into(), "worker".into());
    labels
}

/// [`selector`] as Kubernetes' type.
pub fn label_selector(model: &str) -> LabelSelector {
    LabelSelector { match_labels: Some(selector(model)), ..LabelSelector::default() }
}

/// [`selector`] as text, for `status.selector`.
pub fn selector_text(model: &str) -> String {
    let pairs: Vec<String> = selector(model).iter().map(|(key, value)| format!("{key}={value}")).collect();
    pairs.join(",")
}
