//! The unmodified OpenAI clients for Python and JavaScript against a gateway: models, chats, completions, responses,
//! streams, errors, retries.

use std::net::TcpListener;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use millrace_crds::config::{QueueConfig, ResultsConfig};
use millrace_crds::names::ModelRef;
use millrace_crds::units::Bytes;
use millrace_queue::provision::{Mode, provision};
use millrace_tests::chat::ChatWorker;
use millrace_tests::gateway::Gateway;
use millrace_tests::scripted::Bench;
use millrace_tests::tools;

/// The stamps of the clients' folders in the tools' cache.
const PYTHON: &str = "openai/requirements.sha256";
const JAVASCRIPT: &str = "openai-npm/package-lock.sha256";

fn millrace(bench: &Bench, words: &[&str]) -> Result<String> {
    let mut command = Command::new(tools::program("millrace")?);
    let output = command.args(["--server", &bench.server.url()]).args(words).output()?;
    ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_client_works_unmodified() -> Result<()> {
    if !tools::have(&[PYTHON]) {
        return Ok(());
    }
    let mut python = Command::new("python3");
    python
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai/client.py"))
        .env("PYTHONPATH", tools::cache()?.join("openai"))
        .env("PYTHONDONTWRITEBYTECODE", "1");
    drive(python, 9).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_javascript_client_works_unmodified() -> Result<()> {
    if !tools::have(&[JAVASCRIPT]) {
        return Ok(());
    }
    let mut node = Command::new("node");
    node.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai/client.cjs"))
        .env("NODE_PATH", tools::cache()?.join("openai-npm/node_modules"));
    drive(node, 8).await
}

/// Runs a client's program, which says so of each of its parts, against a gateway.
async fn drive(mut client: Command, parts: usize) -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let full = ModelRef::new("default", "full")?;
    let queue = QueueConfig { max_jobs: 1, max_bytes: Bytes(1 << 20), ..bench.queue.clone() };
    provision(&bench.context, &full, &queue, &ResultsConfig::default(), Mode::Create).await?;
    bench.context.publish(full.jobs_subject(Default::default()), "{}".into()).await?.await?;
    let key = |words: &[&str]| millrace(&bench, &[&["key", "create", "--tenant", "tests"], words].concat());
    let (all, lister, revoked) = (key(&[])?, key(&["--allow-verb", "models"])?, key(&[])?);
    let mut gateway = Gateway::launch(&bench.server.url(), &["--keep-alive", "500ms"])?;
    gateway.wait_ready()?;
    millrace(&bench, &["key", "revoke", revoked.split('-').nth(1).context("a key has an id")?])?;
    let closed = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    client
        .env("DOOR", format!("http://{}/v1", gateway.address()))
        .env("CLOSED", format!("http://{closed}/v1"))
        .envs([("KEY", &all), ("LISTER", &lister), ("REVOKED", &revoked)])
        .env("FULL", "full")
        .env("MILLRACE", tools::program("millrace")?)
        .env("BROKER", bench.server.url())
        .env_remove("OPENAI_API_KEY");
    let output = tokio::task::spawn_blocking(move || client.output()).await??;
    let told = String::from_utf8_lossy(&output.stderr);
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{told}\n{}", gateway.log());
    assert_eq!(said.lines().count(), parts, "{said}");
    for secret in [&all, &lister, &revoked] {
        let secret = secret.rsplit('-').next().context("a key has a secret")?;
        assert!(!gateway.log().contains(secret), "a log holds a secret");
    }
    Ok(())
}
