//! `/v1/responses` and streams of jobs, from two gateways.
//!
//! What holds here: what a client puts together from streams that were cut anywhere and went on at another gateway is
//! the stored text, whatever deltas were lost; what was asked is told by any gateway; nobody sees what is another
//! tenant's.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use millrace_tests::chat::ChatWorker;
use millrace_tests::gateway::{Gateway, HttpAnswer, HttpReply};
use millrace_tests::scripted::{Bench, PATIENCE, until};
use serde_json::{Value, json};

fn text_of(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap_or_default()
}

fn id_of(response: &Value) -> Result<String> {
    Ok(response["id"].as_str().context("a response has an id")?.to_owned())
}

/// The response, as soon as it is not queued any more.
fn ended(gateway: &Gateway, id: &str) -> Result<Value> {
    let began = Instant::now();
    loop {
        let reply = gateway.get(&format!("/v1/responses/{id}"))?;
        ensure!(reply.status == 200, "{reply:?}");
        if reply.json()?["status"] != "queued" {
            return reply.json();
        }
        ensure!(began.elapsed() < PATIENCE, "response {id} does not end");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// The next event of a stream; `None` at its end.
fn event(answer: &mut HttpAnswer) -> Result<Option<Value>> {
    while let Some(line) = answer.line()? {
        if let Some(data) = line.strip_prefix("data: ") {
            return Ok(Some(serde_json::from_str(data)?));
        }
        ensure!(line.is_empty() || line == ": ping" || line.starts_with("event: "), "{line:?}");
    }
    Ok(None)
}

fn events(mut answer: HttpAnswer) -> Result<Vec<Value>> {
    let mut seen = Vec::new();
    while let Some(event) = event(&mut answer)? {
        seen.push(event);
    }
    Ok(seen)
}

fn spelled(events: &[Value]) -> String {
    events.iter().filter_map(|event| event["delta"].as_str()).collect()
}

fn stream(gateway: &Gateway, id: &str, after: Option<u64>) -> Result<HttpAnswer> {
    let after = after.map_or(String::new(), |after| format!("&starting_after={after}"));
    gateway.ask("GET", &format!("/v1/responses/{id}?stream=true{after}"), &[], "")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_is_a_job_that_any_gateway_finds() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let (here, there) = (Gateway::start(&bench.server, &[])?, Gateway::start(&bench.server, &[])?);
    let talked = tokio::task::spawn_blocking(move || -> Result<()> {
        let body = json!({"model": "m", "input": "say hello world", "metadata": {"order": "66"}, "temperature": 0,
                          "instructions": "be brief"});
        let made = here.post("/v1/responses", &body)?;
        ensure!(made.status == 200, "{made:?}");
        let made = made.json()?;
        ensure!(text_of(&made) == "hello world" && made["status"] == "completed", "{made}");
        let seen = there.get(&format!("/v1/responses/{}", id_of(&made)?))?.json()?;
        ensure!(seen == made, "another gateway says {seen}, not {made}");
        ensure!(seen["metadata"]["order"] == "66" && seen["instructions"] == "be brief", "{seen}");
        // It is exactly a job.
        let name = id_of(&made)?.strip_prefix("resp_").context("a prefix")?.to_owned();
        let job = there.get(&format!("/v1/jobs/{name}"))?.json()?;
        let content = &job["outcome"]["response"]["body"]["choices"][0]["message"]["content"];
        ensure!(job["status"] == "completed" && *content == "hello world", "{job}");

        let next = json!({"model": "m", "input": "say more", "previous_response_id": made["id"]});
        let next = there.post("/v1/responses", &next)?.json()?;
        ensure!(text_of(&next) == "more" && next["previous_response_id"] == made["id"], "{next}");
        let items = here.get(&format!("/v1/responses/{}/input_items", id_of(&next)?))?.json()?;
        ensure!(items["data"].as_array().map(Vec::len) == Some(1), "its own input alone: {items}");
        ensure!(items["data"][0]["content"][0]["text"] == "say more", "{items}");

        let gone = here.ask("DELETE", &format!("/v1/responses/{}", id_of(&made)?), &[], "")?.whole()?;
        ensure!(gone.json()?["deleted"] == true, "{gone:?}");
        let missing = there.get(&format!("/v1/responses/{}", id_of(&made)?))?;
        ensure!(missing.error()? == (404, "job_not_found".into(), None), "{missing:?}");
        let orphan = json!({"model": "m", "input": "say x", "previous_response_id": made["id"]});
        let refused = here.post("/v1/responses", &orphan)?.error()?;
        ensure!(refused == (404, "job_not_found".into(), Some("previous_response_id".into())), "{refused:?}");
        let unkept =
            here.post("/v1/responses", &json!({"model": "m", "input": "say x", "store": false}))?.json()?;
        let missing = here.get(&format!("/v1/responses/{}", id_of(&unkept)?))?;
        ensure!(text_of(&unkept) == "x" && missing.status == 404, "{missing:?}");
        refusals(&here)
    });
    talked.await??;
    bench.until_empty().await
}

fn refusals(gateway: &Gateway) -> Result<()> {
    let refused = |body: Value| -> Result<(u16, String, Option<String>)> {
        gateway.post("/v1/responses", &body)?.error()
    };
    let tools = refused(json!({"model": "m", "input": "say x", "tools": [{"type": "web_search"}]}))?;
    ensure!(tools == (400, "invalid_parameter".into(), Some("tools".into())), "{tools:?}");
    let script = refused(json!({"model": "m", "input": "nonsense"}))?;
    ensure!(script == (400, "invalid_request".into(), Some("messages[0].content".into())), "{script:?}");
    let streamed = refused(json!({"model": "m", "input": "nonsense", "stream": true}))?;
    ensure!(streamed == script, "a job that is refused soon has its own status: {streamed:?}");
    let model = refused(json!({"model": "none", "input": "say x"}))?;
    ensure!(model == (404, "model_not_found".into(), Some("model".into())), "{model:?}");
    for (query, param) in [
        ("stream=maybe", "stream"),
        ("starting_after=1", "starting_after"),
        ("stream=true&starting_after=-1", "starting_after"),
    ] {
        let error = gateway.get(&format!("/v1/responses/resp_default.m.1.x?{query}"))?.error()?;
        ensure!(error == (400, "invalid_parameter".into(), Some(param.into())), "{error:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_in_the_background_is_read_and_cancelled_later() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = ChatWorker::start(&bench, "w").await?;
    let (here, there) = (Gateway::start(&bench.server, &[])?, Gateway::start(&bench.server, &[])?);
    let talked = tokio::task::spawn_blocking(move || -> Result<()> {
        let ask = |script: &str| {
            let body = json!({"model": "m", "input": script, "background": true});
            here.post("/v1/responses", &body)?.json()
        };
        let made = ask("slow one two three")?;
        ensure!(
            made["status"] == "queued" && made["output"] == json!([]) && made["background"] == true,
            "{made}"
        );
        let done = ended(&there, &id_of(&made)?)?;
        ensure!(done["status"] == "completed" && text_of(&done) == "one two three", "{done}");
        let failed = ended(&there, &id_of(&ask("nonsense")?)?)?;
        ensure!(failed["status"] == "failed" && failed["error"]["code"] == "invalid_request", "{failed}");
        ensure!(failed["output"] == json!([]), "{failed}");

        let hangs = id_of(&ask("hang")?)?;
        let cancelled =
            there.ask("POST", &format!("/v1/responses/{hangs}/cancel"), &[], "")?.whole()?.json()?;
        ensure!(cancelled["status"] == "cancelled", "a worker hears of it at once: {cancelled}");
        let again = here.ask("POST", &format!("/v1/responses/{hangs}/cancel"), &[], "")?.whole()?.json()?;
        ensure!(again == cancelled, "{again}");
        let last = events(stream(&here, &hangs, None)?)?.pop().context("no event")?;
        ensure!(last["type"] == "response.failed" && last["response"]["status"] == "cancelled", "{last}");
        Ok(())
    });
    talked.await??;
    drop(worker);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_stream_goes_on_at_another_gateway() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let (here, there) = (Gateway::start(&bench.server, &[])?, Gateway::start(&bench.server, &[])?);
    let talked = tokio::task::spawn_blocking(move || -> Result<()> {
        let words: String = (0..30).map(|i| format!(" wörd{i}")).collect();
        let wanted = format!("begin{words}");
        for (number, script) in ["slow", "slow", "say", "lose", "mute"].into_iter().enumerate() {
            let body = json!({"model": "m", "input": format!("{script} {wanted}"), "stream": true, "background": true});
            let mut first = here.ask("POST", "/v1/responses", &[], &body.to_string())?;
            ensure!(first.status == 200 && first.header("content-type").starts_with("text/event-stream"));
            let mut seen = Vec::new();
            while seen.len() < 4 + 3 * number {
                let Some(event) = event(&mut first)? else { break };
                seen.push(event);
            }
            drop(first);
            ensure!(seen[0]["type"] == "response.created" && seen[0]["sequence_number"] == 0, "{}", seen[0]);
            let id = id_of(&seen[0]["response"])?;
            let after = seen.last().and_then(|event| event["sequence_number"].as_u64());
            seen.extend(events(stream(&there, &id, after)?)?);
            ensure!(spelled(&seen) == wanted, "{script}: {}", spelled(&seen));
            let numbers: Vec<_> = seen.iter().filter_map(|event| event["sequence_number"].as_u64()).collect();
            ensure!(numbers.windows(2).all(|two| two[0] < two[1]), "{numbers:?}");
            let kinds: HashSet<_> = seen.iter().filter_map(|event| event["type"].as_str()).collect();
            ensure!(kinds.len() == 9, "each kind came: {kinds:?}");
            let last = seen.last().context("no event")?;
            ensure!(last["type"] == "response.completed" && text_of(&last["response"]) == wanted, "{last}");
            // Whole again, from the stored outcome alone, and nothing behind the last event.
            let whole = events(stream(&here, &id, None)?)?;
            ensure!(spelled(&whole) == wanted && whole.last() == Some(last), "{whole:?}");
            ensure!(events(stream(&here, &id, numbers.last().copied())?)?.is_empty());
        }
        Ok(())
    });
    talked.await?
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_cancels_what_does_not_run_in_the_background() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = ChatWorker::start(&bench, "w").await?;
    let gateway = Arc::new(Gateway::start(&bench.server, &["--keep-alive", "100ms"])?);
    let ask = |background: bool| {
        let gateway = gateway.clone();
        tokio::task::spawn_blocking(move || -> Result<HttpAnswer> {
            let body = json!({"model": "m", "input": "hang", "stream": true, "background": background});
            let mut answer = gateway.ask("POST", "/v1/responses", &[], &body.to_string())?;
            event(&mut answer)?;
            Ok(answer)
        })
    };
    let kept = ask(true).await??;
    until("it runs", || worker.chats.begun.load(Ordering::SeqCst) == 1).await;
    drop(kept);
    let left = ask(false).await??;
    until("the second runs too", || worker.chats.begun.load(Ordering::SeqCst) == 2).await;
    drop(left);
    until("one is cancelled", || worker.chats.dropped.load(Ordering::SeqCst) == 1).await;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert_eq!(worker.chats.dropped.load(Ordering::SeqCst), 1, "the other one goes on");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_is_its_tenants_own() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let key = |tenant: &str| -> Result<String> {
        let mut command = std::process::Command::new(millrace_tests::tools::program("millrace")?);
        let output =
            command.args(["--server", &bench.server.url(), "key", "create", "--tenant", tenant]).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(format!("Bearer {}", String::from_utf8(output.stdout)?.trim()))
    };
    let (mine, other) = (key("team-a")?, key("team-b")?);
    let mut gateway = Gateway::launch(&bench.server.url(), &[])?;
    gateway.wait_ready()?;
    let talked = tokio::task::spawn_blocking(move || -> Result<()> {
        let ask = |key: &str, method: &str, path: &str, body: &str| -> Result<HttpReply> {
            gateway.ask(method, path, &[("authorization", key)], body)?.whole()
        };
        let body = json!({"model": "m", "input": "say secret"});
        let made = ask(&mine, "POST", "/v1/responses", &body.to_string())?.json()?;
        let path = format!("/v1/responses/{}", id_of(&made)?);
        ensure!(ask(&mine, "GET", &path, "")?.json()? == made);
        for (method, path) in [
            ("GET", path.clone()),
            ("GET", format!("{path}?stream=true")),
            ("GET", format!("{path}/input_items")),
            ("POST", format!("{path}/cancel")),
            ("DELETE", path.clone()),
        ] {
            let missing = ask(&other, method, &path, "")?;
            ensure!(missing.error()?.1 == "job_not_found", "{method} {path}: {missing:?}");
        }
        let body = json!({"model": "m", "input": "say x", "previous_response_id": made["id"]});
        let missing = ask(&other, "POST", "/v1/responses", &body.to_string())?;
        ensure!(missing.status == 404, "{missing:?}");
        Ok(())
    });
    talked.await?
}
