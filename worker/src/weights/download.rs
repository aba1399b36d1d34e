//! One file from the object store: parallel ranges, written in place, hashed as they come.
//!
//! A journal beside the file names the parts that are written, tied to the object's version, so that a
//! download that was cut off goes on where it stopped. The journal is not trusted: the SHA-256 of the whole
//! file decides, and a resumed file that fails is pulled once more from the start. Memory is bounded by the
//! permits that all files of a pull share.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::manifest::FileEntry;
use super::{PullError, io};
use crate::store::{Head, S3Uri, Store, StoreError};

/// Bytes of one ranged request: large enough to hide the round trip, small enough to retry.
pub const PART_BYTES: u64 = 8 << 20;
/// Parts in flight over all files of a pull; with [`PART_BYTES`] this bounds the memory to 64 MiB.
pub const PARTS_AT_ONCE: usize = 8;
/// Tries of one part, each of which the client has retried already.
const PART_ATTEMPTS_MAX: u32 = 5;
/// Wait before the second try; doubled for each further one.
const PART_BACKOFF: Duration = Duration::from_millis(200);
/// Bytes read at once when hashing: fits the second-level cache.
const HASH_CHUNK_BYTES: usize = 256 << 10;

/// A file to pull into a folder.
pub struct Download<'a> {
    /// The store.
    pub store: &'a Store,
    /// The object.
    pub uri: S3Uri,
    /// Where the file and its journal go.
    pub folder: &'a Path,
    /// Name, and what the manifest says; an empty hash is not known yet.
    pub wanted: &'a FileEntry,
    /// Permits for parts in flight.
    pub permits: Arc<Semaphore>,
}

/// A part that is written. One that came just now is hashed from its bytes, which count as in flight until
/// then: parts are begun in order, so the one that all wait for is always on its way.
struct Written {
    part: u64,
    fresh: Option<(Bytes, OwnedSemaphorePermit)>,
}

