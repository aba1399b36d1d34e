//! A real nats-server with JetStream that fsyncs every write, as production must run it.
//!
//! It keeps its port and its store over kills and restarts, as a broker on a persistent volume does.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::ConnectOptions;
use tempfile::TempDir;

use crate::accounts::Accounts;
use crate::ports::Port;
use crate::process::{Process, Signal};
use crate::{http, place, tools};

/// The broker recovers its store within this time; ours are small.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// The program's place in the tools' cache.
pub const PROGRAM: &str = "bin/nats-server";
/// The oldest one that is supported.
pub const OLDEST: &str = "bin/nats-server-oldest";

fn write_config(folder: &TempDir, (client, monitor): (&Port, &Port), extra: &str) -> Result<()> {
    let config = format!(
        "server_name: millrace-test\nhost: 127.0.0.1\nport: {}\nhttp: \"127.0.0.1:{}\"\n\
         jetstream {{\n  store_dir: {:?}\n  sync_interval: always\n  max_memory_store: 64MB\n  \
         max_file_store: 1TB\n}}\n{extra}\n",
        client.number(),
        monitor.number(),
        folder.path().join("store"),
    );
    Ok(fs::write(folder.path().join("nats.conf"), config)?)
}

/// A running broker.
#[derive(Debug)]
pub struct NatsServer {
    process: Process,
    program: &'static str,
    client: Port,
    monitor: Port,
    folder: TempDir,
    accounts: Option<Accounts>,
}

impl NatsServer {
    /// Starts a broker with an empty store and waits until JetStream is up.
    ///
    /// # Errors
    /// When the program is missing or does not come up; the message holds the end of its log.
    pub fn start() -> Result<Self> {
        Self::start_with("")
    }

    /// The same with more lines of configuration, such as `max_payload: 2MB`.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(extra: &str) -> Result<Self> {
        Self::start_in(place::folder("nats-")?, extra, None)
    }

    /// One that takes only TLS and only the user of [`Self::accounts`].
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_secured() -> Result<Self> {
        let folder = place::folder("nats-")?;
        let accounts = Accounts::create(folder.path())?;
        let broker = accounts.broker.clone();
        Self::start_in(folder, &broker, Some(accounts))
    }

    fn start_in(folder: TempDir, extra: &str, accounts: Option<Accounts>) -> Result<Self> {
        Self::start_program(PROGRAM, folder, extra, accounts)
    }

    /// The same as [`Self::start_with`] by another program of the tools' cache, such as [`OLDEST`].
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_as(program: &'static str, extra: &str) -> Result<Self> {
        Self::start_program(program, place::folder("nats-")?, extra, None)
    }

    fn start_program(
        program: &'static str,
        folder: TempDir,
        extra: &str,
        accounts: Option<Accounts>,
    ) -> Result<Self> {
        let (client, monitor) = (Port::reserve()?, Port::reserve()?);
        write_config(&folder, (&client, &monitor), extra)?;
        let process = Self::launch(program, &folder)?;
        let mut server = Self { process, program, client, monitor, folder, accounts };
        server.wait_ready()?;
        Ok(server)
    }

    /// Has it read its configuration anew, with these lines instead of the former ones, and waits until it has.
    ///
    /// # Errors
    /// When it does not.
    pub fn reload_with(&mut self, extra: &str) -> Result<()> {
        let reloads = |log: &str| log.matches("Reloaded server configuration").count();
        let before = reloads(&self.log());
        write_config(&self.folder, (&self.client, &self.monitor), extra)?;
        self.process.signal(Signal::Hangup)?;
        let log = self.folder.path().join("nats.log");
        let reloaded = || fs::read_to_string(&log).is_ok_and(|text| reloads(&text) > before);
        self.process.wait_until(READY_LIMIT, reloaded).map(drop)
    }

    fn launch(program: &str, folder: &TempDir) -> Result<Process> {
        let mut command = Command::new(tools::tool(program)?);
        command.arg("-c").arg(folder.path().join("nats.conf"));
        Process::start(&command, &folder.path().join("nats.log"))
    }

    fn wait_ready(&mut self) -> Result<()> {
        let monitor = self.monitor_address();
        // `/healthz` is 200 only when JetStream has recovered its streams and consumers.
        let ready = || http::get(monitor, "/healthz").is_ok_and(|(status, _)| status == 200);
        self.process.wait_until(READY_LIMIT, ready).map(drop)
    }

    /// `nats://127.0.0.1:PORT`, or `tls://` of a secured one.
    pub fn url(&self) -> String {
        let scheme = if self.accounts.is_some() { "tls" } else { "nats" };
        format!("{scheme}://127.0.0.1:{}", self.client.number())
    }

    /// The files that a secured one asks for.
    pub fn accounts(&self) -> Option<&Accounts> {
        self.accounts.as_ref()
    }

    /// What a client needs to get in, for good: it reconnects for ever.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub async fn options(&self) -> Result<ConnectOptions> {
        let options = ConnectOptions::new().max_reconnects(None).name("millrace-tests");
        let Some(accounts) = &self.accounts else { return Ok(options) };
        let options = options.add_root_certificates(accounts.authority.clone());
        Ok(options.credentials_file(&accounts.credentials).await?)
    }

    /// The address of the monitoring pages.
    pub fn monitor_address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.monitor.number()).into()
    }

    /// `http://127.0.0.1:PORT` of the monitoring pages.
    pub fn monitor_url(&self) -> String {
        format!("http://{}", self.monitor_address())
    }

    /// A client that reconnects for ever.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn connect(&self) -> Result<async_nats::Client> {
        let options = self.options().await?;
        options.connect(self.url()).await.with_context(|| format!("cannot connect to {}", self.url()))
    }

    /// SIGKILL, as a crash of the broker.
    ///
    /// # Errors
    /// When the wait for its end fails.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Starts it again on its port and store (after killing it, if it runs) and waits until it is ready.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.process = Self::launch(self.program, &self.folder)?;
        self.wait_ready()
    }

    /// Stops it where it is: connections stay open and nobody answers.
    ///
    /// # Errors
    /// When the signal cannot be sent.
    pub fn pause(&mut self) -> Result<()> {
        self.process.signal(Signal::Stop)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When the signal cannot be sent.
    pub fn resume(&mut self) -> Result<()> {
        self.process.signal(Signal::Continue)
    }

    /// All that it printed.
    pub fn log(&self) -> String {
        self.process.log()
    }
}
