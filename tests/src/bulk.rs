//! A batch of many lines through gateways that are killed, beside workers that are killed and a broker that is killed:
//! what comes out, how fast, and how much memory that takes; and the same lines from an async publisher.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::HeaderMap;
use futures::StreamExt;
use millrace_crds::job::header;
use millrace_crds::names::{Class, ModelRef};
use millrace_queue::provision::{Mode, provision};
use serde_json::{Value, json};

use crate::chat::ChatWorker;
use crate::figures::Figure;
use crate::gateway::{Gateway, HttpReply};
use crate::scripted::Bench;

/// A batch makes progress within this time, whatever is killed.
const STALL: Duration = Duration::from_secs(90);
/// Publishes outstanding of the publisher that is compared: as many as the gateway's.
const OUTSTANDING: usize = 256;
/// What a gateway of these tests is told: its lines may all be on their way.
const OPTIONS: [&str; 4] = ["--batch-flight", "100000", "--timeout", "10m"];

/// How much, and what is killed meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct BulkPlan {
    /// Lines of the batch.
    pub lines: usize,
    /// Times that the gateway is killed which runs it.
    pub gateway_kills: usize,
    /// Times that the worker is killed.
    pub worker_kills: usize,
    /// Times that the broker is killed.
    pub broker_kills: usize,
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub struct BulkReport {
    /// Lines of the batch.
    pub lines: usize,
    /// From the batch's making until it was completed.
    pub seconds: f64,
    /// The most memory of any gateway, in bytes.
    pub peak_bytes: u64,
}

/// The body of a line's request.
fn body(number: usize) -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": format!("say answer {number}")}], "max_tokens": 16})
}

/// A file of so many lines.
pub fn input(lines: usize) -> String {
    let line = |number| {
        let line = json!({
            "custom_id": format!("line-{number}"), "method": "POST", "url": "/v1/chat/completions",
            "body": body(number),
        });
        format!("{line}\n")
    };
    (0..lines).map(line).collect()
}

/// Uploads a file for a batch, and gives its id.
///
/// # Errors
/// When it is refused.
pub fn upload(gateway: &Gateway, content: &str) -> Result<String> {
    let form = format!(
        "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--b\r\n\
         Content-Disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\n\r\n{content}\r\n--b--\r\n"
    );
    let headers = [("Content-Type", "multipart/form-data; boundary=b")];
    id_of(&gateway.ask("POST", "/v1/files", &headers, &form)?.whole()?)
}

/// Makes a batch of a file of chats, and gives its id.
///
/// # Errors
/// When it is refused.
pub fn create(gateway: &Gateway, file: &str, window: &str) -> Result<String> {
    let body =
        json!({"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": window});
    id_of(&gateway.post("/v1/batches", &body)?)
}

fn id_of(reply: &HttpReply) -> Result<String> {
    ensure!(reply.status == 200, "{reply:?}");
    Ok(reply.json()?["id"].as_str().context("no id")?.to_owned())
}

/// A batch as it is now.
///
/// # Errors
/// When there is none.
pub fn look(gateway: &Gateway, id: &str) -> Result<Value> {
    let reply = gateway.get(&format!("/v1/batches/{id}"))?;
    ensure!(reply.status == 200, "{reply:?}");
    reply.json()
}

