//! The smallest HTTP/1.1 client that can ask a local server for its health: GET, whole body, a time limit.
//!
//! It serves monitoring pages on 127.0.0.1 alone and follows no redirect. Responses are bounded.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Monitoring pages answer at once or not at all.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Larger than any metrics page.
const BODY_BYTES_MAX: u64 = 8 << 20;

/// The status code and body of `path`.
///
/// # Errors
/// When the server cannot be reached within 2 s or answers something other than HTTP.
pub fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // HTTP/1.0, so that the answer comes in one piece and ends with the connection.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut bytes = Vec::new();
    stream.take(BODY_BYTES_MAX).read_to_end(&mut bytes)?;
    parse(&String::from_utf8_lossy(&bytes)).with_context(|| format!("http://{address}{path}"))
}

fn parse(answer: &str) -> Result<(u16, String)> {
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        bail!("the answer has no end of headers: {:?}", answer.chars().take(80).collect::<String>());
    };
    let status = head.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    Ok((status.context("the answer has no status code")?, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        let (status, body) = parse("HTTP/1.1 503 Service Unavailable\r\nA: b\r\n\r\nnot ready").unwrap();
        assert_eq!((status, body.as_str()), (503, "not ready"));
        assert!(parse("junk").is_err());
        assert!(parse("HTTP/1.1\r\n\r\n").is_err());
    }
}
