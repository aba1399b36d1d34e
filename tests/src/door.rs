//! What the front door costs: answers over HTTP beside the same jobs published and awaited directly, and streams in
//! which nothing happens. The worker is scripted, so that neither side waits for an engine.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::HeaderMap;
use futures::StreamExt;
use millrace_crds::job::header;
use millrace_crds::names::Class;
use serde_json::json;

use crate::chat::ChatWorker;
use crate::figures::Figure;
use crate::gateway::Gateway;
use crate::overhead::percentile;
use crate::scripted::Bench;

/// Requests at once when as many as possible are measured.
const AT_ONCE: usize = 32;
/// No answer takes longer, unless something hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// Streams that are held.
const STREAMS: usize = 2000;
/// How long they are looked at.
const IDLE_TIME: Duration = Duration::from_secs(20);
const MIB: f64 = 1048576.0;

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub struct DoorCost {
    /// Milliseconds that HTTP adds to a job of one token, one at a time: median and 99th percentile.
    pub added_ms: (f64, f64),
    /// Jobs a second over HTTP, and directly.
    pub jobs_per_s: (f64, f64),
    /// MiB of memory that a gateway has with [`STREAMS`] idle streams.
    pub idle_mib: f64,
    /// Per cent of a core that it uses then.
    pub idle_core: f64,
}

impl DoorCost {
    /// The figures of a release build, with their bars.
    pub fn figures(&self) -> Vec<Figure> {
        let share = self.jobs_per_s.0 / self.jobs_per_s.1;
        vec![
            Figure::new("HTTP over the queue alone, p50", self.added_ms.0, "ms").most(1.5),
            Figure::new("HTTP over the queue alone, p99", self.added_ms.1, "ms").most(5.0),
            Figure::new("jobs of one token over HTTP", self.jobs_per_s.0, "jobs/s"),
            Figure::new("jobs of one token over HTTP over those of the queue alone", share, "x").least(0.7),
            Figure::new("gateway with 2,000 idle streams, memory", self.idle_mib, "MiB").most(120.0),
            Figure::new("gateway with 2,000 idle streams, of a core", self.idle_core, "%").most(40.0),
        ]
    }
}

/// A connection over which one request follows another.
struct Client {
    socket: BufReader<TcpStream>,
}

impl Client {
    fn connect(address: SocketAddr) -> Result<Self> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(LIMIT))?;
        Ok(Self { socket: BufReader::new(socket) })
    }

    fn send(&mut self, body: &str) -> Result<()> {
        let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
        let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
        Ok(self.socket.get_mut().write_all(request.as_bytes())?)
    }

    /// The length of the body that follows.
    fn head(&mut self) -> Result<Option<usize>> {
        let (mut length, mut line) = (None, String::new());
        self.socket.read_line(&mut line)?;
        ensure!(line.starts_with("HTTP/1.1 200"), "{line:?}");
        loop {
            line.clear();
            self.socket.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { return Ok(length) };
            if name.eq_ignore_ascii_case("content-length") {
                length = Some(value.parse()?);
            }
        }
    }

    fn ask(&mut self, body: &str) -> Result<()> {
        self.send(body)?;
        let mut answer = vec![0; self.head()?.context("no length")?];
        Ok(self.socket.read_exact(&mut answer)?)
    }
}

fn body(script: &str, stream: bool) -> String {
    json!({"model": "m", "messages": [{"role": "user", "content": script}], "stream": stream}).to_string()
}

/// Publishes one job and awaits the copy of its outcome, as the gateway does.
async fn direct(bench: &Bench, id: &str, inbox: &str, heard: &mut async_nats::Subscriber) -> Result<()> {
    let mut headers = HeaderMap::new();
    headers.insert(header::JOB_ID, id);
    headers.insert(header::REPLY_SUBJECT, inbox);
    let subject = bench.model.jobs_subject(Class::Normal);
    bench.context.publish_with_headers(subject, headers, body("say x", false).into()).await?.await?;
    tokio::time::timeout(LIMIT, heard.next()).await.context("no outcome")?.context("closed")?;
    Ok(())
}

