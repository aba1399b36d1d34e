//! Free TCP ports of 127.0.0.1, reserved for as long as their holder lives.
//!
//! A port that was only probed may be taken by another test before the server binds it, and a restarted
//! server must get its old port back. So a reservation is a lock on a file that names the port: two
//! harnesses on one machine never hold the same port. The range lies below the one from which the kernel
//! takes the ports of outgoing connections.

use std::fs::{self, File};
use std::net::TcpListener;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, bail};

/// Below Linux's default `ip_local_port_range`, which starts at 32768.
const RANGE: Range<u16> = 20_000..32_000;

/// A reserved port. Dropping it gives it back.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _lock: File,
}

impl Port {
    /// Reserves a port that nobody listens on.
    ///
    /// # Errors
    /// When the lock folder cannot be written or all ports of the range are taken.
    pub fn reserve() -> Result<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let folder = lock_folder();
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        // Processes start at different places, so that they seldom probe the same ports.
        let start = u16::try_from(std::process::id() % u32::from(RANGE.end - RANGE.start))?;
        for _ in RANGE {
            let step = NEXT.fetch_add(1, Ordering::Relaxed);
            let offset = (u32::from(start) + u32::from(step)) % u32::from(RANGE.end - RANGE.start);
            let number = RANGE.start + u16::try_from(offset)?;
            let lock = File::create(folder.join(number.to_string()))?;
            if lock.try_lock().is_ok() && TcpListener::bind(("127.0.0.1", number)).is_ok() {
                return Ok(Self { number, _lock: lock });
            }
        }
        bail!("no free port of 127.0.0.1 in {RANGE:?}");
    }

    /// The port's number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

/// The files are empty and stay: removing a file that another process has open would split the lock.
fn lock_folder() -> PathBuf {
    std::env::temp_dir().join("millrace-ports")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_holders_never_share_a_port() {
        let ports: Vec<Port> = (0..50).map(|_| Port::reserve().unwrap()).collect();
        let numbers: std::collections::BTreeSet<u16> = ports.iter().map(Port::number).collect();
        assert_eq!(numbers.len(), ports.len());
        assert!(numbers.iter().all(|n| RANGE.contains(n)));
    }
}
