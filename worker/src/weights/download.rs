//! One file from the object store: parallel ranges, written in place as they come, hashed part by part behind.
//!
//! A journal beside the file names the parts that are written, tied to the object's version, so that a
//! download that was cut off goes on where it stopped. The journal is not trusted: the SHA-256 of the file or of its
//! chunks decides, and a resumed file that fails is pulled once more from the start. Bytes are kept nowhere but in
//! the system's page cache: a connection's read is written at once, while the processor's cache has it, and the
//! hash reads the mapped file. Memory is bounded by one read for each of the permits that all files of a pull
//! share.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use millrace_engine::folder::hash::{PART_BYTES, PartDigests, hash_part, map_part, of_chunks};
use millrace_engine::folder::manifest::FileEntry;
use millrace_engine::folder::{compare, io};
use millrace_queue::store::{Head, S3Uri, Store, StoreError};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinSet, spawn_blocking};

use super::PullError;

/// Parts of one request at most. Long requests cost the server less; what breaks off is not asked for again, so
/// that they cost no more when they fail.
const REQUEST_PARTS_MAX: u64 = 4;
/// Requests in flight over all files of a pull: enough for a store that limits each connection.
pub const REQUESTS_AT_ONCE: usize = 8;
/// Failures of one request, each of which the client has retried already.
const REQUEST_ATTEMPTS_MAX: u32 = 5;
/// Wait before the second try; doubled for each further one.
const REQUEST_BACKOFF: Duration = Duration::from_millis(200);
/// Parts of one file that are hashed or wait for it; the others wait where they are counted.
const HASHES_AT_ONCE: usize = 8;
/// Bytes written at once. The system gives a long write large pages, which must be free in one piece, and on a virtual
/// machine are those that the host has taken back: a GiB in writes of 1 MiB took 1.0 to 2.2 s of system time on
/// one, in writes of 64 KiB 0.4 s or, with few such pieces free, 0.9 to 2 s. Linux keeps free pieces of up to 32 KiB at
/// hand (`PAGE_ALLOC_COSTLY_ORDER`), in which it took 0.4 to 0.7 s.
const WRITE_BYTES: u64 = 32 << 10;

/// A file to pull into a folder.
#[derive(Clone)]
pub struct Download {
    /// The store.
    pub store: Store,
    /// The object.
    pub uri: S3Uri,
    /// Where the file and its journal go.
    pub folder: PathBuf,
    /// Name, and what the manifest says; an empty hash is not known yet.
    pub wanted: FileEntry,
    /// What the pull's other files use too.
    pub shared: Arc<Shared>,
}

/// What all files of a pull share.
pub struct Shared {
    /// Permits for requests in flight.
    pub permits: Semaphore,
    /// How many parts are hashed at once.
    pub hashes: Semaphore,
    /// The lock on the folder, held for as long as anything may write to it or has mapped it.
    pub _lock: File,
}

/// Where the journal of a file lies: in the folder itself, under a name that no file of a model has.
pub fn journal_path(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!(".{}.parts", name.replace('/', "~")))
}

/// The file that is being written, and its journal. Whoever reads or writes it holds the folder's lock with it.
struct Target {
    shared: Arc<Shared>,
    head: Head,
    file: File,
    journal: Mutex<File>,
}

