//! The broker's fsync policy, read from its monitoring page.
//!
//! A broker that does not fsync each write acknowledges jobs that a power cut takes back. No client can see
//! the policy except on `/varz`, so where that page is configured it is read at the start, and what it says
//! is logged. It is one GET over HTTP/1.0 with a time and a size limit; no redirect is followed.

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The page answers at once or not at all.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Larger than any `/varz`.
const PAGE_BYTES_MAX: u64 = 4 << 20;

/// What the broker does before it acknowledges a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fsync {
    /// It fsyncs each write.
    Always,
    /// It fsyncs after this long, by its own words.
    Every(String),
}

/// Reads the policy from `http://host:port`.
///
/// # Errors
/// When the page cannot be reached or does not say; the message names the address.
pub async fn fsync(monitor: &str) -> Result<Fsync, String> {
    let page = tokio::time::timeout(TIMEOUT, get(monitor, "/varz")).await;
    let page = page.map_err(|_| format!("nats.monitor {monitor:?}: no answer in {} s", TIMEOUT.as_secs()))?;
    let page = page.map_err(|error| format!("nats.monitor {monitor:?}: {error}"))?;
    policy(&page).ok_or_else(|| format!("nats.monitor {monitor:?}: /varz has no jetstream.config"))
}

fn policy(page: &Value) -> Option<Fsync> {
    let config = page.get("jetstream")?.get("config")?;
    if config.get("sync_always").and_then(Value::as_bool) == Some(true) {
        return Some(Fsync::Always);
    }
    let seconds = config.get("sync_interval").and_then(Value::as_u64).map(|ns| ns / 1_000_000_000);
    Some(Fsync::Every(seconds.map_or_else(|| "an unknown time".to_owned(), |s| format!("{s} s"))))
}

async fn get(monitor: &str, path: &str) -> Result<Value, String> {
    let host = monitor.strip_prefix("http://").ok_or("not an http:// address")?.trim_end_matches('/');
    let address = if host.contains(':') { host.to_owned() } else { format!("{host}:8222") };
    let text = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect(&address).await.map_err(text)?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(text)?;
    let mut answer = Vec::new();
    stream.take(PAGE_BYTES_MAX).read_to_end(&mut answer).await.map_err(text)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("the answer is no HTTP")?;
    if head.split_whitespace().nth(1) != Some("200") {
        return Err(format!("the answer is {:?}", head.lines().next().unwrap_or_default()));
    }
    serde_json::from_str(body).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn policies() {
        let always = json!({"jetstream": {"config": {"sync_always": true, "sync_interval": 0}}});
        assert_eq!(policy(&always), Some(Fsync::Always));
        let lazy = json!({"jetstream": {"config": {"sync_interval": 120_000_000_000u64}}});
        assert_eq!(policy(&lazy), Some(Fsync::Every("120 s".into())));
        assert_eq!(policy(&json!({"jetstream": {}})), None);
    }
}
