//! One pod's life on the node: volumes, init containers, containers, status, end.
//!
//! A pod is deleted from the API server only after its processes are gone, as a kubelet does it.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, PodSpec, PodStatus, Secret, ServiceAccount};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::Shared;
use super::addresses::Address;
use super::container::{ContainerProgress, ContainerRun, Standing};
use super::environment::{Environment, Sources};
use super::images::Image;
use super::sandbox::is_root;
use super::status::PodReport;
use super::surroundings::{Surroundings, unsupported};
use super::volumes::{Volumes, asks_for_token};

/// What a pod refers to may come later than the pod.
const PREPARE_AGAIN: Duration = Duration::from_millis(500);
/// A status that could not be written is written again.
const WRITE_AGAIN: Duration = Duration::from_millis(500);
const WRITES_MAX: u32 = 5;
/// A kubelet's default, in seconds.
const GRACE_S: i64 = 30;
/// How long a service account's token holds, in seconds; it is not renewed.
const TOKEN_S: i64 = 86_400;

/// The last that was seen of a pod.
#[derive(Debug, Clone)]
pub struct PodSeen {
    /// The object.
    pub pod: Pod,
    /// It is no longer on the API server.
    pub gone: bool,
}

/// A pod on this node.
#[derive(Debug)]
pub struct Life {
    shared: Arc<Shared>,
    seen: watch::Receiver<PodSeen>,
    address: Arc<Address>,
    started: Timestamp,
    board: watch::Sender<Vec<ContainerProgress>>,
    stop: watch::Sender<Option<Duration>>,
    refused: Option<String>,
    written: Option<PodStatus>,
}

impl Life {
    /// A pod that was bound to the node.
    ///
    /// # Errors
    /// When no address is free.
    pub fn new(shared: Arc<Shared>, seen: watch::Receiver<PodSeen>) -> Result<Self> {
        let pod = seen.borrow().pod.clone();
        let spec = pod.spec.as_ref().context("the pod has no spec")?;
        let containers = spec.init_containers.iter().flatten().count() + spec.containers.len();
        let address = Arc::new(shared.addresses.take()?);
        Ok(Self {
            shared,
            address,
            started: Timestamp::now(),
            board: watch::channel(vec![ContainerProgress::default(); containers]).0,
            stop: watch::channel(None).0,
            refused: unsupported(&pod),
            written: None,
            seen,
        })
    }

    /// Runs the pod until it is deleted.
    pub async fn go(mut self) {
        let mut progress = self.board.subscribe();
        let mut seen = self.seen.clone();
        let mut over = self.refused.is_some();
        let work = Work {
            shared: self.shared.clone(),
            pod: seen.borrow_and_update().pod.clone(),
            address: self.address.clone(),
            board: self.board.clone(),
            stop: self.stop.subscribe(),
        };
        let mut work = AbortOnDropHandle::new(tokio::spawn(async move {
            if !over {
                work.go().await;
            }
        }));
        let mut joined = false;
        loop {
            self.ask_to_stop();
            self.write_status().await;
            let (gone, deleted) = {
                let seen = self.seen.borrow();
                (seen.gone, seen.pod.metadata.deletion_timestamp.is_some())
            };
            if over && gone {
                return;
            }
            if over && deleted {
                self.delete().await;
            }
            tokio::select! {
                _ = &mut work, if !joined => (over, joined) = (true, true),
                _ = progress.changed() => {}
                changed = seen.changed() => if changed.is_err() { return },
            }
            seen.mark_unchanged();
        }
    }

    /// Tells the containers to end when the pod is deleted: within its grace period, or at once when it is gone.
    fn ask_to_stop(&self) {
        let seen = self.seen.borrow();
        let grace = if seen.gone {
            Some(Duration::ZERO)
        } else {
            seen.pod.metadata.deletion_timestamp.as_ref().map(|_| {
                let seconds = seen.pod.metadata.deletion_grace_period_seconds.unwrap_or(GRACE_S);
                Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
            })
        };
        self.stop.send_if_modified(|stop| {
            let changed = *stop != grace && grace.is_some();
            if changed {
                *stop = grace;
            }
            changed
        });
    }

    fn api(&self) -> Api<Pod> {
        let namespace = self.seen.borrow().pod.metadata.namespace.clone().unwrap_or_default();
        Api::namespaced(self.shared.client.clone(), &namespace)
    }

