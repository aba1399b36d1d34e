//! The real helm: installs, upgrades, renders and removes our chart.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use super::programs;

/// How long helm waits for what it installed.
const WAIT: &str = "120s";

/// The folder of the chart in this workspace.
pub fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/millrace")
}

/// Runs helm against one control plane.
#[derive(Debug)]
pub struct Helm {
    kubeconfig: PathBuf,
    home: TempDir,
}

impl Helm {
    /// With the rights of this kubeconfig.
    ///
    /// # Errors
    /// When no temporary folder can be made.
    pub fn new(kubeconfig: PathBuf) -> Result<Self> {
        Ok(Self { kubeconfig, home: tempfile::Builder::new().prefix("millrace-helm-").tempdir()? })
    }

    /// Installs or upgrades a release of the chart and waits until it is ready; returns the notes.
    ///
    /// # Errors
    /// What helm said.
    pub fn install(&self, release: &str, namespace: &str, values: &Value) -> Result<String> {
        let file = self.values(values)?;
        let mut command = self.command(namespace)?;
        command.args(["upgrade", "--install", "--create-namespace", "--wait", "--timeout", WAIT, release]);
        run(command.arg(chart()).arg("--values").arg(file))
    }

    /// Renders the chart's manifests without a cluster.
    ///
    /// # Errors
    /// What helm said.
    pub fn template(&self, release: &str, namespace: &str, values: &Value) -> Result<String> {
        let file = self.values(values)?;
        let mut command = self.command(namespace)?;
        run(command.arg("template").arg(release).arg(chart()).arg("--values").arg(file))
    }

    /// Removes a release and waits until its objects are gone.
    ///
    /// # Errors
    /// What helm said.
    pub fn uninstall(&self, release: &str, namespace: &str) -> Result<()> {
        let mut command = self.command(namespace)?;
        run(command.args(["uninstall", "--wait", "--timeout", WAIT, release])).map(drop)
    }

    fn values(&self, values: &Value) -> Result<PathBuf> {
        let file = self.home.path().join("values.json");
        std::fs::write(&file, values.to_string())?;
        Ok(file)
    }

    fn command(&self, namespace: &str) -> Result<Command> {
        let mut command = Command::new(programs::program("helm")?);
        // Its caches and settings lie in a folder of their own: nothing of the user's is read or written.
        for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(name, self.home.path());
        }
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(["--namespace", namespace]);
        Ok(command)
    }
}

fn run(command: &mut Command) -> Result<String> {
    let done = command.output().context("helm")?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "helm ended with {}: {}", done.status, said.trim());
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}
