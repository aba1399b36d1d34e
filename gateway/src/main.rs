//! `millrace`: the command line.

use std::process::ExitCode;

use clap::Parser;
use millrace_gateway::args::Cli;
use millrace_gateway::output::{Printer, note};
use serde_json::json;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    match millrace_gateway::run(&cli).await {
        Ok(verdict) => verdict.code(),
        Err(failure) => {
            note(&format!("error: {failure}"));
            let error = json!({"error": {"code": failure.category(), "message": failure.to_string()}});
            Printer { json: cli.global.json }.object(&error);
            failure.code()
        }
    }
}