impl Download {
    /// Pulls the file; gives its true size and the hash that decided, and the bytes that came over the network.
    pub async fn run(self) -> Result<(FileEntry, u64), PullError> {
        let head = self.store.head(&self.uri).await?;
        let announced = FileEntry { bytes: head.bytes, ..self.wanted.clone() };
        compare(&self.uri.to_string(), &announced, &self.wanted)?;
        let (found, pulled, resumed) = self.attempt(&head).await?;
        match compare(&self.uri.to_string(), &found, &self.wanted) {
            Ok(()) => Ok((found, pulled)),
            Err(_) if resumed => {
                std::fs::remove_file(self.journal_path()).map_err(io(&self.journal_path()))?;
                let (found, again, _) = self.attempt(&head).await?;
                compare(&self.uri.to_string(), &found, &self.wanted)?;
                Ok((found, pulled + again))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.join(&self.wanted.name)
    }

    fn journal_path(&self) -> PathBuf {
        journal_path(&self.folder, &self.wanted.name)
    }

    async fn attempt(&self, head: &Head) -> Result<(FileEntry, u64, bool), PullError> {
        let (path, journal_path, version) = (self.path(), self.journal_path(), head.clone());
        let opening = spawn_blocking(move || open(&path, &journal_path, &version));
        let (file, journal, done) = opening.await.expect("opening does not panic")?;
        let (shared, head) = (self.shared.clone(), head.clone());
        let target = Arc::new(Target { shared, head, file, journal: Mutex::new(journal) });
        let parts = target.head.bytes.div_ceil(PART_BYTES);
        // One message for each part at most, so that a sender never waits.
        let (written, to_hash) = mpsc::channel(parts as usize + 1);
        for &part in &done {
            written.try_send(part).expect("there is room for each part");
        }
        let fetching = self.fetch_all(&target, missing(parts, &done), written);
        let (pulled, found) = tokio::join!(fetching, self.hash(&target, to_hash));
        let found = found.map_err(io(&self.path()))?;
        Ok((found, pulled?, !done.is_empty()))
    }

    /// Hashes the parts as they are written: in any order where the digest of the chunks is known, else in theirs.
    async fn hash(&self, target: &Arc<Target>, written: mpsc::Receiver<u64>) -> std::io::Result<FileEntry> {
        let found = FileEntry { bytes: target.head.bytes, ..self.wanted.clone() };
        if self.wanted.chunks_sha256.is_some() {
            let chunks = hash_in_any_order(target, written).await?;
            return Ok(FileEntry { chunks_sha256: Some(chunks), ..found });
        }
        let target = target.clone();
        let hashing = spawn_blocking(move || hash_in_order(&target, written));
        Ok(FileEntry { sha256: hashing.await.expect("hashing does not panic")?, ..found })
    }

    /// Gets all parts that are missing. When one cannot be had, no request is in flight any more at the end.
    async fn fetch_all(
        &self,
        target: &Arc<Target>,
        missing: Vec<Range<u64>>,
        written: mpsc::Sender<u64>,
    ) -> Result<u64, PullError> {
        let (mut requests, mut pulled) = (JoinSet::new(), 0);
        let mut missing = missing.into_iter();
        loop {
            while requests.len() < REQUESTS_AT_ONCE
                && let Some(parts) = missing.next()
            {
                let (download, target, written) = (self.clone(), target.clone(), written.clone());
                requests.spawn(async move { download.fetch(&target, parts, &written).await });
            }
            match requests.join_next().await {
                None => return Ok(pulled),
                Some(fetched) => match fetched.expect("a request does not panic") {
                    Ok(bytes) => pulled += bytes,
                    Err(error) => {
                        requests.shutdown().await;
                        return Err(error);
                    }
                },
            }
        }
    }

    /// Gets consecutive parts; where the transfer breaks off, it goes on from there.
    async fn fetch(
        &self,
        target: &Target,
        parts: Range<u64>,
        written: &mpsc::Sender<u64>,
    ) -> Result<u64, PullError> {
        let _permit = self.shared.permits.acquire().await.expect("the permits are never closed");
        let first = parts.start * PART_BYTES;
        let mut at = first;
        let (mut backoff, mut attempt) = (REQUEST_BACKOFF, 1);
        loop {
            match self.transfer(target, &mut at, parts.end, written).await {
                Ok(()) => return Ok(at - first),
                Err(PullError::Store(error @ StoreError::Service { .. }))
                    if attempt < REQUEST_ATTEMPTS_MAX =>
                {
                    tracing::warn!(%error, attempt, at, "a range broke off and goes on");
                    tokio::time::sleep(backoff).await;
                    backoff *= 2;
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes what comes from `at` to the end of a part, and reports the parts that are whole with it.
    async fn transfer(
        &self,
        target: &Target,
        at: &mut u64,
        end_part: u64,
        written: &mpsc::Sender<u64>,
    ) -> Result<(), PullError> {
        let end = target.head.bytes.min(end_part * PART_BYTES);
        let mut body = self.store.get_range(&self.uri, &target.head, *at, end - *at).await?;
        while let Some(chunk) = body.next().await? {
            // Into the page cache, in less time than it takes to wake another thread for it.
            write_at(&target.file, &chunk, *at).map_err(io(&self.path()))?;
            let part = *at / PART_BYTES;
            *at += chunk.len() as u64;
            let whole = if *at == end { end_part } else { *at / PART_BYTES };
            for part in part..whole {
                let mut journal = target.journal.lock().expect("no writer panics");
                writeln!(journal, "{part}").map_err(io(&self.journal_path()))?;
                // The hasher ends early only when mapping fails, which its result tells.
                let _ = written.try_send(part);
            }
        }
        Ok(())
    }
}

/// Writes bytes in pieces that end on multiples of [`WRITE_BYTES`].
fn write_at(file: &File, mut bytes: &[u8], mut at: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let room = WRITE_BYTES - at % WRITE_BYTES;
        let (piece, rest) = bytes.split_at(bytes.len().min(room as usize));
        file.write_all_at(piece, at)?;
        (bytes, at) = (rest, at + piece.len() as u64);
    }
    Ok(())
}

/// Runs of parts that are not written yet, in order. They shorten towards the end, where requests that end
/// together would leave all of their parts to the hash.
fn missing(parts: u64, done: &BTreeSet<u64>) -> Vec<Range<u64>> {
    let missing: Vec<u64> = (0..parts).filter(|part| !done.contains(part)).collect();
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut longest = 0;
    for (index, &part) in missing.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run.end == part && run.end - run.start < longest => run.end += 1,
            _ => {
                runs.push(part..part + 1);
                let left = (missing.len() - index) as u64;
                longest = (left / (2 * REQUESTS_AT_ONCE as u64)).clamp(1, REQUEST_PARTS_MAX);
            }
        }
    }
    runs
}

/// Opens the file and its journal, and tells the parts that are written already.
fn open(path: &Path, journal_path: &Path, head: &Head) -> Result<(File, File, BTreeSet<u64>), PullError> {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder).map_err(io(folder))?;
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
    reserve(&file, head.bytes).map_err(io(path))?;
    let mut journal = File::create(journal_path).map_err(io(journal_path))?;
    let lines: String = done.iter().map(|part| format!("{part}\n")).collect();
    write!(journal, "{title}\n{lines}").map_err(io(journal_path))?;
    Ok((file, journal, done))
}

/// Gives a file its length, and its place on the disk where the file system can: no write has to find one then, and
/// a disk that is too small is known before a byte comes.
fn reserve(file: &File, bytes: u64) -> std::io::Result<()> {
    file.set_len(bytes)?;
    if bytes == 0 {
        return Ok(());
    }
    match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, bytes)) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Hashes the parts in their order, each as soon as it and all before it are written.
fn hash_in_order(target: &Target, mut written: mpsc::Receiver<u64>) -> std::io::Result<String> {
    let (mut ready, mut next, mut hash) = (BTreeSet::new(), 0, Sha256::new());
    while let Some(part) = written.blocking_recv() {
        ready.insert(part);
        while ready.remove(&next) {
            hash.update(&*map_part(&target.file, target.head.bytes, next)?);
            next += 1;
        }
    }
    Ok(hex::encode(hash.finalize()))
}

/// Hashes the chunks of each part as soon as it is written, as many parts at once as all files of the pull may.
async fn hash_in_any_order(
    target: &Arc<Target>,
    mut written: mpsc::Receiver<u64>,
) -> std::io::Result<String> {
    let hashed: PartDigests = futures::stream::poll_fn(|context| written.poll_recv(context))
        .map(async |part| {
            let _permit = target.shared.hashes.acquire().await.expect("the permits are never closed");
            let target = target.clone();
            let hashing = spawn_blocking(move || hash_part(&target.file, target.head.bytes, part));
            hashing.await.expect("hashing does not panic")
        })
        .buffer_unordered(HASHES_AT_ONCE)
        .try_collect()
        .await?;
    Ok(of_chunks(&hashed))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use millrace_engine::folder::hash::FileHash;
    use millrace_engine::folder::manifest::CHUNK_BYTES;

    proptest! {
        #[test]
        fn requests_are_for_each_missing_part_once_and_in_order(
            parts in 0u64..100,
            done in proptest::collection::btree_set(0u64..100, 0..60),
        ) {
            let runs = missing(parts, &done);
            prop_assert!(runs.iter().all(|run| (1..=REQUEST_PARTS_MAX).contains(&(run.end - run.start))));
            let asked: Vec<u64> = runs.into_iter().flatten().collect();
            prop_assert_eq!(asked, (0..parts).filter(|part| !done.contains(part)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn requests_are_long_first_and_short_last() {
        let lengths: Vec<u64> =
            missing(128, &BTreeSet::new()).into_iter().map(|run| run.end - run.start).collect();
        assert!(lengths.is_sorted_by(|before, after| before >= after), "{lengths:?}");
        assert_eq!((lengths[0], lengths[lengths.len() - REQUESTS_AT_ONCE]), (REQUEST_PARTS_MAX, 1));
    }

    #[test]
    fn pieces_make_up_what_is_written() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3 * WRITE_BYTES + 77).map(|n| (n / 100) as u8).collect();
        write_at(&file, &bytes, 1000).unwrap();
        let mut found = vec![1; 1000 + bytes.len()];
        assert_eq!(file.read_at(&mut found, 0).unwrap(), found.len());
        assert!(found[..1000].iter().all(|&byte| byte == 0) && found[1000..] == bytes);
    }

    #[test]
    fn a_file_has_its_length_and_keeps_its_bytes_when_its_place_is_reserved() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for bytes in [0, 5, 1 << 20] {
            file.as_file().write_all_at(b"first", 0).unwrap();
            reserve(file.as_file(), bytes).unwrap();
            let mut wanted = b"first".to_vec();
            wanted.resize(bytes as usize, 0);
            assert!(std::fs::read(file.path()).unwrap() == wanted, "{bytes} bytes");
        }
    }

    #[tokio::test]
    async fn parts_are_hashed_whenever_they_come() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..2 * PART_BYTES + CHUNK_BYTES + 5).map(|n| (n / 1000) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        let mut hash = FileHash::new();
        hash.update(&bytes);
        let wanted = hash.finish(String::new());
        let head = Head { bytes: bytes.len() as u64, etag: String::new() };
        let temporary = || tempfile::tempfile().unwrap();
        let shared = Shared { permits: Semaphore::new(0), hashes: Semaphore::new(2), _lock: temporary() };
        let journal = Mutex::new(temporary());
        let target = Arc::new(Target { shared: Arc::new(shared), head, file, journal });
        let written = || {
            let (written, to_hash) = mpsc::channel(3);
            [2, 0, 1].into_iter().for_each(|part| written.try_send(part).unwrap());
            to_hash
        };
        let chunks = hash_in_any_order(&target, written()).await.unwrap();
        assert_eq!(Some(chunks), wanted.chunks_sha256);
        let (in_order, to_hash) = (target.clone(), written());
        let hash = spawn_blocking(move || hash_in_order(&in_order, to_hash));
        assert_eq!(hash.await.unwrap().unwrap(), wanted.sha256);
    }
}
