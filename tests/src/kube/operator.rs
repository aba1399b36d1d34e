//! The operator as a child process outside of the cluster, with a kubeconfig: for tests that kill it, count its
//! writes or measure it.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use tempfile::TempDir;

use crate::ports::Port;
use crate::process::Process;
use crate::{http as local, tools};

/// It listens as soon as it has read its options.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// The image that test workers have.
pub const WORKER_IMAGE: &str = "millrace-worker:test";

/// A running operator. Dropping it kills it.
#[derive(Debug)]
pub struct Operator {
    process: Process,
    health: Port,
    _folder: TempDir,
}

impl Operator {
    /// Starts one with the rights of a kubeconfig, beside a broker.
    ///
    /// # Errors
    /// When the program was not built or does not come up.
    pub fn start(kubeconfig: PathBuf, nats: &str, arguments: &[&str]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("millrace-operator-").tempdir()?;
        let health = Port::reserve()?;
        let mut command = Command::new(tools::program("millrace-operator")?);
        command
            .args(["--nats-servers", nats, "--worker-image", WORKER_IMAGE])
            .args(["--listen", &format!("127.0.0.1:{}", health.number())])
            .args(arguments)
            .env("KUBECONFIG", kubeconfig);
        let process = Process::start(&command, &folder.path().join("operator.log"))?;
        let mut operator = Self { process, health, _folder: folder };
        let address = ([127, 0, 0, 1], operator.health.number()).into();
        let ready = || local::get(address, "/healthz").is_ok_and(|(status, _)| status == 200);
        operator.process.wait_until(READY_LIMIT, ready)?;
        Ok(operator)
    }

    /// The sum over all label sets of one metric.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let (_, page) = local::get(([127, 0, 0, 1], self.health.number()).into(), "/metrics")?;
        Ok(crate::worker::sum_of(&page, name))
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// When the wait for its end fails.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// All that it logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The last lines that it logged.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }

    /// Its resident memory, in bytes: now, and the most so far.
    ///
    /// # Errors
    /// When it has ended.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.process.memory()
    }

    /// Processor time used so far, in seconds.
    ///
    /// # Errors
    /// When it has ended.
    pub fn processor_s(&self) -> Result<f64> {
        self.process.processor_s()
    }
}
