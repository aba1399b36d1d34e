//! The `millrace` program against a real broker, with a worker that answers from a script.
//!
//! What holds here: a job is paid for once however often it is submitted, outcomes come back in input order,
//! a full queue is waited for and never dropped into, and each exit code means what `--help` says.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::{self, Message};
use async_nats::{Client, HeaderMap};
use futures::StreamExt;
use millrace_crds::job::header;
use millrace_crds::names::{Class, JobId, ModelRef, SubjectToken};
use millrace_crds::result::OutputReference;
use millrace_crds::tokens::TokenDelta;
use millrace_queue::store::{S3Uri, Store};
use millrace_tests::nats::{self, NatsServer};
use millrace_tests::s3::S3;
use millrace_tests::tools;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// A broker, a folder and the program.
struct Scene {
    server: NatsServer,
    folder: TempDir,
    model: ModelRef,
}

impl Scene {
    /// `None` without the tools.
    fn new() -> Result<Option<Self>> {
        if !tools::have(&[nats::PROGRAM]) {
            return Ok(None);
        }
        let model = ModelRef::new("default", "m")?;
        Ok(Some(Self { server: NatsServer::start()?, folder: TempDir::new()?, model }))
    }

    fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(tools::program("millrace")?);
        command.args(words).current_dir(self.folder.path()).stdin(Stdio::null());
        for name in ["NATS_CREDS", "NATS_CA", "MILLRACE_NAMESPACE", "MILLRACE_INBOX_PREFIX"] {
            command.env_remove(name);
        }
        command.env("NATS_URL", self.server.url()).env("MILLRACE_MODEL", "m");
        Ok(command)
    }

    /// Runs the program off the runtime's thread, so that the script can answer meanwhile.
    async fn run(&self, words: &[&str]) -> Result<Output> {
        let mut command = self.command(words)?;
        Ok(tokio::task::spawn_blocking(move || command.output()).await??)
    }

    /// Runs it, demands an exit code, and gives standard output.
    async fn ends(&self, code: i32, words: &[&str]) -> Result<String> {
        let output = self.run(words).await?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(code), "{words:?}: {}, not {code}: {told}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The last line of standard output as JSON.
    async fn json(&self, code: i32, words: &[&str]) -> Result<Value> {
        let text = self.ends(code, words).await?;
        let last = text.lines().last().with_context(|| format!("{words:?} printed nothing"))?;
        serde_json::from_str(last).with_context(|| format!("{words:?}: {last}"))
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        Ok(std::fs::write(self.folder.path().join(name), text)?)
    }

    fn read(&self, name: &str) -> Result<String> {
        Ok(std::fs::read_to_string(self.folder.path().join(name))?)
    }

    async fn worker(&self, reversed: bool) -> Result<tokio::task::JoinHandle<()>> {
        self.worker_with(reversed, None).await
    }

    async fn worker_with(&self, reversed: bool, s3: Option<&S3>) -> Result<tokio::task::JoinHandle<()>> {
        let client = self.server.connect().await?;
        let store = match s3 {
            Some(s3) => Some(Store::connect(&s3.store_config()).await?),
            None => None,
        };
        let script = Script { client, model: self.model.clone(), reversed, store };
        Ok(tokio::spawn(async move { script.run().await.expect("the script runs") }))
    }

    async fn jobs_stored(&self) -> Result<(u64, u64)> {
        let context = jetstream::new(self.server.connect().await?);
        let state = context.get_stream(self.model.jobs_stream()).await?.cached_info().state.clone();
        Ok((state.messages, state.last_sequence))
    }
}

/// Answers jobs as their prompt says: `dead ...` and `reject ...` end so, anything else is echoed.
struct Script {
    client: Client,
    model: ModelRef,
    reversed: bool,
    store: Option<Store>,
}

