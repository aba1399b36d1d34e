//! The whole product on one machine: control plane, broker, object store, a node, and our chart installed with
//! helm, so that the operator itself runs as a pod with the rights that the chart gives it.

use std::fs::read_to_string;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use super::audit;
use super::cluster::{Cluster, wait};
use super::control_plane::{ControlPlane, ControlPlaneOptions};
use super::helm::Helm;
use super::node::{self, Images, Node};
use crate::nats::NatsServer;
use crate::s3::S3;

/// Where the operator runs.
pub const SYSTEM: &str = "millrace-system";
/// The name of the chart's release, and so of the operator's Deployment.
pub const RELEASE: &str = "millrace";
/// Where models run.
pub const NAMESPACE: &str = "models";
/// The Secret with the files that a secured broker asks for.
const NATS_SECRET: &str = "nats";
const CREDENTIALS_KEY: &str = "user.creds";
const CA_KEY: &str = "ca.crt";
/// The Secret with the keys of the object store, as `examples/smollm2.yaml` names it.
pub const S3_SECRET: &str = "s3-models";
/// The bucket of all models.
pub const BUCKET: &str = "models";
/// GPUs that the node advertises. Nothing here needs one.
const GPUS: u32 = 2;
/// The API server's own admission refuses what is not restricted, in both namespaces.
const RESTRICTED: (&str, &str) = ("pod-security.kubernetes.io/enforce", "restricted");
/// An operator that died starts again within this time.
const LIMIT: Duration = Duration::from_secs(120);

/// Everything that runs. Dropping it ends and removes all.
#[derive(Debug)]
pub struct Platform {
    // The node is dropped first: its pods end before what they use.
    /// The node.
    pub node: Node,
    /// The installed chart.
    pub helm: Helm,
    /// Control plane and broker.
    pub cluster: Cluster,
    /// The object store.
    pub s3: S3,
}

impl Platform {
    /// Starts all parts but the operator.
    ///
    /// # Errors
    /// When a part is missing or does not come up.
    pub async fn start() -> Result<Self> {
        Self::beside(NatsServer::start).await
    }

    /// The same with a broker that takes only TLS and only known users.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_secured() -> Result<Self> {
        Self::beside(NatsServer::start_secured).await
    }

    async fn beside(nats: fn() -> Result<NatsServer>) -> Result<Self> {
        let s3 = tokio::task::spawn_blocking(S3::start);
        let nats = tokio::task::spawn_blocking(nats);
        let options = ControlPlaneOptions {
            audit_rules: Some(audit::rule_for(&operator_user())),
            ..ControlPlaneOptions::default()
        };
        let plane = ControlPlane::start(&options).await?;
        let cluster = Cluster::of(plane, nats.await??).await?;
        let images = Images::of_programs(&["millrace-operator", "millrace-worker"])?;
        let node = node::NodeOptions { name: "node-1".into(), gpus: GPUS, images };
        let node = Node::start(&cluster.plane, node).await?;
        let helm = Helm::new(cluster.plane.write_kubeconfig("helm", Some("system:masters"))?)?;
        let s3 = s3.await??;
        s3.create_bucket(BUCKET).await?;
        for namespace in [SYSTEM, NAMESPACE] {
            cluster.namespace(namespace, &[RESTRICTED]).await?;
        }
        let platform = Self { node, helm, cluster, s3 };
        let [access, secret, _] = platform.s3.credentials_environment();
        platform.create_secret(S3_SECRET, &json!({access.0: access.1, secret.0: secret.1})).await?;
        if let Some(accounts) = platform.cluster.nats.accounts() {
            let (creds, ca) = (read_to_string(&accounts.credentials)?, read_to_string(&accounts.authority)?);
            platform.create_secret(NATS_SECRET, &json!({CREDENTIALS_KEY: creds, CA_KEY: ca})).await?;
        }
        Ok(platform)
    }

    async fn create_secret(&self, name: &str, keys: &Value) -> Result<()> {
        let secret: Secret = serde_json::from_value(json!({"metadata": {"name": name}, "stringData": keys}))?;
        for namespace in [SYSTEM, NAMESPACE] {
            let api: Api<Secret> = Api::namespaced(self.cluster.client(), namespace);
            api.create(&PostParams::default(), &secret).await?;
        }
        Ok(())
    }

    /// Puts a model's files into the object store.
    ///
    /// # Errors
    /// When the store refuses them.
    pub async fn upload(&self, folder: &Path, prefix: &str) -> Result<()> {
        self.s3.put_folder(folder, BUCKET, prefix).await
    }

    /// Installs the chart and waits until its operator is ready; `extra` values win.
    ///
    /// # Errors
    /// What helm said, with the operator's log.
    pub async fn install(&self, extra: &Value) -> Result<()> {
        let mut values = json!({
            "image": {"repository": "millrace-operator", "tag": "test"},
            "crd": {"install": false},
            "worker": {"image": "millrace-worker:test", "natsMonitor": self.cluster.nats.monitor_url()},
            "nats": {"servers": [self.cluster.nats.url()]},
        });
        if self.cluster.nats.accounts().is_some() {
            let secured = json!({
                "nats": {"secret": NATS_SECRET, "credentialsKey": CREDENTIALS_KEY, "caKey": CA_KEY},
                "worker": {"natsSecret": NATS_SECRET, "natsCredentialsKey": CREDENTIALS_KEY, "natsCaKey": CA_KEY},
            });
            merge(&mut values, &secured);
        }
        merge(&mut values, extra);
        let installed = tokio::task::block_in_place(|| self.helm.install(RELEASE, SYSTEM, &values));
        installed.with_context(|| self.why())?;
        let deployments: Api<Deployment> = Api::namespaced(self.cluster.client(), SYSTEM);
        wait("ready operator", LIMIT, async || {
            let found = deployments.list(&Default::default()).await?;
            let ready = |deployment: &Deployment| {
                deployment.status.as_ref().is_some_and(|status| status.ready_replicas.unwrap_or(0) > 0)
            };
            Ok((!found.items.is_empty() && found.items.iter().all(ready)).then(|| found.items[0].name_any()))
        })
        .await
        .with_context(|| self.why())?;
        Ok(())
    }

    /// What the operator's pods printed and the node noted: the first look when something fails.
    pub fn why(&self) -> String {
        let last = |text: &str| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(20)..].join("\n")
        };
        let logs = [SYSTEM, NAMESPACE].map(|namespace| self.node.logs(namespace, ""));
        let logs: Vec<String> =
            logs.into_iter().flatten().map(|(pod, log)| format!("--- {pod}\n{}", last(&log))).collect();
        format!("{}\n--- node\n{}", logs.join("\n"), last(&self.node.notes()))
    }
}

/// The user that the operator's pod is to the API server.
pub fn operator_user() -> String {
    format!("system:serviceaccount:{SYSTEM}:{RELEASE}")
}

fn merge(values: &mut Value, extra: &Value) {
    match (values, extra) {
        (Value::Object(values), Value::Object(extra)) => {
            for (key, extra) in extra {
                merge(values.entry(key.clone()).or_insert(Value::Null), extra);
            }
        }
        (values, extra) => *values = extra.clone(),
    }
}
