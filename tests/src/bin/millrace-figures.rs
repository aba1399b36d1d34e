//! The README's figures, measured on this machine: the engine alone, the queue, the pull of weights.
//!
//! It runs the very programs that users run and reads their JSON. It prints one table for people and, as the
//! last line, one JSON object. A part that cannot run is named with its reason and makes the run fail at its
//! end, after the others have run.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Parser;
use millrace_tests::cluster::Cluster;
use millrace_tests::{model, overhead, tools};
use serde_json::{Map, Value, json};

/// The requests of the comparison with other engines.
const REQUESTS: &str = "examples/bench/cpu-64.jsonl";
/// One sequence: enough tokens for a steady rate.
const ONE_SEQUENCE: &str = "1,32,256";
/// One job at a time, then as many as possible.
const SINGLE_JOBS: usize = 1000;
const MANY_JOBS: usize = 5000;

/// Measures the README's figures on this machine.
#[derive(Debug, Parser)]
#[command(name = "millrace-figures")]
struct Args {
    /// Measure only parts whose names contain this
    #[arg(long, default_value = "")]
    only: String,
}

/// One row of the table.
#[derive(Debug)]
struct Row {
    name: &'static str,
    bar: &'static str,
    result: Result<Value>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let folder = tokio::task::spawn_blocking(model::smollm2).await??;
    let mut rows = Vec::new();
    for (name, bar, options) in engine_parts() {
        if name.contains(&args.only) {
            eprintln!("measuring {name}");
            rows.push(Row { name, bar, result: bench(&folder, &options) });
        }
    }
    if "queue".contains(&args.only) {
        eprintln!("measuring the queue");
        rows.push(Row { name: "queue", bar: "p99 <= 10 ms, >= 400 jobs/s", result: queue().await });
    }
    print_table(&rows);
    let mut object = Map::new();
    object.insert("machine".into(), machine());
    for row in &rows {
        let value =
            row.result.as_ref().map_or_else(|error| json!({"error": format!("{error:#}")}), Clone::clone);
        object.insert(row.name.replace([' ', ','], "_"), value);
    }
    println!("{}", Value::Object(object));
    if rows.iter().any(|row| row.result.is_err()) {
        bail!("not all figures could be measured");
    }
    Ok(())
}

/// `(name, bar of the first version, options of bench)`.
fn engine_parts() -> [(&'static str, &'static str, Vec<&'static str>); 5] {
    [
        ("cpu-64 bf16", ">= 500 tok/s", vec!["--requests", REQUESTS, "--dtype", "bf16"]),
        ("cpu-64 int8", "", vec!["--requests", REQUESTS, "--dtype", "bf16", "--quantization", "int8"]),
        ("cpu-64 one at a time bf16", "batching >= 5x", {
            vec!["--requests", REQUESTS, "--dtype", "bf16", "--concurrency", "1"]
        }),
        ("one sequence bf16", ">= 80 tok/s", vec!["--synthetic", ONE_SEQUENCE, "--dtype", "bf16"]),
        ("one sequence int8", ">= 150 tok/s", {
            vec!["--synthetic", ONE_SEQUENCE, "--dtype", "bf16", "--quantization", "int8"]
        }),
    ]
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
    let cluster = tokio::task::spawn_blocking(Cluster::tiny).await??;
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
    println!("| figure | measured | bar |\n|---|---|---|");
    for row in rows {
        let measured = match &row.result {
            Ok(value) => shown(value),
            Err(error) => format!("failed: {error:#}"),
        };
        println!("| {} | {measured} | {} |", row.name, row.bar);
    }
    let rate = |name: &str| {
        let row = rows.iter().find(|row| row.name == name)?;
        row.result.as_ref().ok()?["output_tokens_per_s"].as_f64()
    };
    if let (Some(together), Some(alone)) = (rate("cpu-64 bf16"), rate("cpu-64 one at a time bf16")) {
        println!("| batching pays | {:.1}x | >= 5x |", together / alone);
    }
    println!();
}

/// The numbers that the table shows, of those that a part reports.
fn shown(value: &Value) -> String {
    let named = [
        ("output_tokens_per_s", "tok/s out"),
        ("prompt_tokens_per_s", "tok/s in"),
        ("bound_share", "of the bound"),
        ("overhead_p50_ms", "ms p50"),
        ("overhead_p99_ms", "ms p99"),
        ("jobs_per_s", "jobs/s"),
    ];
    let parts = named.iter().filter_map(|(name, unit)| Some(format!("{:.2} {unit}", value[*name].as_f64()?)));
    parts.collect::<Vec<_>>().join(", ")
}
