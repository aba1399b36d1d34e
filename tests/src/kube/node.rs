//! A node that runs pods as processes of this machine. It is made for tests and the demo, and for nothing else.
//!
//! Towards the API server it behaves as a kubelet: it registers with its own certificate under the Node
//! authorizer, keeps its lease, takes the pods that the scheduler binds to it, honours command, arguments,
//! environment, volumes, security context, probes, restart policy and grace period, reports status and
//! conditions, and removes a pod once its processes are gone. It advertises `nvidia.com/gpu` as a device plugin
//! would; there need be no GPU.
//!
//! What differs: images are names of programs that are already here; all pods share the machine's loopback
//! interface, each with an address of its own, which the variables `MILLRACE_LISTEN_ADDRESS` and `MILLRACE_LISTEN`
//! tell our worker and operator; back-off is ten times shorter; volumes do not follow later changes; limits and
//! network policies are not enforced. A pod that needs more than that fails with the field's name.

mod addresses;
mod container;
mod environment;
mod images;
mod pod;
mod probe;
mod sandbox;
mod status;
mod surroundings;
mod volumes;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node as NodeObject, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

pub use images::{Image, Images};

use self::addresses::Addresses;
use self::pod::{Life, PodSeen};
use super::control_plane::ControlPlane;

/// The operator's port, as the chart probes it.
const OPERATOR_PORT: u16 = 8080;
/// As a kubelet's.
const LEASE_NAMESPACE: &str = "kube-node-lease";
const LEASE_RENEWAL: Duration = Duration::from_secs(10);
const LEASE_SECONDS: i32 = 40;
/// Registration is tried again: the API server may still make its first roles.
const REGISTER_AGAIN: Duration = Duration::from_millis(200);
const REGISTER_MAX: u32 = 150;
/// After a failed watch.
const WATCH_AGAIN: Duration = Duration::from_millis(500);

/// How a node is made.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Its name.
    pub name: String,
    /// GPUs that it advertises.
    pub gpus: u32,
    /// The images that it has.
    pub images: Images,
}

/// A running node. Dropping it kills the processes of its pods.
#[derive(Debug)]
pub struct Node {
    _work: AbortOnDropHandle<()>,
    shared: Arc<Shared>,
    folder: TempDir,
}

