//! The custom resource `InferenceModel` of group `millrace.dev`, version `v1alpha1`.
//!
//! A platform team writes the spec: where the weights are, how the engine is sized, what the queue keeps, and
//! how the number of workers follows the work. The operator writes the status. The types here are the one
//! source of the schema: [`definition`] prints the CustomResourceDefinition, [`rules`] holds what types
//! cannot say, [`docs`] prints the field reference and the runbook. A change that breaks resources that are
//! already stored needs a new version.

// Each printer column has a type, which the lint takes for a repetition.
#![allow(clippy::duplicated_attributes)]

pub mod definition;
pub mod docs;
pub mod pods;
pub mod reason;
pub mod rules;
pub mod status;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::pods::{PodTemplate, Resources, SecretRef};
use self::status::InferenceModelStatus;
use crate::config::{ClassWeights, DrainConfig, EngineConfig, QueueConfig};
use crate::scaling::ScalingSpec;
use crate::units::{Bytes, Span};

/// The API group of the custom resource, and the prefix of all labels and annotations.
pub const GROUP: &str = "millrace.dev";
/// Longest name of an InferenceModel. The names of its pods must fit into 63 bytes.
pub const NAME_BYTES_MAX: usize = 40;
/// The label on all objects of a model; its value is the model's name.
pub const MODEL_LABEL: &str = "millrace.dev/model";
/// Set to `true` on an InferenceModel, the operator leaves its objects and queues alone.
pub const PAUSED_ANNOTATION: &str = "millrace.dev/paused";
/// The finalizer of models whose queues go with them (`spec.queue.onDelete: Delete`).
pub const QUEUE_FINALIZER: &str = "millrace.dev/queue";

/// What an InferenceModel should be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, CustomResource)]
#[kube(
    group = "millrace.dev",
    version = "v1alpha1",
    kind = "InferenceModel",
    plural = "inferencemodels",
    shortname = "imodel",
    category = "millrace",
    namespaced,
    derive = "PartialEq",
    status = "InferenceModelStatus",
    doc = "A model that answers prompt jobs from a queue: its weights, its engine, its queue and its workers.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(
        name = "Model",
        type_ = "string",
        json_path = ".spec.model.uri",
        description = "Where the weights are."
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].status"#,
        description = "Whether jobs are served; true at zero replicas without work."
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].reason"#,
        description = "Why it is ready, or why not."
    ),
    printcolumn(
        name = "Replicas",
        type_ = "string",
        json_path = ".status.workers",
        description = "Workers that take jobs, of the workers asked for."
    ),
    printcolumn(
        name = "Backlog",
        type_ = "integer",
        json_path = ".status.backlog",
        description = "Jobs without an outcome."
    ),
    printcolumn(
        name = "KV%",
        type_ = "integer",
        json_path = ".status.kvUtilization",
        description = "Share of the KV blocks in use."
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Revision",
        type_ = "string",
        json_path = ".spec.model.revision",
        description = "The version of the weights.",
        priority = 1
    ),
    printcolumn(
        name = "Decision",
        type_ = "string",
        json_path = ".status.scaling.lastDecision.sentence",
        description = "The last change of the number of workers, and why.",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InferenceModelSpec {
    /// The weights.
    pub model: ModelSpec,
    /// The engine's sizes and numeric types.
    #[serde(default)]
    pub engine: EngineConfig,
    /// How one copy of the model spreads over GPUs.
    #[serde(default)]
    pub parallelism: Parallelism,
    /// The job queue.
    #[serde(default)]
    pub queue: QueueSpec,
    /// The outcomes.
    #[serde(default)]
    pub results: ResultsSpec,
    /// A fixed number of workers, or one that `kubectl scale`, an HPA or KEDA sets through `/scale`. Exactly
    /// one of `replicas` and `scaling` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1024))]
    pub replicas: Option<u32>,
    /// The number of workers follows the queue. `{}` takes all defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<ScalingSpec>,
    /// Shutting down.
    #[serde(default)]
    pub drain: DrainConfig,
    /// Starting.
    #[serde(default)]
    pub start: StartSpec,
    /// What each worker gets, as in a container: `nvidia.com/gpu`, `cpu`, `memory`.
    #[serde(default)]
    pub resources: Resources,
    /// What the workers' pods have beside it. The security context cannot be weakened.
    #[serde(default)]
    pub template: PodTemplate,
}

/// The weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelSpec {
    /// A folder in Hugging Face layout: `s3://bucket/prefix`, `pvc://claim/path` or `file:///path` in the
    /// image.
    #[schemars(length(max = 1024))]
    pub uri: String,
    /// The version of the weights, in your words. Changing `uri` needs a new one, because answers change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub revision: Option<String>,
    /// `sha256:` and 64 hex digits of the manifest of the files. Workers refuse other files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71))]
    pub digest: Option<String>,
    /// Address of an S3-compatible service; AWS when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub endpoint: Option<String>,
    /// Region of the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub region: Option<String>,
    /// Put the bucket into the path instead of the host name.
    #[serde(default)]
    pub path_style: bool,
    /// A Secret of the same namespace with the keys `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and, if any,
    /// `AWS_SESSION_TOKEN`. Without it, the pod's workload identity is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretRef>,
    /// A role that workers take on by a token of their service account, instead of keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub web_identity: Option<WebIdentitySpec>,
    /// A Secret of the same namespace whose key `ca.crt` holds the certificate authority of the service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretRef>,
    /// Address of an HTTP proxy through which workers reach the service, such as `http://proxy.net.svc:3128`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub proxy: Option<String>,
    /// Room for pulled weights on each worker's node; a model that is larger is refused.
    #[serde(default = "defaults::cache_size")]
    pub cache_size: Bytes,
    /// A claim of the same namespace where pulled weights are kept instead, shared by all workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub cache_claim: Option<String>,
}

