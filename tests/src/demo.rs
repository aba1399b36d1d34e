//! What the demos share: a run that leaves nothing behind, whichever way it ends.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use crate::{place, process};

/// The longest step of a start that cannot be cut short: the import of the model.
const CLEAN_UP_LIMIT: Duration = Duration::from_secs(60);

/// Runs a demo to its summary, the last line of standard output, or until Ctrl-C or SIGTERM (exit code 130). What
/// runs belongs to the future: it is ended and removed with it.
///
/// # Errors
/// Why the demo failed.
pub fn show(demo: impl Future<Output = Result<Value>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            result = demo => result.map(Some),
            _ = interrupt.recv() => Ok(None),
            _ = terminate.recv() => Ok(None),
        }
    });
    // What is still being started belongs to a thread of its own, which drops it as soon as it may.
    process::stop_waiting();
    runtime.shutdown_timeout(CLEAN_UP_LIMIT);
    place::leave();
    match ended? {
        Some(summary) => println!("{summary}"),
        None => {
            eprintln!("interrupted: everything is stopped and removed");
            std::process::exit(130);
        }
    }
    Ok(())
}

/// Says what happens, with the seconds since the start.
pub fn say(start: Instant, text: &str) {
    eprintln!("[{:6.1} s] {text}", start.elapsed().as_secs_f64());
}