/// A batch once it has ended.
///
/// # Errors
/// When it makes no progress.
pub fn ended(gateway: &Gateway, id: &str) -> Result<Value> {
    let (mut last, mut since) = (Value::Null, Instant::now());
    loop {
        let reply = gateway.get(&format!("/v1/batches/{id}"))?;
        // While the broker is away a gateway says so.
        let batch = if reply.status == 503 { json!({"request_counts": last}) } else { reply.json()? };
        if ["completed", "failed", "expired", "cancelled"].iter().any(|status| batch["status"] == *status) {
            return Ok(batch);
        }
        if batch["request_counts"] != last {
            (last, since) = (batch["request_counts"].clone(), Instant::now());
        }
        ensure!(since.elapsed() < STALL, "no progress: {batch}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The lines of a file.
///
/// # Errors
/// When it cannot be read.
pub fn lines(gateway: &Gateway, file: &Value) -> Result<Vec<Value>> {
    let id = file.as_str().context("there is no such file")?;
    let reply = gateway.get(&format!("/v1/files/{id}/content"))?;
    ensure!(reply.status == 200, "{reply:?}");
    let text = String::from_utf8(reply.body)?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Checks that each line is there once, in the order of the input, with its own answer.
///
/// # Errors
/// What is wrong.
pub fn check(output: &[Value], lines: usize) -> Result<()> {
    let mut times: HashMap<&str, usize> = HashMap::new();
    for line in output {
        *times.entry(line["custom_id"].as_str().context("no custom_id")?).or_default() += 1;
    }
    let repeated = times.values().filter(|times| **times > 1).count();
    let lost = (0..lines).filter(|number| !times.contains_key(format!("line-{number}").as_str())).count();
    ensure!(lost == 0 && repeated == 0, "{lost} lines lost, {repeated} repeated of {lines}");
    for (number, line) in output.iter().enumerate() {
        let text = &line["response"]["body"]["choices"][0]["message"]["content"];
        ensure!(line["custom_id"] == format!("line-{number}"), "not in order: {line}");
        ensure!(*text == format!("answer {number}"), "not its own answer: {line}");
    }
    Ok(())
}

type Gateways = Arc<Mutex<Vec<Gateway>>>;

/// Runs a batch while things are killed, and checks what comes out.
///
/// # Errors
/// When a line is lost, repeated or wrong, or nothing progresses.
pub async fn run(bench: &mut Bench, plan: BulkPlan) -> Result<BulkReport> {
    let start = |bench: &Bench| Gateway::start(&bench.server, &OPTIONS);
    let gateways: Gateways = Arc::new(Mutex::new(vec![start(bench)?, start(bench)?]));
    let mut worker = ChatWorker::start(bench, "w0").await?;
    let content = input(plan.lines);
    let (id, began) = {
        let gateways = gateways.lock().expect("no writer panics");
        let file = upload(&gateways[0], &content)?;
        (create(&gateways[1], &file, "24h")?, Instant::now())
    };
    drop(content);
    let kills = plan.gateway_kills.max(plan.worker_kills).max(plan.broker_kills);
    let mut peak_bytes = 0;
    for kill in 0..kills {
        until_done(&gateways, &id, plan.lines * (kill + 1) / (kills + 1)).await?;
        if kill < plan.gateway_kills {
            // Whichever runs it: the one is killed, then the other.
            let (place, new) = (kill % 2, start(bench)?);
            let mut gateways = gateways.lock().expect("no writer panics");
            peak_bytes = peak_bytes.max(gateways[place].peak_bytes()?);
            gateways[place].kill()?;
            gateways[place] = new;
        }
        if kill < plan.worker_kills {
            let next = ChatWorker::start(bench, &format!("w{}", kill + 1)).await?;
            std::mem::replace(&mut worker, next).kill();
        }
        if kill < plan.broker_kills {
            bench.server.kill()?;
            bench.server.restart()?;
        }
    }
    let (done, id) = (gateways.clone(), id.clone());
    let batch = tokio::task::spawn_blocking(move || -> Result<Value> {
        let gateways = done.lock().expect("no writer panics");
        ended(&gateways[0], &id)
    });
    let batch = batch.await??;
    let seconds = began.elapsed().as_secs_f64();
    let expected = json!({"total": plan.lines, "completed": plan.lines, "failed": 0});
    ensure!(batch["status"] == "completed" && batch["request_counts"] == expected, "{batch}");
    ensure!(batch["error_file_id"].is_null(), "{batch}");
    let gateways = gateways.lock().expect("no writer panics");
    check(&lines(&gateways[1], &batch["output_file_id"])?, plan.lines)?;
    for gateway in gateways.iter() {
        peak_bytes = peak_bytes.max(gateway.peak_bytes()?);
    }
    Ok(BulkReport { lines: plan.lines, seconds, peak_bytes })
}

/// Waits until so many lines have results.
async fn until_done(gateways: &Gateways, id: &str, lines: usize) -> Result<()> {
    let began = Instant::now();
    loop {
        // While the broker is away a gateway says so.
        let batch =
            gateways.lock().expect("no writer panics")[0].get(&format!("/v1/batches/{id}"))?.json()?;
        if batch["request_counts"]["completed"].as_u64().is_some_and(|done| done >= lines as u64) {
            return Ok(());
        }
        ensure!(began.elapsed() < STALL, "{lines} lines are not reached: {batch}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Lines a second that the broker takes: from an async publisher, and of the same lines from a gateway that runs a
/// batch of them. Nobody works on them meanwhile.
///
/// # Errors
/// When they are not taken.
pub async fn rates(bench: &Bench, lines: usize) -> Result<(f64, f64)> {
    let other = ModelRef::new("default", "beside")?;
    provision(&bench.context, &other, &bench.queue, &bench.results, Mode::Create).await?;
    let subject = other.jobs_subject(Class::Low);
    let began = Instant::now();
    let publish = |number: usize| {
        let mut headers = HeaderMap::new();
        headers.insert(header::JOB_ID, format!("bulk-{number}").as_str());
        let sent =
            bench.context.publish_with_headers(subject.clone(), headers, body(number).to_string().into());
        async move { Ok::<_, anyhow::Error>(sent.await?.await?) }
    };
    let mut acks = futures::stream::iter(0..lines).map(publish).buffer_unordered(OUTSTANDING);
    while let Some(ack) = acks.next().await {
        ack?;
    }
    let directly = lines as f64 / began.elapsed().as_secs_f64();
    let gateway = Gateway::start(&bench.server, &OPTIONS)?;
    let id = create(&gateway, &upload(&gateway, &input(lines))?, "24h")?;
    let published = || gateway.metric("millrace_gateway_jobs_published_total");
    while look(&gateway, &id)?["status"] != "in_progress" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (before, began) = (published()?, Instant::now());
    while published()? < lines as f64 {
        ensure!(began.elapsed() < STALL, "{} of {lines} lines are published", published()?);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok((directly, (lines as f64 - before) / began.elapsed().as_secs_f64()))
}

/// The figures of both, with their bars.
pub fn figures(report: BulkReport, (directly, batch): (f64, f64)) -> Vec<Figure> {
    let rate = report.lines as f64 / report.seconds;
    let mib = report.peak_bytes as f64 / f64::from(1 << 20);
    vec![
        Figure::new("lines of a batch, each out once while things are killed", report.lines as f64, "lines"),
        Figure::new("from a batch's making to its files, kills included", rate, "lines/s"),
        Figure::new("memory of a gateway that runs it, at most", mib, "MiB").most(100.0),
        Figure::new("the broker takes from an async publisher", directly, "lines/s"),
        Figure::new("the broker takes of a batch, share of that", batch / directly, "x").least(0.8),
    ]
}
