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

/// Events of our own: id, name and data.
fn events(text: &str) -> Vec<(String, String, Value)> {
    let events = text.split_terminator("\n\n").filter(|event| *event != ": ping");
    let field = |event: &str, name: &str| {
        let found = event.lines().find_map(|line| line.strip_prefix(name));
        found.unwrap_or_default().to_owned()
    };
    let data = |event: &str| serde_json::from_str(&field(event, "data: ")).unwrap_or_default();
    events.map(|event| (field(event, "id: "), field(event, "event: "), data(event))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_stream_goes_on_behind_the_last_event() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let (here, there) = (Gateway::start(&bench.server, &[])?, Gateway::start(&bench.server, &[])?);
    let talked = tokio::task::spawn_blocking(move || -> Result<()> {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": "slow één two three four five six"}],
                          "n": 2, "stream": true});
        let id = id_of(&here.post("/v1/jobs", &body)?)?;
        let path = format!("/v1/jobs/{id}/stream");
        let whole = here.ask("GET", &path, &[], "")?.whole()?;
        ensure!(whole.header("content-type").starts_with("text/event-stream"), "{whole:?}");
        let seen = events(std::str::from_utf8(&whole.body)?);
        let spelled = |events: &[(String, String, Value)], index: u64| -> String {
            let own = events.iter().filter(|(_, name, data)| name == "delta" && data["index"] == index);
            own.filter_map(|(_, _, data)| data["text"].as_str()).collect()
        };
        let wanted = "één two three four five six";
        ensure!(spelled(&seen, 0) == wanted && spelled(&seen, 1) == wanted, "{seen:?}");
        let (_, name, job) = seen.last().expect("an event");
        ensure!(name == "outcome" && job["status"] == "completed" && job["id"] == id.as_str(), "{job}");
        for cut in 0..seen.len() - 1 {
            let last = [("Last-Event-ID", seen[cut].0.as_str())];
            let rest = there.ask("GET", &path, &last, "")?.whole()?;
            let mut both = seen[..=cut].to_vec();
            both.extend(events(std::str::from_utf8(&rest.body)?));
            ensure!(spelled(&both, 0) == wanted && spelled(&both, 1) == wanted, "cut behind {cut}: {both:?}");
        }
        let wrong = there.ask("GET", &path, &[("Last-Event-ID", "seven")], "")?.whole()?;
        ensure!(
            wrong.error()? == (400, "invalid_parameter".into(), Some("last-event-id".into())),
            "{wrong:?}"
        );
        let missing = there.get("/v1/jobs/default.m.99.other/stream")?;
        ensure!(missing.error()?.1 == "job_not_found", "{missing:?}");
        Ok(())
    });
    talked.await??;
    bench.until_empty().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_was_given_up_runs_again() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let gateway = Gateway::start(&bench.server, &[])?;
    let talked = tokio::task::spawn_blocking(move || -> Result<()> {
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.push(id_of(&submit(&gateway, "fail", &[("millrace-class", "low")])?)?);
        }
        for id in &ids {
            ensure!(ended(&gateway, id)?["status"] == "dead");
        }
        let list = |query: &str| gateway.get(&format!("/v1/jobs/dead?model=m{query}"))?.json();
        let first = list("&limit=2")?;
        ensure!(first["data"].as_array().map(Vec::len) == Some(2) && first["has_more"] == true, "{first}");
        ensure!(first["data"][0]["class"] == "low" && first["data"][0]["attempt"] == 3, "{first}");
        let second = list(&format!("&limit=2&after={}", first["last"]))?;
        ensure!(
            second["data"].as_array().map(Vec::len) == Some(1) && second["has_more"] == false,
            "{second}"
        );
        let letter = first["data"][0]["id"].as_str().unwrap_or_default().to_owned();
        let again = gateway.ask("POST", &format!("/v1/jobs/{letter}/requeue"), &[], "")?.whole()?;
        ensure!(again.status == 202, "{again:?}");
        let new = id_of(&again)?;
        ensure!(new.ends_with("-r1"), "{new}");
        ensure!(ended(&gateway, &new)?["status"] == "dead", "it fails again");
        let gone = gateway.ask("POST", &format!("/v1/jobs/{letter}/requeue"), &[], "")?.whole()?;
        ensure!(gone.error()?.1 == "job_not_found", "its letter is gone: {gone:?}");
        let left = list("")?;
        ensure!(left["data"].as_array().map(Vec::len) == Some(3), "two old ones and the new: {left}");
        let wrong = gateway.get("/v1/jobs/dead")?.error()?;
        ensure!(wrong == (400, "missing_required_parameter".into(), Some("model".into())), "{wrong:?}");
        Ok(())
    });
    talked.await??;
    bench.until_empty().await
}
