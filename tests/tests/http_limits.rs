//! How much a key and a tenant may, over three gateways and a real broker; and what answers a request again.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millrace_crds::config::{QueueConfig, ResultsConfig};
use millrace_crds::names::ModelRef;
use millrace_queue::provision::{Mode, provision};
use millrace_tests::chat::ChatWorker;
use millrace_tests::gateway::{Gateway, HttpReply};
use millrace_tests::scripted::{Bench, PATIENCE};
use millrace_tests::tools;
use serde_json::{Value, json};

const CHATS: &str = "/v1/chat/completions";

/// A broker, a worker and gateways that ask for keys.
struct Doors {
    bench: Bench,
    worker: ChatWorker,
    gateways: Vec<Arc<Gateway>>,
}

impl Doors {
    async fn open(count: usize, options: &[&str]) -> Result<Option<Self>> {
        let Some(bench) = Bench::start().await? else { return Ok(None) };
        let worker = ChatWorker::start(&bench, "w").await?;
        let mut gateways = Vec::new();
        for _ in 0..count {
            let mut gateway = Gateway::launch(&bench.server.url(), options)?;
            gateway.wait_ready()?;
            gateways.push(Arc::new(gateway));
        }
        Ok(Some(Self { bench, worker, gateways }))
    }

    fn millrace(&self, words: &[&str]) -> Result<Value> {
        let mut command = Command::new(tools::program("millrace")?);
        let output = command.args(["--json", "--server", &self.bench.server.url()]).args(words).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "{words:?}: {text} {}", String::from_utf8_lossy(&output.stderr));
        Ok(Value::Array(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?))
    }

    /// Id and key of a new one.
    fn key(&self, words: &[&str]) -> Result<(String, String)> {
        let made = self.millrace(&[&["key", "create"], words].concat())?;
        let text = |name: &str| made[0][name].as_str().map(str::to_owned).with_context(|| made.to_string());
        Ok((text("id")?, text("key")?))
    }
}

fn chat(script: &str) -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": script}]})
}

fn ask(gateway: &Gateway, key: &str, body: &Value, headers: &[(&str, &str)]) -> Result<HttpReply> {
    let bearer = format!("Bearer {key}");
    let headers = [&[("authorization", bearer.as_str())], headers].concat();
    gateway.ask("POST", CHATS, &headers, &body.to_string())?.whole()
}

/// Off the runtime's threads, which the worker needs.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

fn number(reply: &HttpReply, name: &str) -> Result<u64> {
    let text = reply.header(name);
    text.strip_suffix('s').unwrap_or(text).parse().with_context(|| format!("{name}: {text:?}"))
}

fn check_refusal(reply: &HttpReply) -> Result<()> {
    ensure!(reply.error()? == (429, "rate_limit_exceeded".into(), None), "{reply:?}");
    ensure!((1..=60).contains(&number(reply, "retry-after")?), "{reply:?}");
    ensure!(reply.header("x-should-retry") == "true", "{reply:?}");
    Ok(())
}

