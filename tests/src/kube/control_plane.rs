//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler as child processes on free ports of
//! 127.0.0.1, with certificates, RBAC, the Node authorizer and Pod Security admission on.
//!
//! etcd does not fsync: a test's cluster need not outlive the machine. The controllers that need a cloud, real
//! pod addresses or a kubelet's volumes are off; those that run Deployments, collect garbage and watch nodes
//! are on. Everything lies in a temporary folder and is gone when the handle is dropped.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::ByteString;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::json;
use tempfile::TempDir;

use super::programs;
use crate::certificates::{Certificates, Identity};
use crate::http as local;
use crate::ports::Port;
use crate::process::Process;

/// An idle machine takes 6 s; a busy one has far less.
const READY_LIMIT: Duration = Duration::from_secs(180);
/// A look at `/readyz` costs the starting server little.
const READY_POLL: Duration = Duration::from_millis(100);
/// Requests a second of the controllers and of the harness's clients; the defaults throttle tests.
const CLIENT_QPS: u32 = 400;
/// Lines of a log that an error shows.
const LOG_LINES_SHOWN: usize = 30;
/// What a conformant cluster runs for the objects that our chart and operator make.
const CONTROLLERS: [&str; 12] = [
    "deployment-controller",
    "replicaset-controller",
    "job-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "serviceaccount-controller",
    "root-ca-certificate-publisher-controller",
    "disruption-controller",
    "pod-garbage-collector-controller",
    "node-lifecycle-controller",
    "taint-eviction-controller",
    "horizontal-pod-autoscaler-controller",
];

/// How a control plane is started.
#[derive(Debug, Clone, Default)]
pub struct ControlPlaneOptions {
    /// Rules of the audit policy as YAML list items; without any, nothing is audited.
    pub audit_rules: Option<String>,
    /// Only etcd and the API server: no controller and no scheduler runs.
    pub api_only: bool,
}

/// A running control plane. Dropping it kills its processes.
#[derive(Debug)]
pub struct ControlPlane {
    // Fields are dropped in this order: clients first, then the API server, its store, its files.
    processes: Vec<Process>,
    api: Port,
    certificates: Certificates,
    folder: TempDir,
    started_in: Duration,
}

impl ControlPlane {
    /// Starts one with an empty store and waits until it is ready.
    ///
    /// # Errors
    /// When a program is missing or does not come up; the message holds the end of its log.
    pub async fn start(options: &ControlPlaneOptions) -> Result<Self> {
        let (start, options) = (Instant::now(), options.clone());
        // The wait for etcd blocks its thread.
        let mut plane = tokio::task::spawn_blocking(move || Self::launch_api(&options)).await??;
        plane.wait_ready().await?;
        plane.started_in = start.elapsed();
        Ok(plane)
    }

