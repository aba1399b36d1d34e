//! One container's life: start, probes, end, back-off and restart, and its end on SIGTERM.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::Result;
use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::jiff::Timestamp;
use tokio::sync::watch;

use super::probe::{self, ProbeVerdict, Target};
use super::sandbox::Sandbox;
use crate::process::{Process, Signal};

/// The end of a process is seen this late at most.
const POLL: Duration = Duration::from_millis(20);
/// The wait before the second restart; it doubles. A kubelet waits ten times as long.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// The longest wait. A kubelet's is 300 s.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A container that ran this long starts over with the shortest wait.
const BACKOFF_RESET: Duration = Duration::from_secs(120);
/// After SIGKILL a process is gone at once, unless a device holds it.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// The part of its log that a kubelet takes for a termination message.
const LAST_WORDS_BYTES: usize = 2048;

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The exit code; 128 and the signal's number for a signal.
    pub code: i32,
    /// `Completed`, `Error` or why it could not start.
    pub reason: String,
    /// More words, if any.
    pub message: String,
    /// When it started.
    pub started: Timestamp,
    /// When it ended.
    pub finished: Timestamp,
}

/// Where a container stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It does not run yet, or not again.
    Waiting {
        /// One word.
        reason: String,
        /// More words, if any.
        message: String,
    },
    /// It runs.
    Running {
        /// Since when.
        since: Timestamp,
    },
    /// It ended.
    Ended(Ended),
}

/// What is reported of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerProgress {
    /// Where it stands.
    pub state: Standing,
    /// How it ended the last time, if it was started again.
    pub last: Option<Ended>,
    /// How often it was started again.
    pub restarts: i32,
    /// Its startup probe has passed.
    pub started: bool,
    /// Its readiness probe passes.
    pub ready: bool,
}

impl Default for ContainerProgress {
    fn default() -> Self {
        let state = Standing::Waiting { reason: "ContainerCreating".into(), message: String::new() };
        Self { state, last: None, restarts: 0, started: false, ready: false }
    }
}

/// Whether a container that ended with this code starts again.
pub fn restarts(policy: Option<&str>, code: i32) -> bool {
    match policy {
        Some("Never") => false,
        Some("OnFailure") => code != 0,
        _ => true,
    }
}

/// A container that is to run.
#[derive(Debug)]
pub struct ContainerRun {
    /// As the pod has it.
    pub spec: Container,
    /// Its surroundings.
    pub sandbox: Sandbox,
    /// The pod's address.
    pub ip: std::net::Ipv4Addr,
    /// What it prints is appended here.
    pub log: PathBuf,
    /// The pod's restart policy.
    pub restart_policy: Option<String>,
    /// Where its progress is reported, and its place there.
    pub board: watch::Sender<Vec<ContainerProgress>>,
    /// Its place on the board.
    pub place: usize,
    /// How long it may take to end, once it is to end.
    pub stop: watch::Receiver<Option<Duration>>,
}

impl ContainerRun {
    fn report(&self, change: impl FnOnce(&mut ContainerProgress)) {
        self.board.send_modify(|board| change(&mut board[self.place]));
    }

    /// Runs until it is not started again.
    pub async fn go(mut self) {
        let mut backoff = None;
        loop {
            let since = Instant::now();
            let ended = self.once().await;
            let again = restarts(self.restart_policy.as_deref(), ended.code) && self.stop.borrow().is_none();
            self.report(|progress| {
                progress.state = Standing::Ended(ended.clone());
                (progress.ready, progress.started) = (false, false);
            });
            if !again {
                return;
            }
            if since.elapsed() >= BACKOFF_RESET {
                backoff = None;
            }
            if let Some(wait) = backoff {
                let message = format!("back-off {wait:?} restarting failed container={}", self.spec.name);
                self.report(|progress| {
                    progress.state = Standing::Waiting { reason: "CrashLoopBackOff".into(), message };
                    progress.last = Some(ended.clone());
                });
                let stopped = self.stop.wait_for(Option::is_some);
                if tokio::time::timeout(wait, stopped).await.is_ok() {
                    self.report(|progress| progress.state = Standing::Ended(ended));
                    return;
                }
            }
            backoff = Some(backoff.map_or(BACKOFF_FIRST, |wait: Duration| BACKOFF_MAX.min(wait * 2)));
            self.report(|progress| {
                progress.last = Some(ended);
                progress.restarts += 1;
            });
        }
    }

    async fn once(&mut self) -> Ended {
        let started = Timestamp::now();
        match self.start_and_wait(started).await {
            Ok(status) => {
                let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
                let reason = if code == 0 { "Completed" } else { "Error" };
                let message = if code == 0 { String::new() } else { self.last_words() };
                Ended { code, reason: reason.into(), message, started, finished: Timestamp::now() }
            }
            Err(error) => {
                let (reason, message) = ("StartError".into(), format!("{error:#}"));
                Ended { code: 128, reason, message, started, finished: Timestamp::now() }
            }
        }
    }

