//! A child process: its own log file, signals, a bounded wait, and death with its parent.
//!
//! Children are started with a parent-death signal, so that a killed test leaves none behind. Linux sends
//! that signal when the *thread* that started the child ends, and threads of test runners and of tokio end
//! early; so one thread that never ends starts them all.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A wait for a child's state looks this often.
const POLL: Duration = Duration::from_millis(10);
/// Lines of the log that an error shows.
const LOG_LINES_SHOWN: usize = 30;

/// Starts that may wait for the starting thread; a start takes a millisecond, and more callers wait.
const ORDERS_MAX: usize = 16;

/// What the kernel counts processor time in.
const TICKS_PER_S: f64 = 100.0;

/// Set once this process is about to end.
static STOPPING: AtomicBool = AtomicBool::new(false);

/// Ends every wait for a child to be ready, so that a program that was interrupted in the middle of its start
/// drops what it has started instead of leaving it behind.
pub fn stop_waiting() {
    STOPPING.store(true, Ordering::Relaxed);
}

/// A signal that a test sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Ends the process, unhandled.
    Kill,
    /// Asks it to end.
    Terminate,
    /// Ctrl-C.
    Interrupt,
    /// Stops it where it is.
    Stop,
    /// Lets it go on.
    Continue,
    /// Asks it to read its configuration anew.
    Hangup,
}

impl Signal {
    fn name(self) -> &'static str {
        match self {
            Signal::Kill => "KILL",
            Signal::Terminate => "TERM",
            Signal::Interrupt => "INT",
            Signal::Stop => "STOP",
            Signal::Continue => "CONT",
            Signal::Hangup => "HUP",
        }
    }
}

/// A running child. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; what it prints is appended to `log`.
    ///
    /// # Errors
    /// When the program or the log cannot be opened.
    pub fn start(command: &Command, log: &Path) -> Result<Self> {
        let output = File::options().create(true).append(true).open(log)?;
        let errors = output.try_clone()?;
        let mut wrapped = with_parent_death(command);
        wrapped.stdin(Stdio::null()).stdout(output).stderr(errors);
        let program = Path::new(command.get_program());
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let child = spawn(wrapped).with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { child, name, log: log.to_owned() })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its resident memory, in bytes: now, and the most so far.
    ///
    /// # Errors
    /// When it has ended.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let field = |name: &str| -> Result<u64> {
            let line = text.lines().find(|line| line.starts_with(name)).context("no such field")?;
            let kib: u64 = line.split_whitespace().nth(1).context("no value")?.parse()?;
            Ok(kib << 10)
        };
        Ok((field("VmRSS:")?, field("VmHWM:")?))
    }

    /// Processor time used so far, in seconds.
    ///
    /// # Errors
    /// When it has ended.
    pub fn processor_s(&self) -> Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        // The second field is the program's name in parentheses and may hold spaces.
        let rest = text.rsplit(')').next().unwrap_or_default();
        let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
        Ok(ticks.sum::<Result<f64, _>>()? / TICKS_PER_S)
    }

    /// Sends a signal. A process that has already ended is no error.
    ///
    /// # Errors
    /// When `sh` cannot be run.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        if signal == Signal::Kill {
            self.child.kill()?;
            return Ok(());
        }
        // The shell's own `kill`: the standard library can only send SIGKILL.
        let line = format!("kill -{} {}", signal.name(), self.child.id());
        Command::new("sh").arg("-c").arg(&line).stderr(Stdio::null()).status().context(line)?;
        Ok(())
    }

    /// Kills it and waits until it is gone.
    ///
    /// # Errors
    /// When the wait fails.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::Kill)?;
        self.child.wait()?;
        Ok(())
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When the wait fails.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When it is still there after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} still runs after {limit:?}\n{}", self.name, self.log_tail());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until `ready` says so.
    ///
    /// # Errors
    /// When it is not ready within `limit` or ends before; the message holds the end of its log.
    pub fn wait_until(&mut self, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<Duration> {
        let start = Instant::now();
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status} before it was ready\n{}", self.name, self.log_tail());
            }
            if STOPPING.load(Ordering::Relaxed) {
                bail!("{} was not ready before the end", self.name);
            }
            if start.elapsed() >= limit {
                bail!("{} is not ready after {limit:?}\n{}", self.name, self.log_tail());
            }
            std::thread::sleep(POLL);
        }
        Ok(start.elapsed())
    }

    /// All that it printed so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The last lines that it printed.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let first = lines.len().saturating_sub(LOG_LINES_SHOWN);
        format!("--- end of the log of {}\n{}", self.name, lines[first..].join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The child may already be gone; nothing is left to do then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The same command under `setpriv`, which sets the parent-death signal and then becomes the program. It is
/// part of every Debian; without it, children only die with the harness's own clean-up.
pub fn with_parent_death(command: &Command) -> Command {
    const SETPRIV: &str = "/usr/bin/setpriv";
    let mut wrapped = if Path::new(SETPRIV).exists() {
        let mut wrapped = Command::new(SETPRIV);
        wrapped.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program());
        wrapped
    } else {
        Command::new(command.get_program())
    };
    wrapped.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        wrapped.current_dir(folder);
    }
    // A group of its own: Ctrl-C at the terminal reaches the harness alone, which then ends its children
    // in order.
    wrapped.process_group(0);
    wrapped
}

