//! A model from the object store into the cache folder.
//!
//! `<cache>/<key>` holds a whole, verified model and appears by renaming; `<cache>/<key>.partial` is one in
//! the making, which a later start continues. The key is the manifest's digest, or a hash of the listing
//! where the store has no manifest. A pull does not wait until the disk has everything: a thread sees to that
//! and then leaves a mark in the folder. A folder without the mark may have lost bytes to a power cut, so it is
//! hashed before it is used, and pulled again where it does not fit its manifest. Workers that share the cache
//! take turns by a lock on `<cache>/<key>.lock`: the second one finds the work done.

use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use millrace_crds::config::ModelConfig;
use millrace_engine::folder::manifest::{
    FileEntry, MANIFEST_BYTES_MAX, MANIFEST_NAME, Manifest, ModelDigest, TEMPLATES_FOLDER,
};
use millrace_engine::folder::{FolderError, belongs, check_files, compare, io, read_manifest};
use millrace_queue::store::{S3Uri, Store, StoreError};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::download::{Download, REQUESTS_AT_ONCE, Shared, journal_path};
use super::{Folder, PullError, list, pull_threads};

/// The mark of a folder whose bytes have all reached the disk.
const SETTLED_NAME: &str = ".settled";
/// Files that are pulled at once; their requests share the permits.
const FILES_AT_ONCE: usize = 4;

/// One pull.
pub struct Pull {
    /// Where the files are.
    pub store: Store,
    /// What to pull, and into which cache.
    pub config: ModelConfig,
    /// The digest that the manifest must have.
    pub wanted: Option<ModelDigest>,
}

impl Pull {
    /// Pulls what the cache does not have.
    pub async fn run(&self) -> Result<Folder, PullError> {
        let uri: S3Uri = self.config.uri.parse()?;
        let (key, files) = self.files(&uri).await?;
        let bytes = files.iter().map(|file| file.bytes).fold(0, u64::saturating_add);
        if bytes > self.config.bytes_max.0 {
            return Err(PullError::TooLarge { bytes, limit: self.config.bytes_max.0 });
        }
        let cache = &self.config.cache_dir;
        fs::create_dir_all(cache).map_err(io(cache))?;
        let lock = lock(cache.join(format!("{key}.lock"))).await?;
        let shared = Arc::new(Shared {
            permits: Semaphore::new(REQUESTS_AT_ONCE),
            hashes: Semaphore::new(pull_threads()),
            _lock: lock,
        });
        let ready = cache.join(&key);
        let place = ready.clone();
        let cached =
            tokio::task::spawn_blocking(move || cached(&place)).await.expect("hashing does not panic");
        if let Some(folder) = cached? {
            return Ok(folder);
        }
        let partial = cache.join(format!("{key}.partial"));
        fs::create_dir_all(&partial).map_err(io(&partial))?;
        check_disk(cache, &partial, bytes)?;
        let (manifest, pulled_bytes) = self.download(&uri, &partial, &files, &shared).await?;
        finish(&partial, &ready, &manifest)?;
        settle(ready.clone());
        Ok(Folder { path: ready, digest: manifest.digest(), bytes, pulled_bytes })
    }

