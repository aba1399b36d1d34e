//! Who may do what over HTTP: keys, their scopes, their end, and what is written down of it.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millrace_tests::chat::ChatWorker;
use millrace_tests::gateway::{Gateway, HttpReply};
use millrace_tests::scripted::{Bench, PATIENCE};
use millrace_tests::tools;
use serde_json::{Value, json};

fn millrace(bench: &Bench, words: &[&str]) -> Result<Value> {
    let mut command = Command::new(tools::program("millrace")?);
    let output = command.args(["--json", "--server", &bench.server.url()]).args(words).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{words:?}: {text} {}", String::from_utf8_lossy(&output.stderr));
    Ok(Value::Array(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?))
}

/// Id and key of a new one.
fn create(bench: &Bench, words: &[&str]) -> Result<(String, String)> {
    let made = millrace(bench, &[&["key", "create"], words].concat())?;
    let text = |name: &str| made[0][name].as_str().map(str::to_owned).with_context(|| made.to_string());
    Ok((text("id")?, text("key")?))
}

fn ask(gateway: &Gateway, key: &str, headers: &[(&str, &str)]) -> Result<HttpReply> {
    let bearer = format!("Bearer {key}");
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "say canary"}]});
    let headers = [&[("authorization", bearer.as_str())], headers].concat();
    gateway.ask("POST", "/v1/chat/completions", &headers, &body.to_string())?.whole()
}

/// Off the runtime's threads, which the worker needs.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_lets_in_until_it_is_revoked_and_no_further_than_its_scopes() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let folder = millrace_tests::place::folder("audit-")?;
    let audit = folder.path().join("audit.jsonl");
    let option = audit.to_str().context("a path")?.to_owned();
    blocking(move || {
        let mut gateway = Gateway::launch(&bench.server.url(), &["--audit", &option])?;
        gateway.wait_ready()?;
        // Before there is any key, nobody is let in.
        let nobody = gateway.get("/v1/models")?;
        ensure!(nobody.error()? == (401, "invalid_api_key".into(), None), "{nobody:?}");
        let unknown = format!("mr-{}-{}", "0".repeat(16), "0".repeat(64));
        ensure!(ask(&gateway, &unknown, &[])?.status == 401);

        let (id, key) = create(&bench, &["--tenant", "team a", "--label", "ci", "--expires", "1h"])?;
        let (_, lister) =
            create(&bench, &["--tenant", "b", "--allow-verb", "models", "--allow-namespace", "other"])?;
        let (_, low) = create(&bench, &["--tenant", "b", "--allow-class", "low", "--allow-model", "m"])?;
        let (_, brief) = create(&bench, &["--tenant", "b", "--expires", "1500ms"])?;
        let answer = ask(&gateway, &key, &[])?;
        ensure!(answer.status == 200, "{:?}", answer.json()?);
        // One hex digit off: the id is known, the secret is another.
        let last = if key.ends_with('0') { "1" } else { "0" };
        ensure!(ask(&gateway, &format!("{}{last}", &key[..key.len() - 1]), &[])?.status == 401);
        ensure!(ask(&gateway, &lister, &[])?.error()?.1 == "insufficient_permissions");
        let bearer = format!("Bearer {lister}");
        let seen = gateway.ask("GET", "/v1/models", &[("authorization", bearer.as_str())], "")?.whole()?;
        ensure!(seen.json()?["data"] == json!([]), "the models of another namespace are seen");
        let one = gateway.ask("GET", "/v1/models/m", &[("authorization", bearer.as_str())], "")?.whole()?;
        ensure!(one.error()?.1 == "model_not_found");
        ensure!(ask(&gateway, &low, &[])?.status == 200, "the class is one that is allowed");
        let refused = ask(&gateway, &low, &[("millrace-class", "high")])?;
        ensure!(refused.error()?.0 == 403);
        std::thread::sleep(Duration::from_millis(1600));
        ensure!(ask(&gateway, &brief, &[])?.status == 401, "its time is over");

        let listed = millrace(&bench, &["key", "list"])?;
        let own = listed.as_array().and_then(|keys| keys.iter().find(|key| key["id"] == id.as_str()));
        let own = own.with_context(|| listed.to_string())?;
        ensure!(
            (&own["tenant"], &own["label"], &own["revoked"])
                == (&json!("team a"), &json!("ci"), &Value::Null)
        );
        ensure!(!listed.to_string().contains(key.rsplit('-').next().context("a secret")?));
        millrace(&bench, &["key", "revoke", &id])?;
        let began = Instant::now();
        while ask(&gateway, &key, &[])?.status != 401 {
            ensure!(began.elapsed() < PATIENCE, "a revoked key lets in");
            std::thread::sleep(Duration::from_millis(200));
        }
        audited(&std::fs::read_to_string(&option)?, &id, answer.header("x-request-id"))?;
        for text in [gateway.log(), std::fs::read_to_string(&option)?] {
            for secret in [&key, &lister, &low, &brief] {
                ensure!(!text.contains(secret.rsplit('-').next().context("a secret")?), "{text}");
            }
            ensure!(!text.contains("canary"), "a log holds a prompt");
        }
        Ok(())
    })
    .await
}

/// The request stands in the audit with who made it, and so does one that nobody is known of.
fn audited(text: &str, key: &str, request: &str) -> Result<()> {
    let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let found = lines.iter().find(|line| line["request"] == request).context("not in the audit")?;
    let said = ["tenant", "key", "method", "path", "model", "status"].map(|name| found[name].clone());
    let expected = [
        json!("team a"),
        json!(key),
        json!("POST"),
        json!("/v1/chat/completions"),
        json!("default/m"),
        json!(200),
    ];
    ensure!(said == expected, "{found}");
    ensure!(lines[0]["status"] == 401 && lines[0]["tenant"].is_null(), "{}", lines[0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_seen_and_cancelled_by_its_own_tenant_alone() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    blocking(move || {
        let mut gateway = Gateway::launch(&bench.server.url(), &[])?;
        gateway.wait_ready()?;
        let (_, own) = create(&bench, &["--tenant", "a"])?;
        let (_, colleague) = create(&bench, &["--tenant", "a"])?;
        let (_, other) = create(&bench, &["--tenant", "b"])?;
        let send = |key: &str, method: &str, path: &str, body: &str| -> Result<HttpReply> {
            let bearer = format!("Bearer {key}");
            gateway.ask(method, path, &[("authorization", bearer.as_str())], body)?.whole()
        };
        let body = json!({"model": "m", "messages": [{"role": "user", "content": "hang"}]}).to_string();
        let made = send(&own, "POST", "/v1/jobs", &body)?;
        ensure!(made.status == 202, "{made:?}");
        let id = made.json()?["id"].as_str().context("no id")?.to_owned();
        ensure!(id.ends_with(made.header("x-request-id")), "{made:?}");
        let (look, cancel) = (format!("/v1/jobs/{id}"), format!("/v1/jobs/{id}/cancel"));
        for (method, path) in [("GET", &look), ("POST", &cancel)] {
            let refused = send(&other, method, path, "")?;
            ensure!(refused.error()? == (404, "job_not_found".into(), None), "{method}: {refused:?}");
        }
        let seen = send(&own, "GET", &look, "")?;
        ensure!(seen.json()?["status"] == "queued", "{seen:?}");
        ensure!(send(&colleague, "POST", &cancel, "")?.status == 200);
        let began = Instant::now();
        while send(&own, "GET", &look, "")?.json()?["status"] != "rejected" {
            ensure!(began.elapsed() < PATIENCE, "the job is not cancelled");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })
    .await
}