/// One client of the queue: milliseconds of each job.
async fn direct_client(bench: Arc<Bench>, name: String, count: usize) -> Result<Vec<f64>> {
    let client = bench.server.connect().await?;
    let inbox = client.new_inbox();
    let mut heard = client.subscribe(inbox.clone()).await?;
    client.flush().await?;
    let mut times = Vec::with_capacity(count);
    for job in 0..count {
        let began = Instant::now();
        direct(&bench, &format!("{name}-{job}"), &inbox, &mut heard).await?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(times)
}

/// One client of the gateway: milliseconds of each request.
fn http_client(address: SocketAddr, count: usize) -> Result<Vec<f64>> {
    let (mut client, body) = (Client::connect(address)?, body("say x", false));
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        client.ask(&body)?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(times)
}

/// Jobs a second of [`AT_ONCE`] clients of the queue.
async fn direct_rate(bench: &Arc<Bench>, name: &str, each: usize) -> Result<f64> {
    let began = Instant::now();
    let client = |i: usize| tokio::spawn(direct_client(bench.clone(), format!("{name}-{i}"), each));
    for client in (0..AT_ONCE).map(client).collect::<Vec<_>>() {
        client.await??;
    }
    Ok((AT_ONCE * each) as f64 / began.elapsed().as_secs_f64())
}

async fn http_rate(address: SocketAddr, each: usize) -> Result<f64> {
    let began = Instant::now();
    let client = |_| tokio::task::spawn_blocking(move || http_client(address, each));
    for client in (0..AT_ONCE).map(client).collect::<Vec<_>>() {
        client.await??;
    }
    Ok((AT_ONCE * each) as f64 / began.elapsed().as_secs_f64())
}

/// Memory in MiB and per cent of a core of a gateway whose streams are idle.
fn idle(gateway: &Gateway) -> Result<(f64, f64)> {
    let mut clients = Vec::with_capacity(STREAMS);
    for _ in 0..STREAMS {
        let mut client = Client::connect(gateway.address())?;
        client.send(&body("hang", true))?;
        clients.push(client);
    }
    for client in &mut clients {
        client.head()?;
    }
    let (began, used) = (Instant::now(), gateway.processor_s()?);
    std::thread::sleep(IDLE_TIME);
    let used = gateway.processor_s()? - used;
    let core = 100.0 * used / began.elapsed().as_secs_f64();
    let memory = gateway.resident_bytes()? as f64 / MIB;
    for client in &mut clients {
        let mut ping = String::new();
        client.socket.read_line(&mut ping)?;
        ensure!(!ping.is_empty(), "a stream ended");
    }
    Ok((memory, core))
}

/// Measures `single` jobs one at a time, `each` of [`AT_ONCE`] clients at once, and [`STREAMS`] idle streams; `None`
/// where there is no broker. Both sides take turns, so that what else the machine does meets both.
///
/// # Errors
/// When an answer does not come within a minute.
pub async fn measure(single: usize, each: usize) -> Result<Option<DoorCost>> {
    let Some(bench) = Bench::start().await?.map(Arc::new) else { return Ok(None) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let gateway = Arc::new(Gateway::start(&bench.server, &[])?);
    let address = gateway.address();
    let over_http = |count| tokio::task::spawn_blocking(move || http_client(address, count));
    direct_client(bench.clone(), "warm".into(), 50).await?;
    over_http(50).await??;
    let (mut queue, mut http) = (Vec::new(), Vec::new());
    for turn in 0..4 {
        queue.extend(direct_client(bench.clone(), format!("single-{turn}"), single / 4).await?);
        http.extend(over_http(single / 4).await??);
    }
    queue.sort_by(f64::total_cmp);
    http.sort_by(f64::total_cmp);
    let added = |part| percentile(&http, part) - percentile(&queue, part);
    let mut rates = (0.0, 0.0);
    for turn in 0..2 {
        rates.1 += direct_rate(&bench, &format!("many-{turn}"), each / 2).await? / 2.0;
        rates.0 += http_rate(address, each / 2).await? / 2.0;
    }
    let (idle_mib, idle_core) = tokio::task::spawn_blocking(move || idle(&gateway)).await??;
    Ok(Some(DoorCost { added_ms: (added(50), added(99)), jobs_per_s: rates, idle_mib, idle_core }))
}
