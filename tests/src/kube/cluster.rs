//! Control plane, broker and the custom resource's definition: what most tests of the operator begin with.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use millrace_crds::model::status::InferenceModelStatus;
use millrace_crds::model::{InferenceModel, definition};
use serde_json::{Value, json};

use super::control_plane::{ControlPlane, ControlPlaneOptions};
use super::operator::Operator;
use crate::nats::NatsServer;

/// The field manager of the tests.
const MANAGER: &str = "millrace-tests";
/// A definition is served, and a namespace has its service account, within this time.
const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at the API server.
const POLL: Duration = Duration::from_millis(50);
/// The user of operators that run outside of the cluster.
pub const OPERATOR_USER: &str = "millrace-operator-test";

/// A control plane and a broker.
#[derive(Debug)]
pub struct Cluster {
    /// The control plane.
    pub plane: ControlPlane,
    /// The broker.
    pub nats: NatsServer,
    client: Access,
}

/// A client that may do everything; the client's type has no debug form.
#[derive(Clone)]
struct Access(Client);

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Access")
    }
}

impl Cluster {
    /// Starts both, and makes InferenceModels known to the API server.
    ///
    /// # Errors
    /// When a program is missing or does not come up.
    pub async fn start(options: &ControlPlaneOptions) -> Result<Self> {
        let nats = tokio::task::spawn_blocking(NatsServer::start);
        let plane = ControlPlane::start(options).await?;
        Self::of(plane, nats.await??).await
    }

    /// Of parts that run. Makes InferenceModels known to the API server.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn of(plane: ControlPlane, nats: NatsServer) -> Result<Self> {
        let client = plane.admin().await?;
        define(&client).await?;
        Ok(Self { plane, nats, client: Access(client) })
    }

    /// A client that may do everything.
    pub fn client(&self) -> Client {
        self.client.0.clone()
    }

    /// Starts an operator outside of the cluster that may do everything.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn operator(&self, arguments: &[&str]) -> Result<Operator> {
        let kubeconfig = self.plane.write_kubeconfig(OPERATOR_USER, Some("system:masters"))?;
        Operator::start(kubeconfig, &self.nats.url(), arguments)
    }

    /// Makes a namespace and waits until pods can be made in it.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        let labels: BTreeMap<&str, &str> = labels.iter().copied().collect();
        let namespace = json!({"metadata": {"name": name, "labels": labels}});
        let api: Api<Namespace> = Api::all(self.client());
        api.create(&PostParams::default(), &serde_json::from_value(namespace)?).await?;
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client(), name);
        wait(&format!("service account of {name}"), LIMIT, async || Ok(accounts.get_opt("default").await?))
            .await?;
        Ok(())
    }

    /// The InferenceModels of a namespace.
    pub fn models(&self, namespace: &str) -> Api<InferenceModel> {
        Api::namespaced(self.client(), namespace)
    }

    /// Creates or changes an InferenceModel.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn apply(&self, namespace: &str, name: &str, spec: &Value) -> Result<InferenceModel> {
        let object = json!({
            "apiVersion": "millrace.dev/v1alpha1", "kind": "InferenceModel",
            "metadata": {"name": name}, "spec": spec,
        });
        let params = PatchParams::apply(MANAGER).force();
        let made = self.models(namespace).patch(name, &params, &Patch::Apply(&object)).await;
        made.with_context(|| format!("InferenceModel {namespace}/{name}"))
    }

    /// Waits until a model's status is as wanted.
    ///
    /// # Errors
    /// When it is not within `limit`; the message holds the status.
    pub async fn wait_status(
        &self,
        (namespace, name): (&str, &str),
        what: &str,
        limit: Duration,
        good: impl Fn(&InferenceModelStatus) -> bool,
    ) -> Result<InferenceModelStatus> {
        let models = self.models(namespace);
        let start = Instant::now();
        loop {
            let status = models.get(name).await?.status;
            if let Some(status) = status.as_ref().filter(|status| good(status)) {
                return Ok(status.clone());
            }
            if start.elapsed() >= limit {
                let text = serde_json::to_string_pretty(&status)?;
                bail!("{namespace}/{name} is not {what} after {limit:?}: {text}");
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

/// The reason of a model's `Ready` condition, where that is true.
pub fn ready_reason(status: &InferenceModelStatus) -> Option<String> {
    let ready = condition(status, "Ready")?;
    (ready["status"] == "True").then(|| ready["reason"].as_str().map(str::to_owned))?
}

/// The reason of one of a model's conditions.
pub fn reason_of(status: &InferenceModelStatus, kind: &str) -> Option<String> {
    condition(status, kind)?["reason"].as_str().map(str::to_owned)
}

fn condition(status: &InferenceModelStatus, kind: &str) -> Option<Value> {
    let status = serde_json::to_value(status).ok()?;
    status["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind).cloned()
}

/// Makes InferenceModels known and waits until they are served.
///
/// # Errors
/// When the API server refuses the definition.
pub async fn define(client: &Client) -> Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let crd = definition::definition();
    let name = crd.metadata.name.clone().context("the definition has no name")?;
    crds.patch(&name, &PatchParams::apply(MANAGER), &Patch::Apply(&crd)).await?;
    let models: Api<InferenceModel> = Api::all(client.clone());
    wait("served InferenceModels", LIMIT, async || Ok(models.list(&Default::default()).await.ok())).await?;
    Ok(())
}

/// Looks again and again until there is something.
///
/// # Errors
/// When a look fails, or nothing is there after `limit`.
pub async fn wait<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await? {
            return Ok(found);
        }
        if start.elapsed() >= limit {
            bail!("no {what} after {limit:?}");
        }
        tokio::time::sleep(POLL).await;
    }
}
