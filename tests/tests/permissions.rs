//! The permissions that `millrace permissions` prints, on a real broker: with them each role does all that it has to
//! do, and what is not in them is refused.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::{ConnectOptions, Event, HeaderMap};
use millrace_tests::cluster::QueueHarness;
use millrace_tests::gateway::Gateway;
use millrace_tests::nats::{self, NatsServer};
use millrace_tests::worker::Worker;
use millrace_tests::{place, tools};
use serde_json::{Value, json};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);
/// The roles, and what the subjects of their replies begin with.
const ROLES: [(&str, &str); 4] = [
    ("operator", "_INBOX.operator"),
    ("worker", "_INBOX.worker.default.tiny"),
    ("gateway", "_INBOX.gateway"),
    ("tenant", "_INBOX.tenant.default.tiny"),
];

/// What the command prints for a role.
fn printed(role: &str, more: &[&str]) -> Result<String> {
    let mut command = Command::new(tools::program("millrace")?);
    let done = command.args(["-m", "tiny", "permissions", "--role", role]).args(more).output()?;
    ensure!(done.status.success(), "{role}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(String::from_utf8(done.stdout)?)
}

/// Both lists of a role, as a JWT has them.
fn subjects(role: &str) -> Result<(Vec<String>, Vec<String>)> {
    let json: Value = serde_json::from_str(&printed(role, &["--json"])?)?;
    let list =
        |kind: &str| -> Result<Vec<String>> { Ok(serde_json::from_value(json[kind]["allow"].clone())?) };
    Ok((list("pub")?, list("sub")?))
}

/// A broker on which each role is a user of its name, with its password.
fn server() -> Result<NatsServer> {
    let mut users = String::new();
    for (role, _) in ROLES {
        users += &format!("{{ user: {role}, password: {role}\n{}\n}}\n", printed(role, &[])?);
    }
    NatsServer::start_with(&format!("authorization {{ users: [\n{users}] }}"))
}

/// The command line as one of the roles.
struct Shell<'a> {
    server: &'a NatsServer,
    role: &'static str,
}

impl Shell<'_> {
    fn output(&self, words: &[&str]) -> Result<Output> {
        let prefix = ROLES.iter().find(|(role, _)| *role == self.role).map(|(_, prefix)| *prefix);
        let mut command = Command::new(tools::program("millrace")?);
        command.args(["--user", self.role, "-m", "tiny", "--server", &self.server.url()]).args(words);
        command.env("NATS_PASSWORD", self.role);
        command.env("MILLRACE_INBOX_PREFIX", prefix.context("a role")?);
        Ok(command.output()?)
    }

    /// Runs a command that must succeed.
    fn run(&self, words: &[&str]) -> Result<String> {
        let done = self.output(words)?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(
            done.status.success(),
            "{} {words:?}: {}: {said}\n{}",
            self.role,
            done.status,
            violations(self.server)
        );
        Ok(String::from_utf8(done.stdout)?)
    }
}

/// Lines of the broker's log that say what was refused.
fn violations(server: &NatsServer) -> String {
    let log = server.log();
    log.lines().filter(|line| line.contains("Violation")).collect::<Vec<_>>().join("\n")
}

fn files(folder: &TempDir, role: &str) -> Result<(PathBuf, PathBuf)> {
    let (user, password) = (folder.path().join("user"), folder.path().join("password"));
    std::fs::write(&user, role)?;
    std::fs::write(&password, role)?;
    Ok((user, password))
}

/// A worker of the tiny model as the role `worker`.
fn worker(cluster: &QueueHarness, folder: &TempDir) -> Result<Worker> {
    let (user, password) = files(folder, "worker")?;
    let mut config = cluster.config.clone();
    config.nats.servers = vec![cluster.nats.url()];
    config.nats.monitor = Some(cluster.nats.monitor_url());
    (config.nats.user_file, config.nats.password_file) = (Some(user), Some(password));
    config.nats.provision = false;
    Worker::start_ready(&config)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_does_all_of_its_work() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = QueueHarness::tiny()?;
    cluster.nats = server()?;
    let server = &cluster.nats;
    let operator = Shell { server, role: "operator" };
    operator.run(&["provision", "--apply"])?;
    operator.run(&["provision", "--apply", "--max-jobs", "1000"])?;
    operator.run(&["provision", "--check", "--max-jobs", "1000"])?;
    let key: Value = serde_json::from_str(&operator.run(&["--json", "key", "create", "--tenant", "t"])?)?;
    let text = |name: &str| key[name].as_str().map(str::to_owned).context("a key");
    // What gateways share is used where there is a limit.
    operator.run(&["key", "limit", &text("id")?, "--key-limit", "requests=1000/min"])?;
    let old = operator.run(&["--json", "key", "create", "--tenant", "u"])?;
    let old: Value = serde_json::from_str(&old)?;
    operator.run(&["key", "revoke", old["id"].as_str().context("an id")?])?;
    ensure!(operator.run(&["--json", "key", "list"])?.lines().count() == 2, "two keys");

    let folder = place::folder("role-")?;
    let worker = worker(&cluster, &folder)?;
    of_a_tenant(&cluster, &worker).await?;
    of_a_gateway(server, &text("key")?).await?;
    assert_eq!(violations(server), "", "{}", worker.log_tail());
    Ok(())
}

