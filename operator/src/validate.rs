//! From a spec to a [`Plan`]: everything checked, every default chosen. No later step reads the raw spec.
//!
//! Pure. It repeats what the schema says and the operator relies on, because an object can be older than the
//! schema, and adds what a schema cannot say. A refusal names the field, the value and what it must be.

use std::time::Duration;

use k8s_openapi::api::core::v1::Affinity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource, ResourceExt};
use millrace_crds::config::{QueueConfig, ResultsConfig, WorkerConfig};
use millrace_crds::model::pods::{PodTemplate, Resources};
use millrace_crds::model::{InferenceModel, NAME_BYTES_MAX, OnDelete, PAUSED_ANNOTATION};
use millrace_crds::names::ModelRef;
use millrace_crds::scaling::ScalingSpec;

use crate::config::Config;
use crate::network::{self, Peer};
use crate::worker_config::{self, Mounts};

/// Time between the end of draining and the kill: for the last acknowledgements and for closing.
const GRACE_MARGIN: Duration = Duration::from_secs(30);

/// What is to be made of one model.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The model's address on the wire.
    pub model: ModelRef,
    /// The unique id of the InferenceModel.
    pub uid: String,
    /// Owns all objects.
    pub owner: OwnerReference,
    /// The generation of the spec.
    pub generation: i64,
    /// Whether the operator only looks.
    pub paused: bool,
    /// Who says how many workers there are.
    pub sizing: Sizing,
    /// What workers read.
    pub worker: WorkerConfig,
    /// What is mounted beside it.
    pub mounts: Mounts,
    /// Streams and consumers.
    pub queue: QueueConfig,
    /// Streams of outcomes.
    pub results: ResultsConfig,
    /// What becomes of the streams.
    pub on_delete: OnDelete,
    /// Whom workers talk to.
    pub peers: Vec<Peer>,
    /// The pods.
    pub pod: PodPlan,
}

/// Who says how many workers there are.
#[derive(Debug, Clone, PartialEq)]
pub enum Sizing {
    /// `spec.replicas`.
    Fixed(u32),
    /// The autoscaler.
    Follow(ScalingSpec),
}

/// What the pods need to know.
#[derive(Debug, Clone)]
pub struct PodPlan {
    /// The image.
    pub image: String,
    /// GPUs of each worker.
    pub gpus: u64,
    /// Requests and limits.
    pub resources: Resources,
    /// The version of the weights, in the user's words.
    pub weights_revision: Option<String>,
    /// The user's template.
    pub template: PodTemplate,
    /// The template's affinity, in Kubernetes' type.
    pub affinity: Option<Affinity>,
    /// How long a pod may take to end.
    pub grace: Duration,
    /// How long a pod may take to become ready.
    pub start_timeout: Duration,
    /// Make a PodMonitor.
    pub monitored: bool,
}

/// Why a spec was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {message}")]
pub struct SpecRefusal {
    /// The field, with its path.
    pub field: String,
    /// Its value and what it must be.
    pub message: String,
}

/// A refusal of a field.
pub(crate) fn refuse(field: &str, message: impl Into<String>) -> SpecRefusal {
    SpecRefusal { field: field.to_owned(), message: message.into() }
}

/// Checks the object and chooses what the spec leaves open.
///
/// # Errors
/// With the first field that cannot be carried out.
pub fn plan(object: &InferenceModel, config: &Config) -> Result<Plan, SpecRefusal> {
    let name = object.name_any();
    if name.len() > NAME_BYTES_MAX {
        let message = format!("has {} bytes; at most {NAME_BYTES_MAX} are allowed", name.len());
        return Err(refuse("metadata.name", message));
    }
    let namespace = object.namespace().unwrap_or_default();
    let model =
        ModelRef::new(&namespace, &name).map_err(|error| refuse("metadata.name", error.to_string()))?;
    let uid = object.uid().unwrap_or_default();
    let owner = object
        .controller_owner_ref(&())
        .ok_or_else(|| refuse("metadata.uid", "is missing; the object does not come from an API server"))?;
    let spec = &object.spec;
    let (worker, mounts) = worker_config::build(spec, &model, config)?;
    if !worker.queue.outlasts(worker.engine.step_timeout) {
        let (wait, step) = (worker.queue.ack_wait, worker.engine.step_timeout);
        let message = format!("is {wait}; it must be at least twice spec.engine.stepTimeout ({step})");
        return Err(refuse("spec.queue.ackWait", message));
    }
    Ok(Plan {
        uid,
        owner,
        generation: object.meta().generation.unwrap_or_default(),
        paused: object.annotations().get(PAUSED_ANNOTATION).is_some_and(|value| value == "true"),
        sizing: sizing(spec.replicas, spec.scaling.as_ref())?,
        queue: worker.queue.clone(),
        results: worker.results.clone(),
        on_delete: spec.queue.on_delete,
        peers: network::peers(&worker),
        pod: pod_plan(object, config)?,
        model,
        worker,
        mounts,
    })
}

