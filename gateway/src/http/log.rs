//! Logs: one JSON object a line on standard error. They hold no prompt, no answer and no secret.

use tracing_subscriber::EnvFilter;

/// The environment variable with the log filter.
const VARIABLE: &str = "MILLRACE_LOG";
/// Libraries that could print what they carry, with the most that they may say.
const CAPPED: [&str; 6] =
    ["async_nats=warn", "aws_smithy_runtime=warn", "h2=warn", "hyper=warn", "hyper_util=warn", "rustls=warn"];

/// Begins logging. Later calls change nothing.
///
/// # Errors
/// When the variable is no filter.
pub fn start() -> Result<(), String> {
    let text = std::env::var(VARIABLE).unwrap_or_else(|_| "info".to_owned());
    let wrong = |error| format!("{VARIABLE}: {text:?} is not a log filter: {error}");
    let mut filter = EnvFilter::try_new(&text).map_err(wrong)?;
    for cap in CAPPED {
        filter = filter.add_directive(cap.parse().expect("a constant directive"));
    }
    let _ = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_writer(std::io::stderr)
        .with_env_filter(filter)
        .try_init();
    Ok(())
}