impl Download<'_> {
    /// Pulls the file; gives its true size and hash, and the bytes that came over the network.
    pub async fn run(&self) -> Result<(FileEntry, u64), PullError> {
        let head = self.store.head(&self.uri).await?;
        let announced = FileEntry { bytes: head.bytes, ..self.wanted.clone() };
        compare(&self.uri.to_string(), &announced, self.wanted)?;
        let (found, pulled, resumed) = self.attempt(&head).await?;
        match compare(&self.uri.to_string(), &found, self.wanted) {
            Ok(()) => Ok((found, pulled)),
            Err(_) if resumed => {
                std::fs::remove_file(self.journal_path()).map_err(io(&self.journal_path()))?;
                let (found, again, _) = self.attempt(&head).await?;
                compare(&self.uri.to_string(), &found, self.wanted)?;
                Ok((found, pulled + again))
            }
            Err(error) => Err(error),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.join(&self.wanted.name)
    }

    fn journal_path(&self) -> PathBuf {
        self.folder.join(format!(".{}.parts", self.wanted.name))
    }

    async fn attempt(&self, head: &Head) -> Result<(FileEntry, u64, bool), PullError> {
        let path = self.path();
        let (file, journal, done) = open(&path, &self.journal_path(), head)?;
        let (file, journal) = (Arc::new(file), &std::sync::Mutex::new(journal));
        let parts = head.bytes.div_ceil(PART_BYTES);
        // One message for each part at most, so that a sender never waits.
        let (written, to_hash) = mpsc::sync_channel(parts as usize + 1);
        for &part in &done {
            written.send(Written { part, fresh: None }).expect("the receiver is here");
        }
        let hasher = {
            let (file, bytes) = (file.clone(), head.bytes);
            tokio::task::spawn_blocking(move || hash_in_order(&file, bytes, &to_hash))
        };
        let missing = (0..parts).filter(|part| !done.contains(part));
        let pulled = futures::stream::iter(missing)
            .map(|part| {
                let (file, written) = (file.clone(), written.clone());
                async move {
                    let (bytes, permit) = self.part(head, part, file).await?;
                    let count = bytes.len() as u64;
                    writeln!(journal.lock().expect("no writer panics"), "{part}")
                        .map_err(io(&self.journal_path()))?;
                    // The hasher ends early only when reading fails, which its result tells.
                    let _ = written.send(Written { part, fresh: Some((bytes, permit)) });
                    Ok::<u64, PullError>(count)
                }
            })
            .buffer_unordered(PARTS_AT_ONCE)
            .try_fold(0, async |sum, count| Ok(sum + count))
            .await;
        drop(written);
        let hash = hasher.await.expect("hashing does not panic").map_err(io(&path))?;
        let pulled = pulled?;
        let found = FileEntry { name: self.wanted.name.clone(), bytes: head.bytes, sha256: hash };
        Ok((found, pulled, !done.is_empty()))
    }

    /// Gets a part and writes it to its place.
    async fn part(
        &self,
        head: &Head,
        part: u64,
        file: Arc<File>,
    ) -> Result<(Bytes, OwnedSemaphorePermit), PullError> {
        let first = part * PART_BYTES;
        let count = PART_BYTES.min(head.bytes - first);
        let permit = self.permits.clone().acquire_owned().await.expect("the permits are never closed");
        let mut backoff = PART_BACKOFF;
        let mut attempt = 1;
        loop {
            match self.store.get_range(&self.uri, head, first, count).await {
                Ok(bytes) => {
                    let written = bytes.clone();
                    tokio::task::spawn_blocking(move || file.write_all_at(&written, first))
                        .await
                        .expect("writing does not panic")
                        .map_err(io(&self.path()))?;
                    return Ok((bytes, permit));
                }
                Err(error @ StoreError::Service { .. }) if attempt < PART_ATTEMPTS_MAX => {
                    tracing::warn!(%error, attempt, "a range failed and is asked for again");
                    tokio::time::sleep(backoff).await;
                    backoff *= 2;
                    attempt += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Opens the file and its journal; gives the parts that are written already.
fn open(path: &Path, journal_path: &Path, head: &Head) -> Result<(File, File, BTreeSet<u64>), PullError> {
    let title = format!("{} {}", head.bytes, head.etag);
    let text = std::fs::read_to_string(journal_path).unwrap_or_default();
    let (first, rest) = text.split_once('\n').unwrap_or_default();
    let done: BTreeSet<u64> = if first == title && path.exists() {
        // A torn last line parses as another number at worst; the hash of the whole file finds it.
        rest.lines().filter_map(|line| line.parse().ok()).collect()
    } else {
        BTreeSet::new()
    };
    let parts = head.bytes.div_ceil(PART_BYTES);
    let done: BTreeSet<u64> = done.into_iter().filter(|&part| part < parts).collect();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(done.is_empty())
        .open(path)
        .map_err(io(path))?;
    file.set_len(head.bytes).map_err(io(path))?;
    let mut journal = File::create(journal_path).map_err(io(journal_path))?;
    let lines: String = done.iter().map(|part| format!("{part}\n")).collect();
    write!(journal, "{title}\n{lines}").map_err(io(journal_path))?;
    Ok((file, journal, done))
}

/// Hashes the parts in their order, each as soon as it and all before it are written.
fn hash_in_order(file: &File, bytes: u64, written: &mpsc::Receiver<Written>) -> std::io::Result<String> {
    let (mut ready, mut next) = (BTreeMap::new(), 0);
    let (mut hash, mut chunk) = (Sha256::new(), vec![0; HASH_CHUNK_BYTES]);
    while let Ok(Written { part, fresh }) = written.recv() {
        ready.insert(part, fresh);
        while let Some(fresh) = ready.remove(&next) {
            next += 1;
            if let Some((bytes, _permit)) = fresh {
                hash.update(&bytes);
                continue;
            }
            let part = next - 1;
            let (mut at, end) = (part * PART_BYTES, bytes.min((part + 1) * PART_BYTES));
            while at < end {
                let count = HASH_CHUNK_BYTES.min((end - at) as usize);
                file.read_exact_at(&mut chunk[..count], at)?;
                hash.update(&chunk[..count]);
                at += count as u64;
            }
        }
    }
    Ok(hex::encode(hash.finalize()))
}

/// Size and SHA-256 of a local file.
pub fn hash_file(path: &Path) -> Result<(u64, String), PullError> {
    let mut file = File::open(path).map_err(io(path))?;
    let (mut hash, mut chunk, mut bytes) = (Sha256::new(), vec![0; HASH_CHUNK_BYTES], 0);
    loop {
        let count = file.read(&mut chunk).map_err(io(path))?;
        if count == 0 {
            return Ok((bytes, hex::encode(hash.finalize())));
        }
        hash.update(&chunk[..count]);
        bytes += count as u64;
    }
}

/// Whether a file is what the manifest says. A size or hash that is not known matches anything.
pub fn compare(file: &str, found: &FileEntry, wanted: &FileEntry) -> Result<(), PullError> {
    let differs = |what, found: String, wanted: String| {
        Err(PullError::Content { file: file.to_owned(), what, found, wanted })
    };
    if found.bytes != wanted.bytes {
        return differs("size", found.bytes.to_string(), wanted.bytes.to_string());
    }
    if !wanted.sha256.is_empty() && found.sha256 != wanted.sha256 {
        return differs("SHA-256", found.sha256.clone(), wanted.sha256.clone());
    }
    Ok(())
}