fn sizing(replicas: Option<u32>, scaling: Option<&ScalingSpec>) -> Result<Sizing, SpecRefusal> {
    match (replicas, scaling) {
        (Some(replicas), None) if replicas <= millrace_crds::scaling::REPLICAS_LIMIT => {
            Ok(Sizing::Fixed(replicas))
        }
        (Some(replicas), None) => {
            let limit = millrace_crds::scaling::REPLICAS_LIMIT;
            Err(refuse("spec.replicas", format!("is {replicas}; at most {limit} are allowed")))
        }
        (None, Some(scaling)) => match scaling.check() {
            Ok(()) => Ok(Sizing::Follow(scaling.clone())),
            Err(error) => {
                let text = error.to_string();
                let (field, message) = text.split_once(' ').unwrap_or(("scaling", &text));
                Err(refuse(&format!("spec.{field}"), message))
            }
        },
        _ => Err(refuse("spec", "must hold exactly one of replicas and scaling")),
    }
}

fn pod_plan(object: &InferenceModel, config: &Config) -> Result<PodPlan, SpecRefusal> {
    let spec = &object.spec;
    let gpus = spec.resources.gpus();
    if spec.parallelism.tensor != 1 {
        let message = format!("is {}; this version runs each copy on 1 GPU", spec.parallelism.tensor);
        return Err(refuse("spec.parallelism.tensor", message));
    }
    if gpus > 1 {
        let message = format!("asks for {gpus} of nvidia.com/gpu; each worker uses 1");
        return Err(refuse("spec.resources.limits", message));
    }
    let affinity = spec.template.affinity.clone().map(serde_json::from_value).transpose();
    let affinity = affinity.map_err(|error| refuse("spec.template.affinity", error.to_string()))?;
    let cuda = config.worker_image_cuda.as_ref().filter(|_| gpus > 0);
    let image = spec.template.image.as_ref().or(cuda).unwrap_or(&config.worker_image);
    Ok(PodPlan {
        image: image.clone(),
        gpus,
        resources: spec.resources.clone(),
        weights_revision: spec.model.revision.clone(),
        template: spec.template.clone(),
        affinity,
        grace: spec.drain.timeout.0.saturating_add(GRACE_MARGIN),
        start_timeout: spec.start.timeout.0,
        monitored: config.pod_monitors,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::tests::sample;

    /// An object as an API server would hold it.
    pub(crate) fn object(spec: &str) -> InferenceModel {
        let text = format!(
            "apiVersion: millrace.dev/v1alpha1\nkind: InferenceModel\n\
             metadata: {{name: m, namespace: team, uid: u-1, generation: 3}}\nspec:\n{spec}"
        );
        serde_yaml::from_str(&text).expect("an object")
    }

    #[test]
    fn a_short_spec_is_enough() {
        let plan = plan(&object("  model: {uri: 's3://b/m'}\n  replicas: 2\n"), &sample(&[])).unwrap();
        assert_eq!(plan.sizing, Sizing::Fixed(2));
        assert_eq!(plan.pod.image, "w:1");
        assert_eq!(plan.pod.grace, Duration::from_secs(150));
        assert_eq!(plan.owner.uid, "u-1");
        assert_eq!(plan.generation, 3);
    }

    #[test]
    fn gpus_choose_the_image() {
        let spec = "  model: {uri: 's3://b/m'}\n  replicas: 1\n  resources: {limits: {nvidia.com/gpu: 1}}\n";
        let config = sample(&["--worker-image-cuda", "w:cuda"]);
        assert_eq!(plan(&object(spec), &config).unwrap().pod.image, "w:cuda");
        let own = format!("{spec}  template: {{image: 'mine:1'}}\n");
        assert_eq!(plan(&object(&own), &config).unwrap().pod.image, "mine:1");
    }

    #[test]
    fn refusals_name_field_and_value() {
        let base = "  model: {uri: 's3://b/m'}\n";
        let cases = [
            (base.to_owned(), "spec must hold exactly one"),
            (format!("{base}  replicas: 1\n  scaling: {{}}\n"), "spec must hold exactly one"),
            (format!("{base}  replicas: 5000\n"), "spec.replicas is 5000"),
            (format!("{base}  scaling: {{minReplicas: 9}}\n"), "spec.scaling.minReplicas is 9"),
            (format!("{base}  replicas: 1\n  parallelism: {{tensor: 2}}\n"), "spec.parallelism.tensor is 2"),
            (
                format!("{base}  replicas: 1\n  resources: {{limits: {{nvidia.com/gpu: 2}}}}\n"),
                "spec.resources.limits asks for 2",
            ),
            (
                format!("{base}  replicas: 1\n  template: {{affinity: {{nodeAffinity: 3}}}}\n"),
                "spec.template.affinity",
            ),
            (format!("{base}  replicas: 1\n  queue: {{ackWait: 59s}}\n"), "spec.queue.ackWait is 59s"),
            ("  model: {uri: 'hf://x'}\n  replicas: 1\n".to_owned(), "spec.model.uri is \"hf://x\""),
            ("  model: {uri: 'pvc://'}\n  replicas: 1\n".to_owned(), "spec.model.uri is \"pvc://\""),
        ];
        for (spec, words) in cases {
            let message = plan(&object(&spec), &sample(&[])).unwrap_err().to_string();
            assert!(message.contains(words), "{spec}: {message:?} lacks {words:?}");
        }
        let mut long = object("  model: {uri: 's3://b/m'}\n  replicas: 1\n");
        long.metadata.name = Some("x".repeat(41));
        assert!(plan(&long, &sample(&[])).unwrap_err().to_string().contains("41 bytes"));
    }
}