/// Each of a few clients a gateway asks as fast as it can.
#[tokio::test(flavor = "multi_thread")]
async fn three_gateways_have_one_limit() -> Result<()> {
    const LIMIT: u64 = 300;
    let Some(doors) = Doors::open(3, &["--tenant-limit", "requests=300/min"]).await? else { return Ok(()) };
    blocking(move || {
        let (_, key) = doors.key(&["--tenant", "team-a"])?;
        let (_, other) = doors.key(&["--tenant", "team-b"])?;
        let (began, mut clients) = (Instant::now(), Vec::new());
        for gateway in doors.gateways.iter().chain(&doors.gateways) {
            let (gateway, key) = (gateway.clone(), key.clone());
            clients.push(std::thread::spawn(move || -> Result<(u64, u64)> {
                let (mut answered, mut refused) = (0, 0);
                for _ in 0..150 {
                    let reply = ask(&gateway, &key, &chat("say x"), &[])?;
                    match reply.status {
                        200 => answered += 1,
                        _ => {
                            check_refusal(&reply)?;
                            refused += 1;
                        }
                    }
                    ensure!(number(&reply, "x-ratelimit-limit-requests")? == LIMIT, "{reply:?}");
                    ensure!(number(&reply, "x-ratelimit-remaining-requests")? < LIMIT, "{reply:?}");
                    ensure!(number(&reply, "x-ratelimit-reset-requests")? <= 61, "{reply:?}");
                }
                Ok((answered, refused))
            }));
        }
        let mut total = (0, 0);
        for client in clients {
            let (answered, refused) = client.join().expect("no client panics")?;
            total = (total.0 + answered, total.1 + refused);
        }
        let took = began.elapsed();
        ensure!(took < Duration::from_secs(55), "900 requests took {took:?}: this is no minute any more");
        ensure!(total.0 <= LIMIT && total.0 * 100 >= LIMIT * 98, "{total:?}");
        ensure!(total.1 == 900 - total.0, "{total:?}");
        ensure!(ask(&doors.gateways[0], &other, &chat("say x"), &[])?.status == 200, "another tenant");
        let counted: f64 =
            doors.gateways.iter().map(|g| g.metric("millrace_gateway_limited_total")).sum::<Result<f64>>()?;
        ensure!(counted as u64 == total.1, "{counted} counted");
        println!("{} of {LIMIT} let in by three gateways, {} refused, in {took:?}", total.0, total.1);
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_count_as_what_they_came_to_and_places_are_given_back() -> Result<()> {
    let Some(doors) = Doors::open(2, &[]).await? else { return Ok(()) };
    blocking(move || {
        let (here, there) = (&doors.gateways[0], &doors.gateways[1]);
        // Each asks for up to 60 tokens and gets 2.
        let (_, key) = doors.key(&["--tenant", "a", "--key-limit", "output-tokens=100/min"])?;
        let mut body = chat("say one two");
        body["max_tokens"] = json!(60);
        for turn in 0..6 {
            let gateway = if turn % 2 == 0 { here } else { there };
            let reply = ask(gateway, &key, &body, &[])?;
            ensure!(reply.status == 200, "{turn}: {reply:?}");
            ensure!(number(&reply, "x-ratelimit-limit-tokens")? == 100, "{reply:?}");
            // What a request came to is told within a tenth of a second.
            std::thread::sleep(Duration::from_millis(300));
        }
        let last = ask(here, &key, &body, &[])?;
        ensure!(number(&last, "x-ratelimit-remaining-output-tokens")? == 100 - 6 * 2 - 60, "{last:?}");

        let (id, key) = doors.key(&["--tenant", "b", "--tenant-limit", "concurrent=2"])?;
        let hanging = |gateway: &Gateway| {
            let (bearer, mut body) = (format!("Bearer {key}"), chat("hang"));
            body["stream"] = json!(true);
            gateway.ask("POST", CHATS, &[("authorization", bearer.as_str())], &body.to_string())
        };
        let running = [hanging(here)?, hanging(there)?];
        ensure!(running.iter().all(|answer| answer.status == 200), "{running:?}");
        check_refusal(&ask(there, &key, &chat("say x"), &[])?)?;
        drop(running);
        let began = Instant::now();
        while ask(here, &key, &chat("say x"), &[])?.status != 200 {
            ensure!(began.elapsed() < PATIENCE, "the places are not given back");
            std::thread::sleep(Duration::from_millis(50));
        }
        // Limits can be changed while the key is used, and the other limits stay.
        doors.millrace(&["key", "limit", &id, "--key-limit", "requests=1/min"])?;
        while ask(here, &key, &chat("say x"), &[])?.status != 429 {
            ensure!(began.elapsed() < PATIENCE * 2, "the new limit is not in force");
        }
        let listed = doors.millrace(&["key", "list"])?;
        let own = listed.as_array().and_then(|keys| keys.iter().find(|key| key["id"] == id.as_str()));
        let limits = own.map(|own| (own["limits"].clone(), own["tenant_limits"].clone()));
        ensure!(limits == Some((json!({"requests": 1}), json!({"concurrent": 2}))), "{limits:?}");
        Ok(())
    })
    .await
}

/// A worker's word of which files it has.
async fn report(bench: &Bench, digest: &str) -> Result<()> {
    let report = json!({"worker": "w", "phase": "ready", "modelDigest": digest});
    bench.client.publish("millrace.load.default.m.w", report.to_string().into()).await?;
    bench.client.flush().await?;
    // It is heard in no time, and there is nothing else to see it by.
    tokio::time::sleep(Duration::from_millis(200)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deterministic_request_is_answered_by_the_stored_outcome() -> Result<()> {
    let Some(doors) = Doors::open(2, &["--cache", "always"]).await? else { return Ok(()) };
    let doors = Arc::new(doors);
    let (_, key) = doors.key(&["--tenant", "a"])?;
    let (_, other) = doors.key(&["--tenant", "b"])?;
    let (_, never) = doors.key(&["--tenant", "a", "--cache", "never"])?;
    let mut body = chat("say hello world");
    body["temperature"] = json!(0);
    let send = async |gateway: usize, key: &str, body: &Value, cache: &'static [(&str, &str)]| {
        let (gateway, key, body) = (doors.gateways[gateway].clone(), key.to_owned(), body.clone());
        blocking(move || ask(&gateway, &key, &body, cache)).await
    };
    let begun = || doors.worker.chats.begun.load(Ordering::SeqCst);
    // Before a worker has said which files it has, nothing is looked for.
    let unknown = send(0, &key, &body, &[]).await?;
    assert_eq!((unknown.status, unknown.header("millrace-cache")), (200, ""));
    report(&doors.bench, "sha256:0").await?;
    let first = send(0, &key, &body, &[]).await?;
    assert_eq!((first.status, first.header("millrace-cache"), begun()), (200, "miss", 2));
    tokio::time::sleep(Duration::from_millis(300)).await;
    report(&doors.bench, "sha256:0").await?;
    let second = send(1, &key, &body, &[]).await?;
    assert_eq!((second.status, second.header("millrace-cache"), begun()), (200, "hit", 2));
    assert_eq!(second.body, first.body, "the stored bytes");
    assert_eq!(second.header("millrace-cached-job"), first.header("x-request-id"));
    assert_ne!(second.header("x-request-id"), first.header("x-request-id"));
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let stream = send(0, &key, &streamed, &[]).await?;
    assert_eq!((stream.header("millrace-cache"), stream.spelled(0)?), ("hit", "hello world".into()));
    assert_eq!(begun(), 2);
    let hits = doors.gateways.iter().map(|g| g.metric("millrace_gateway_cache_hits_total"));
    assert_eq!(hits.sum::<Result<f64>>()?, 2.0);
    // Neither another tenant, nor who does not want it, nor what is not deterministic, nor other files.
    assert_eq!(send(0, &other, &body, &[]).await?.header("millrace-cache"), "miss");
    assert_eq!(send(0, &never, &body, &[]).await?.header("millrace-cache"), "");
    assert_eq!(send(0, &key, &body, &[("millrace-cache", "off")]).await?.header("millrace-cache"), "");
    assert_eq!(send(0, &key, &chat("say hello world"), &[]).await?.header("millrace-cache"), "");
    report(&doors.bench, "sha256:1").await?;
    assert_eq!(send(0, &key, &body, &[]).await?.header("millrace-cache"), "miss");
    assert_eq!(begun(), 7);
    let wrong = send(0, &key, &body, &[("millrace-cache", "maybe")]).await?;
    assert_eq!(wrong.error()?, (400, "invalid_parameter".into(), Some("millrace-cache".into())));
    Ok(())
}

/// The broker takes 20 jobs, and nobody works.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_urgent_is_refused_before_the_queue_is_full() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let small = ModelRef::new("default", "small")?;
    let queue = QueueConfig { max_jobs: 20, ..bench.queue.clone() };
    provision(&bench.context, &small, &queue, &ResultsConfig::default(), Mode::Create).await?;
    let gateway = Gateway::start(&bench.server, &[])?;
    blocking(move || {
        let body = json!({"model": "small", "prompt": "x"}).to_string();
        let submit =
            |class: &str| gateway.ask("POST", "/v1/jobs", &[("millrace-class", class)], &body)?.whole();
        for job in 0..17 {
            ensure!(submit("normal")?.status == 202, "{job}");
        }
        let began = Instant::now();
        let refused = loop {
            let reply = submit("low")?;
            if reply.status != 202 {
                break reply;
            }
            ensure!(began.elapsed() < PATIENCE, "18 of 20 jobs are not seen");
            // Each request but the first of a second is measured by the look that another one began.
            std::thread::sleep(Duration::from_millis(1100));
        };
        ensure!(refused.error()?.1 == "queue_full" && refused.header("retry-after") == "10", "{refused:?}");
        ensure!(refused.json()?.to_string().contains("class low are taken below 90 %"), "{refused:?}");
        ensure!(submit("high")?.status == 202, "there is room for what is urgent");
        Ok(())
    })
    .await
}

/// How long each of `count` requests of one client took, one after another, in milliseconds.
fn waits(gateway: &Gateway, key: &str, count: usize) -> Result<Vec<f64>> {
    let mut waits = Vec::new();
    for _ in 0..count {
        let began = Instant::now();
        let reply = ask(gateway, key, &chat("slow a b c d"), &[])?;
        ensure!(reply.status == 200, "{reply:?}");
        waits.push(began.elapsed().as_secs_f64() * 1e3);
    }
    waits.sort_by(f64::total_cmp);
    Ok(waits)
}

/// A tenant with ten times the clients that the workers have places, beside one that asks for little.
#[tokio::test(flavor = "multi_thread")]
async fn a_greedy_tenant_costs_a_modest_one_little() -> Result<()> {
    let Some(doors) = Doors::open(2, &[]).await? else { return Ok(()) };
    blocking(move || {
        let (_, modest) = doors.key(&["--tenant", "modest"])?;
        let (_, greedy) = doors.key(&["--tenant", "greedy"])?;
        let alone = waits(&doors.gateways[0], &modest, 40)?;
        let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let clients: Vec<_> = (0..640)
            .map(|client| {
                let (gateway, key, over) = (doors.gateways[client % 2].clone(), greedy.clone(), over.clone());
                std::thread::spawn(move || -> BTreeMap<u16, u64> {
                    let mut seen = BTreeMap::new();
                    while !over.load(Ordering::Relaxed) {
                        let status =
                            ask(&gateway, &key, &chat("slow a b c d"), &[]).map_or(0, |reply| reply.status);
                        *seen.entry(status).or_default() += 1;
                    }
                    seen
                })
            })
            .collect();
        std::thread::sleep(Duration::from_secs(5));
        let beside = waits(&doors.gateways[0], &modest, 40)?;
        over.store(true, Ordering::Relaxed);
        let mut seen: BTreeMap<u16, u64> = BTreeMap::new();
        for client in clients {
            for (status, count) in client.join().expect("no client panics") {
                *seen.entry(status).or_default() += count;
            }
        }
        let p = |waits: &[f64], part: usize| waits[waits.len() * part / 100];
        println!(
            "alone {:.0} and {:.0} ms, beside {:.0} and {:.0} ms (p50, p99); the greedy one: {seen:?}",
            p(&alone, 50),
            p(&alone, 97),
            p(&beside, 50),
            p(&beside, 97)
        );
        ensure!(seen.get(&200).copied().unwrap_or(0) > 640, "{seen:?}");
        // What else the machine does is worth some milliseconds.
        ensure!(p(&beside, 97) <= 1.2 * p(&alone, 97) + 20.0, "{alone:?} {beside:?}");
        Ok(())
    })
    .await
}
