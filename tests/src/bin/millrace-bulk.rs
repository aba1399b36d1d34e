//! A batch of many lines while gateways, workers and the broker are killed; and its lines beside an async publisher.
//!
//! `cargo run --release --bin millrace-bulk` prints the figures with their bars, and fails where one is missed.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use millrace_tests::bulk::{self, BulkPlan};
use millrace_tests::figures::{self, page};
use millrace_tests::scripted::Bench;

/// Measures batches over HTTP on this machine.
#[derive(Debug, Parser)]
#[command(name = "millrace-bulk")]
struct Args {
    /// Lines of the batch
    #[arg(long, default_value_t = 50_000)]
    lines: usize,
    /// Times that the gateway is killed
    #[arg(long, default_value_t = 5)]
    gateway_kills: usize,
    /// Times that the worker is killed
    #[arg(long, default_value_t = 10)]
    worker_kills: usize,
    /// Times that the broker is killed
    #[arg(long, default_value_t = 1)]
    broker_kills: usize,
}

#[tokio::main]
async fn main() -> Result<()> {
    let Args { lines, gateway_kills, worker_kills, broker_kills } = Args::parse();
    let start = async || Bench::start().await?.context("there is no broker to start: run `make tools`");
    let rates = bulk::rates(&start().await?, lines).await?;
    let plan = BulkPlan { lines, gateway_kills, worker_kills, broker_kills };
    let report = bulk::run(&mut start().await?, plan).await?;
    let found = bulk::figures(report, rates);
    println!("{}\n\n{}", figures::machine(), page::table(&found));
    ensure!(found.iter().all(|figure| figure.is_met()), "a bar is missed");
    Ok(())
}