    async fn write_status(&mut self) {
        let seen = self.seen.borrow().clone();
        if seen.gone {
            return;
        }
        let progress = self.board.borrow().clone();
        let (ip, started, refused) = (self.address.ip(), self.started, self.refused.as_deref());
        let report = PodReport { pod: &seen.pod, ip, started, progress: &progress, refused };
        let status = report.status(Timestamp::now());
        if self.written.as_ref().is_some_and(|written| same(written, &status)) {
            return;
        }
        let name = seen.pod.metadata.name.clone().unwrap_or_default();
        // The uid makes the write fail when another pod has taken the name.
        let patch = json!({"metadata": {"uid": seen.pod.metadata.uid}, "status": status});
        for _ in 0..WRITES_MAX {
            match self.api().patch_status(&name, &PatchParams::default(), &Patch::Strategic(&patch)).await {
                Ok(_) => {
                    self.written = Some(status);
                    return;
                }
                Err(kube::Error::Api(refusal)) if matches!(refusal.code, 404 | 409) => return,
                Err(error) => self.shared.note(&format!("status of pod {name}: {error}")),
            }
            tokio::time::sleep(WRITE_AGAIN).await;
        }
    }

    async fn delete(&self) {
        let metadata = self.seen.borrow().pod.metadata.clone();
        let preconditions = Preconditions { uid: metadata.uid, ..Preconditions::default() };
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(preconditions),
            ..DeleteParams::default()
        };
        // Whoever was faster has done the same.
        if let Err(error) = self.api().delete(&metadata.name.unwrap_or_default(), &params).await {
            self.shared.note(&format!("deletion of a pod: {error}"));
        }
    }
}

/// Equal but for the times of transition, which are made anew each time.
fn same(one: &PodStatus, two: &PodStatus) -> bool {
    let without_times = |status: &PodStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            condition.last_transition_time = None;
        }
        status
    };
    without_times(one) == without_times(two)
}

/// The containers' side.
#[derive(Debug)]
struct Work {
    shared: Arc<Shared>,
    pod: Pod,
    address: Arc<Address>,
    board: watch::Sender<Vec<ContainerProgress>>,
    stop: watch::Receiver<Option<Duration>>,
}

impl Work {
    async fn go(mut self) {
        let Some(runs) = self.prepared().await else { return };
        let inits = self.spec().init_containers.iter().flatten().count();
        let mut runs = runs.into_iter();
        for mut run in runs.by_ref().take(inits) {
            // An init container runs again until it succeeds, whatever `Always` means for the others.
            let policy = run.restart_policy.take().filter(|policy| policy != "Always");
            run.restart_policy = Some(policy.unwrap_or_else(|| "OnFailure".into()));
            let place = run.place;
            run.go().await;
            let succeeded =
                matches!(&self.board.borrow()[place].state, Standing::Ended(ended) if ended.code == 0);
            if !succeeded || self.stop.borrow().is_some() {
                return;
            }
        }
        let mut tasks: JoinSet<()> = runs.map(ContainerRun::go).collect();
        while tasks.join_next().await.is_some() {}
    }

    fn spec(&self) -> PodSpec {
        self.pod.spec.clone().unwrap_or_default()
    }

    /// Waits until all that the pod refers to is there; `None` when the pod is deleted before.
    async fn prepared(&mut self) -> Option<Vec<ContainerRun>> {
        loop {
            match self.prepare().await {
                Ok(runs) => return Some(runs),
                Err(error) => {
                    let message = format!("{error:#}");
                    self.shared
                        .note(&format!("pod {}: {message}", self.pod.metadata.name.as_deref().unwrap_or("")));
                    let reason =
                        if message.contains(NO_IMAGE) { NO_IMAGE } else { "CreateContainerConfigError" };
                    let state = Standing::Waiting { reason: reason.into(), message };
                    self.board.send_if_modified(|board| {
                        let changed = board.iter().any(|progress| progress.state != state);
                        board.iter_mut().for_each(|progress| progress.state = state.clone());
                        changed
                    });
                }
            }
            let stopped = self.stop.wait_for(Option::is_some);
            if tokio::time::timeout(PREPARE_AGAIN, stopped).await.is_ok() {
                return None;
            }
        }
    }

