//! Logs: JSON lines on standard error, filtered by `RUST_LOG`. No secret and no job's content reaches them,
//! because the operator reads neither.

use tracing_subscriber::EnvFilter;

/// What is logged without `RUST_LOG`.
const DEFAULT: &str = "info,kube_client=warn,kube_runtime=warn";

/// Starts logging.
///
/// # Errors
/// When `RUST_LOG` cannot be read, or logging was started before.
pub fn start() -> anyhow::Result<()> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) => EnvFilter::try_new(&text).map_err(|error| anyhow::anyhow!("RUST_LOG: {error}"))?,
        Err(_) => EnvFilter::new(DEFAULT),
    };
    tracing_subscriber::fmt()
        .json()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init()
        .map_err(|error| anyhow::anyhow!("logging: {error}"))
}