type Order = (Command, mpsc::SyncSender<io::Result<Child>>);

/// Has the one starting thread start a child.
fn spawn(command: Command) -> io::Result<Child> {
    static STARTER: LazyLock<Mutex<mpsc::SyncSender<Order>>> = LazyLock::new(|| {
        let (orders, inbox) = mpsc::sync_channel::<Order>(ORDERS_MAX);
        let work = move || {
            for (mut command, answer) in inbox {
                // Whoever asked may have panicked meanwhile; the child then ends as its handle is dropped.
                let _ = answer.send(command.spawn());
            }
        };
        std::thread::Builder::new().name("starter".into()).spawn(work).expect("threads can be started");
        Mutex::new(orders)
    });
    let gone = |_| io::Error::other("the starting thread has ended");
    let (answer, child) = mpsc::sync_channel(1);
    STARTER
        .lock()
        .map_err(|e| io::Error::other(e.to_string()))?
        .send((command, answer))
        .map_err(|_| gone(()))?;
    child.recv().map_err(|_| gone(()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(log: &Path) -> Process {
        let mut command = Command::new("/bin/sleep");
        command.arg("600");
        Process::start(&command, log).unwrap()
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it_and_dies_on_drop() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut child = std::thread::spawn(move || sleeper(&log)).join().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(child.ended().unwrap().is_none());
        let id = child.id();
        drop(child);
        assert!(!Path::new(&format!("/proc/{id}")).exists());
    }

    #[test]
    fn signals_and_log() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "trap 'echo caught; exit 3' TERM; echo up; while :; do sleep 0.02; done"]);
        let mut child = Process::start(&command, &log).unwrap();
        child
            .wait_until(Duration::from_secs(5), || std::fs::read_to_string(&log).unwrap() == "up\n")
            .unwrap();
        child.signal(Signal::Stop).unwrap();
        child.signal(Signal::Terminate).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(child.ended().unwrap().is_none(), "a stopped process handles no signal");
        child.signal(Signal::Continue).unwrap();
        assert_eq!(child.wait(Duration::from_secs(5)).unwrap().code(), Some(3));
        assert!(child.log_tail().ends_with("up\ncaught"));
        child.signal(Signal::Terminate).unwrap();
    }

    #[test]
    fn a_child_that_ends_early_is_reported_with_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo no such disk; exit 7"]);
        let mut child = Process::start(&command, &folder.path().join("log")).unwrap();
        let error = child.wait_until(Duration::from_secs(5), || false).unwrap_err().to_string();
        assert!(error.contains("7") && error.contains("no such disk"), "{error}");
    }
}
