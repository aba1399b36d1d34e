//! A `millrace-worker serve` process with a configuration file, a health port and a log of its own.

use std::fs;
use std::net::SocketAddr;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result};
use millrace_crds::config::WorkerConfig;
use tempfile::TempDir;

use crate::ports::Port;
use crate::process::{Process, Signal};
use crate::{http, place, tools};

/// A real model is read and warmed up within this time, also in a test build on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(120);

/// A running worker. Dropping it kills it.
#[derive(Debug)]
pub struct Worker {
    process: Process,
    health: Port,
    _folder: TempDir,
}

impl Worker {
    /// Starts a worker and does not wait for it. It listens on a port of its own, whatever `config` says.
    ///
    /// # Errors
    /// When the program was not built.
    pub fn start(config: &WorkerConfig, environment: &[(&str, &str)]) -> Result<Self> {
        let folder = place::folder("worker-")?;
        let health = Port::reserve()?;
        let mut config = config.clone();
        config.server.listen = ([127, 0, 0, 1], health.number()).into();
        let file = folder.path().join("worker.yaml");
        fs::write(&file, serde_yaml::to_string(&config)?)?;
        let mut command = Command::new(tools::program("millrace-worker")?);
        command.arg("serve").arg("--config").arg(&file).envs(environment.iter().copied());
        let process = Process::start(&command, &folder.path().join("worker.log"))?;
        Ok(Self { process, health, _folder: folder })
    }

    /// Starts a worker and waits until it takes jobs.
    ///
    /// # Errors
    /// When it does not come up; the message holds the end of its log.
    pub fn start_ready(config: &WorkerConfig) -> Result<Self> {
        let mut worker = Self::start(config, &[])?;
        worker.wait_ready()?;
        Ok(worker)
    }

    /// Waits until it takes jobs, and says how long that took.
    ///
    /// # Errors
    /// When it does not come up; the message holds the end of its log.
    pub fn wait_ready(&mut self) -> Result<Duration> {
        let address = self.health_address();
        let ready = || http::get(address, "/readyz").is_ok_and(|(status, _)| status == 200);
        self.process.wait_until(READY_LIMIT, ready)
    }

    /// The address of `/metrics`, `/healthz` and `/readyz`.
    pub fn health_address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.health.number()).into()
    }

    /// The sum over all label sets of one metric; 0 when it has not been counted yet.
    ///
    /// # Errors
    /// When the worker does not answer.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let (_, page) = http::get(self.health_address(), "/metrics")?;
        Ok(sum_of(&page, name))
    }

    /// Processor time used so far, in seconds.
    ///
    /// # Errors
    /// When it has ended.
    pub fn processor_s(&self) -> Result<f64> {
        self.process.processor_s()
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// When the wait for its end fails.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When it is still there after `limit`; the message holds the end of its log.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.process.wait(limit)
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When the wait fails.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.process.ended().context("worker")
    }

    /// All that it logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The last lines that it logged.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }
}

pub(crate) fn sum_of(page: &str, name: &str) -> f64 {
    page.lines()
        .filter_map(|line| line.strip_prefix(name))
        .filter(|rest| rest.starts_with(['{', ' ']))
        .filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    #[test]
    fn metrics_are_summed_over_labels() {
        let page = "# HELP a b\na{x=\"1\"} 2\na{x=\"2\"} 3.5\na_total 7\n";
        assert_eq!(super::sum_of(page, "a"), 5.5);
        assert_eq!(super::sum_of(page, "a_total"), 7.0);
        assert_eq!(super::sum_of(page, "b"), 0.0);
    }
}
