//! The end of a model. What is inside of the cluster goes by owner references; only queues that shall go with
//! their model need a finalizer (`spec.queue.onDelete: Delete`).
//!
//! The order: the workload is deleted, its workers drain, the streams are deleted, the finalizer is removed.
//! Each step may be repeated and the operator may die between any two.

use kube::api::Api;
use kube::{Client, Resource, ResourceExt};
use millrace_crds::model::{InferenceModel, OnDelete, QUEUE_FINALIZER};
use millrace_crds::names::ModelRef;

use crate::apply::{Applier, ApplyError};
use crate::caches::Caches;
use crate::fetch;
use crate::queue::{QueueClient, QueueError};

/// Why a model cannot end yet, or its finalizer cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum FinalizeError {
    /// The API server.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The broker.
    #[error("the streams cannot be deleted: {0}")]
    Queue(#[from] QueueError),
}

/// How far the end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Workers still drain.
    Draining,
    /// All is done; the object goes.
    Done,
}

/// Makes the finalizer present or absent, as the spec says. Returns the number of writes.
///
/// # Errors
/// When the API server refuses, or the object changed meanwhile.
pub async fn ensure(
    applier: &Applier,
    client: &Client,
    object: &InferenceModel,
) -> Result<u32, FinalizeError> {
    let wanted = object.spec.queue.on_delete == OnDelete::Delete;
    let held = object.finalizers().iter().any(|name| name == QUEUE_FINALIZER);
    if wanted == held {
        return Ok(0);
    }
    write(applier, client, object, wanted).await?;
    Ok(1)
}

async fn write(
    applier: &Applier,
    client: &Client,
    object: &InferenceModel,
    wanted: bool,
) -> Result<(), ApplyError> {
    let mut list: Vec<String> =
        object.finalizers().iter().filter(|name| *name != QUEUE_FINALIZER).cloned().collect();
    if wanted {
        list.push(QUEUE_FINALIZER.to_owned());
    }
    let api: Api<InferenceModel> = Api::namespaced(client.clone(), &object.namespace().unwrap_or_default());
    applier.set_finalizers(&api, object, &list).await
}

/// What the end needs.
pub struct Finalizer<'a> {
    /// The API server.
    pub client: &'a Client,
    /// Writes objects.
    pub applier: &'a Applier,
    /// What is there.
    pub caches: &'a Caches,
    /// The broker.
    pub queue: &'a QueueClient,
}

impl Finalizer<'_> {
    /// Takes a model that is being deleted one step further.
    ///
    /// # Errors
    /// When the API server or the broker refuses. Deletion waits then, and is tried again.
    pub async fn end(&self, object: &InferenceModel, model: &ModelRef) -> Result<End, FinalizeError> {
        if !object.finalizers().iter().any(|name| name == QUEUE_FINALIZER) {
            return Ok(End::Done);
        }
        if object.spec.queue.on_delete == OnDelete::Delete {
            let existing = fetch::existing(self.caches, model);
            let uid = object.meta().uid.clone().unwrap_or_default();
            self.applier.delete_workload(&existing, &uid).await?;
            if existing.deployment.is_some() || !fetch::pods(self.caches, model).is_empty() {
                return Ok(End::Draining);
            }
            self.queue.delete(model).await?;
        }
        write(self.applier, self.client, object, false).await?;
        Ok(End::Done)
    }
}
