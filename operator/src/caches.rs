//! What the API server holds, as watches keep it here: InferenceModels, their objects and their pods.
//!
//! Each kind has one watch, narrowed to what carries the operator's label. A change wakes the model that it
//! belongs to. Reads come from here, so a settled model costs the API server nothing. What is read may be a
//! moment old; fixed names and server-side apply make that harmless.

use std::fmt::Debug;
use std::hash::Hash;

use futures::{StreamExt, future::BoxFuture};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, ApiResource, DynamicObject};
use kube::core::DeserializeGuard;
use kube::{Client, Resource, ResourceExt};
use kube_runtime::reflector::{ObjectRef, Store, store::Writer};
use kube_runtime::{WatchStreamExt, watcher};
use millrace_crds::model::{InferenceModel, MODEL_LABEL};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};

use crate::names::{MANAGED_BY, MANAGED_BY_LABEL};
use crate::pod_monitors::{Follower, PodMonitors};

/// An InferenceModel, or the reason why what is there cannot be read as one.
pub type Guarded = DeserializeGuard<InferenceModel>;
/// Which model to look at.
pub type ModelKey = ObjectRef<Guarded>;

/// Changes that may wait to be looked at; the watches wait beyond it.
pub const CHANGES_MAX: usize = 4096;
/// Objects of one page of a first list: bounds the memory of a start with many models.
const PAGE: u32 = 200;

/// All caches. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Caches {
    /// InferenceModels.
    pub models: Store<Guarded>,
    /// Service accounts.
    pub service_accounts: Store<ServiceAccount>,
    /// Configurations.
    pub config_maps: Store<ConfigMap>,
    /// Network policies.
    pub network_policies: Store<NetworkPolicy>,
    /// Disruption budgets.
    pub disruption_budgets: Store<PodDisruptionBudget>,
    /// Pod monitors, where they are wanted.
    pub pod_monitors: Option<watch::Receiver<PodMonitors>>,
    /// Deployments.
    pub deployments: Store<Deployment>,
    /// Pods, without their spec.
    pub pods: Store<Pod>,
}

/// Where watches look.
#[derive(Clone)]
pub struct Scope {
    /// The API server.
    pub client: Client,
    /// One namespace, or all.
    pub namespace: Option<String>,
}

impl Scope {
    fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        match &self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    pub(crate) fn dynamic(&self, kind: &ApiResource) -> Api<DynamicObject> {
        match &self.namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, kind),
            None => Api::all_with(self.client.clone(), kind),
        }
    }
}

/// The watches, to be run beside everything else. None of them ends by itself.
pub type Watches = Vec<BoxFuture<'static, ()>>;

impl Caches {
    /// Makes the caches and the watches that fill them. Changes go to `changes`.
    pub fn new(scope: &Scope, pod_monitors: bool, changes: &mpsc::Sender<ModelKey>) -> (Self, Watches) {
        let mut watches: Watches = Vec::new();
        let (models, writer) = kube_runtime::reflector::store();
        let changed = watch(scope.api::<Guarded>(), watcher::Config::default(), writer, |_| {});
        watches.push(Box::pin(forward(
            changed,
            |model: &Guarded| Some(ObjectRef::from_obj(model)),
            changes.clone(),
        )));
        let pod_monitors = pod_monitors.then(|| {
            let (state, told) = watch::channel(PodMonitors::Asking);
            let (scope, models, changes) = (scope.clone(), models.clone(), changes.clone());
            watches.push(Box::pin(Follower { scope, models, changes, state }.run()));
            told
        });
        let caches = Self {
            models,
            pod_monitors,
            service_accounts: owned(scope, &mut watches, changes),
            config_maps: owned(scope, &mut watches, changes),
            network_policies: owned(scope, &mut watches, changes),
            disruption_budgets: owned(scope, &mut watches, changes),
            deployments: owned(scope, &mut watches, changes),
            pods: {
                let (_, writer) = kube_runtime::reflector::store();
                // Only metadata and status are read, and specs are most of a pod.
                child(scope.api(), writer, |pod: &mut Pod| pod.spec = None, &mut watches, changes)
            },
        };
        (caches, watches)
    }

    /// Waits until every cache has seen all that is there.
    ///
    /// # Errors
    /// When a watch has ended.
    pub async fn ready(&self) -> anyhow::Result<()> {
        self.models.wait_until_ready().await?;
        self.service_accounts.wait_until_ready().await?;
        self.config_maps.wait_until_ready().await?;
        self.network_policies.wait_until_ready().await?;
        self.disruption_budgets.wait_until_ready().await?;
        if let Some(mut pod_monitors) = self.pod_monitors.clone() {
            pod_monitors.wait_for(|state| !matches!(state, PodMonitors::Asking)).await?;
        }
        self.deployments.wait_until_ready().await?;
        self.pods.wait_until_ready().await?;
        Ok(())
    }
}

fn owned<K>(scope: &Scope, watches: &mut Watches, changes: &mpsc::Sender<ModelKey>) -> Store<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + DeserializeOwned
        + Debug
        + Send
        + Sync
        + 'static,
{
    let (_, writer) = kube_runtime::reflector::store();
    child(scope.api(), writer, |_| {}, watches, changes)
}

fn child<K>(
    api: Api<K>,
    writer: Writer<K>,
    slim: impl Fn(&mut K) + Send + Sync + 'static,
    watches: &mut Watches,
    changes: &mpsc::Sender<ModelKey>,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let reader = writer.as_reader();
    watches.push(Box::pin(forward(watch(api, ours(), writer, slim), owner::<K>, changes.clone())));
    reader
}

/// What the operator made.
pub(crate) fn ours() -> watcher::Config {
    watcher::Config::default().labels(&format!("{MANAGED_BY_LABEL}={MANAGED_BY}"))
}

/// The model that an object belongs to, by its label.
pub(crate) fn owner<K: Resource>(object: &K) -> Option<ModelKey> {
    let model = object.labels().get(MODEL_LABEL)?;
    Some(ObjectRef::new(model).within(&object.namespace()?))
}

pub(crate) fn watch<K>(
    api: Api<K>,
    config: watcher::Config,
    writer: Writer<K>,
    slim: impl Fn(&mut K) + Send + Sync + 'static,
) -> impl futures::Stream<Item = Result<K, watcher::Error>> + Send
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Eq + Hash + Clone + Send + Sync,
{
    watcher(api, config.page_size(PAGE))
        .default_backoff()
        .modify(move |object| {
            object.meta_mut().managed_fields = None;
            slim(object);
        })
        .reflect(writer)
        .touched_objects()
}

async fn forward<K: Resource<DynamicType: Default> + Send + 'static>(
    watch: impl futures::Stream<Item = Result<K, watcher::Error>> + Send,
    key: impl Fn(&K) -> Option<ModelKey> + Send,
    changes: mpsc::Sender<ModelKey>,
) {
    let kind = K::kind(&K::DynamicType::default()).into_owned();
    let mut watch = std::pin::pin!(watch);
    while let Some(change) = watch.next().await {
        match change {
            Ok(object) => {
                if let Some(key) = key(&object) {
                    // The receiver lives as long as the operator.
                    let _ = changes.send(key).await;
                }
            }
            Err(error) => tracing::warn!(kind, %error, "a watch broke off; trying again"),
        }
    }
}