    async fn prepare(&self) -> Result<Vec<ContainerRun>> {
        let spec = self.spec();
        let sources = self.sources(&spec).await?;
        let asks = spec.volumes.iter().flatten().any(asks_for_token);
        let token = if asks { Some(self.token(&spec).await?) } else { None };
        let ip = self.address.ip();
        let group = spec.security_context.as_ref().and_then(|context| context.fs_group);
        let group = group.filter(|_| is_root()).map(u32::try_from).transpose()?;
        let folder = self.shared.pod_folder(&self.pod);
        let environment = || Environment { pod: &self.pod, ip, sources: &sources };
        let volumes = Volumes { environment: environment(), token, group }
            .write(spec.volumes.as_deref().unwrap_or_default(), &folder.join("volumes"))?;
        let given = self.shared.variables(&self.pod, ip);
        let surroundings = Surroundings { environment: environment(), volumes: &volumes, given: &given };
        let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
        containers
            .enumerate()
            .map(|(place, container)| self.run(&surroundings, (place, container), &folder))
            .collect()
    }

    fn run(
        &self,
        surroundings: &Surroundings<'_>,
        (place, container): (usize, &Container),
        folder: &Path,
    ) -> Result<ContainerRun> {
        let root = folder.join("roots").join(&container.name);
        std::fs::create_dir_all(&root)?;
        let sandbox = surroundings
            .sandbox(container, self.image(container)?, root)
            .with_context(|| format!("container {:?}", container.name))?;
        Ok(ContainerRun {
            spec: container.clone(),
            sandbox,
            ip: self.address.ip(),
            log: folder.join(format!("{}.log", container.name)),
            restart_policy: self.spec().restart_policy,
            board: self.board.clone(),
            place,
            stop: self.stop.clone(),
        })
    }

    fn image(&self, container: &Container) -> Result<&Image> {
        let reference = container.image.as_deref().unwrap_or_default();
        self.shared
            .images
            .find(reference)
            .with_context(|| format!("{NO_IMAGE}: image {reference:?} is not present"))
    }

    async fn sources(&self, spec: &PodSpec) -> Result<Sources> {
        let namespace = self.pod.metadata.namespace.clone().unwrap_or_default();
        let (maps, secrets) = references(spec);
        let mut sources = Sources::default();
        let api: Api<ConfigMap> = Api::namespaced(self.shared.client.clone(), &namespace);
        for name in maps {
            if let Some(map) = api.get_opt(&name).await.with_context(|| format!("configmap {name:?}"))? {
                sources.config_maps.insert(name, map);
            }
        }
        let api: Api<Secret> = Api::namespaced(self.shared.client.clone(), &namespace);
        for name in secrets {
            if let Some(secret) = api.get_opt(&name).await.with_context(|| format!("secret {name:?}"))? {
                sources.secrets.insert(name, secret);
            }
        }
        Ok(sources)
    }

    async fn token(&self, spec: &PodSpec) -> Result<String> {
        let metadata = &self.pod.metadata;
        let api: Api<ServiceAccount> =
            Api::namespaced(self.shared.client.clone(), metadata.namespace.as_deref().unwrap_or_default());
        let account = spec.service_account_name.as_deref().unwrap_or("default");
        let bound = BoundObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: metadata.name.clone(),
            uid: metadata.uid.clone(),
        };
        let wanted = TokenRequestSpec {
            audiences: Vec::new(),
            bound_object_ref: Some(bound),
            expiration_seconds: Some(TOKEN_S),
        };
        let request = TokenRequest { spec: wanted, ..TokenRequest::default() };
        let made = api.create_token_request(account, &PostParams::default(), &request).await;
        let made = made.with_context(|| format!("token of service account {account:?}"))?;
        Ok(made.status.context("the token request has no answer")?.token)
    }
}

/// The reason of a container whose image nobody announced.
const NO_IMAGE: &str = "ErrImageNeverPull";

/// The names of the ConfigMaps and Secrets that a pod refers to.
fn references(spec: &PodSpec) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut maps, mut secrets) = (BTreeSet::new(), BTreeSet::new());
    for volume in spec.volumes.iter().flatten() {
        maps.extend(volume.config_map.iter().map(|map| map.name.clone()));
        secrets.extend(volume.secret.iter().filter_map(|secret| secret.secret_name.clone()));
        for source in volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()) {
            maps.extend(source.config_map.iter().map(|map| map.name.clone()));
            secrets.extend(source.secret.iter().map(|secret| secret.name.clone()));
        }
    }
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        for source in container.env_from.iter().flatten() {
            maps.extend(source.config_map_ref.iter().map(|map| map.name.clone()));
            secrets.extend(source.secret_ref.iter().map(|secret| secret.name.clone()));
        }
        for from in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
            maps.extend(from.config_map_key_ref.iter().map(|map| map.name.clone()));
            secrets.extend(from.secret_key_ref.iter().map(|secret| secret.name.clone()));
        }
    }
    (maps, secrets)
}