/// How one copy of the model spreads over GPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Parallelism {
    /// GPUs that share each layer. Only 1 is served in this version.
    #[schemars(range(min = 1, max = 64))]
    pub tensor: u32,
}

impl Default for Parallelism {
    fn default() -> Self {
        Self { tensor: 1 }
    }
}

/// The job queue: one work-queue stream, and one durable consumer for each class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct QueueSpec {
    /// Attempts before a job is dead.
    #[schemars(range(min = 1, max = 100))]
    pub max_deliver: u32,
    /// How long a silent worker keeps a job; at least twice `engine.stepTimeout`.
    pub ack_wait: Span,
    /// Delay before attempt 2, 3, ...; the last one repeats.
    #[schemars(length(min = 1, max = 16))]
    pub backoff: Vec<Span>,
    /// Most jobs in the queue; publishers are refused beyond it.
    #[schemars(range(min = 1))]
    pub max_jobs: u64,
    /// Most bytes in the queue; publishers are refused beyond it.
    pub max_bytes: Bytes,
    /// Copies of each stream.
    #[schemars(range(min = 1, max = 5))]
    pub replicas: u32,
    /// Longest time that one attempt may run.
    pub attempt_timeout: Span,
    /// Shares of the classes under contention.
    pub weights: ClassWeights,
    /// A Secret of the same namespace with the workers' login to the broker, in place of the operator's
    /// `--worker-nats-secret`; its keys are those that the operator's options name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretRef>,
    /// What becomes of the streams when the InferenceModel is deleted. `Retain`: they stay, with their
    /// consumers, jobs and outcomes; jobs can still be published, and an InferenceModel of the same name goes
    /// on with them. `Delete`: they go with it, once its workers have drained.
    pub on_delete: OnDelete,
}

impl Default for QueueSpec {
    fn default() -> Self {
        let queue = QueueConfig::default();
        Self {
            max_deliver: queue.max_deliver,
            ack_wait: queue.ack_wait,
            backoff: queue.backoff,
            max_jobs: queue.max_jobs,
            max_bytes: queue.max_bytes,
            replicas: queue.replicas,
            attempt_timeout: queue.attempt_timeout,
            weights: queue.weights,
            credentials_secret_ref: None,
            on_delete: OnDelete::Retain,
        }
    }
}

