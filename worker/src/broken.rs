//! Last words: what breaks the process says why, and the jobs that are held write it down before the process aborts.
//!
//! A hung call or a lost thread cannot be mended, so that the process must end. The ledgers of the jobs that ran are
//! what tells the next worker which of them may have done it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How long the process waits for its jobs before it aborts.
pub const LAST_WORDS: Duration = Duration::from_millis(500);

/// Whether the process is broken, and why. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Broken(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    token: CancellationToken,
    cause: OnceLock<String>,
    /// Somebody will say when all is written.
    awaited: AtomicBool,
    written: Mutex<bool>,
    changed: Condvar,
}

impl Broken {
    /// Says that the process must end. The first cause is kept.
    pub fn declare(&self, cause: String) {
        let _ = self.0.cause.set(cause);
        self.0.token.cancel();
    }

    /// Says that the process must end, gives its jobs a moment, and aborts.
    pub fn abort(&self, cause: String) -> ! {
        self.declare(cause);
        if self.0.awaited.load(Ordering::Acquire) {
            let written = self.0.written.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = self.0.changed.wait_timeout_while(written, LAST_WORDS, |written| !*written);
        }
        std::process::abort();
    }

    /// Whether the process must end.
    pub fn is_declared(&self) -> bool {
        self.0.token.is_cancelled()
    }

    /// Waits until the process is broken.
    pub async fn declared(&self) {
        self.0.token.cancelled().await;
    }

    /// Why it is.
    pub fn cause(&self) -> String {
        self.0.cause.get().cloned().unwrap_or_else(|| "the engine has stopped".to_owned())
    }

    /// From here on an abort waits until [`Self::all_written`] is said.
    pub fn await_words(&self) {
        self.0.awaited.store(true, Ordering::Release);
    }

    /// The jobs have written down what there was to write.
    pub fn all_written(&self) {
        *self.0.written.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }
}
