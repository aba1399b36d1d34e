//! A broker that takes only TLS and only known users: the worker, the command line and the operator get in with their
//! files, and each says what is missing without them.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::api::DeleteParams;
use millrace_tests::cluster::QueueHarness;
use millrace_tests::kube::cluster::{self as plane, ready_reason};
use millrace_tests::kube::control_plane::{ControlPlane, ControlPlaneOptions};
use millrace_tests::kube::operator::Operator;
use millrace_tests::kube::programs;
use millrace_tests::nats::{self, NatsServer};
use millrace_tests::tools;
use millrace_tests::worker::Worker;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

/// The files of the broker's user: credentials and certificate authority.
fn files(nats: &NatsServer) -> Result<(PathBuf, PathBuf)> {
    let accounts = nats.accounts().context("a broker without accounts")?;
    Ok((accounts.credentials.clone(), accounts.authority.clone()))
}

/// Runs the command line with these options beside the address.
fn millrace(cluster: &QueueHarness, words: &[&str]) -> Result<Output> {
    let mut command = Command::new(tools::program("millrace")?);
    for name in ["NATS_CREDS", "NATS_CA", "MILLRACE_NAMESPACE", "MILLRACE_INBOX_PREFIX"] {
        command.env_remove(name);
    }
    command.args(["--model", cluster.model().name.as_str(), "--connect-timeout", "2s"]).args(words);
    Ok(command.env("NATS_URL", cluster.nats.url()).output()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_and_the_command_line_get_in_with_their_files() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = QueueHarness::tiny()?;
    cluster.nats = NatsServer::start_secured()?;
    let (creds, ca) = files(&cluster.nats)?;
    let mut config = cluster.config.clone();
    config.nats.servers = vec![cluster.nats.url()];
    config.nats.monitor = Some(cluster.nats.monitor_url());
    config.nats.ca_file = Some(ca.clone());
    let refused = Worker::start(&config, &[])?;
    let start = Instant::now();
    while !refused.log().contains("authorization violation") {
        ensure!(start.elapsed() < LIMIT, "it does not say why it is kept out: {}", refused.log_tail());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(refused);

    config.nats.credentials_file = Some(creds.clone());
    let worker = Worker::start_ready(&config)?;
    let body = cluster.folder.path().join("job.json");
    std::fs::write(&body, r#"{"prompt":"safe","max_tokens":4}"#)?;
    let (body, creds, ca) =
        (body.display().to_string(), creds.display().to_string(), ca.display().to_string());
    let submit = ["submit", body.as_str(), "--wait"];
    let done = millrace(&cluster, &[&["--creds", &creds, "--ca", &ca], &submit[..]].concat())?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{}: {said}\n{}", done.status, worker.log_tail());
    ensure!(worker.metric("millrace_jobs_total")? >= 1.0, "{said}");

    for (given, missing) in [(vec!["--ca", &ca], "--creds"), (vec!["--creds", &creds], "--ca")] {
        let done = millrace(&cluster, &[&given, &submit[..]].concat())?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(!done.status.success() && said.contains(missing), "with {given:?}: {}: {said}", done.status);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_gets_in_with_its_files() -> Result<()> {
    if !programs::have() || !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let nats = NatsServer::start_secured()?;
    let (creds, ca) = files(&nats)?;
    // A user with the operator's permissions and no more, as they stand in a JWT.
    let mut command = Command::new(tools::program("millrace")?);
    let printed = command.args(["permissions", "--role", "operator", "--json"]).output()?;
    let permissions = serde_json::from_slice(&printed.stdout).context("the operator's permissions")?;
    nats.accounts().context("a broker without accounts")?.write_user(&creds, &permissions, None)?;
    let (creds, ca) = (creds.display().to_string(), ca.display().to_string());
    let plane =
        ControlPlane::start(&ControlPlaneOptions { api_only: true, ..ControlPlaneOptions::default() })
            .await?;
    let arguments = ["--no-leader-election", "--nats-credentials-file", &creds, "--nats-ca-file", &ca];
    let kubeconfig = plane.write_kubeconfig(plane::OPERATOR_USER, Some("system:masters"))?;
    let cluster = plane::Cluster::of(plane, nats).await?;
    let operator = Operator::start(kubeconfig, &cluster.nats.url(), &arguments)?;
    let spec = json!({"model": {"uri": "s3://models/tiny"}, "scaling": {"minReplicas": 0, "maxReplicas": 1},
        "queue": {"maxBytes": "1Mi"}});
    cluster.apply("default", "m", &spec).await?;
    let asleep = |status: &_| ready_reason(status).as_deref() == Some("ScaledToZero");
    let settled = cluster.wait_status(("default", "m"), "asleep, its queue made", LIMIT, asleep).await;
    settled.with_context(|| operator.log_tail())?;
    // A change and a deletion need rights too.
    let spec = json!({"model": {"uri": "s3://models/tiny"}, "scaling": {"minReplicas": 0, "maxReplicas": 1},
        "queue": {"maxBytes": "2Mi", "onDelete": "Delete"}});
    cluster.apply("default", "m", &spec).await?;
    let repaired = || operator.log().contains("max_bytes is 1048576, not 2097152");
    let start = Instant::now();
    while !repaired() {
        ensure!(start.elapsed() < LIMIT, "the stream is not changed: {}", operator.log_tail());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.models("default").delete("m", &DeleteParams::default()).await?;
    let gone = async || Ok(cluster.models("default").get_opt("m").await?.is_none().then_some(()));
    plane::wait("end of the model", LIMIT, gone).await.with_context(|| operator.log_tail())?;
    let log = cluster.nats.log();
    let refused: Vec<&str> = log.lines().filter(|line| line.contains("Violation")).collect();
    ensure!(refused.is_empty(), "{refused:?}");
    Ok(())
}
