//! Measures this machine: the engine alone, the queue, crashes, the pull of weights, the demos.
//!
//! It runs the very programs that users run and reads their JSON, and prints one table with every bar. A bar that is
//! missed says so, and a part that cannot run is named with its reason. `--write` keeps the figures as a result file
//! and makes the page anew; the other ways in do the same with figures that other programs left.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use millrace_tests::cluster::QueueHarness;
use millrace_tests::figures::{self, Figure, ResultFile, page, soak};
use millrace_tests::random::Random;
use millrace_tests::{chaos, door, model, overhead, pulling, tools};
use serde_json::Value;

/// The requests of the comparison with other engines.
const REQUESTS: &str = "examples/bench/cpu-64.jsonl";
/// One sequence after another, and many at once: requests, tokens in, tokens out.
const ONE_SEQUENCE: &str = "8,64,128";
const SEQUENCES: &str = "64,64,128";
/// One job at a time, then as many as possible.
const SINGLE_JOBS: usize = 1000;
const MANY_JOBS: usize = 5000;
/// Jobs of each client of the front door, where many ask at once.
const JOBS_OF_CLIENT: usize = 200;
/// Size of the object that is pulled.
const PULL_BYTES: u64 = 1 << 30;
/// The parts, by the names that `--only` looks at.
const PARTS: [&str; 8] =
    ["engine-bf16", "engine-int8", "queue", "http", "crashes", "pull", "demo", "demo-k8s"];

/// Measures this machine, and makes docs/figures.md of all result files.
#[derive(Debug, Parser)]
#[command(name = "millrace-figures")]
struct Args {
    /// Measure only parts whose names contain this
    #[arg(long, default_value = "")]
    only: String,
    /// Write a result file into this folder and make the page beside it anew
    #[arg(long, value_name = "FOLDER")]
    write: Option<PathBuf>,
    /// Measure nothing: make the page of this folder's result files
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["write", "only"])]
    render: Option<PathBuf>,
    /// Measure nothing: take the figures that millrace-sim wrote
    #[arg(long, value_name = "JSON", conflicts_with_all = ["only", "render"])]
    sim: Option<PathBuf>,
    /// Measure nothing: take the figures of a long run from what it printed
    #[arg(long, value_name = "LOG", conflicts_with_all = ["only", "render", "sim"])]
    soak: Option<PathBuf>,
    /// Pull one model with this configuration, and measure nothing: how this program starts itself
    #[arg(long, hide = true, value_name = "JSON")]
    pull: Option<String>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(config) = &args.pull {
        return pulling::pull_once(config).await;
    }
    if let Some(folder) = &args.render {
        return figures::write_page(folder);
    }
    let read = |path: &PathBuf| std::fs::read_to_string(path).with_context(|| path.display().to_string());
    let (kind, command, found) = match (&args.sim, &args.soak) {
        (Some(path), _) => ("sim", "make sim", serde_json::from_str(&read(path)?)?),
        (None, Some(path)) => ("soak", "make soak", soak::figures(&read(path)?)?),
        (None, None) => ("cpu", "make figures", measure(&args).await?),
    };
    println!("{}\n\n{}", figures::machine(), page::table(&found));
    let unmet: Vec<&str> =
        found.iter().filter(|figure| !figure.is_met()).map(|figure| figure.name.as_str()).collect();
    let (unmet, whole) = (unmet.join(", "), found.iter().all(|figure| figure.value.is_some()));
    if let Some(folder) = &args.write {
        println!("written: {}", ResultFile::new(command, found)?.write(folder, kind)?.display());
        figures::write_page(folder)?;
        // A missed bar stands on the page.
        ensure!(whole, "not all was measured: {unmet}");
        return Ok(());
    }
    ensure!(unmet.is_empty(), "missed, or not measured: {unmet}");
    Ok(())
}

/// All figures of the parts that are asked for; a part that fails is one figure that says why.
async fn measure(args: &Args) -> Result<Vec<Figure>> {
    let only = &args.only;
    ensure!(args.write.is_none() || only.is_empty(), "--write keeps all parts or none; leave --only away");
    let slow = cfg!(debug_assertions) && args.write.is_some();
    ensure!(!slow, "--write keeps figures of a release build alone: make figures");
    let parts: Vec<&str> = PARTS.into_iter().filter(|part| part.contains(only.as_str())).collect();
    ensure!(!parts.is_empty(), "--only is {only:?}; the parts are {}", PARTS.join(", "));
    let mut found = Vec::new();
    for part in parts {
        eprintln!("measuring {part}");
        let figures = match part {
            "engine-bf16" => engine("bf16", &["--dtype", "bf16"], (Some(500.0), 80.0)).await,
            "engine-int8" => {
                engine("int8", &["--dtype", "bf16", "--quantization", "int8"], (None, 150.0)).await
            }
            "queue" => queue().await,
            "http" => http().await,
            "crashes" => crashes().await,
            "pull" => pull().await,
            "demo" => demo(),
            _ => demo_k8s(),
        };
        found.extend(figures.unwrap_or_else(|error| vec![Figure::failed(part, &error)]));
    }
    Ok(found)
}

