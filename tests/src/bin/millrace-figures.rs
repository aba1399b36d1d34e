//! The README's figures, measured on this machine: the engine alone, the queue, crashes, the pull of weights.
//!
//! It runs the very programs that users run and reads their JSON. It prints one table for people and, as the
//! last line, one JSON object. A part that cannot run is named with its reason, and a bar that is missed is
//! marked; either makes the run fail at its end, after the others have run.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use millrace_tests::chaos;
use millrace_tests::cluster::QueueHarness;
use millrace_tests::random::Random;
use millrace_tests::{model, overhead, pulling, tools};
use serde_json::{Map, Value, json};

/// The requests of the comparison with other engines.
const REQUESTS: &str = "examples/bench/cpu-64.jsonl";
/// One sequence: enough tokens for a steady rate.
const ONE_SEQUENCE: &str = "1,32,256";
/// One job at a time, then as many as possible.
const SINGLE_JOBS: usize = 1000;
const MANY_JOBS: usize = 5000;
/// Size of the object that is pulled.
const PULL_BYTES: u64 = 1 << 30;

/// Measures the README's figures on this machine.
#[derive(Debug, Parser)]
#[command(name = "millrace-figures")]
struct Args {
    /// Measure only parts whose names contain this
    #[arg(long, default_value = "")]
    only: String,
    /// Pull one model with this configuration, and measure nothing: how this program starts itself
    #[arg(long, hide = true, value_name = "JSON")]
    pull: Option<String>,
}

