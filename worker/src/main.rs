//! `millrace-worker`: serve a queue, run a file of requests, measure the engine and a model, import or check a model.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use millrace_worker::batch::{self, BatchArgs};
use millrace_worker::bench::{self, BenchArgs};
use millrace_worker::check::{self, CheckArgs};
use millrace_worker::ending::{self, EXIT_CODES, Ending};
use millrace_worker::import::{self, ImportArgs};
use millrace_worker::perplexity::{self, PerplexityArgs};
use millrace_worker::worker::{self, ServeArgs};

/// Runs prompt jobs through a paged-attention engine.
#[derive(Debug, Parser)]
#[command(name = "millrace-worker", version, after_help = EXIT_CODES)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take jobs from the queue, and publish one durable result for each.
    Serve(ServeArgs),
    /// Answer a file of requests, without any service; an interrupted run goes on where it stopped.
    Batch(BatchArgs),
    /// Measure the engine's speed on this machine, beside the machine's limits.
    Bench(BenchArgs),
    /// Measure how well a model predicts a text, to compare numeric types and checkpoints.
    Perplexity(PerplexityArgs),
    /// Turn a GGUF file into a model folder, and upload it if asked.
    Import(ImportArgs),
    /// Look at a model folder as a start would, without its weights; ends with 1 when something fails.
    Check(CheckArgs),
}

fn main() -> ExitCode {
    let ended = match Args::parse().command {
        Command::Serve(args) => worker::run(&args),
        Command::Batch(args) => batch::run(&args).map(|well| ExitCode::from(u8::from(!well))),
        Command::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Perplexity(args) => perplexity::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Import(args) => import::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Check(args) => check::run(&args).map(|well| ExitCode::from(u8::from(!well))),
    };
    match ended {
        Ok(code) => code,
        Err(error) => {
            let ending = Ending::of(&error);
            eprintln!("millrace-worker: {ending}: {}", ending::message(&error));
            ending.into()
        }
    }
}
