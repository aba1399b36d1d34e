//! The `millrace` command line: a thin client of the queue.
//!
//! Each command is typed arguments, then a plan, then effects; the plan is pure. Results go to standard
//! output, everything else to standard error, and the exit code says which of a few things happened.

mod args;
mod cancel;
mod collect;
mod connect;
mod dead;
mod direct;
mod doctor;
mod done;
mod entries;
mod failure;
mod follow;
mod gather;
mod input;
mod live;
mod outcome;
mod output;
mod plan;
mod provision;
mod publish;
mod queue;
mod results;
mod store;
mod submit;
mod summary;
mod worker;

use std::process::ExitCode;

use clap::Parser;
use serde_json::json;

use args::{Cli, Command};
use failure::{Failure, Verdict};
use output::{Printer, note};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli).await {
        Ok(verdict) => verdict.code(),
        Err(failure) => {
            note(&format!("error: {failure}"));
            let error = json!({"error": {"code": failure.category(), "message": failure.to_string()}});
            Printer { json: cli.global.json }.object(&error);
            failure.code()
        }
    }
}

async fn run(cli: &Cli) -> Result<Verdict, Failure> {
    let global = &cli.global;
    match &cli.command {
        Command::Submit(args) => submit::run(global, args).await,
        Command::Results(args) => results::run(global, args).await,
        Command::Cancel(args) => cancel::run(global, args).await,
        Command::Dead(args) => dead::run(global, &args.command).await,
        Command::Queue(args) => queue::run(global, args).await,
        Command::Provision(args) => provision::run(global, args).await,
        Command::Import(args) => worker::run("import", global, &args.words),
        Command::Check(args) => worker::run("check", global, &args.words),
        Command::Doctor(args) => doctor::run(global, args).await,
    }
}
