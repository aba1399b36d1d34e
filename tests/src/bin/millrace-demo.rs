//! The demo: the prompts of `examples/prompts.jsonl` through broker, S3 and worker, as a pipeline would send
//! them.
//!
//! It starts a broker and an S3 server of its own on free ports of 127.0.0.1 with stores in temporary folders,
//! uploads SmolLM2 (imported once from its GGUF file), starts a worker that pulls it from there, and submits
//! the prompts with the `millrace` command line. It ends with a summary; the last line of standard output is
//! the summary as one JSON object. Nothing of it is left afterwards, also after Ctrl-C.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use futures::StreamExt;
use millrace_crds::config::{Dtype, Quantization, WorkerConfig};
use millrace_crds::load::{ColdStart, LoadReport};
use millrace_tests::demo::{self, say};
use millrace_tests::gateway::Gateway;
use millrace_tests::nats::NatsServer;
use millrace_tests::s3::S3;
use millrace_tests::worker::Worker;
use millrace_tests::{model, place, process, tools};
use serde_json::{Value, json};

const MODEL: &str = "smollm2";
const BUCKET: &str = "models";
/// Prompt and answer of the examples fit many times over.
const MODEL_LEN_MAX: u32 = 2048;
/// Answers that are printed.
const ANSWERS_SHOWN: usize = 4;
/// Characters of an answer that are printed.
const ANSWER_CHARACTERS: usize = 300;
/// A load report comes each second.
const REPORT_LIMIT: Duration = Duration::from_secs(10);

/// Runs the prompts of a file through broker, S3 and worker.
#[derive(Debug, Parser)]
#[command(name = "millrace-demo")]
struct Args {
    /// OpenAI batch lines
    #[arg(long, default_value = "examples/prompts.jsonl")]
    prompts: PathBuf,
    /// Numeric type of the weights: auto, bf16 or f32
    #[arg(long, default_value = "auto")]
    dtype: String,
    /// Quantise the linear layers: none or int8
    #[arg(long, default_value = "none")]
    quantization: String,
    /// Then serve OpenAI's API over HTTP until Ctrl-C
    #[arg(long)]
    wait: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    demo::show(run(&args))
}

async fn run(args: &Args) -> Result<Value> {
    let start = Instant::now();
    ensure!(args.prompts.is_file(), "--prompts {}: no such file", args.prompts.display());
    let folder = tokio::task::spawn_blocking(model::smollm2).await??;
    say(start, &format!("model folder {}", folder.display()));
    let (nats, s3) =
        tokio::try_join!(async { tokio::task::spawn_blocking(NatsServer::start).await? }, async {
            tokio::task::spawn_blocking(S3::start).await?
        },)?;
    say(start, &format!("broker at {}, S3 at {}", nats.url(), s3.endpoint()));
    s3.create_bucket(BUCKET).await?;
    s3.put_folder(&folder, BUCKET, MODEL).await?;
    say(start, "model uploaded");

    let place = place::folder("demo-")?;
    let config = config(args, &nats, &s3, place.path())?;
    let client = nats.connect().await?;
    let reports = client.subscribe(format!("millrace.load.default.{MODEL}.*")).await?;
    client.flush().await?;
    millrace(&nats, &["provision"]).await?;
    let worker = tokio::task::spawn_blocking(move || Worker::start_ready(&config)).await??;
    say(start, "worker ready, weights pulled from S3");

    let output = place.path().join("answers.jsonl");
    let submit = ["submit", text_of(&args.prompts)?, "--wait", "--output", text_of(&output)?];
    let counted = millrace(&nats, &submit).await.with_context(|| worker.log_tail())?;
    show_answers(&args.prompts, &output)?;
    let cold_start = cold_start(reports).await?;
    let summary = summary(&counted, &cold_start);
    if args.wait {
        println!("{summary}");
        return serve(&nats).await;
    }
    go_on(&folder);
    Ok(summary)
}

/// Serves OpenAI's API until the demo is interrupted.
async fn serve(nats: &NatsServer) -> Result<Value> {
    let gateway = Gateway::start(nats, &[])?;
    let url = format!("http://{}/v1", gateway.address());
    println!("\nOpenAI's API is served at {url} until Ctrl-C. In another terminal:\n");
    println!("  curl {url}/chat/completions -H 'content-type: application/json' \\");
    println!(
        "      -d '{{\"model\": \"{MODEL}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'"
    );
    println!("  examples/chat.py {url} {MODEL} \"Tell me of rivers\"    with the package openai, streamed\n");
    std::future::pending().await
}

/// What a newcomer types next.
fn go_on(model: &Path) {
    println!("To go on:");
    println!("  make demo WAIT=1           the same, and then OpenAI's API over HTTP until Ctrl-C");
    println!("  make demo DOCS=my.jsonl    your own prompts, as OpenAI batch lines");
    println!("  make demo-k8s              the same under the operator, from zero workers and back to zero");
    println!("  target/debug/millrace-worker batch --input examples/prompts.jsonl --output answers.jsonl \\");
    println!("      --model {}    the engine alone, without services\n", model.display());
}

