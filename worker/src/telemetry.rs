//! Logs: one JSON object a line on standard error, and the end of the process on any panic.
//!
//! Logs never hold prompts, answers or secrets. Bodies are never passed to a log call, libraries that could
//! print what they carry are capped at `info`, and a panic is logged by its place alone, because its message
//! may quote a text that it failed on.

use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::Directive;

use crate::broken::Broken;

/// The environment variable with the log filter, such as `info` or `millrace_worker=debug`.
pub const VARIABLE: &str = "MILLRACE_LOG";

/// Libraries that handle bodies or credentials, with the most that they may say.
const CAPPED: [&str; 10] = [
    // What it says at `info` the worker says itself.
    "async_nats=warn",
    "aws_config=warn",
    "aws_credential_types=warn",
    "aws_runtime=warn",
    "aws_sdk_s3=warn",
    "aws_smithy_http_client=warn",
    "aws_smithy_runtime=warn",
    "hyper=warn",
    "rustls=warn",
    "tokenizers=warn",
];

/// Begins logging. Later calls change nothing.
///
/// # Errors
/// When the variable is no filter.
pub fn start() -> Result<(), String> {
    let text = std::env::var(VARIABLE).unwrap_or_else(|_| "info".to_owned());
    let filter =
        filter(&text).map_err(|error| format!("{VARIABLE}: {text:?} is not a log filter: {error}"))?;
    let _ = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_writer(std::io::stderr)
        .with_env_filter(filter)
        .try_init();
    Ok(())
}

/// The log filter, with the caps that nothing lifts.
///
/// # Errors
/// When the text is no filter.
pub fn filter(text: &str) -> Result<EnvFilter, String> {
    let mut filter = EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    for cap in CAPPED {
        filter = filter.add_directive(Directive::from_str(cap).map_err(|error| error.to_string())?);
    }
    Ok(filter)
}

/// Makes every panic, on whatever thread, end the process. A worker that lost a thread would only seem to
/// work; one that is gone is replaced, and its jobs are delivered again.
pub fn abort_on_panic(broken: Broken) {
    std::panic::set_hook(Box::new(move |info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current();
        tracing::error!(
            category = "panic",
            place,
            thread = thread.name().unwrap_or("unnamed"),
            "a panic; aborting"
        );
        broken.abort(format!("a panic at {place}"));
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_stay_capped_whatever_is_asked() {
        let text = filter("trace,async_nats=trace").unwrap().to_string();
        assert!(text.contains("async_nats=warn") && !text.contains("async_nats=trace"), "{text}");
        assert!(filter("millrace_worker=loud").is_err());
    }
}
