//! Startup, liveness and readiness probes: httpGet, tcpSocket and exec, with a kubelet's thresholds.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::sandbox::Sandbox;

/// An answer's status line is shorter.
const ANSWER_BYTES_MAX: u64 = 4096;

/// What a probe looks at.
#[derive(Debug, Clone)]
pub struct Target {
    /// The pod's address.
    pub ip: Ipv4Addr,
    /// The container's process.
    pub process: u32,
    /// The container's surroundings, for commands.
    pub sandbox: Sandbox,
}

/// Counts successes and failures in a row.
#[derive(Debug, Clone, Copy)]
pub struct ProbeVerdict {
    success_threshold: i32,
    failure_threshold: i32,
    successes: i32,
    failures: i32,
}

impl ProbeVerdict {
    /// With a kubelet's defaults where the probe is silent.
    pub fn new(probe: &Probe) -> Self {
        Self {
            success_threshold: probe.success_threshold.unwrap_or(1).max(1),
            failure_threshold: probe.failure_threshold.unwrap_or(3).max(1),
            successes: 0,
            failures: 0,
        }
    }

    /// `Some` when this result crosses a threshold.
    pub fn count(&mut self, success: bool) -> Option<bool> {
        let (count, other, threshold) = if success {
            (&mut self.successes, &mut self.failures, self.success_threshold)
        } else {
            (&mut self.failures, &mut self.successes, self.failure_threshold)
        };
        *other = 0;
        *count += 1;
        (*count >= threshold).then_some(success)
    }
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(value.and_then(|value| u64::try_from(value).ok()).unwrap_or(default))
}

/// The time before the first look.
pub fn delay(probe: &Probe) -> Duration {
    seconds(probe.initial_delay_seconds, 0)
}

/// The time between two looks.
pub fn period(probe: &Probe) -> Duration {
    seconds(probe.period_seconds, 10).max(Duration::from_secs(1))
}

/// One look.
///
/// # Errors
/// Why the container did not pass.
pub async fn look(probe: &Probe, container: &Container, target: &Target) -> Result<()> {
    let limit = seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1));
    let look = async {
        if let Some(get) = &probe.http_get {
            return http_get(get, container, target.ip).await;
        }
        if let Some(tcp) = &probe.tcp_socket {
            let port = port(&tcp.port, container)?;
            TcpStream::connect((target.ip, port)).await.context("tcpSocket")?;
            return Ok(());
        }
        let Some(exec) = &probe.exec else { bail!("only httpGet, tcpSocket and exec are supported") };
        let command = target.sandbox.enter(target.process, exec.command.as_deref().unwrap_or_default());
        let mut command = tokio::process::Command::from(command);
        let done = command.kill_on_drop(true).stdin(Stdio::null()).output().await?;
        ensure!(done.status.success(), "exec: {}", done.status);
        Ok(())
    };
    tokio::time::timeout(limit, look).await.with_context(|| format!("no answer within {limit:?}"))?
}

async fn http_get(get: &HTTPGetAction, container: &Container, ip: Ipv4Addr) -> Result<()> {
    ensure!(get.scheme.as_deref() != Some("HTTPS"), "scheme HTTPS is not supported");
    let ip = match &get.host {
        Some(host) => host.parse().with_context(|| format!("host {host:?} is no address"))?,
        None => IpAddr::V4(ip),
    };
    let address = SocketAddr::new(ip, port(&get.port, container)?);
    let mut stream = TcpStream::connect(address).await.context("httpGet")?;
    let headers: String = get
        .http_headers
        .iter()
        .flatten()
        .map(|header| format!("{}: {}\r\n", header.name, header.value))
        .collect();
    let path = get.path.as_deref().unwrap_or("/");
    let request =
        format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nUser-Agent: kube-probe\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let code: Option<u16> = answer.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    match code {
        Some(200..400) => Ok(()),
        Some(code) => bail!("HTTP probe failed with statuscode: {code}"),
        None => bail!("the answer is not HTTP"),
    }
}

fn port(port: &IntOrString, container: &Container) -> Result<u16> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => container
            .ports
            .iter()
            .flatten()
            .find(|port| port.name.as_ref() == Some(name))
            .map(|port| port.container_port),
    };
    let number = number.with_context(|| format!("no port is named {port:?}"))?;
    u16::try_from(number).with_context(|| format!("port {number}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn thresholds_count_results_in_a_row() {
        let probe: Probe =
            serde_json::from_value(json!({"failureThreshold": 2, "successThreshold": 2})).unwrap();
        let mut verdict = ProbeVerdict::new(&probe);
        let results = [false, true, false, false, false, true, true];
        let counted = results.map(|result| verdict.count(result));
        assert_eq!(counted, [None, None, None, Some(false), Some(false), None, Some(true)]);
    }

    #[tokio::test]
    async fn http_answers_are_judged_by_their_code() {
        for (answer, good) in [("HTTP/1.1 204 x", true), ("HTTP/1.1 503 x", false), ("SSH-2.0", false)] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let number = listener.local_addr().unwrap().port();
            let served = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                // A request that is left unread makes the close a reset.
                let mut request = [0; 1024];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                stream.write_all(answer.as_bytes()).await.unwrap();
            });
            let container: Container = serde_json::from_value(
                json!({"name": "c", "ports": [{"name": "p", "containerPort": number}]}),
            )
            .unwrap();
            let get: HTTPGetAction =
                serde_json::from_value(json!({"port": "p", "path": "/healthz"})).unwrap();
            let result = http_get(&get, &container, Ipv4Addr::LOCALHOST).await;
            assert_eq!(result.is_ok(), good, "{answer}: {result:?}");
            served.await.unwrap();
        }
    }
}
