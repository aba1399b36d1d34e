//! `/v1/jobs`: requests that nobody waits for, seen from two gateways.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use millrace_tests::chat::ChatWorker;
use millrace_tests::gateway::{Gateway, HttpReply};
use millrace_tests::scripted::{Bench, PATIENCE};
use serde_json::{Value, json};

fn submit(gateway: &Gateway, script: &str, headers: &[(&str, &str)]) -> Result<HttpReply> {
    let body = json!({"model": "m", "messages": [{"role": "user", "content": script}]});
    gateway.ask("POST", "/v1/jobs", headers, &body.to_string())?.whole()
}

fn id_of(reply: &HttpReply) -> Result<String> {
    Ok(reply.json()?["id"].as_str().unwrap_or_default().to_owned())
}

/// The job, as soon as it is not queued any more.
fn ended(gateway: &Gateway, id: &str) -> Result<Value> {
    let began = Instant::now();
    loop {
        let reply = gateway.get(&format!("/v1/jobs/{id}"))?;
        ensure!(reply.status == 200, "{reply:?}");
        if reply.json()?["status"] != "queued" {
            return reply.json();
        }
        ensure!(began.elapsed() < PATIENCE, "job {id} does not end");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_submitted_here_and_looked_at_there() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let here = Gateway::start(&bench.server, &[])?;
    let there = Gateway::start(&bench.server, &[])?;
    let done = tokio::task::spawn_blocking(move || -> Result<(String, Value)> {
        let made = submit(&here, "say hello", &[])?;
        ensure!(made.status == 202 && made.json()?["status"] == "queued", "{made:?}");
        let id = id_of(&made)?;
        let done = ended(&there, &id)?;
        ensure!(done["status"] == "completed" && done["id"] == id.as_str(), "{done}");
        // A client that asks for one that never was, or that it may not see, is told so.
        for wrong in ["default.m.99.req-1", "default.m.1.other", "other.m.1.x", "nonsense"] {
            let missing = there.get(&format!("/v1/jobs/{wrong}"))?;
            ensure!(missing.error()? == (404, "job_not_found".into(), None), "{wrong}: {missing:?}");
        }

        // The same key is the same job: while it runs, and once it is done.
        let key = [("Idempotency-Key", "order 66")];
        let first = submit(&here, "slow one two three four five six", &key)?;
        let again = submit(&there, "slow one two three four five six", &key)?;
        ensure!((first.status, again.status) == (202, 202) && id_of(&first)? == id_of(&again)?, "{again:?}");
        let other = submit(&there, "say other", &key)?;
        let reused = (409, "id_reused".to_owned(), Some("idempotency-key".to_owned()));
        ensure!(other.error()? == reused, "queued: {other:?}");
        ended(&here, &id_of(&first)?)?;
        let other = submit(&here, "say other", &key)?;
        ensure!(other.error()? == reused, "done: {other:?}");
        let later = submit(&there, "slow one two three four five six", &key)?;
        ensure!(later.status == 200 && later.json()?["status"] == "completed", "{later:?}");
        ensure!(ended(&here, &id_of(&later)?)?["outcome"] == later.json()?["outcome"]);

        let hangs = id_of(&submit(&here, "hang", &[("millrace-class", "high")])?)?;
        let cancelled = there.ask("POST", &format!("/v1/jobs/{hangs}/cancel"), &[], "")?.whole()?;
        ensure!(cancelled.status == 200, "{cancelled:?}");
        let ended = ended(&here, &hangs)?;
        ensure!(ended["status"] == "rejected" && ended["outcome"]["error"]["code"] == "CANCELLED", "{ended}");
        // A key that would be passed over would be none, and its job run twice.
        let odd = submit(&here, "say hello", &[("Idempotency-Key", "ключ")])?;
        let named = Some("idempotency-key".to_owned());
        ensure!(odd.error()? == (400, "invalid_parameter".into(), named), "{odd:?}");
        let empty = here.ask("POST", "/v1/jobs", &[], "{\"model\":\"m\"}")?.whole()?;
        ensure!(empty.error()?.1 == "missing_required_parameter");
        Ok((id, done))
    });
    let (id, done) = done.await??;
    let stored = bench.outcome(id.rsplit('.').next().unwrap_or_default()).await?;
    assert_eq!(done["outcome"], serde_json::from_slice::<Value>(&stored.payload)?);
    bench.until_empty().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_queue_was_purged_is_published_again() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let gateway = Arc::new(Gateway::start(&bench.server, &[])?);
    let ask = async || -> Result<HttpReply> {
        let gateway = gateway.clone();
        tokio::task::spawn_blocking(move || submit(&gateway, "say hello", &[("Idempotency-Key", "k")]))
            .await?
    };
    let first = ask().await?;
    ensure!(first.status == 202, "{first:?}");
    let same = ask().await?;
    ensure!(id_of(&same)? == id_of(&first)?, "a job that waits is published once: {same:?}");
    bench.context.get_stream(bench.model.jobs_stream()).await?.purge().await?;
    let again = ask().await?;
    ensure!(again.status == 202 && id_of(&again)? != id_of(&first)?, "it has another place: {again:?}");
    let _worker = ChatWorker::start(&bench, "w").await?;
    let done = tokio::task::spawn_blocking(move || ended(&gateway, &id_of(&again)?));
    let done = done.await??;
    ensure!(done["status"] == "completed", "{done}");
    bench.until_empty().await
}