    fn launch_api(options: &ControlPlaneOptions) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("millrace-kube-").tempdir()?;
        let certificates = Certificates::create(folder.path())?;
        let (client, peer, health) = (Port::reserve()?, Port::reserve()?, Port::reserve()?);
        let mut plane = Self {
            processes: Vec::new(),
            api: Port::reserve()?,
            certificates,
            folder,
            started_in: Duration::ZERO,
        };
        let store = plane.start_etcd([&client, &peer, &health])?;
        let server = plane.start_api_server(&client, options)?;
        if !options.api_only {
            // They wait for the API server by themselves.
            plane.processes = vec![plane.start_controllers()?, plane.start_scheduler()?];
        }
        plane.processes.extend([server, store]);
        Ok(plane)
    }

    fn launch(&self, program: &str, arguments: &[String]) -> Result<Process> {
        let mut command = Command::new(programs::program(program)?);
        command.args(arguments).current_dir(self.folder.path());
        Process::start(&command, &self.log_file(program))
    }

    fn log_file(&self, program: &str) -> PathBuf {
        self.folder.path().join(format!("{program}.log"))
    }

    fn start_etcd(&self, [client, peer, health]: [&Port; 3]) -> Result<Process> {
        let url = |port: &Port| format!("http://127.0.0.1:{}", port.number());
        let data = self.folder.path().join("etcd");
        let arguments = [
            format!("--data-dir={}", data.display()),
            format!("--listen-client-urls={}", url(client)),
            format!("--advertise-client-urls={}", url(client)),
            format!("--listen-peer-urls={}", url(peer)),
            format!("--initial-advertise-peer-urls={}", url(peer)),
            format!("--initial-cluster=default={}", url(peer)),
            format!("--listen-metrics-urls={}", url(health)),
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        let mut process = self.launch("etcd", &arguments)?;
        let address = ([127, 0, 0, 1], health.number()).into();
        process
            .wait_until(READY_LIMIT, || local::get(address, "/health").is_ok_and(|(code, _)| code == 200))?;
        Ok(process)
    }

    fn start_api_server(&self, store: &Port, options: &ControlPlaneOptions) -> Result<Process> {
        let file = |name: &str| self.certificates.file(name).display().to_string();
        let mut arguments = vec![
            format!("--etcd-servers=http://127.0.0.1:{}", store.number()),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", self.api.number()),
            "--advertise-address=127.0.0.1".to_owned(),
            // The endpoint of the service `kubernetes` may not be a loopback address; pods get it by environment.
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--tls-cert-file={}", file("server.crt")),
            format!("--tls-private-key-file={}", file("server.key")),
            format!("--client-ca-file={}", file("ca.crt")),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", file("tokens.pub")),
            format!("--service-account-signing-key-file={}", file("tokens.key")),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--profiling=false".to_owned(),
        ];
        if let Some(rules) = &options.audit_rules {
            let policy = format!("apiVersion: audit.k8s.io/v1\nkind: Policy\nrules:\n{rules}\n");
            fs::write(self.folder.path().join("audit.yaml"), policy)?;
            arguments
                .push(format!("--audit-policy-file={}", self.folder.path().join("audit.yaml").display()));
            arguments.push(format!("--audit-log-path={}", self.audit_log().display()));
            arguments.push("--audit-log-mode=blocking".to_owned());
        }
        self.launch("kube-apiserver", &arguments)
    }

    fn start_controllers(&self) -> Result<Process> {
        let config = self.write_kubeconfig("system:kube-controller-manager", None)?;
        let file = |name: &str| self.certificates.file(name).display().to_string();
        let arguments = [
            format!("--kubeconfig={}", config.display()),
            format!("--controllers={}", CONTROLLERS.join(",")),
            format!("--root-ca-file={}", file("ca.crt")),
            // Each controller has the rights of its own role, as in a real cluster.
            "--use-service-account-credentials=true".to_owned(),
            format!("--service-account-private-key-file={}", file("tokens.key")),
            "--leader-elect=false".to_owned(),
            "--secure-port=0".to_owned(),
            format!("--kube-api-qps={CLIENT_QPS}"),
            format!("--kube-api-burst={}", 2 * CLIENT_QPS),
        ];
        self.launch("kube-controller-manager", &arguments)
    }

    fn start_scheduler(&self) -> Result<Process> {
        let config = self.write_kubeconfig("system:kube-scheduler", None)?;
        let arguments = [
            format!("--kubeconfig={}", config.display()),
            "--leader-elect=false".to_owned(),
            "--secure-port=0".to_owned(),
            format!("--kube-api-qps={CLIENT_QPS}"),
            format!("--kube-api-burst={}", 2 * CLIENT_QPS),
        ];
        self.launch("kube-scheduler", &arguments)
    }

    async fn wait_ready(&mut self) -> Result<()> {
        let client = self.admin().await?;
        let start = Instant::now();
        loop {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            let Err(error) = client.request_text(request).await else { return Ok(()) };
            self.check()?;
            if start.elapsed() >= READY_LIMIT {
                let log = self.log("kube-apiserver")?;
                bail!("the API server is not ready after {READY_LIMIT:?}: {error}\n{}", tail(&log));
            }
            tokio::time::sleep(READY_POLL).await;
        }
    }

    /// How long the start took, until the API server was ready.
    pub fn started_in(&self) -> Duration {
        self.started_in
    }

    /// The API server's port of 127.0.0.1.
    pub fn api_port(&self) -> u16 {
        self.api.number()
    }

    /// The authority's certificate, PEM.
    pub fn authority(&self) -> String {
        self.certificates.authority()
    }

    /// The audit log: one JSON object a line.
    pub fn audit_log(&self) -> PathBuf {
        self.folder.path().join("audit.log")
    }

    /// A kubeconfig of a new client certificate for `user`, in `group` if any.
    ///
    /// # Errors
    /// When the certificate cannot be made.
    pub fn kubeconfig(&self, user: &str, group: Option<&str>) -> Result<Kubeconfig> {
        Ok(serde_json::from_value(self.kubeconfig_json(self.certificates.client(user, group)?))?)
    }

    fn kubeconfig_json(&self, identity: Identity) -> serde_json::Value {
        let server = format!("https://127.0.0.1:{}", self.api.number());
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": server, "certificate-authority-data": base64(self.authority().as_bytes()),
            }}],
            "users": [{"name": "test", "user": {
                "client-certificate-data": base64(identity.certificate.as_bytes()),
                "client-key-data": base64(identity.key.as_bytes()),
            }}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        })
    }

    /// The same as a file, for programs; a JSON text is YAML too.
    ///
    /// # Errors
    /// When the certificate cannot be made or the file not be written.
    pub fn write_kubeconfig(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        let file = self.folder.path().join(format!("{}.kubeconfig", user.replace(':', "-")));
        let config = self.kubeconfig_json(self.certificates.client(user, group)?);
        fs::write(&file, serde_json::to_string_pretty(&config)?)?;
        Ok(file)
    }

    /// A client for `user`, in `group` if any.
    ///
    /// # Errors
    /// When the certificate cannot be made.
    pub async fn client(&self, user: &str, group: Option<&str>) -> Result<Client> {
        let kubeconfig = self.kubeconfig(user, group)?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        Ok(Client::try_from(config)?)
    }

    /// A client that may do everything.
    ///
    /// # Errors
    /// When the certificate cannot be made.
    pub async fn admin(&self) -> Result<Client> {
        self.client("millrace-test-admin", Some("system:masters")).await
    }

    /// What a program printed, such as `kube-apiserver`.
    ///
    /// # Errors
    /// When it was never started.
    pub fn log(&self, program: &str) -> Result<String> {
        let file = self.log_file(program);
        fs::read_to_string(&file).with_context(|| format!("{}: no such log", file.display()))
    }

    /// Refuses when one of the programs has ended.
    ///
    /// # Errors
    /// As it says, with the end of its log.
    pub fn check(&mut self) -> Result<()> {
        for process in &mut self.processes {
            if let Some(status) = process.ended()? {
                bail!("a program of the control plane ended with {status}\n{}", process.log_tail());
            }
        }
        Ok(())
    }
}

/// Kubeconfig files hold PEM texts in base64, as Kubernetes' own byte strings do.
fn base64(bytes: &[u8]) -> serde_json::Value {
    json!(ByteString(bytes.to_vec()))
}

/// The last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
}