/// A least or most value of one of a part's numbers.
#[derive(Debug, Clone, Copy)]
enum Bar {
    Least(&'static str, f64),
    Most(&'static str, f64),
}

impl Bar {
    fn text(self) -> String {
        match self {
            Bar::Least(name, value) => format!("{} >= {value}", unit_of(name)),
            Bar::Most(name, value) => format!("{} <= {value}", unit_of(name)),
        }
    }

    fn is_met(self, part: &Value) -> bool {
        let number = |name: &str| part[name].as_f64();
        match self {
            Bar::Least(name, value) => number(name).is_some_and(|found| found >= value),
            Bar::Most(name, value) => number(name).is_some_and(|found| found <= value),
        }
    }
}

/// One row of the table.
#[derive(Debug)]
struct Row {
    name: &'static str,
    bars: Vec<Bar>,
    result: Result<Value>,
}

impl Row {
    fn is_well(&self) -> bool {
        self.result.as_ref().is_ok_and(|value| self.bars.iter().all(|bar| bar.is_met(value)))
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(config) = &args.pull {
        return pulling::pull_once(config).await;
    }
    let rows = measure(&args.only).await?;
    ensure!(!rows.is_empty(), "--only {:?}: no part has such a name", args.only);
    print_table(&rows);
    let mut object = Map::new();
    object.insert("machine".into(), machine());
    for row in &rows {
        let mut value =
            row.result.as_ref().map_or_else(|error| json!({"error": format!("{error:#}")}), Clone::clone);
        value["bars_met"] = row.is_well().into();
        object.insert(row.name.replace([' ', ','], "_"), value);
    }
    println!("{}", Value::Object(object));
    let unwell: Vec<&str> = rows.iter().filter(|row| !row.is_well()).map(|row| row.name).collect();
    ensure!(unwell.is_empty(), "not measured, or below a bar: {}", unwell.join(", "));
    Ok(())
}

async fn measure(only: &str) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let engine: Vec<_> = engine_parts().into_iter().filter(|(name, ..)| name.contains(only)).collect();
    if !engine.is_empty() {
        let folder = tokio::task::spawn_blocking(model::smollm2).await??;
        for (name, bars, options) in engine {
            eprintln!("measuring {name}");
            rows.push(Row { name, bars, result: bench(&folder, &options) });
        }
        rows.extend(batching(&rows));
    }
    if "queue".contains(only) {
        eprintln!("measuring the queue");
        let bars = vec![Bar::Most("overhead_p99_ms", 10.0), Bar::Least("jobs_per_s", 400.0)];
        rows.push(Row { name: "queue", bars, result: queue().await });
    }
    if "crashes".contains(only) {
        eprintln!("killing workers and the broker");
        let plan = chaos::SHORT;
        let bars = vec![Bar::Least("outcomes", plan.jobs as f64), Bar::Least("redelivered", 1.0)];
        rows.push(Row { name: "crashes", bars, result: crashes(plan).await });
    }
    if "pull".contains(only) {
        eprintln!("pulling from S3");
        rows.push(Row { name: "pull", bars: vec![Bar::Least("of_plain", 0.8)], result: pull().await });
    }
    Ok(rows)
}

type EnginePart = (&'static str, Vec<Bar>, Vec<&'static str>);

/// `(name, bars, options of bench)`.
fn engine_parts() -> [EnginePart; 5] {
    let rate = |least| vec![Bar::Least("output_tokens_per_s", least)];
    let list = |more: &[&'static str]| [&["--requests", REQUESTS, "--dtype", "bf16"], more].concat();
    let one = |more: &[&'static str]| [&["--synthetic", ONE_SEQUENCE, "--dtype", "bf16"], more].concat();
    [
        ("cpu-64 bf16", rate(500.0), list(&[])),
        ("cpu-64 int8", Vec::new(), list(&["--quantization", "int8"])),
        ("cpu-64 one at a time bf16", Vec::new(), list(&["--concurrency", "1"])),
        ("one sequence bf16", rate(80.0), one(&[])),
        ("one sequence int8", rate(150.0), one(&["--quantization", "int8"])),
    ]
}

/// How much faster the list is together than one request at a time, if both were measured.
fn batching(rows: &[Row]) -> Option<Row> {
    let rate = |name: &str| {
        let row = rows.iter().find(|row| row.name == name)?;
        row.result.as_ref().ok()?["output_tokens_per_s"].as_f64()
    };
    let times = rate("cpu-64 bf16")? / rate("cpu-64 one at a time bf16")?;
    let bars = vec![Bar::Least("times", 5.0)];
    Some(Row { name: "batching", bars, result: Ok(json!({"times": rounded(times)})) })
}

fn bench(folder: &Path, options: &[&str]) -> Result<Value> {
    let mut command = Command::new(tools::program("millrace-worker")?);
    command.arg("bench").arg("--model").arg(folder).arg("--json").args(options);
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("millrace-worker bench {} ended with {}", options.join(" "), output.status);
    }
    serde_json::from_str(text.lines().last().unwrap_or_default()).context("the last line is no JSON object")
}

async fn queue() -> Result<Value> {
    let cluster = tokio::task::spawn_blocking(QueueHarness::tiny).await??;
    let config = cluster.config.clone();
    let start = move || millrace_tests::worker::Worker::start_ready(&config);
    let _worker = tokio::task::spawn_blocking(start).await??;
    let figures = overhead::measure(&cluster, SINGLE_JOBS, MANY_JOBS).await?;
    Ok(json!({
        "overhead_p50_ms": rounded(figures.p50_ms),
        "overhead_p99_ms": rounded(figures.p99_ms),
        "jobs_per_s": rounded(figures.jobs_per_s),
    }))
}

async fn crashes(plan: chaos::ChaosPlan) -> Result<Value> {
    let report = chaos::run(plan, Random::from_environment("crashes", 20_261_123)).await?;
    Ok(json!({
        "jobs": plan.jobs,
        "outcomes": report.record.outcomes.len(),
        "redelivered": report.record.redelivered(),
        "worker_kills": report.worker_kills,
        "broker_kills": report.broker_kills,
        "elapsed_s": rounded(report.elapsed.as_secs_f64()),
    }))
}

async fn pull() -> Result<Value> {
    let rates = pulling::measure(PULL_BYTES).await?;
    let mib = |rate: f64| rounded(rate / f64::from(1 << 20));
    Ok(json!({
        "pull_mib_per_s": mib(rates.pull()),
        "plain_mib_per_s": mib(rates.plain()),
        "of_plain": rounded(rates.pull() / rates.plain()),
        "pull_rounds_mib_per_s": rates.pulls.iter().copied().map(mib).collect::<Vec<_>>(),
        "plain_rounds_mib_per_s": rates.plains.iter().copied().map(mib).collect::<Vec<_>>(),
    }))
}

fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// The processor's name and cores, as the kernel tells them.
fn machine() -> Value {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    json!({"cpu": name.map_or("unknown", |(_, name)| name), "cores": cores})
}

fn print_table(rows: &[Row]) {
    let machine = machine();
    println!("{}, {} cores\n", machine["cpu"].as_str().unwrap_or_default(), machine["cores"]);
    println!("| figure | measured | bar | met |\n|---|---|---|---|");
    for row in rows {
        let measured = match &row.result {
            Ok(value) => shown(value),
            Err(error) => format!("failed: {error:#}"),
        };
        let bars: Vec<String> = row.bars.iter().map(|bar| bar.text()).collect();
        let met = match (row.is_well(), bars.is_empty()) {
            (true, true) => "-",
            (true, false) => "yes",
            (false, _) => "NO",
        };
        println!("| {} | {measured} | {} | {met} |", row.name, bars.join(", "));
    }
    println!();
}

/// The numbers that the table shows, of those that a part reports, with their units.
const SHOWN: [(&str, &str); 13] = [
    ("output_tokens_per_s", "tok/s out"),
    ("prompt_tokens_per_s", "tok/s in"),
    ("bound_share", "of the bound"),
    ("times", "times"),
    ("overhead_p50_ms", "ms p50"),
    ("overhead_p99_ms", "ms p99"),
    ("jobs_per_s", "jobs/s"),
    ("outcomes", "outcomes"),
    ("redelivered", "redelivered"),
    ("worker_kills", "worker kills"),
    ("broker_kills", "broker kills"),
    ("pull_mib_per_s", "MiB/s"),
    ("of_plain", "of s5cmd's rate"),
];

fn unit_of(name: &str) -> &str {
    SHOWN.iter().find(|(shown, _)| *shown == name).map_or(name, |(_, unit)| unit)
}

fn shown(value: &Value) -> String {
    let number = |name: &str| value[name].as_f64();
    let parts = SHOWN.iter().filter_map(|(name, unit)| Some(format!("{} {unit}", rounded(number(name)?))));
    parts.collect::<Vec<_>>().join(", ")
}