    /// The end of its log, where the container asks for that as its termination message.
    fn last_words(&self) -> String {
        if self.spec.termination_message_policy.as_deref() != Some("FallbackToLogsOnError") {
            return String::new();
        }
        let log = std::fs::read(&self.log).unwrap_or_default();
        let start = log.len().saturating_sub(LAST_WORDS_BYTES);
        String::from_utf8_lossy(&log[start..]).into_owned()
    }

    async fn start_and_wait(&mut self, since: Timestamp) -> Result<ExitStatus> {
        let mut process = Process::start(&self.sandbox.command(), &self.log)?;
        let target = Target { ip: self.ip, process: process.id(), sandbox: self.sandbox.clone() };
        let started = self.spec.startup_probe.is_none();
        let ready = started && self.spec.readiness_probe.is_none();
        self.report(|progress| {
            progress.state = Standing::Running { since };
            (progress.started, progress.ready) = (started, ready);
        });
        let mut stop = self.stop.clone();
        let grace = tokio::select! {
            ended = end_of(&mut process) => return ended,
            () = self.probes(&target) => grace_of(&self.spec),
            asked = stop.wait_for(Option::is_some) => asked.ok().and_then(|grace| *grace).unwrap_or_default(),
        };
        terminate(&mut process, grace, stop).await
    }

    /// Ends when the container is to be restarted.
    async fn probes(&self, target: &Target) {
        if let Some(startup) = &self.spec.startup_probe {
            let mut passed = false;
            self.watch(startup, target, |good| {
                passed = good;
                true
            })
            .await;
            if !passed {
                return;
            }
            let ready = self.spec.readiness_probe.is_none();
            self.report(|progress| (progress.started, progress.ready) = (true, ready));
        }
        let readiness = async {
            match &self.spec.readiness_probe {
                Some(probe) => {
                    self.watch(probe, target, |good| {
                        self.report(|progress| progress.ready = good);
                        false
                    })
                    .await;
                }
                None => std::future::pending().await,
            }
        };
        let liveness = async {
            match &self.spec.liveness_probe {
                Some(probe) => self.watch(probe, target, |good| !good).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! { () = readiness => {}, () = liveness => {} }
    }

    /// Looks again and again, until `crossed`, told of each result that crosses a threshold, says to end.
    async fn watch(&self, probe: &Probe, target: &Target, mut crossed: impl FnMut(bool) -> bool) {
        let mut verdict = ProbeVerdict::new(probe);
        tokio::time::sleep(probe::delay(probe)).await;
        loop {
            let good = probe::look(probe, &self.spec, target).await.is_ok();
            if verdict.count(good).is_some_and(&mut crossed) {
                return;
            }
            tokio::time::sleep(probe::period(probe)).await;
        }
    }
}

/// The grace period of a container that its liveness probe condemned.
fn grace_of(spec: &Container) -> Duration {
    let probe = spec.liveness_probe.as_ref().and_then(|probe| probe.termination_grace_period_seconds);
    Duration::from_secs(probe.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(30))
}

async fn end_of(process: &mut Process) -> Result<ExitStatus> {
    loop {
        if let Some(status) = process.ended()? {
            return Ok(status);
        }
        tokio::time::sleep(POLL).await;
    }
}

/// SIGTERM, then SIGKILL when the grace period is over; it may be cut short meanwhile.
async fn terminate(
    process: &mut Process,
    grace: Duration,
    mut stop: watch::Receiver<Option<Duration>>,
) -> Result<ExitStatus> {
    process.signal(Signal::Terminate)?;
    stop.mark_unchanged();
    let cut_short = async {
        let shorter = |asked: &Option<Duration>| asked.is_some_and(|asked| asked < grace);
        match stop.wait_for(shorter).await {
            Ok(shorter) => *shorter,
            Err(_) => None,
        }
    };
    let mut cut = Duration::ZERO;
    tokio::select! {
        ended = end_of(process) => return ended,
        () = tokio::time::sleep(grace) => {}
        shorter = cut_short => cut = shorter.unwrap_or_default(),
    }
    if let Ok(ended) = tokio::time::timeout(cut, end_of(process)).await {
        return ended;
    }
    process.signal(Signal::Kill)?;
    tokio::time::timeout(KILL_LIMIT, end_of(process)).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restart_policies() {
        let cases = [
            (None, 0, true),
            (Some("Always"), 0, true),
            (Some("OnFailure"), 0, false),
            (Some("OnFailure"), 1, true),
            (Some("Never"), 1, false),
        ];
        for (policy, code, again) in cases {
            assert_eq!(restarts(policy, code), again, "{policy:?} {code}");
        }
    }
}