async fn of_a_tenant(cluster: &QueueHarness, worker: &Worker) -> Result<()> {
    let tenant = Shell { server: &cluster.nats, role: "tenant" };
    let body = cluster.folder.path().join("job.json");
    std::fs::write(&body, r#"{"prompt":"safe","max_tokens":4}"#)?;
    let file = body.display().to_string();
    ensure!(tenant.run(&["submit", "--wait", &file])?.len() > 1, "{}", worker.log_tail());
    tenant.run(&["submit", "--wait", &file])?;
    tenant.run(&["submit", "--stream", "--prompt", "streamed", "--max-tokens", "8"])?;
    tenant.run(&["results", &file])?;
    tenant.run(&["results"])?;
    tenant.run(&["results", "--wait-all", "--follow", &file])?;
    tenant.run(&["queue"])?;
    tenant.run(&["doctor", "--max-jobs", "1000", "--monitor", &cluster.nats.monitor_url()])?;
    // A long job that is cancelled while it runs.
    std::fs::write(&body, r#"{"prompt":"long","max_tokens":1900,"n":6,"ignore_eos":true}"#)?;
    tenant.run(&["--json", "submit", &file])?;
    tenant.run(&["cancel", "--all-pending"])?;
    let done = tenant.output(&["results", "--wait-all", "--timeout", "30s", &file])?;
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    ensure!(done.status.code() == Some(1) && said.contains("CANCELLED"), "{said}: {done:?}");
    // An id that is used again with another body ends as a dead letter, which is published again.
    let options = ConnectOptions::with_user_and_password("tenant".into(), "tenant".into());
    let client =
        options.custom_inbox_prefix("_INBOX.tenant.default.tiny").connect(cluster.nats.url()).await?;
    for body in [r#"{"prompt":"a","max_tokens":2}"#, r#"{"prompt":"b","max_tokens":2}"#] {
        let mut headers = HeaderMap::new();
        headers.insert("Millrace-Job-Id", "twice");
        let subject = "millrace.jobs.default.tiny.normal";
        client.publish_with_headers(subject, headers, body.into()).await?;
        client.flush().await?;
        tenant.run(&["results", "--wait-all", "--job", "twice"])?;
    }
    let start = Instant::now();
    let listed = loop {
        let listed = tenant.run(&["--json", "dead", "list"])?;
        if !listed.is_empty() {
            break listed;
        }
        ensure!(start.elapsed() < LIMIT, "no dead letter\n{}", worker.log_tail());
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let listed: Value = serde_json::from_str(listed.lines().next().context("a dead letter")?)?;
    let job = listed["job"].as_str().or(listed["id"].as_str()).context("its id")?;
    tenant.run(&["dead", "show", job])?;
    tenant.run(&["dead", "requeue", job])?;
    ensure!(tenant.run(&["--json", "dead", "list"])?.is_empty(), "the letter is removed");
    Ok(())
}

async fn of_a_gateway(server: &NatsServer, key: &str) -> Result<()> {
    let folder = place::folder("role-")?;
    let (_, password) = files(&folder, "gateway")?;
    let login = ["--user", "gateway", "--password-file", &password.display().to_string()];
    let mut gateway = Gateway::launch(&server.url(), &login)?;
    gateway.wait_ready()?;
    let bearer = format!("Bearer {key}");
    let ask = |method: &str, path: &str, body: &Value| -> Result<String> {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let reply = gateway.ask(method, path, &[("authorization", &bearer)], &text)?.whole()?;
        let said = String::from_utf8(reply.body)?;
        ensure!(
            (200..300).contains(&reply.status),
            "{method} {path}: {}: {said}\n{}",
            reply.status,
            violations(server)
        );
        Ok(said)
    };
    let request = json!({"model": "tiny", "prompt": "Hi", "max_tokens": 4});
    ensure!(ask("GET", "/v1/models", &Value::Null)?.contains("tiny"), "the model is listed");
    ask("POST", "/v1/completions", &request)?;
    let streamed = json!({"model": "tiny", "prompt": "Ho", "max_tokens": 4, "stream": true});
    ensure!(ask("POST", "/v1/completions", &streamed)?.contains("[DONE]"), "a stream ends");
    let response = json!({"model": "tiny", "input": "Hi", "max_output_tokens": 4});
    let response: Value = serde_json::from_str(&ask("POST", "/v1/responses", &response)?)?;
    let path = format!("/v1/responses/{}", response["id"].as_str().context("a response's id")?);
    ask("GET", &path, &Value::Null)?;
    ask("DELETE", &path, &Value::Null)?;
    let job: Value = serde_json::from_str(&ask("POST", "/v1/jobs", &request)?)?;
    let path = format!("/v1/jobs/{}", job["id"].as_str().context("a job's id")?);
    let start = Instant::now();
    while !ask("GET", &path, &Value::Null)?.contains("completed") {
        ensure!(start.elapsed() < LIMIT, "the job does not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    ask("POST", &format!("{path}/cancel"), &Value::Null).map(drop)
}

/// Whether a subject, which may hold wildcards itself, lies within a pattern.
fn covers(pattern: &str, subject: &str) -> bool {
    let mut given = subject.split('.');
    for token in pattern.split('.') {
        match (token, given.next()) {
            (">", Some(_)) => return true,
            ("*", Some(token)) if token != ">" => {}
            (token, Some(other)) if token == other => {}
            _ => return false,
        }
    }
    given.next().is_none()
}

/// What somebody with bad intentions would try, beside what other roles may do.
const TRIED: [&str; 16] = [
    "$JS.API.STREAM.PURGE.JOBS_default_tiny",
    "$JS.API.STREAM.MSG.GET.JOBS_default_tiny",
    "$JS.API.STREAM.MSG.DELETE.RESULTS_default_tiny",
    "$JS.API.STREAM.DELETE.JOBS_default_tiny",
    "$JS.API.STREAM.SNAPSHOT.RESULTS_default_tiny",
    "$JS.API.CONSUMER.DURABLE.CREATE.JOBS_default_tiny.x",
    "$JS.API.CONSUMER.MSG.NEXT.JOBS_default_other.workers-high",
    "$JS.API.CONSUMER.PAUSE.JOBS_default_tiny.workers-high",
    "$JS.ACK.JOBS_default_other.workers-high.1.1.1.1.0",
    "$KV.MILLRACE_KEYS.x",
    "$SYS.REQ.SERVER.PING",
    "millrace.jobs.default.other.high",
    "millrace.results.default.tiny.x",
    "millrace.results.default.other.x",
    "millrace.tokens.default.tiny.x",
    "_INBOX.x",
];

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_in_them_is_refused() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let server = server()?;
    let lists = ROLES.map(|(role, _)| subjects(role));
    let lists = lists.into_iter().collect::<Result<Vec<_>>>()?;
    let (mut tried, mut kept) = (0, 0);
    for ((role, prefix), (publish, subscribe)) in ROLES.into_iter().zip(&lists) {
        let refused = Arc::new(AtomicUsize::new(0));
        let counted = refused.clone();
        let options = ConnectOptions::with_user_and_password(role.into(), role.into())
            .custom_inbox_prefix(prefix)
            .event_callback(move |event| {
                let violation =
                    matches!(&event, Event::ServerError(e) if e.to_string().contains("ermissions"));
                counted.fetch_add(usize::from(violation), Ordering::Relaxed);
                async {}
            });
        let client = options.connect(server.url()).await?;
        let count = || refused.load(Ordering::Relaxed);
        let foreign = |mine: &[String], all: &[String]| {
            let outside = |subject: &&String| !mine.iter().any(|pattern| covers(pattern, subject));
            all.iter().filter(outside).cloned().collect::<Vec<_>>()
        };
        let others: Vec<String> = lists.iter().flat_map(|(publish, _)| publish.clone()).collect();
        let told = others.iter().map(|subject| subject.replace(['*', '>'], "x"));
        let all: Vec<String> = told.chain(TRIED.map(str::to_owned)).collect();
        for subject in foreign(publish, &all) {
            let before = count();
            client.publish(subject.clone(), "x".into()).await?;
            expect(&format!("{role} publishes to {subject}"), || count() > before).await?;
            tried += 1;
        }
        let heard: Vec<String> = lists.iter().flat_map(|(_, subscribe)| subscribe.clone()).collect();
        let wide = [">", "millrace.>", "_INBOX.>", "$JS.>"].map(str::to_owned);
        for subject in foreign(subscribe, &[heard, wide.to_vec()].concat()) {
            let before = count();
            let held = client.subscribe(subject.clone()).await?;
            expect(&format!("{role} subscribes to {subject}"), || count() > before).await?;
            drop(held);
            tried += 1;
        }
        // What is in them is let through; no answer is asked for.
        let before = count();
        for subject in publish.iter().filter(|subject| subject.starts_with("millrace.")) {
            client.publish(subject.replace(['*', '>'], "x"), "x".into()).await?;
            kept += 1;
        }
        client.flush().await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(count(), before, "{role}");
    }
    assert!(tried > 60 && kept > 8, "{tried} refusals and {kept} others");
    Ok(())
}

async fn expect(what: &str, holds: impl Fn() -> bool) -> Result<()> {
    let start = Instant::now();
    while !holds() {
        ensure!(start.elapsed() < Duration::from_secs(2), "it is not refused: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

#[test]
fn patterns_cover_what_lies_within_them() {
    for (pattern, subject, expected) in [
        ("a.*", "a.b", true),
        ("a.*", "a.>", false),
        ("a.>", "a.b.c", true),
        ("a.>", "a", false),
        ("a.b", "a.c", false),
        ("a.*.c", "a.b", false),
    ] {
        assert_eq!(covers(pattern, subject), expected, "{pattern} {subject}");
    }
}
