//! How fast weights come from S3: the worker's own pull beside a plain download of the same object by s5cmd,
//! the well-known parallel client, in turns over the same server and disk.
//!
//! The two are not alike: the pull also hashes every byte before the file is used. Each is a process, timed from its
//! start until it has the object: the client's end, and the line in which the pull says so, where a worker would go
//! on to load the model. Neither waits for the disk: the client does not sync, and a worker leaves that to a thread
//! that goes on behind it, whose time is not counted.
//! Both write to a fresh folder each time, and what the last one wrote is on the disk before the next begins.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millrace_crds::config::ModelConfig;
use millrace_crds::units::Bytes;
use millrace_queue::store::Store;
use millrace_worker::weights;
use tempfile::TempDir;

use crate::figures::Figure;
use crate::random::Random;
use crate::s3::S3;
use crate::{place, tools};

/// The client's place in the tools' cache.
pub const S5CMD: &str = "bin/s5cmd";
const BUCKET: &str = "models";
const TENSORS: &str = "model.safetensors";
/// What a pull's process says when it has the model.
const PULLED: &str = "pulled";
/// Rounds; each pulls once and downloads once.
const ROUNDS: usize = 6;
/// Bytes written at once when the object is made.
const CHUNK_BYTES: usize = 1 << 20;

/// The rates of each round, in bytes a second.
#[derive(Debug, Clone)]
pub struct Rates {
    /// The worker's pull.
    pub pulls: Vec<f64>,
    /// The plain download.
    pub plains: Vec<f64>,
}

impl Rates {
    /// The median of the pulls.
    pub fn pull(&self) -> f64 {
        median(self.pulls.clone())
    }

    /// The median of the plain downloads.
    pub fn plain(&self) -> f64 {
        median(self.plains.clone())
    }

    /// The figures, with their bar.
    pub fn figures(&self) -> Vec<Figure> {
        let mib = |rates: &[f64]| rates.iter().map(|rate| rate / f64::from(1 << 20)).collect::<Vec<_>>();
        let rate = |name: &str, rates: &[f64]| {
            let rates = mib(rates);
            Figure::new(name, median(rates.clone()), "MiB/s").of_runs(rates)
        };
        vec![
            rate("1 GiB from S3, hashed, until the model can be loaded", &self.pulls),
            rate("1 GiB from S3 by s5cmd, not hashed", &self.plains),
            Figure::new("1 GiB from S3, of the rate of s5cmd", 100.0 * self.pull() / self.plain(), "%")
                .least(80.0),
        ]
    }
}

/// Pulls and downloads an object of this size in turns.
///
/// # Errors
/// When the server or the client does not do it, or a copy is not whole.
pub async fn measure(bytes: u64) -> Result<Rates> {
    let s3 = tokio::task::spawn_blocking(S3::start).await??;
    s3.create_bucket(BUCKET).await?;
    let place = place::folder("pulling-")?;
    let model = place.path().join("model");
    write_model(&model, bytes)?;
    let store = Store::connect(&s3.store_config()).await?;
    weights::upload(&model, &format!("s3://{BUCKET}/m"), &store).await?;
    let (mut pulls, mut plains) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // Whoever goes first in a round may find the server's caches colder.
        for pulls_now in [round % 2 == 0, round % 2 != 0] {
            let target = tempfile::Builder::new().prefix("round-").tempdir_in(place.path())?;
            let took =
                if pulls_now { pull(&s3, &target).await? } else { download(&s3, &target, bytes).await? };
            if pulls_now { &mut pulls } else { &mut plains }.push(bytes as f64 / took.as_secs_f64());
            drop(target);
            settle(place.path())?;
        }
    }
    Ok(Rates { pulls, plains })
}

/// In a process of its own, as the client runs in one and a worker starts in one: this program again, with `--pull`.
async fn pull(s3: &S3, target: &TempDir) -> Result<Duration> {
    let config = ModelConfig {
        namespace: "default".parse()?,
        name: "m".parse()?,
        uri: format!("s3://{BUCKET}/m"),
        digest: None,
        store: s3.store_config(),
        cache_dir: target.path().to_owned(),
        bytes_max: Bytes(u64::MAX),
    };
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--pull").arg(serde_json::to_string(&config)?).stdin(Stdio::null()).stdout(Stdio::piped());
    tokio::task::spawn_blocking(move || {
        let began = Instant::now();
        let mut child = command.spawn()?;
        let mut said = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut said)?;
        let took = began.elapsed();
        let status = child.wait()?;
        ensure!(
            status.success() && said.trim_end() == PULLED,
            "the pull said {said:?} and ended with {status}"
        );
        Ok(took)
    })
    .await?
}

/// What the process of [`pull`] does.
///
/// # Errors
/// When the pull fails, or found something in the cache.
pub async fn pull_once(config: &str) -> Result<()> {
    let folder = weights::pull(&serde_json::from_str(config)?).await?;
    ensure!(folder.pulled_bytes == folder.bytes, "{} of {} bytes came", folder.pulled_bytes, folder.bytes);
    println!("{PULLED}");
    Ok(())
}

/// The time from a program's start to its end.
async fn timed(mut command: Command, what: &str) -> Result<Duration> {
    let began = Instant::now();
    let status = tokio::task::spawn_blocking(move || command.status()).await??;
    let took = began.elapsed();
    ensure!(status.success(), "{what} ended with {status}");
    Ok(took)
}

/// The client's own choice of part size and parts at once, which is what people type.
async fn download(s3: &S3, target: &TempDir, bytes: u64) -> Result<Duration> {
    let file = target.path().join(TENSORS);
    let mut command = Command::new(tools::tool(S5CMD)?);
    command.args(["--endpoint-url", &s3.endpoint(), "cp", &format!("s3://{BUCKET}/m/{TENSORS}")]);
    command.arg(&file).envs(s3.credentials_environment()).stdout(Stdio::null()).stdin(Stdio::null());
    let took = timed(command, "s5cmd cp").await?;
    let found = file.metadata().context("what s5cmd wrote")?.len();
    ensure!(found == bytes, "s5cmd wrote {found} of {bytes} bytes");
    Ok(took)
}

/// A model folder whose tensors are so many random bytes.
fn write_model(folder: &Path, bytes: u64) -> Result<()> {
    std::fs::create_dir(folder)?;
    std::fs::write(folder.join("config.json"), "{}")?;
    let mut file = File::create(folder.join(TENSORS))?;
    let (mut random, mut left) = (Random::new(1), bytes);
    while left > 0 {
        let count = left.min(CHUNK_BYTES as u64) as usize;
        let chunk: Vec<u8> =
            (0..count.div_ceil(8)).flat_map(|_| random.next_u64().to_le_bytes()).take(count).collect();
        file.write_all(&chunk)?;
        left -= count as u64;
    }
    Ok(file.sync_all()?)
}

/// Waits until what was written and removed has reached the disk.
fn settle(folder: &Path) -> Result<()> {
    let status = Command::new("sync").arg("-f").arg(folder).status().context("sync")?;
    ensure!(status.success(), "sync ended with {status}");
    Ok(())
}

/// The mean of the two middle values, of an even number of them.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    #[test]
    fn medians() {
        assert_eq!(super::median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(super::median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