impl Script {
    async fn run(&self) -> Result<()> {
        let context = jetstream::new(self.client.clone());
        let stream = context.get_stream(self.model.jobs_stream()).await?;
        let consumer: PullConsumer = match stream.get_consumer(&self.model.consumer(Class::Normal)).await {
            Ok(consumer) => consumer,
            Err(error) => anyhow::bail!("{error}"),
        };
        loop {
            let mut jobs = Vec::new();
            let mut batch = consumer.fetch().max_messages(100).messages().await?;
            while let Some(Ok(job)) = batch.next().await {
                jobs.push(job);
            }
            if self.reversed {
                jobs.reverse();
            }
            for job in jobs {
                self.answer(&context, job).await?;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn answer(&self, context: &jetstream::Context, job: Message) -> Result<()> {
        let text = |name: &str| job.headers.as_ref()?.get(name).map(|value| value.as_str().to_owned());
        let id: JobId = text(header::JOB_ID).context("a job without an id")?.parse()?;
        let jsonl = text(header::CONTENT_TYPE).as_deref() == Some("application/jsonl");
        let input: Option<S3Uri> = text(header::INPUT).map(|uri| uri.parse()).transpose()?;
        let payload = match (&self.store, &input) {
            (Some(store), Some(uri)) => store.get(uri, 16 << 20).await?,
            _ => job.payload.clone(),
        };
        let lines: Vec<Value> = payload
            .split(|&b| b == b'\n')
            .filter(|line| !line.is_empty())
            .map(serde_json::from_slice)
            .collect::<Result<_, _>>()?;
        let prompt = |line: &Value| match jsonl {
            true => line["body"]["prompt"].as_str().unwrap_or_default().to_owned(),
            false => line["prompt"].as_str().unwrap_or_default().to_owned(),
        };
        let kind = match prompt(&lines[0]).split(' ').next() {
            Some("dead") => "dead",
            Some("reject") => "rejected",
            _ => "completed",
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::OUTCOME, kind);
        headers.insert(header::QUEUE_WAIT_MS, "5.5");
        headers.insert("Nats-Expected-Last-Subject-Sequence", "0");
        if text(header::STREAM).is_some() {
            self.stream(&id, &prompt(&lines[0])).await?;
        }
        let answered = lines.iter().enumerate().map(|(index, line)| {
            let custom_id = line["custom_id"].as_str().unwrap_or(id.as_str());
            let line_id = if jsonl { format!("{id}-{index}") } else { id.to_string() };
            let (response, error) = match kind {
                "completed" => (reply(&line_id, &prompt(line)), Value::Null),
                _ => (Value::Null, json!({"code": "INVALID_REQUEST", "message": "as asked"})),
            };
            json!({"id": line_id, "custom_id": custom_id, "response": response, "error": error}).to_string()
        });
        let mut body = answered.collect::<Vec<_>>().join("\n");
        if let (Some(store), Some(uri)) = (&self.store, &input) {
            // What came by reference is answered by reference.
            let output = uri.join("out");
            let sha256 = hex::encode(Sha256::digest(&body));
            let reference = OutputReference { output: output.to_string(), bytes: body.len() as u64, sha256 };
            store.put(&output, body.into()).await?;
            body = serde_json::to_string(&reference)?;
        }
        // A lost race is another copy of the same answer.
        let ack = context.publish_with_headers(self.model.result_subject(&id), headers, body.into()).await?;
        let _ = ack.await;
        if kind == "dead" {
            let mut headers = HeaderMap::new();
            headers.insert(header::REASON, "as asked");
            headers.insert(header::CLASS, "normal");
            headers.insert(header::ATTEMPT, "5");
            headers.insert(header::CONTENT_TYPE, "application/json");
            let subject = self.model.dead_subject(&id);
            context.publish_with_headers(subject, headers, job.payload.clone()).await?.await?;
        }
        job.ack().await.map_err(|e| anyhow::anyhow!("{e}"))
    }

    async fn stream(&self, id: &JobId, prompt: &str) -> Result<()> {
        for (number, word) in format!("echo {prompt}").split_inclusive(' ').enumerate() {
            let number = number as u64;
            let delta = TokenDelta { number, request: 0, choice: 0, text: word.into(), finish_reason: None };
            let payload = serde_json::to_vec(&delta)?.into();
            self.client.publish(self.model.tokens_subject(id), payload).await?;
        }
        Ok(())
    }
}

fn reply(id: &str, prompt: &str) -> Value {
    json!({"status_code": 200, "request_id": id, "body": {
        "choices": [{"index": 0, "text": format!("echo {prompt}")}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }})
}

fn batch(count: usize) -> String {
    let line = |i| {
        json!({"custom_id": format!("c{i}"), "method": "POST", "url": "/v1/completions",
            "body": {"prompt": format!("p{i}")}})
    };
    (0..count).map(|i| line(i).to_string() + "\n").collect()
}

fn custom_ids(text: &str) -> Vec<String> {
    let id = |line: &str| serde_json::from_str::<Value>(line).ok()?["custom_id"].as_str().map(str::to_owned);
    text.lines().filter_map(id).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_paid_for_once_and_lines_keep_their_order() -> Result<()> {
    let Some(mut scene) = Scene::new()? else { return Ok(()) };
    scene.write("in.jsonl", &batch(300))?;
    scene.ends(4, &["submit", "in.jsonl"]).await?;
    scene.ends(1, &["provision", "--check"]).await?;
    scene.ends(0, &["provision"]).await?;
    assert!(
        scene.ends(0, &["provision", "--check", "--json"]).await?.lines().all(|l| l.contains("\"same\""))
    );
    let worker = scene.worker(true).await?;
    let submit = ["submit", "in.jsonl", "--output", "out.jsonl", "--json"];
    let first = scene.json(0, &submit).await?;
    let counts =
        |v: &Value| ["accepted", "published", "completed", "done_before"].map(|n| v[n].as_u64().unwrap());
    assert_eq!(counts(&first), [300, 300, 300, 0]);
    assert_eq!(
        (first["output_tokens"].as_u64(), first["queue_wait_p99_ms"].as_f64()),
        (Some(600), Some(5.5))
    );
    let whole = scene.read("out.jsonl")?;
    assert_eq!(custom_ids(&whole), (0..300).map(|i| format!("c{i}")).collect::<Vec<_>>());

    // The same again, with nothing kept, and after the broker has forgotten its ids.
    std::fs::remove_file(scene.folder.path().join("out.jsonl"))?;
    scene.server.restart()?;
    let second = scene.json(0, &submit).await?;
    assert_eq!(counts(&second), [300, 0, 300, 300]);
    assert_eq!(scene.read("out.jsonl")?, whole);
    assert_eq!(scene.jobs_stored().await?.1, 300, "nothing was published twice");

    // A torn file, and one with a hole, are completed to the very same bytes.
    for cut in [whole.len() / 2, whole.len() - 1] {
        scene.write("out.jsonl", &whole[..cut])?;
        scene.ends(0, &["results", "in.jsonl", "--output", "out.jsonl"]).await?;
        assert_eq!(scene.read("out.jsonl")?, whole);
    }
    let holes: Vec<&str> =
        whole.split_inclusive('\n').enumerate().filter(|(i, _)| i % 3 > 0).map(|(_, l)| l).collect();
    scene.write("out.jsonl", &holes.concat())?;
    scene.ends(0, &["results", "in.jsonl", "--output", "out.jsonl"]).await?;
    assert_eq!(scene.read("out.jsonl")?, whole);
    worker.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packs_prompts_and_streams() -> Result<()> {
    let Some(scene) = Scene::new()? else { return Ok(()) };
    scene.ends(0, &["provision"]).await?;
    let worker = scene.worker(false).await?;
    scene.write("in.jsonl", &batch(10))?;
    let packed = scene.json(0, &["submit", "in.jsonl", "--pack", "4", "--output", "o", "--json"]).await?;
    assert_eq!((packed["jobs"].as_u64(), packed["output_tokens"].as_u64()), (Some(3), Some(20)));
    assert_eq!(custom_ids(&scene.read("o")?).len(), 10);
    assert_eq!(scene.ends(0, &["submit", "--prompt", "hi there", "--wait"]).await?, "echo hi there\n");
    assert_eq!(scene.ends(0, &["submit", "--prompt", "a b c", "--stream"]).await?, "echo a b c\n");
    assert_eq!(scene.ends(0, &["submit", "--prompt", "a b c", "--stream"]).await?, "echo a b c\n", "stored");
    let refused = scene.run(&["submit", "--prompt", "reject this", "--wait"]).await?;
    let told = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1));
    assert!(told.contains("error: INVALID_REQUEST: as asked") && told.contains("1 job: "), "{told}");
    let all = scene.ends(1, &["results"]).await?;
    assert_eq!(all.lines().count(), 13);
    worker.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_jobs_are_listed_and_published_again_under_a_new_id() -> Result<()> {
    let Some(scene) = Scene::new()? else { return Ok(()) };
    scene.ends(0, &["provision"]).await?;
    let worker = scene.worker(false).await?;
    let submit = ["submit", "--prompt", "dead x", "--id-from", "custom-id", "--wait", "--json"];
    assert_eq!(scene.json(1, &submit).await?["dead"], 1);
    let letter = scene.json(0, &["dead", "list", "--json"]).await?;
    assert_eq!((letter["job"].as_str(), letter["attempt"].as_u64()), (Some("prompt"), Some(5)));
    let shown: Value = serde_json::from_str(&scene.ends(0, &["dead", "show", "prompt"]).await?)?;
    assert_eq!(shown["body"]["prompt"], "dead x");
    scene.ends(2, &["dead", "show", "nobody"]).await?;
    let again = scene.json(0, &["dead", "requeue", "prompt", "--json"]).await?;
    assert_eq!(again["requeued_as"], "prompt-r1");
    scene.ends(1, &["results", "--job", "prompt-r1", "--wait-all", "--timeout", "20s"]).await?;
    let letter = scene.json(0, &["dead", "list", "--json"]).await?;
    assert_eq!(letter["job"], "prompt-r1", "the first letter is gone, the second one is there");
    scene.ends(0, &["dead", "requeue", "--all"]).await?;
    scene.ends(1, &["dead", "requeue", "prompt"]).await?;
    worker.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_is_waited_for() -> Result<()> {
    let Some(scene) = Scene::new()? else { return Ok(()) };
    scene.ends(0, &["provision", "--max-jobs", "20"]).await?;
    scene.write("in.jsonl", &batch(500))?;
    let stalled = scene.json(5, &["submit", "in.jsonl", "--timeout", "500ms", "--json"]).await?;
    assert_eq!(stalled["error"]["code"], "stalled");
    assert_eq!(scene.jobs_stored().await?.0, 20);
    let worker = scene.worker(false).await?;
    let summary = scene.json(0, &["submit", "in.jsonl", "--wait", "--timeout", "20s", "--json"]).await?;
    assert_eq!((summary["accepted"].as_u64(), summary["completed"].as_u64()), (Some(500), Some(500)));
    assert_eq!(scene.jobs_stored().await?, (0, 500));
    worker.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queue_and_cancelling() -> Result<()> {
    let Some(scene) = Scene::new()? else { return Ok(()) };
    scene.ends(0, &["provision"]).await?;
    scene.write("in.jsonl", &batch(3))?;
    scene.ends(0, &["submit", "in.jsonl", "--class", "high"]).await?;
    let picture = scene.json(0, &["queue", "--json"]).await?;
    let high = &picture["classes"][0];
    assert_eq!((high["class"].as_str(), high["pending"].as_u64()), (Some("high"), Some(3)));
    assert!(high["oldest_s"].as_f64().is_some() && picture["classes"][1]["oldest_s"].is_null());
    assert_eq!((picture["jobs"].as_u64(), picture["workers"].as_array().map(Vec::len)), (Some(3), Some(0)));
    assert_eq!(scene.ends(0, &["cancel", "--all-pending", "--json"]).await?.lines().count(), 3);
    let context = jetstream::new(scene.server.connect().await?);
    let results = context.get_stream(scene.model.results_stream()).await?;
    assert_eq!(results.cached_info().state.messages, 3, "three markers are stored");
    let worker = scene.worker(false).await?;
    scene.ends(0, &["submit", "--prompt", "x", "--id-from", "custom-id", "--wait"]).await?;
    let late = scene.json(1, &["cancel", "prompt", "--json"]).await?;
    assert_eq!(late, json!({"job": "prompt", "cancelled": false, "outcome": "completed"}));
    worker.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_finds_what_is_missing() -> Result<()> {
    let Some(scene) = Scene::new()? else { return Ok(()) };
    let monitor = scene.server.monitor_url();
    let sick = scene.ends(1, &["doctor", "--monitor", &monitor, "--json"]).await?;
    assert_eq!(sick.matches("\"grade\":\"fail\"").count(), 6, "{sick}");
    scene.ends(0, &["provision"]).await?;
    let _load = load_reports(&scene).await?;
    let text = scene.ends(0, &["doctor", "--monitor", &monitor]).await?;
    assert!(text.contains("ok    fsync policy: always"), "{text}");
    assert!(text.contains("ok    workers: 1 report, 1 ready"), "{text}");
    assert!(text.contains("ok    clock: 0."), "{text}");
    let drifted = scene.ends(1, &["doctor", "--monitor", &monitor, "--max-jobs", "7"]).await?;
    assert!(drifted.contains("max_msgs is 1000000, should be 7"), "{drifted}");
    Ok(())
}

async fn load_reports(scene: &Scene) -> Result<tokio::task::JoinHandle<()>> {
    let client = scene.server.connect().await?;
    let subject = scene.model.load_subject(&"w-1".parse::<SubjectToken>()?);
    let report = json!({"worker": "w-1", "phase": "ready", "uptimeS": 1.0, "kvBlocksUsed": 1,
        "kvBlocksTotal": 2, "sequencesRunning": 0, "sequencesWaiting": 0, "jobsHeld": 0,
        "promptTokensPerS": 0.0, "outputTokensPerS": 0.0, "jobsFinished": 0});
    Ok(tokio::spawn(async move {
        loop {
            let _ = client.publish(subject.clone(), report.to_string().into()).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_use_publishes_nothing_and_says_where() -> Result<()> {
    let Some(scene) = Scene::new()? else { return Ok(()) };
    scene.ends(0, &["provision"]).await?;
    scene.write("bad.jsonl", &format!("{}{{\"custom_id\":\"c0\",\"body\":{{\"prompt\":1}}}}\n", batch(2)))?;
    let output = scene.run(&["submit", "bad.jsonl"]).await?;
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(told.contains("bad.jsonl:3: custom_id \"c0\" stands at bad.jsonl:1 already"), "{told}");
    assert_eq!(scene.jobs_stored().await?, (0, 0));
    let cases: [(i32, &[&str]); 8] = [
        (2, &["submit"]),
        (2, &["submit", "--prompt", "x", "--deadline", "yesterday"]),
        (2, &["submit", "--prompt", "x", "--prompt", "y", "--stream"]),
        (2, &["queue", "-m", "a.b"]),
        (2, &["frobnicate"]),
        (2, &["results", "--wait-all"]),
        (7, &["submit", "absent.jsonl"]),
        (3, &["queue", "--server", "nats://127.0.0.1:1", "--connect-timeout", "2s"]),
    ];
    for (code, words) in cases {
        let began = Instant::now();
        scene.ends(code, words).await?;
        assert!(began.elapsed() < Duration::from_secs(5), "{words:?} took {:?}", began.elapsed());
    }
    let unreachable = scene.json(3, &["queue", "--server", "nats://me:pw@127.0.0.1:1", "--json"]).await?;
    let message = unreachable["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("nats://***@127.0.0.1:1") && !message.contains("pw"), "{message}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_come_from_standard_input() -> Result<()> {
    let Some(scene) = Scene::new()? else { return Ok(()) };
    scene.ends(0, &["provision"]).await?;
    let mut command = scene.command(&["submit", "-", "--format", "prompts", "--dry-run"])?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("a pipe")?.write_all(b"one\ntwo\n")?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    assert_eq!(text.lines().count(), 2);
    assert!(text.contains("\"custom_ids\":[\"stdin-2\"]"), "{text}");
    assert!(!Path::new("stdin").exists());
    Ok(())
}

/// A message that is no outcome, and an outcome whose body is gone, are named and counted; the others are collected.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_cannot_be_read_hides_no_other() -> Result<()> {
    let Some(scene) = Scene::new()? else { return Ok(()) };
    scene.ends(0, &["provision"]).await?;
    let _worker = scene.worker(false).await?;
    scene.ends(0, &["submit", "--prompt", "first", "--wait"]).await?;
    let context = jetstream::new(scene.server.connect().await?);
    let stray = scene.model.result_subject(&"stray".parse()?);
    context.publish(stray, "stray".into()).await?.await?;
    let mut map = HeaderMap::new();
    map.insert(header::OUTCOME, "completed");
    let gone = r#"{"output":"s3://nowhere/gone","bytes":3,"sha256":"00"}"#;
    let subject = scene.model.result_subject(&"gone".parse()?);
    context.publish_with_headers(subject, map, gone.into()).await?.await?;
    scene.ends(0, &["submit", "--prompt", "last", "--wait"]).await?;

    // Port 9 of this machine answers nobody: the store is away.
    let store = ["--s3-endpoint", "http://127.0.0.1:9", "--s3-region", "none"];
    let output = scene.run(&[&["results"], &store[..]].concat()).await?;
    let (lines, told) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    assert_eq!((output.status.code(), lines.lines().count()), (Some(1), 2), "{lines}\n{told}");
    assert!(told.contains("job stray: header Millrace-Outcome") && told.contains("job gone: "), "{told}");
    assert!(told.contains("2 malformed"), "{told}");
    Ok(())
}