/// What the node's parts share.
pub(crate) struct Shared {
    client: Client,
    images: Images,
    addresses: Addresses,
    api_port: u16,
    folder: PathBuf,
    notes: Mutex<File>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl Shared {
    /// A pod's folder: its volumes, its containers' roots and logs.
    fn pod_folder(&self, pod: &Pod) -> PathBuf {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let ObjectMeta { namespace, name, uid, .. } = &pod.metadata;
        self.folder.join(format!("{}_{}_{}", text(namespace), text(name), text(uid)))
    }

    /// The variables that each container gets.
    fn variables(&self, pod: &Pod, ip: Ipv4Addr) -> Vec<(String, String)> {
        let hostname = pod.metadata.name.clone().unwrap_or_default();
        let port = self.api_port.to_string();
        [
            ("HOME", "/".to_owned()),
            ("HOSTNAME", hostname),
            ("KUBERNETES_SERVICE_HOST", Ipv4Addr::LOCALHOST.to_string()),
            ("KUBERNETES_SERVICE_PORT", port),
            ("MILLRACE_LISTEN", format!("{ip}:{OPERATOR_PORT}")),
            ("MILLRACE_LISTEN_ADDRESS", ip.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }

    /// A line of the node's own log.
    fn note(&self, text: &str) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk must not end the node.
        let _ = writeln!(notes, "{} {text}", Timestamp::now());
    }
}

impl Node {
    /// Registers a node and starts to run pods.
    ///
    /// # Errors
    /// When the machine allows no mount namespaces, or the API server refuses the node.
    pub async fn start(plane: &ControlPlane, options: NodeOptions) -> Result<Self> {
        sandbox::check()?;
        let folder = tempfile::Builder::new().prefix("millrace-node-").tempdir()?;
        // A container's user is not ours: it must be able to pass through.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open)?;
        let client = plane.client(&format!("system:node:{}", options.name), Some("system:nodes")).await?;
        register(&client, &options).await?;
        let shared = Arc::new(Shared {
            client: client.clone(),
            images: options.images,
            addresses: Addresses::reserve()?,
            api_port: plane.api_port(),
            folder: folder.path().to_owned(),
            notes: Mutex::new(File::create(folder.path().join("node.log"))?),
        });
        let (pods, lease) =
            (run_pods(shared.clone(), options.name.clone()), keep_lease(client, options.name));
        let work = tokio::spawn(async {
            tokio::join!(pods, lease);
        });
        Ok(Self { _work: AbortOnDropHandle::new(work), shared, folder })
    }

    /// What the containers of a namespace's pods printed, pod by pod; `prefix` is the beginning of their names.
    pub fn logs(&self, namespace: &str, prefix: &str) -> Vec<(String, String)> {
        let start = format!("{namespace}_{prefix}");
        let folders = std::fs::read_dir(self.folder.path()).into_iter().flatten().flatten();
        let mut found = Vec::new();
        for folder in folders.filter(|folder| folder.file_name().to_string_lossy().starts_with(&start)) {
            for file in std::fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                let name = file.file_name().to_string_lossy().into_owned();
                if let (Some(container), Ok(bytes)) = (name.strip_suffix(".log"), std::fs::read(file.path()))
                {
                    let pod = folder.file_name().to_string_lossy().into_owned();
                    found.push((format!("{pod}/{container}"), String::from_utf8_lossy(&bytes).into_owned()));
                }
            }
        }
        found.sort();
        found
    }

    /// What the node itself noted: refusals of the API server, references that lead nowhere.
    pub fn notes(&self) -> String {
        std::fs::read_to_string(self.shared.folder.join("node.log")).unwrap_or_default()
    }
}

async fn register(client: &Client, options: &NodeOptions) -> Result<()> {
    let nodes: Api<NodeObject> = Api::all(client.clone());
    let node: NodeObject = serde_json::from_value(json!({
        "metadata": {"name": options.name, "labels": {
            "kubernetes.io/hostname": options.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
        }},
    }))?;
    let mut tries = 0;
    while let Err(error) = nodes.create(&PostParams::default(), &node).await {
        if matches!(&error, kube::Error::Api(refusal) if refusal.code == 409) {
            break;
        }
        tries += 1;
        if tries >= REGISTER_MAX {
            return Err(error).context("the API server refuses the node");
        }
        tokio::time::sleep(REGISTER_AGAIN).await;
    }
    let resources = json!({
        "cpu": "64", "memory": "512Gi", "ephemeral-storage": "1Ti", "pods": "250",
        "nvidia.com/gpu": options.gpus.to_string(),
    });
    let condition = |kind: &str, status: &str, reason: &str| {
        let now = Timestamp::now().to_string();
        json!({"type": kind, "status": status, "reason": reason, "lastHeartbeatTime": now, "lastTransitionTime": now})
    };
    let status = json!({"status": {
        "capacity": resources,
        "allocatable": resources,
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": options.name}],
        "nodeInfo": {
            "machineID": "", "systemUUID": "", "bootID": "", "kernelVersion": "", "osImage": "processes",
            "containerRuntimeVersion": "process://1", "kubeletVersion": super::programs::VERSION,
            "kubeProxyVersion": "", "operatingSystem": "linux", "architecture": "amd64",
        },
        "conditions": [
            condition("Ready", "True", "KubeletReady"),
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID"),
        ],
    }});
    nodes.patch_status(&options.name, &PatchParams::default(), &Patch::Strategic(&status)).await?;
    Ok(())
}

/// The lease tells the node controller that the node lives.
async fn keep_lease(client: Client, name: String) {
    let leases: Api<Lease> = Api::namespaced(client, LEASE_NAMESPACE);
    loop {
        let spec = LeaseSpec {
            holder_identity: Some(name.clone()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            renew_time: Some(MicroTime(Timestamp::now())),
            ..LeaseSpec::default()
        };
        let patch = Patch::Merge(json!({"spec": spec}));
        let renewed = match leases.patch(&name, &PatchParams::default(), &patch).await {
            Err(kube::Error::Api(refusal)) if refusal.code == 404 => {
                let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
                leases.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await
            }
            other => other,
        };
        // The lease's namespace is made by the API server soon after its start.
        tokio::time::sleep(if renewed.is_ok() { LEASE_RENEWAL } else { REGISTER_AGAIN }).await;
    }
}

/// Runs the pods that are bound to the node, until it is dropped.
async fn run_pods(shared: Arc<Shared>, name: String) {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={name}"));
    let mut events = std::pin::pin!(watcher(Api::<Pod>::all(shared.client.clone()), config));
    let mut known: BTreeMap<String, watch::Sender<PodSeen>> = BTreeMap::new();
    let mut listed = Vec::new();
    let mut lives = JoinSet::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listed.clear(),
            Ok(Event::InitApply(pod)) => {
                listed.push(pod.metadata.uid.clone().unwrap_or_default());
                take(&shared, pod, &mut known, &mut lives);
            }
            Ok(Event::InitDone) => {
                for (_, gone) in known.extract_if(.., |uid, _| !listed.contains(uid)) {
                    gone.send_modify(|seen| seen.gone = true);
                }
            }
            Ok(Event::Apply(pod)) => take(&shared, pod, &mut known, &mut lives),
            Ok(Event::Delete(pod)) => {
                if let Some(gone) = known.remove(&pod.metadata.uid.unwrap_or_default()) {
                    gone.send_modify(|seen| seen.gone = true);
                }
            }
            Err(error) => {
                shared.note(&format!("watch of pods: {error}"));
                tokio::time::sleep(WATCH_AGAIN).await;
            }
        }
        while lives.try_join_next().is_some() {}
    }
}

/// A pod that was seen: a new one starts to live, a known one learns of the change.
fn take(
    shared: &Arc<Shared>,
    pod: Pod,
    known: &mut BTreeMap<String, watch::Sender<PodSeen>>,
    lives: &mut JoinSet<()>,
) {
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    if let Some(seen) = known.get(&uid) {
        seen.send_modify(|seen| seen.pod = pod);
        return;
    }
    let (sender, receiver) = watch::channel(PodSeen { pod, gone: false });
    match Life::new(shared.clone(), receiver) {
        Ok(life) => {
            lives.spawn(life.go());
            known.insert(uid, sender);
        }
        Err(error) => shared.note(&format!("a pod was not taken: {error:#}")),
    }
}