fn config(args: &Args, nats: &NatsServer, s3: &S3, place: &Path) -> Result<WorkerConfig> {
    let dtype: Dtype = serde_json::from_value(json!(args.dtype)).context("--dtype")?;
    let quantization: Quantization =
        serde_json::from_value(json!(args.quantization)).context("--quantization")?;
    let mut config: WorkerConfig = serde_json::from_value(json!({
        "model": {"name": MODEL, "uri": format!("s3://{BUCKET}/{MODEL}"), "cacheDir": place.join("cache")},
        "nats": {"servers": [nats.url()], "monitor": nats.monitor_url()},
    }))?;
    config.model.store = s3.store_config();
    config.engine.dtype = dtype;
    config.engine.quantization = quantization;
    config.engine.max_model_len = Some(MODEL_LEN_MAX);
    Ok(config)
}

fn text_of(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// Runs the command line; its progress bar goes to standard error, its JSON object is returned.
async fn millrace(nats: &NatsServer, arguments: &[&str]) -> Result<Value> {
    let mut plain = std::process::Command::new(tools::program("millrace")?);
    plain.args(["--server", &nats.url(), "--model", MODEL, "--json"]).args(arguments);
    let mut command = tokio::process::Command::from(process::with_parent_death(&plain));
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true).output().await?;
    let text = String::from_utf8_lossy(&output.stdout);
    // 1 says that some jobs did not complete, which the summary shows.
    if !matches!(output.status.code(), Some(0 | 1)) {
        bail!("millrace {} ended with {}\n{text}", arguments.join(" "), output.status);
    }
    let last = text.lines().last().unwrap_or("null");
    serde_json::from_str(last).with_context(|| format!("millrace {}: {last}", arguments[0]))
}

fn show_answers(prompts: &Path, output: &Path) -> Result<()> {
    let lines = |path: &Path| -> Result<Vec<Value>> {
        let read = BufReader::new(std::fs::File::open(path)?).lines();
        let lines = read.filter(|line| !line.as_ref().is_ok_and(|line| line.trim().is_empty()));
        lines.map(|line| Ok(serde_json::from_str(&line?)?)).collect()
    };
    let (asked, answered) = (lines(prompts)?, lines(output)?);
    let step = (asked.len() / ANSWERS_SHOWN).max(1);
    println!();
    ensure!(!asked.is_empty(), "--prompts {}: no line", prompts.display());
    for (question, answer) in asked.iter().zip(&answered).step_by(step).take(ANSWERS_SHOWN) {
        let choice = &answer["response"]["body"]["choices"][0];
        let text = choice["message"]["content"].as_str().or(choice["text"].as_str());
        let text: String = text.unwrap_or("(no answer)").chars().take(ANSWER_CHARACTERS).collect();
        println!("> {}\n{}\n", prompt_of(question), text.trim());
    }
    Ok(())
}

/// The last message or the first prompt of a batch line, or of a bare request.
fn prompt_of(line: &Value) -> String {
    let body = if line["body"].is_object() { &line["body"] } else { line };
    let last = body["messages"].as_array().and_then(|messages| messages.last());
    let text = last.map_or(&body["prompt"], |message| &message["content"]);
    let text = text.as_str().or(text[0].as_str()).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

/// The durations that the worker reports once it is ready.
async fn cold_start(mut reports: async_nats::Subscriber) -> Result<ColdStart> {
    let found = async {
        while let Some(message) = reports.next().await {
            if let Some(phases) = serde_json::from_slice::<LoadReport>(&message.payload)?.cold_start {
                return Ok(phases);
            }
        }
        bail!("the connection to the broker ended")
    };
    tokio::time::timeout(REPORT_LIMIT, found).await.context("no load report with the cold start")?
}

/// Prints the figures for people, and returns them for programs.
fn summary(counted: &Value, cold: &ColdStart) -> Value {
    let number = |name: &str| counted[name].as_f64().unwrap_or_default();
    println!(
        "jobs        accepted {:.0}, completed {:.0}, rejected {:.0}, dead {:.0}",
        number("accepted"),
        number("completed"),
        number("rejected"),
        number("dead"),
    );
    println!(
        "tokens      {:.0} in, {:.0} out, {:.1} out/s",
        number("prompt_tokens"),
        number("output_tokens"),
        number("output_tokens_per_s"),
    );
    println!(
        "queue wait  p50 {:.0} ms, p99 {:.0} ms",
        number("queue_wait_p50_ms"),
        number("queue_wait_p99_ms"),
    );
    println!(
        "cold start  connect {:.0} ms, pull {:.0} ms, load {:.0} ms, warm up {:.0} ms, in all {:.0} ms\n",
        cold.connect_ms, cold.pull_ms, cold.load_ms, cold.warm_up_ms, cold.total_ms,
    );
    json!({
        "accepted": counted["accepted"],
        "completed": counted["completed"],
        "rejected": counted["rejected"],
        "dead": counted["dead"],
        "output_tokens": counted["output_tokens"],
        "output_tokens_per_s": counted["output_tokens_per_s"],
        "queue_wait_p99_ms": counted["queue_wait_p99_ms"],
        "cold_start_ms": (cold.total_ms * 10.0).round() / 10.0,
    })
}
