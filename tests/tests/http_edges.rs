//! The gateway at its edges: slow and too many clients, copies that are lost, TLS, a secured broker, a real worker.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::HeaderMap;
use millrace_crds::job::header;
use millrace_crds::names::{Class, JobId};
use millrace_tests::certificates::Certificates;
use millrace_tests::chat::ChatWorker;
use millrace_tests::cluster::QueueHarness;
use millrace_tests::gateway::Gateway;
use millrace_tests::jobs::OutcomeLog;
use millrace_tests::nats::{self, NatsServer};
use millrace_tests::scripted::{Bench, PATIENCE};
use millrace_tests::{place, tools};
use serde_json::{Value, json};

const CHATS: &str = "/v1/chat/completions";

fn chat(script: &str) -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": script}]})
}

/// Sends a request over a socket that stays open.
fn open(gateway: &Gateway, length: usize, body: &str) -> Result<TcpStream> {
    let mut socket = TcpStream::connect(gateway.address())?;
    let head = format!("POST {CHATS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n");
    write!(socket, "{head}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_and_too_many_clients_are_told() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let gateway = Gateway::start(&bench.server, &["--body-timeout", "500ms", "--requests-max", "2"])?;
    blocking(move || {
        let mut answer = String::new();
        open(&gateway, 100, "{")?.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 408") && answer.contains("\"body_timeout\""), "{answer}");
        ensure!(answer.contains("x-should-retry: true") && answer.contains("retry-after: 1"), "{answer}");
        let body = chat("hang").to_string();
        let hanging = [open(&gateway, body.len(), &body)?, open(&gateway, body.len(), &body)?];
        let began = Instant::now();
        let wait = |what: &str, mut done: Box<dyn FnMut() -> Result<bool> + '_>| -> Result<()> {
            while !done()? {
                ensure!(began.elapsed() < PATIENCE, "waited in vain until {what}");
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        };
        wait("both places are taken", Box::new(|| Ok(gateway.get("/readyz")?.status == 503)))?;
        ensure!(gateway.get("/readyz")?.body == b"2 requests run, as many as may\n");
        let refused = gateway.post(CHATS, &chat("say x"))?;
        ensure!(refused.error()?.1 == "overloaded" && refused.header("retry-after") == "2", "{refused:?}");
        drop(hanging);
        wait("a place is free", Box::new(|| Ok(gateway.post(CHATS, &chat("say x"))?.status == 200)))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_whose_copy_was_lost_is_found() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let gateway = Arc::new(Gateway::start(&bench.server, &[])?);
    let asking = gateway.clone();
    let asked = tokio::spawn(blocking(move || asking.post(CHATS, &chat("say x"))));
    // This test is the worker, and sends no copy.
    let jobs = bench.context.get_stream(bench.model.jobs_stream()).await?;
    let began = Instant::now();
    let job: JobId = loop {
        match jobs.direct_get_last_for_subject(bench.model.jobs_subject(Class::Normal)).await {
            Ok(message) => break message.headers.get(header::JOB_ID).context("no id")?.as_str().parse()?,
            Err(error) => ensure!(began.elapsed() < PATIENCE, "no job: {error}"),
        }
    };
    let response = json!({"status_code": 200, "request_id": job, "body": {"found": true}});
    let line = json!({"id": job, "custom_id": job, "response": response, "error": null});
    let mut headers = HeaderMap::new();
    headers.insert(header::OUTCOME, "completed");
    let subject = bench.model.result_subject(&job);
    bench.context.publish_with_headers(subject, headers, line.to_string().into()).await?.await?;
    let answer = asked.await??;
    assert_eq!((answer.status, answer.body), (200, b"{\"found\":true}".to_vec()));
    Ok(())
}

/// Whether the gateway's certificate is one of this authority's, by a client of its own.
fn trusts(gateway: &Gateway, authority: &Path) -> Result<bool> {
    let script = "import ssl, sys, urllib.request\n\
        context = ssl.create_default_context(cafile=sys.argv[2])\n\
        print(urllib.request.urlopen(sys.argv[1], context=context, timeout=10).read().decode())";
    let url = format!("https://{}/readyz", gateway.address());
    let output = Command::new("python3").args(["-c", script, &url]).arg(authority).output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() || told.contains("certificate verify failed"), "{told}");
    Ok(output.status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_taken_while_it_serves() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let server = NatsServer::start()?;
    let (used, next) = (place::folder("tls-")?, place::folder("tls-")?);
    let (first, second) = (Certificates::create(used.path())?, Certificates::create(next.path())?);
    let old_authority = used.path().join("old.crt");
    std::fs::copy(first.file("ca.crt"), &old_authority)?;
    let text = |path: std::path::PathBuf| path.to_str().map(str::to_owned).context("a path");
    let (cert, key) = (text(first.file("server.crt"))?, text(first.file("server.key"))?);
    let options = ["--anonymous", "--tls-cert", &cert, "--tls-key", &key];
    let gateway = Gateway::launch(&server.url(), &options)?;
    let began = Instant::now();
    while !trusts(&gateway, &old_authority).unwrap_or(false) {
        ensure!(began.elapsed() < PATIENCE, "no TLS: {}", gateway.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(!trusts(&gateway, &second.file("ca.crt"))?, "the other authority signed nothing yet");
    std::fs::copy(second.file("server.key"), &key)?;
    std::fs::copy(second.file("server.crt"), &cert)?;
    while !trusts(&gateway, &second.file("ca.crt"))? {
        ensure!(began.elapsed() < PATIENCE * 2, "the old certificate stays: {}", gateway.log());
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secured_broker_is_reached_with_its_files_alone() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let server = NatsServer::start_secured()?;
    let accounts = server.accounts().context("a broker without accounts")?;
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path");
    let (creds, ca) = (text(&accounts.credentials)?, text(&accounts.authority)?);
    let kept_out = Gateway::launch(&server.url(), &["--anonymous", "--ca", &ca])?;
    let mut let_in = Gateway::launch(&server.url(), &["--anonymous", "--ca", &ca, "--creds", &creds])?;
    let_in.wait_ready()?;
    let began = Instant::now();
    while !kept_out.log().contains("authorization violation") {
        ensure!(began.elapsed() < PATIENCE, "it does not say why it is kept out: {}", kept_out.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    let page = String::from_utf8(kept_out.get("/readyz")?.body)?;
    assert!(
        page.starts_with("the broker is not connected: ") && page.contains("authorization violation"),
        "{page}"
    );
    Ok(())
}

/// With a real engine: log probabilities, whose spelling a second writer might change, and streams.
#[tokio::test(flavor = "multi_thread")]
async fn answers_of_a_real_worker_are_the_stored_bytes() -> Result<()> {
    const REQUESTS: usize = 24;
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let cluster = QueueHarness::tiny()?;
    let worker = cluster.worker()?;
    let queue = cluster.queue().await?;
    let gateway = Arc::new(Gateway::start(&cluster.nats, &[])?);
    let asking = gateway.clone();
    let answers = blocking(move || {
        let body = |i: usize| {
            json!({"model": "tiny", "prompt": format!("Tell me {i}"), "max_tokens": 20 + i, "ignore_eos": true,
                   "n": 1 + i % 2, "logprobs": if i % 4 < 2 { json!(2) } else { Value::Null }, "stream": i % 2 == 1})
        };
        (0..REQUESTS).map(|i| asking.post("/v1/completions", &body(i))).collect::<Result<Vec<_>>>()
    });
    let answers = answers.await.with_context(|| worker.log_tail())?;
    let mut record = OutcomeLog::default();
    record.wait(&queue, REQUESTS, PATIENCE).await?;
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!(answer.status, 200, "{answer:?}");
        let stored = record.of(answer.header("x-request-id"))?;
        let whole = stored.answer()?;
        if i % 2 == 0 {
            let line = String::from_utf8(stored.body.to_vec())?;
            let body = String::from_utf8(answer.body.clone())?;
            assert!(line.contains(&format!(r#","body":{body}}},"error":null"#)), "{body}\nis not in\n{line}");
            continue;
        }
        for (index, choice) in whole["choices"].as_array().context("no choices")?.iter().enumerate() {
            assert_eq!(answer.spelled(index as u64)?, choice["text"].as_str().context("no text")?);
        }
    }
    Ok(())
}
