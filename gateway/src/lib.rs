//! The two thin clients of the queue: the command line `millrace` ([`run`]), and OpenAI's API over HTTP,
//! `millrace-gateway` ([`http`]). Both publish jobs and read outcomes by the same code, and neither knows an engine.
//!
//! Each command is typed arguments, then a plan, then effects; the plan is pure. Results go to standard
//! output, everything else to standard error, and the exit code says which of a few things happened.

pub mod args;
pub mod broker_args;
mod cancel;
mod collect;
mod connect;
mod dead;
mod direct;
mod doctor;
mod done;
mod entries;
pub mod failure;
mod follow;
mod gather;
pub mod http;
mod input;
mod key;
mod live;
mod outcome;
pub mod output;
mod permissions;
mod plan;
mod provision;
mod publish;
mod queue;
mod results;
mod store;
mod submit;
mod summary;
mod worker;

use args::{Cli, Command};
use failure::{Failure, Verdict};

/// Runs a command of the command line.
///
/// # Errors
/// See [`Failure`].
pub async fn run(cli: &Cli) -> Result<Verdict, Failure> {
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
        Command::Permissions(args) => permissions::run(global, args),
        Command::Key(args) => key::run(global, &args.command).await,
        Command::Doctor(args) => doctor::run(global, args).await,
    }
}