/// The list and sequences with weights of one type, together and alone; the bars are tokens a second of the list and
/// of one sequence.
async fn engine(name: &str, dtype: &[&str], bars: (Option<f64>, f64)) -> Result<Vec<Figure>> {
    let folder = tokio::task::spawn_blocking(model::smollm2).await??;
    let run = |options: &[&str]| last_object("millrace-worker", &bench(&folder, &[dtype, options].concat()));
    let number = |said: &Value, field: &str| said[field].as_f64().unwrap_or(f64::NAN);
    let rate = |said: &Value| number(said, "output_tokens_per_s");
    let (list, list_alone) =
        (run(&["--requests", REQUESTS])?, run(&["--requests", REQUESTS, "--concurrency", "1"])?);
    let one = run(&["--synthetic", ONE_SEQUENCE, "--concurrency", "1"])?;
    let many = run(&["--synthetic", SEQUENCES])?;
    let figure = |what: &str, value: f64, unit: &str| Figure::new(&format!("{name}, {what}"), value, unit);
    let of_limit = |said: &Value| 100.0 * number(said, "bound_share");
    let whole = figure("the list, 64 at once", rate(&list), "tokens/s");
    Ok(vec![
        bars.0.into_iter().fold(whole, Figure::least),
        figure("the list, of the machine's limit", of_limit(&list), "%"),
        figure("the list, one at a time", rate(&list_alone), "tokens/s"),
        figure("the list, 64 at once over one at a time", rate(&list) / rate(&list_alone), "x").least(5.0),
        figure("one sequence", rate(&one), "tokens/s").least(bars.1),
        figure("one sequence, of the machine's limit", of_limit(&one), "%"),
        figure("64 sequences at once", rate(&many), "tokens/s"),
        figure("64 sequences at once over one", rate(&many) / rate(&one), "x").least(5.0),
    ])
}

fn bench<'a>(folder: &'a Path, options: &[&'a str]) -> Vec<&'a str> {
    let folder = folder.to_str().unwrap_or_default();
    [&["bench", "--json", "--model", folder], options].concat()
}

/// Runs a program of this workspace; the last line that it prints is a JSON object.
fn last_object(program: &str, arguments: &[&str]) -> Result<Value> {
    let mut command = Command::new(tools::program(program)?);
    let line = [&[program], arguments].concat().join(" ");
    let output = command.args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "{line} ended with {}", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().unwrap_or_default();
    serde_json::from_str(last)
        .with_context(|| format!("the last line of {program} is no JSON object: {last}"))
}

async fn queue() -> Result<Vec<Figure>> {
    let cluster = tokio::task::spawn_blocking(QueueHarness::tiny).await??;
    let config = cluster.config.clone();
    let start = move || millrace_tests::worker::Worker::start_ready(&config);
    let _worker = tokio::task::spawn_blocking(start).await??;
    Ok(overhead::measure(&cluster, SINGLE_JOBS, MANY_JOBS).await?.figures())
}

async fn http() -> Result<Vec<Figure>> {
    let cost = door::measure(SINGLE_JOBS, JOBS_OF_CLIENT).await?;
    Ok(cost.context("there is no nats-server")?.figures())
}

async fn crashes() -> Result<Vec<Figure>> {
    let plan = chaos::SHORT;
    let report = chaos::run(plan, Random::from_environment("crashes", 20_261_123)).await?;
    Ok(soak::crashes(&report.numbers(&plan)))
}

async fn pull() -> Result<Vec<Figure>> {
    Ok(pulling::measure(PULL_BYTES).await?.figures())
}

fn demo() -> Result<Vec<Figure>> {
    let said = last_object("millrace-demo", &[])?;
    let number = |name: &str| said[name].as_f64().unwrap_or(f64::NAN);
    Ok(vec![
        Figure::new("demo, cold start of its worker", number("cold_start_ms") / 1e3, "s"),
        Figure::new("demo, 64 prompts through the queue", number("output_tokens_per_s"), "tokens/s"),
    ])
}

/// Nothing where there is no control plane: it takes minutes to build.
#[cfg(feature = "cluster")]
fn demo_k8s() -> Result<Vec<Figure>> {
    use millrace_tests::kube::programs;
    if let Some(error) = programs::PROGRAMS.iter().find_map(|name| programs::program(name).err()) {
        eprintln!("not run: {error:#}");
        return Ok(Vec::new());
    }
    let said = last_object("millrace-demo-k8s", &[])?;
    let number = |name: &str| said[name].as_f64().unwrap_or(f64::NAN);
    Ok(vec![
        Figure::new(
            "a sleeping model on Kubernetes, first job until a worker is ordered",
            number("wake_ms"),
            "ms",
        ),
        Figure::new("a sleeping model on Kubernetes, jobs completed", number("completed"), "jobs")
            .least(number("published")),
        Figure::new(
            "a sleeping model on Kubernetes, last result until no worker is left",
            number("back_to_zero_s"),
            "s",
        ),
        Figure::new(
            "a revision that changes under load, jobs completed",
            number("rollout_completed"),
            "jobs",
        )
        .least(number("rollout_published")),
    ])
}

#[cfg(not(feature = "cluster"))]
fn demo_k8s() -> Result<Vec<Figure>> {
    eprintln!("not run: this program was built without the feature cluster");
    Ok(Vec::new())
}