    /// The cache's key, and the files to pull. Without a manifest their hashes are empty.
    async fn files(&self, uri: &S3Uri) -> Result<(String, Vec<FileEntry>), PullError> {
        match self.store.get(&uri.join(MANIFEST_NAME), MANIFEST_BYTES_MAX).await {
            Ok(bytes) => {
                let manifest = Manifest::parse(&bytes)?;
                let found = manifest.digest();
                match &self.wanted {
                    Some(wanted) if *wanted != found => {
                        Err(PullError::Digest { wanted: wanted.clone(), found })
                    }
                    _ => Ok((found.hex().to_owned(), manifest.files().to_vec())),
                }
            }
            Err(StoreError::Missing(_)) => {
                let listed = list(&self.store, uri).await?;
                let files: Vec<FileEntry> = listed
                    .into_iter()
                    .filter(|(name, _)| belongs(name))
                    .map(|(name, bytes)| FileEntry::unknown(name, bytes))
                    .collect();
                if !files.iter().any(|file| file.name == "config.json") {
                    return Err(FolderError::NoModel(uri.to_string()).into());
                }
                let listing: Vec<_> = files.iter().map(|file| (&file.name, file.bytes)).collect();
                let hash = Sha256::digest(format!("{uri} {listing:?}"));
                Ok((format!("unlisted-{}", hex::encode(hash)), files))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn download(
        &self,
        uri: &S3Uri,
        partial: &Path,
        files: &[FileEntry],
        shared: &Arc<Shared>,
    ) -> Result<(Manifest, u64), PullError> {
        let downloads: Vec<Download> = files
            .iter()
            .map(|wanted| Download {
                store: self.store.clone(),
                uri: uri.join(&wanted.name),
                folder: partial.to_owned(),
                wanted: wanted.clone(),
                shared: shared.clone(),
            })
            .collect();
        let found: Vec<(FileEntry, u64)> = futures::stream::iter(downloads)
            .map(Download::run)
            .buffer_unordered(FILES_AT_ONCE)
            .try_collect()
            .await?;
        let pulled = found.iter().map(|(_, pulled)| pulled).sum();
        let manifest = Manifest::new(found.into_iter().map(|(entry, _)| entry).collect())?;
        Ok((manifest, pulled))
    }
}

/// Takes the lock of one model in the cache; waits while another worker pulls it.
async fn lock(path: PathBuf) -> Result<File, PullError> {
    let locked = tokio::task::spawn_blocking(move || {
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(io(&path))?;
        file.lock().map_err(io(&path))?;
        Ok(file)
    });
    locked.await.expect("locking does not panic")
}

/// A model that is in the cache already. One that has settled on the disk needs only its sizes; another is
/// hashed, and removed if it is not whole.
fn cached(ready: &Path) -> Result<Option<Folder>, PullError> {
    if !ready.exists() {
        return Ok(None);
    }
    let settled = ready.join(SETTLED_NAME).exists();
    match check(ready, settled) {
        Ok(folder) => {
            if !settled {
                settle(ready.to_owned());
            }
            Ok(Some(folder))
        }
        Err(error) if !settled => {
            tracing::warn!(%error, "the cached model is not whole; pulling it again");
            fs::remove_dir_all(ready).map_err(io(ready))?;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Compares a cached folder with its manifest: by size, or by hash too.
fn check(ready: &Path, sizes_only: bool) -> Result<Folder, PullError> {
    let manifest =
        read_manifest(ready)?.ok_or_else(|| io(&ready.join(MANIFEST_NAME))(ErrorKind::NotFound.into()))?;
    if sizes_only {
        for wanted in manifest.files() {
            let path = ready.join(&wanted.name);
            let bytes = fs::metadata(&path).map_err(io(&path))?.len();
            compare(&path.display().to_string(), &FileEntry { bytes, ..wanted.clone() }, wanted)?;
        }
    } else {
        check_files(ready, &manifest)?;
    }
    let bytes = manifest.total_bytes();
    Ok(Folder { path: ready.to_owned(), digest: manifest.digest(), bytes, pulled_bytes: 0 })
}

/// Sees to it that a folder reaches the disk, and marks it then. Nobody waits for it: without the mark the
/// next start hashes the folder.
fn settle(folder: PathBuf) {
    let shown = folder.display().to_string();
    let work = move || {
        if let Err(error) = settle_now(&folder) {
            tracing::warn!(%error, folder = %folder.display(), "the model may not be on the disk yet");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("settle".into()).spawn(work) {
        tracing::warn!(%error, folder = shown, "the model may not be on the disk yet");
    }
}

fn settle_now(folder: &Path) -> std::io::Result<()> {
    let templates = folder.join(TEMPLATES_FOLDER);
    for inner in [folder, &templates].into_iter().filter(|inner| inner.is_dir()) {
        for entry in fs::read_dir(inner)? {
            File::open(entry?.path())?.sync_all()?;
        }
    }
    File::open(folder)?.sync_all()?;
    File::open(folder.parent().unwrap_or(folder))?.sync_all()?;
    File::create(folder.join(SETTLED_NAME))?.sync_all()?;
    File::open(folder)?.sync_all()
}

/// Refuses a pull for which the disk has no room, less what an earlier try has written.
fn check_disk(cache: &Path, partial: &Path, bytes: u64) -> Result<(), PullError> {
    let mut present = 0;
    for entry in fs::read_dir(partial).map_err(io(partial))? {
        let entry = entry.map_err(io(partial))?;
        present += std::os::unix::fs::MetadataExt::blocks(&entry.metadata().map_err(io(partial))?) * 512;
    }
    let needed = bytes.saturating_sub(present);
    match free_bytes(cache) {
        Some(free) if free < needed => {
            Err(PullError::Disk { needed, free, folder: cache.display().to_string() })
        }
        _ => Ok(()),
    }
}

/// Free bytes of a folder's file system for who has no privileges; none where it cannot tell.
fn free_bytes(folder: &Path) -> Option<u64> {
    rustix::fs::statvfs(folder).ok().map(|found| found.f_bavail.saturating_mul(found.f_frsize))
}

/// Makes the pulled files read-only, and the folder visible.
fn finish(partial: &Path, ready: &Path, manifest: &Manifest) -> Result<(), PullError> {
    for file in manifest.files() {
        let path = partial.join(&file.name);
        fs::set_permissions(&path, Permissions::from_mode(0o444)).map_err(io(&path))?;
        let journal = journal_path(partial, &file.name);
        fs::remove_file(&journal).map_err(io(&journal))?;
    }
    let path = partial.join(MANIFEST_NAME);
    fs::write(&path, manifest.canonical()).map_err(io(&path))?;
    Ok(fs::rename(partial, ready).map_err(io(ready))?)
}