impl QueueSpec {
    /// As workers and streams see it.
    pub fn config(&self) -> QueueConfig {
        QueueConfig {
            max_deliver: self.max_deliver,
            ack_wait: self.ack_wait,
            backoff: self.backoff.clone(),
            max_jobs: self.max_jobs,
            max_bytes: self.max_bytes,
            replicas: self.replicas,
            attempt_timeout: self.attempt_timeout,
            weights: self.weights.clone(),
        }
    }
}

/// What becomes of the streams when the InferenceModel is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum OnDelete {
    /// They stay, with their consumers, jobs and outcomes. Jobs can still be published; an InferenceModel of the
    /// same name goes on with them.
    #[default]
    Retain,
    /// They are deleted, with all jobs and outcomes.
    Delete,
}

/// The outcomes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ResultsSpec {
    /// How long an outcome is kept, from its creation; a job's cancel marker and ledger as long, once it has one.
    pub ttl: Span,
    /// Most bytes of outcomes, markers and ledgers; beyond it answers wait in their workers.
    pub max_bytes: Bytes,
    /// How long dead letters are kept, and cancel markers and ledgers of jobs that have no outcome yet.
    pub dead_ttl: Span,
    /// Most bytes of dead letters; beyond it dead jobs stay in the queue.
    pub dead_max_bytes: Bytes,
    /// Outcomes larger than this go to `objectStore`, or are refused without one.
    pub inline_bytes_max: Bytes,
    /// Where large outcomes go, and where the bodies of large jobs may lie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object_store: Option<ObjectStoreSpec>,
}

impl Default for ResultsSpec {
    fn default() -> Self {
        let results = crate::config::ResultsConfig::default();
        Self {
            ttl: results.ttl,
            max_bytes: results.max_bytes,
            dead_ttl: results.dead_ttl,
            dead_max_bytes: results.dead_max_bytes,
            inline_bytes_max: results.inline_bytes_max,
            object_store: None,
        }
    }
}

/// A folder in an S3-compatible object store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ObjectStoreSpec {
    /// `s3://bucket/prefix`. Claim checks of jobs must lie under it too.
    #[schemars(length(max = 1024))]
    pub uri: String,
    /// Address of an S3-compatible service; AWS when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub endpoint: Option<String>,
    /// Region of the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub region: Option<String>,
    /// Put the bucket into the path instead of the host name.
    #[serde(default)]
    pub path_style: bool,
    /// As `spec.model.credentialsSecretRef`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretRef>,
    /// A role that workers take on by a token of their service account, instead of keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub web_identity: Option<WebIdentitySpec>,
    /// A Secret of the same namespace whose key `ca.crt` holds the certificate authority of the service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretRef>,
    /// Address of an HTTP proxy through which workers reach the service, such as `http://proxy.net.svc:3128`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub proxy: Option<String>,
}

/// A role that a token of the workers' service account takes on (AssumeRoleWithWebIdentity).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WebIdentitySpec {
    /// The role, such as `arn:aws:iam::123456789012:role/models`.
    #[schemars(length(min = 1, max = 2048))]
    pub role_arn: String,
    /// Whom the token is for.
    #[serde(default = "defaults::audience")]
    #[schemars(length(min = 1, max = 512))]
    pub audience: String,
    /// Address of the security token service; AWS's of the region when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub endpoint: Option<String>,
}

/// Starting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct StartSpec {
    /// A worker that is not ready after this time is started again.
    pub timeout: Span,
}

impl Default for StartSpec {
    fn default() -> Self {
        Self { timeout: Span::seconds(1800) }
    }
}

mod defaults {
    use crate::units::Bytes;

    pub fn audience() -> String {
        "sts.amazonaws.com".to_owned()
    }
    pub fn cache_size() -> Bytes {
        Bytes(200 << 30)
    }
}
