//! PodMonitors: the one kind that the API server may not know, as its definition comes with the Prometheus operator.
//!
//! Models run without it. Where PodMonitors are wanted, the definition is looked for again and again, and from
//! when it is there until it goes they are watched like all other objects. Whenever that changes, every model is
//! looked at, so that it gets its PodMonitor, or says that it has none.

use std::time::Duration;

use futures::StreamExt;
use kube::Client;
use kube::api::DynamicObject;
use kube_runtime::reflector::{ObjectRef, Store, store::Writer};
use tokio::sync::{mpsc, watch};

use crate::build::pod_monitor_kind;
use crate::caches::{self, Guarded, ModelKey, Scope};

/// Pause between two looks for the definition. It comes once in the life of a cluster.
const DEFINITION_PAUSE: Duration = Duration::from_secs(10);
/// The same after a look that failed: the operator's start waits for the first one.
const FAILED_PAUSE: Duration = Duration::from_secs(1);

/// Whether the API server knows PodMonitors, and those that there are.
#[derive(Debug, Clone)]
pub enum PodMonitors {
    /// It was not asked yet.
    Asking,
    /// It does not know them.
    Undefined,
    /// Those with the operator's label.
    Known(Store<DynamicObject>),
}

/// Looks for the definition, and follows the objects while it is there.
pub(crate) struct Follower {
    /// Where.
    pub scope: Scope,
    /// All models.
    pub models: Store<Guarded>,
    /// Where models to be looked at go.
    pub changes: mpsc::Sender<ModelKey>,
    /// Where the state goes.
    pub state: watch::Sender<PodMonitors>,
}

impl Follower {
    /// Runs for ever.
    pub async fn run(self) {
        loop {
            self.wait_for_definition().await;
            self.follow().await;
            tracing::warn!("the definition of PodMonitors is gone; models run without");
        }
    }

    async fn wait_for_definition(&self) {
        let mut told = false;
        loop {
            let pause = match is_defined(&self.scope.client).await {
                Ok(true) => return,
                Ok(false) if told => DEFINITION_PAUSE,
                Ok(false) => {
                    tracing::warn!(
                        "--pod-monitors: the API server does not know PodMonitors (monitoring.coreos.com/v1); \
                         models run without until it does"
                    );
                    told = true;
                    self.tell(PodMonitors::Undefined).await;
                    DEFINITION_PAUSE
                }
                Err(error) => {
                    tracing::warn!(%error, "--pod-monitors: the API server's resources cannot be read; trying again");
                    FAILED_PAUSE
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Watches PodMonitors until their definition is gone.
    async fn follow(&self) {
        let kind = pod_monitor_kind();
        let writer = Writer::<DynamicObject>::new(kind.clone());
        let store = writer.as_reader();
        let api = self.scope.dynamic(&kind);
        let mut watch = std::pin::pin!(caches::watch(api, caches::ours(), writer, |_| {}));
        let mut told = false;
        loop {
            tokio::select! {
                // An error would mean that the writer is gone, and the watch holds it.
                _ = store.wait_until_ready(), if !told => {
                    told = true;
                    self.tell(PodMonitors::Known(store.clone())).await;
                }
                change = watch.next() => match change {
                    Some(Ok(object)) => {
                        if let Some(key) = caches::owner(&object) {
                            // The receiver lives as long as the operator.
                            let _ = self.changes.send(key).await;
                        }
                    }
                    Some(Err(_)) if matches!(is_defined(&self.scope.client).await, Ok(false)) => return,
                    Some(Err(error)) => {
                        tracing::warn!(kind = kind.kind, %error, "a watch broke off; trying again");
                    }
                    None => return,
                },
            }
        }
    }

    async fn tell(&self, state: PodMonitors) {
        self.state.send_replace(state);
        for model in self.models.state() {
            // The receiver lives as long as the operator.
            let _ = self.changes.send(ObjectRef::from_obj(model.as_ref())).await;
        }
    }
}

async fn is_defined(client: &Client) -> Result<bool, kube::Error> {
    let kind = pod_monitor_kind();
    match client.list_api_group_resources(&kind.api_version).await {
        Ok(list) => Ok(list.resources.iter().any(|found| found.name == kind.plural)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(error),
    }
}
