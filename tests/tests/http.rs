//! OpenAI's API over a real broker, with a worker that answers from a script.
//!
//! What holds here: an answer is the stored outcome byte for byte, also where it is streamed and deltas are lost; every
//! error has OpenAI's form; a client that leaves cancels its job; a drain finishes what runs.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use millrace_crds::config::{QueueConfig, ResultsConfig};
use millrace_crds::job::header;
use millrace_crds::names::{Class, ModelRef};
use millrace_crds::units::Bytes;
use millrace_queue::provision::{Mode, provision};
use millrace_tests::chat::ChatWorker;
use millrace_tests::gateway::{Gateway, HttpReply};
use millrace_tests::process::Signal;
use millrace_tests::scripted::{Bench, PATIENCE, text, until};
use serde_json::{Value, json};

/// A broker, a worker and a gateway.
struct Door {
    bench: Bench,
    worker: ChatWorker,
    gateway: Arc<Gateway>,
}

impl Door {
    async fn open(options: &'static [&'static str]) -> Result<Option<Self>> {
        let Some(bench) = Bench::start().await? else { return Ok(None) };
        let worker = ChatWorker::start(&bench, "w").await?;
        let gateway = Arc::new(Gateway::start(&bench.server, options)?);
        Ok(Some(Self { bench, worker, gateway }))
    }

    /// Asks off the runtime's threads, which the worker needs.
    async fn with<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&Gateway) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let gateway = self.gateway.clone();
        tokio::task::spawn_blocking(move || ask(&gateway)).await?
    }

    async fn post(&self, path: &'static str, body: Value) -> Result<HttpReply> {
        self.with(move |gateway| gateway.post(path, &body)).await
    }

    async fn chat(&self, script: &str) -> Result<HttpReply> {
        self.post("/v1/chat/completions", chat(script, false)).await
    }

    async fn streamed(&self, script: &str) -> Result<HttpReply> {
        self.post("/v1/chat/completions", chat(script, true)).await
    }

    /// The bytes of the answer in a job's stored outcome.
    async fn stored(&self, id: &str) -> Result<String> {
        let outcome = self.bench.outcome(id).await?;
        let line = String::from_utf8(outcome.payload.to_vec())?;
        let (_, body) = line.split_once(r#","body":"#).with_context(|| line.clone())?;
        Ok(body.strip_suffix(r#"},"error":null}"#).context("not an answer")?.to_owned())
    }
}

fn chat(script: &str, stream: bool) -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": script}], "stream": stream})
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_the_stored_outcome() -> Result<()> {
    let Some(door) = Door::open(&[]).await? else { return Ok(()) };
    let answer = door.chat("say hello world").await?;
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/json"));
    let id = answer.header("x-request-id").to_owned();
    assert_eq!(String::from_utf8_lossy(&answer.body), door.stored(&id).await?);
    assert_eq!(answer.json()?["id"], format!("chatcmpl-{id}"));
    assert_eq!(answer.json()?["choices"][0]["message"]["content"], "hello world");

    let body = json!({"model": "default/m", "prompt": "say more", "n": 2});
    let answer = door.post("/v1/completions", body).await?;
    let id = answer.header("x-request-id").to_owned();
    assert_eq!(String::from_utf8_lossy(&answer.body), door.stored(&id).await?);
    assert_eq!(answer.json()?["choices"][1]["text"], "more");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_has_the_class_and_the_deadline_that_were_asked_for() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    // Without a worker the jobs stay in the queue to be looked at.
    let gateway = Arc::new(Gateway::start(&bench.server, &["--class", "low"])?);
    let asking = gateway.clone();
    let asked = tokio::task::spawn_blocking(move || {
        let headers = [("millrace-class", "high"), ("millrace-deadline", "1s"), ("traceparent", TRACE)];
        asking.ask("POST", "/v1/chat/completions", &headers, &chat("say x", false).to_string())?.whole()
    });
    let jobs = bench.context.get_stream(bench.model.jobs_stream()).await?;
    let began = Instant::now();
    let message = loop {
        match jobs.direct_get_last_for_subject(bench.model.jobs_subject(Class::High)).await {
            Ok(message) => break message,
            Err(error) => anyhow::ensure!(began.elapsed() < PATIENCE, "no job: {error}"),
        }
    };
    assert_eq!(message.payload, chat("say x", false).to_string());
    assert_eq!(
        (text(&message, "traceparent"), text(&message, header::STREAM)),
        (TRACE.into(), String::new())
    );
    assert!(text(&message, header::DEADLINE).starts_with("20"), "{:?}", message.headers);
    // Nobody answers: the gateway says so when the deadline has passed, and cancels the job.
    let answer = asked.await??;
    assert_eq!(answer.error()?, (504, "deadline_exceeded".into(), None));
    assert_eq!(answer.header("x-should-retry"), "false");
    let job = answer.header("x-request-id").parse()?;
    let results = bench.context.get_stream(bench.model.results_stream()).await?;
    let marked = async || results.direct_get_last_for_subject(bench.model.cancel_subject(&job)).await.is_ok();
    while !marked().await {
        anyhow::ensure!(began.elapsed() < PATIENCE, "the job was not cancelled");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[tokio::test(flavor = "multi_thread")]
async fn models_are_what_has_a_queue() -> Result<()> {
    let Some(door) = Door::open(&[]).await? else { return Ok(()) };
    let other = ModelRef::new("team-a", "m2")?;
    let missing = door.with(|gateway| gateway.get("/v1/models/team-a%2Fm2")).await?;
    assert_eq!(missing.error()?, (404, "model_not_found".into(), Some("model".into())));
    let queue = QueueConfig { max_bytes: Bytes(1 << 20), ..door.bench.queue.clone() };
    provision(&door.bench.context, &other, &queue, &ResultsConfig::default(), Mode::Create).await?;
    // A model that was just made is found although the list was read just before.
    tokio::time::sleep(Duration::from_millis(600)).await;
    for path in ["/v1/models/team-a%2Fm2", "/v1/models/team-a/m2"] {
        let found = door.with(move |gateway| gateway.get(path)).await?;
        assert_eq!((found.status, &found.json()?["id"]), (200, &json!("team-a/m2")), "{path}");
    }
    let list = door.with(|gateway| gateway.get("/v1/models")).await?.json()?;
    let ids: Vec<_> = list["data"].as_array().context("no list")?.iter().map(|m| m["id"].clone()).collect();
    assert_eq!((ids, &list["has_more"]), (vec![json!("m"), json!("team-a/m2")], &json!(false)));
    assert!(list["data"][0]["created"].as_i64().is_some_and(|at| at > 1_700_000_000), "{list}");
    assert_eq!(list["data"][1]["owned_by"], "team-a");
    Ok(())
}

/// Method, path, headers and body; then status, code and param of the refusal.
type Refused = (
    &'static str,
    &'static str,
    &'static [(&'static str, &'static str)],
    String,
    u16,
    &'static str,
    Option<String>,
);

#[tokio::test(flavor = "multi_thread")]
async fn every_error_has_openais_form() -> Result<()> {
    let Some(door) = Door::open(&["--body-timeout", "1s"]).await? else { return Ok(()) };
    let path = "/v1/chat/completions";
    let named = |name: &str| Some(name.to_owned());
    let refused = door.chat("nonsense").await?;
    assert_eq!(refused.error()?, (400, "invalid_request".into(), named("messages[0].content")));
    assert_eq!(refused.header("x-should-retry"), "false");
    let failed = door.chat("fail").await?;
    assert_eq!(failed.error()?, (500, "inference_error".into(), None));
    assert_eq!(failed.header("x-should-retry"), "false");

    let asks: [Refused; 9] = [
        ("POST", path, &[], "{".into(), 400, "invalid_json", None),
        ("POST", path, &[], r#"{"model":"m"}"#.into(), 400, "missing_required_parameter", named("messages")),
        (
            "POST",
            path,
            &[],
            chat("say", false).to_string().replace("\"m\"", "\"x\""),
            404,
            "model_not_found",
            named("model"),
        ),
        ("POST", path, &[("content-type", "text/plain")], "{}".into(), 415, "unsupported_media_type", None),
        (
            "POST",
            path,
            &[("millrace-class", "urgent")],
            chat("say", false).to_string(),
            400,
            "invalid_parameter",
            named("millrace-class"),
        ),
        (
            "POST",
            path,
            &[("millrace-deadline", "1h")],
            chat("say", false).to_string(),
            400,
            "invalid_parameter",
            named("millrace-deadline"),
        ),
        ("POST", path, &[], chat(&"x".repeat(1 << 20), false).to_string(), 413, "request_too_large", None),
        ("GET", path, &[], String::new(), 405, "method_not_allowed", None),
        ("GET", "/v1/nothing", &[], String::new(), 404, "unknown_url", None),
    ];
    for (method, path, headers, body, status, code, param) in asks {
        let owned: Vec<_> = headers.to_vec();
        let reply = door.with(move |gateway| gateway.ask(method, path, &owned, &body)?.whole()).await?;
        assert_eq!(reply.error()?, (status, code.to_owned(), param));
        assert!(reply.header("x-request-id").starts_with("req-"), "{code}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_the_stored_outcome_whatever_is_lost() -> Result<()> {
    let Some(door) = Door::open(&[]).await? else { return Ok(()) };
    let words: String = (0..200).map(|i| format!(" w{i}")).collect();
    for script in ["say", "lose", "mute"] {
        let reply = door.streamed(&format!("{script} begin{words}")).await?;
        assert_eq!((reply.status, reply.header("content-type")), (200, "text/event-stream; charset=utf-8"));
        assert_eq!(reply.spelled(0)?, format!("begin{words}"), "{script}");
        let chunks = reply.chunks()?;
        assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}), "{script}");
        let last = chunks.last().context("no chunk")?;
        assert_eq!(last["choices"][0]["finish_reason"], "stop", "{script}");
        let id = reply.header("x-request-id");
        assert!(chunks.iter().all(|chunk| chunk["id"] == format!("chatcmpl-{id}")), "{script}");
        let stored: Value = serde_json::from_str(&door.stored(id).await?)?;
        assert_eq!(stored["choices"][0]["message"]["content"], format!("begin{words}"));
    }
    assert!(door.with(|gateway| gateway.metric("millrace_gateway_streams_healed_total")).await? >= 2.0);

    let body = json!({"model": "m", "prompt": "say one two", "n": 2, "stream": true,
                      "stream_options": {"include_usage": true}});
    let reply = door.post("/v1/completions", body).await?;
    assert_eq!((reply.spelled(0)?, reply.spelled(1)?), ("one two".into(), "one two".into()));
    let chunks = reply.chunks()?;
    let last = chunks.last().context("no chunk")?;
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(4)));
    assert!(chunks.iter().all(|chunk| chunk["object"] == "text_completion"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_kept_alive_and_fails_in_the_clients_form() -> Result<()> {
    let Some(door) = Door::open(&["--keep-alive", "200ms"]).await? else { return Ok(()) };
    // A job that is refused before its first token keeps its own status.
    let refused = door.streamed("nonsense").await?;
    assert_eq!(refused.error()?, (400, "invalid_request".into(), Some("messages[0].content".into())));
    // One that hangs begins with pings, and ends with its deadline as data.
    let reply = door
        .with(|gateway| {
            let headers = [("millrace-deadline", "4s")];
            gateway.ask("POST", "/v1/chat/completions", &headers, &chat("hang", true).to_string())?.whole()
        })
        .await?;
    let text = String::from_utf8_lossy(&reply.body).into_owned();
    assert!(reply.status == 200 && text.starts_with(": ping\n\n: ping\n\n"), "{text}");
    let chunks = reply.chunks()?;
    assert_eq!((chunks.len(), &chunks[0]["error"]["code"]), (1, &json!("deadline_exceeded")), "{text}");
    Ok(())
}

/// Asks for what never ends, over a socket that stays open.
fn hanging(gateway: &Gateway, stream: bool) -> Result<TcpStream> {
    let body = chat("hang", stream).to_string();
    let mut socket = TcpStream::connect(gateway.address())?;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
    write!(socket, "{head}Content-Length: {}\r\n\r\n{body}", body.len())?;
    Ok(socket)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_cancels_its_job() -> Result<()> {
    let Some(door) = Door::open(&[]).await? else { return Ok(()) };
    for (stream, dropped) in [(false, 1), (true, 2)] {
        let socket = hanging(&door.gateway, stream)?;
        let chats = door.worker.chats.clone();
        until("the job runs", || chats.begun.load(Ordering::SeqCst) == dropped).await;
        drop(socket);
        until("the job is cancelled", || chats.dropped.load(Ordering::SeqCst) == dropped).await;
    }
    // Who leaves leaves a trace.
    until("it is written down", || door.gateway.log().contains("\"status\":499")).await;
    door.bench.until_empty().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_finishes_what_runs() -> Result<()> {
    let Some(mut door) = Door::open(&[]).await? else { return Ok(()) };
    let words: String = (0..30).map(|i| format!(" w{i}")).collect();
    let script = format!("slow begin{words}");
    let streaming = {
        let (gateway, body) = (door.gateway.clone(), chat(&script, true).to_string());
        let mut answer = gateway.ask("POST", "/v1/chat/completions", &[], &body)?;
        answer.line()?;
        answer
    };
    let gateway = Arc::get_mut(&mut door.gateway).context("the gateway is in use")?;
    gateway.signal(Signal::Terminate)?;
    let rest = tokio::task::spawn_blocking(move || streaming.whole()).await??;
    // The first line was read apart.
    let text = String::from_utf8_lossy(&rest.body).into_owned();
    assert!(text.ends_with("data: [DONE]\n\n") && text.contains("w29"), "{text}");
    assert!(gateway.wait(PATIENCE)?.success(), "{}", gateway.log());
    assert!(gateway.log().contains("draining"), "{}", gateway.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_drain_cuts_off_is_cancelled() -> Result<()> {
    let Some(mut door) = Door::open(&["--drain-timeout", "300ms"]).await? else { return Ok(()) };
    let sockets = [hanging(&door.gateway, false)?, hanging(&door.gateway, true)?];
    let chats = door.worker.chats.clone();
    until("both jobs run", || chats.begun.load(Ordering::SeqCst) == 2).await;
    let gateway = Arc::get_mut(&mut door.gateway).context("the gateway is in use")?;
    gateway.signal(Signal::Terminate)?;
    assert!(gateway.wait(PATIENCE)?.success(), "{}", gateway.log());
    assert!(!gateway.log().contains("not all jobs"), "{}", gateway.log());
    until("both jobs are cancelled", || chats.dropped.load(Ordering::SeqCst) == 2).await;
    drop(sockets);
    door.bench.until_empty().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_said() -> Result<()> {
    let Some(mut bench) = Bench::start().await? else { return Ok(()) };
    let gateway = Arc::new(Gateway::start(&bench.server, &[])?);
    assert_eq!(gateway.get("/readyz")?.body, b"ready\n");
    bench.server.kill()?;
    let began = Instant::now();
    while gateway.get("/readyz")?.status == 200 {
        anyhow::ensure!(began.elapsed() < PATIENCE, "ready without a broker");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(gateway.get("/readyz")?.body, b"the broker is not connected\n");
    assert_eq!(gateway.get("/healthz")?.status, 200);
    let refused = gateway.post("/v1/chat/completions", &chat("say x", false))?;
    assert_eq!(refused.error()?.1, "broker_unavailable");
    assert_eq!((refused.header("retry-after"), refused.header("x-should-retry")), ("2", "true"));
    bench.server.restart()?;
    while gateway.get("/readyz")?.status != 200 {
        anyhow::ensure!(began.elapsed() < PATIENCE * 2, "not ready with a broker");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!gateway.log().contains("say x"), "a log holds a prompt");
    Ok(())
}
