//! `millrace-gateway`: OpenAI's API over the queue.

use std::process::ExitCode;

use clap::Parser;
use millrace_gateway::http::{self, options::GatewayArgs};

#[tokio::main]
async fn main() -> ExitCode {
    match http::run(GatewayArgs::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("millrace-gateway: {failure}");
            failure.code()
        }
    }
}
