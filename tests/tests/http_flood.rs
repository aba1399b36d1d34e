//! Clients that are many, slow or huge, and what others see of them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::HeaderMap;
use millrace_crds::job::header;
use millrace_crds::names::{Class, JobId};
use millrace_crds::result::OutputReference;
use millrace_queue::store::Store;
use millrace_tests::chat::ChatWorker;
use millrace_tests::gateway::Gateway;
use millrace_tests::overhead::percentile;
use millrace_tests::s3::{self, S3};
use millrace_tests::scripted::{Bench, PATIENCE};
use millrace_tests::{nats, tools};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const CHATS: &str = "/v1/chat/completions";
const MIB: f64 = 1048576.0;

fn chat(script: &str) -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": script}]})
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// Begins a request whose body has this length, and sends these bytes of it.
fn begin(gateway: &Gateway, length: usize, sent: &[u8]) -> Result<TcpStream> {
    let mut socket = TcpStream::connect(gateway.address())?;
    write!(socket, "POST {CHATS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")?;
    write!(socket, "Content-Length: {length}\r\n\r\n")?;
    socket.write_all(sent)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// The status line and all that comes with it, until the gateway closes.
fn answer(mut socket: TcpStream) -> String {
    let mut answer = Vec::new();
    // What was read before an end without a farewell counts.
    let _ = socket.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn wait(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !done()? {
        ensure!(began.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Milliseconds of ordinary requests, sorted.
fn ordinary(gateway: &Gateway, count: usize) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for _ in 0..count {
        let began = Instant::now();
        let reply = gateway.post(CHATS, &chat("say x"))?;
        ensure!(reply.status == 200, "{reply:?}");
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_bad_clients_change_nothing_for_others() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let options = ["--head-timeout", "4s", "--body-timeout", "4s"];
    let gateway = Gateway::start(&bench.server, &options)?;
    blocking(move || {
        let alone = ordinary(&gateway, 100)?;
        let before = gateway.resident_bytes()?;
        let huge = vec![b' '; 256 << 10];
        let mut bad = Vec::new();
        for client in 0..1000 {
            bad.push(match client % 4 {
                // Half a head, no head, a body that comes no further, a body that is too large.
                0 => {
                    let mut socket = TcpStream::connect(gateway.address())?;
                    socket.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")?;
                    socket
                }
                1 => TcpStream::connect(gateway.address())?,
                2 => begin(&gateway, 1_000_000, b"{\"model\":")?,
                _ => begin(&gateway, 2 << 20, &huge)?,
            });
        }
        let beside = ordinary(&gateway, 100)?;
        let during = gateway.resident_bytes()?;
        println!(
            "ordinary requests: p50 {:.1} ms alone, {:.1} beside; p99 {:.1} and {:.1}; memory {:.1} MiB, then {:.1}",
            percentile(&alone, 50),
            percentile(&beside, 50),
            percentile(&alone, 99),
            percentile(&beside, 99),
            before as f64 / MIB,
            during as f64 / MIB
        );
        ensure!(percentile(&beside, 50) <= 3.0 * percentile(&alone, 50) + 5.0, "{alone:?} {beside:?}");
        // 64 KiB for each of them.
        ensure!(during < before + (64 << 20), "{before} bytes, then {during}");
        for (client, socket) in bad.into_iter().enumerate() {
            let answer = answer(socket);
            match client % 4 {
                0 | 1 => ensure!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{client}: {answer}"),
                2 => ensure!(answer.starts_with("HTTP/1.1 408"), "{client}: {answer}"),
                _ => ensure!(answer.starts_with("HTTP/1.1 408") || answer.starts_with("HTTP/1.1 413"), "{answer}"),
            }
        }
        wait("all connections are closed", || Ok(gateway.metric("millrace_gateway_connections")? <= 1.0))?;
        ensure!(gateway.metric("millrace_gateway_held_bytes")? == 0.0, "bytes stay held");
        ensure!(gateway.resident_bytes()? < before + (64 << 20), "memory stays held");
        Ok(())
    })
    .await
}

/// The outcome of a job whose lines lie in an object store, as a worker would have written it.
async fn refer(bench: &Bench, job: &JobId, reference: &OutputReference) -> Result<()> {
    let mut headers = HeaderMap::new();
    headers.insert(header::OUTCOME, "completed");
    let (subject, body) = (bench.model.result_subject(job), serde_json::to_vec(reference)?);
    bench.context.publish_with_headers(subject, headers, body.into()).await?.await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_outcome_is_sent_on_and_not_held() -> Result<()> {
    const BYTES: usize = 96 << 20;
    if !tools::have(&[nats::PROGRAM, s3::PROGRAM]) {
        return Ok(());
    }
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let s3 = S3::start()?;
    s3.create_bucket("claims").await?;
    let store = Store::connect(&s3.store_config()).await?;
    let line = format!(r#"{{"id":"j","response":{{"body":"{}"}},"error":null}}"#, "x".repeat(BYTES));
    store.put(&"s3://claims/a".parse()?, line.clone().into()).await?;
    let good = OutputReference {
        output: "s3://claims/a".into(),
        bytes: line.len() as u64,
        sha256: hex::encode(Sha256::digest(&line)),
    };
    // As the ids of jobs of nobody's begin: the SHA-256 of an empty name.
    let job = |name: &str| -> Result<JobId> { Ok(format!("job-e3b0c44298fc1c14-{name}").parse()?) };
    refer(&bench, &job("good")?, &good).await?;
    refer(&bench, &job("bad")?, &OutputReference { sha256: "0".repeat(64), ..good.clone() }).await?;
    let (endpoint, folder) = (s3.endpoint(), s3.credentials_dir());
    let folder = folder.to_str().context("a path")?;
    let options = ["--memory-max", "16Mi", "--s3-endpoint", &endpoint, "--s3-credentials-dir", folder];
    let gateway = Gateway::start(&bench.server, &options)?;
    blocking(move || {
        let before = gateway.resident_bytes()?;
        let found = gateway.get("/v1/jobs/default.m.0.job-e3b0c44298fc1c14-good")?;
        ensure!(
            found.status == 200 && found.header("content-type") == "application/json",
            "{}",
            found.status
        );
        let text = String::from_utf8(found.body)?;
        let outcome = text.split_once(r#""outcome":"#).context("no outcome")?.1;
        ensure!(outcome.strip_suffix('}') == Some(line.as_str()), "{} bytes", text.len());
        let after = gateway.resident_bytes()?;
        println!(
            "{:.0} MiB sent on; memory {:.1} MiB, then {:.1}",
            BYTES as f64 / MIB,
            before as f64 / MIB,
            after as f64 / MIB
        );
        ensure!(after < before + (BYTES / 2) as u64, "{before} bytes, then {after}");
        // What is not what the outcome says has no end.
        let broken = gateway.get("/v1/jobs/default.m.0.job-e3b0c44298fc1c14-bad")?;
        let said: usize = broken.header("content-length").parse()?;
        ensure!(broken.body.len() < said, "{} of {said} bytes", broken.body.len());
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_answer_is_the_one_in_the_object_store() -> Result<()> {
    if !tools::have(&[nats::PROGRAM, s3::PROGRAM]) {
        return Ok(());
    }
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let s3 = S3::start()?;
    s3.create_bucket("claims").await?;
    let store = Store::connect(&s3.store_config()).await?;
    let (endpoint, folder) = (s3.endpoint(), s3.credentials_dir());
    let folder = folder.to_str().context("a path")?;
    let options = ["--memory-max", "16Mi", "--s3-endpoint", &endpoint, "--s3-credentials-dir", folder];
    let gateway = Arc::new(Gateway::start(&bench.server, &options)?);
    let asking = gateway.clone();
    let asked = tokio::spawn(blocking(move || asking.post(CHATS, &chat("say x"))));
    // This test is the worker: its answer is larger than all that the gateway may hold.
    let jobs = bench.context.get_stream(bench.model.jobs_stream()).await?;
    let began = Instant::now();
    let job: JobId = loop {
        match jobs.direct_get_last_for_subject(bench.model.jobs_subject(Class::Normal)).await {
            Ok(message) => break message.headers.get(header::JOB_ID).context("no id")?.as_str().parse()?,
            Err(error) => ensure!(began.elapsed() < PATIENCE, "no job: {error}"),
        }
    };
    let text = "x".repeat(24 << 20);
    let usage = json!({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3});
    let answer = json!({"choices": [{"text": text}], "usage": usage}).to_string();
    let head =
        format!(r#"{{"id":"{job}","custom_id":"{job}","response":{{"status_code":200,"request_id":"{job}""#);
    let line = format!(r#"{head},"body":{answer}}},"error":null}}"#);
    store.put(&"s3://claims/b".parse()?, line.clone().into()).await?;
    let (bytes, sha256) = (line.len() as u64, hex::encode(Sha256::digest(&line)));
    refer(&bench, &job, &OutputReference { output: "s3://claims/b".into(), bytes, sha256 }).await?;
    let reply = asked.await??;
    ensure!(reply.status == 200 && reply.header("content-type") == "application/json", "{}", reply.status);
    let body = reply.body;
    // The harness's client reads a body as it comes.
    ensure!(body == answer.as_bytes(), "{} of {} bytes", body.len(), answer.len());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_and_bytes_have_a_bound() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let options = ["--connections-max", "40", "--memory-max", "16Mi", "--body-timeout", "20s"];
    let gateway = Gateway::start(&bench.server, &options)?;
    blocking(move || {
        // Each body is nearly as large as may be, and its last byte does not come.
        let length = (1 << 20) - (16 << 10);
        let mut body = chat("say x").to_string().into_bytes();
        body.resize(length, b' ');
        let mut slow = Vec::new();
        for _ in 0..16 {
            slow.push(begin(&gateway, length, &body[..length - 1])?);
        }
        wait("16 bodies are held", || Ok(gateway.metric("millrace_gateway_held_bytes")? > 15.5 * MIB))?;
        wait("it is not ready", || Ok(gateway.get("/readyz")?.status == 503))?;
        let text = answer(begin(&gateway, length, &body)?);
        ensure!(text.starts_with("HTTP/1.1 503") && text.contains("\"overloaded\""), "{text}");
        ensure!(text.contains("retry-after: 2") && text.contains("16777216 bytes"), "{text}");
        // The others are not hurt: they end, and so do small ones meanwhile.
        ensure!(gateway.post(CHATS, &chat("say x"))?.status == 200, "a small one fits");
        for mut socket in slow {
            socket.write_all(&body[length - 1..])?;
            let mut head = [0; 12];
            socket.read_exact(&mut head)?;
            ensure!(&head == b"HTTP/1.1 200", "{}", String::from_utf8_lossy(&head));
        }
        wait("nothing is held", || Ok(gateway.metric("millrace_gateway_held_bytes")? == 0.0))?;
        wait("all are closed", || Ok(gateway.metric("millrace_gateway_connections")? <= 1.0))?;

        let idle: Vec<TcpStream> =
            (0..40).map(|_| TcpStream::connect(gateway.address())).collect::<Result<_, _>>()?;
        std::thread::sleep(Duration::from_millis(300));
        let body = chat("say x").to_string();
        let text = answer(begin(&gateway, body.len(), body.as_bytes())?);
        ensure!(text.starts_with("HTTP/1.1 503") && text.contains("as many connections as it may"), "{text}");
        ensure!(text.contains("retry-after: 2") && text.contains("x-should-retry: true"), "{text}");
        drop(idle);
        wait("there is a place again", || {
            Ok(gateway.post(CHATS, &chat("say x")).is_ok_and(|r| r.status == 200))
        })?;
        ensure!(gateway.metric("millrace_gateway_connections_refused_total")? >= 1.0, "it was counted");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_have_a_bound() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let gateway = Gateway::start(&bench.server, &[])?;
    blocking(move || {
        let send = |head: &str| -> Result<String> {
            let mut socket = TcpStream::connect(gateway.address())?;
            socket.set_read_timeout(Some(PATIENCE))?;
            // It may answer before all is sent.
            let _ = socket.write_all(head.as_bytes());
            Ok(answer(socket))
        };
        let many: String = (0..200).map(|i| format!("x-{i}: y\r\n")).collect();
        let text = send(&format!("GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{many}\r\n"))?;
        ensure!(text.starts_with("HTTP/1.1 431"), "{text}");
        let long = "y".repeat(40 << 10);
        let text =
            send(&format!("GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\nx: {long}\r\n\r\n"))?;
        ensure!(text.starts_with("HTTP/1.1 431"), "{text}");
        let fits = "y".repeat(20 << 10);
        let text =
            send(&format!("GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\nx: {fits}\r\n\r\n"))?;
        ensure!(text.starts_with("HTTP/1.1 200"), "{text}");
        Ok(())
    })
    .await
}
