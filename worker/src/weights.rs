//! Model files: from `s3://` or `file://` to verified local files.
//!
//! A model is a folder in Hugging Face layout with a [`manifest`] that names every file with its size and
//! SHA-256. No file is used before its bytes were compared with the manifest. A folder in the cache was
//! compared when it was pulled and is read-only since; later starts compare sizes only, once all of it has
//! reached the disk. A `file://` folder is
//! compared at every start.

mod download;
mod pull;

use std::path::{Path, PathBuf};

use millrace_crds::config::ModelConfig;

use millrace_engine::folder::manifest::{
    FileEntry, MANIFEST_NAME, ManifestError, ModelDigest, TEMPLATES_FOLDER,
};
use millrace_engine::folder::{FolderError, hash, io, verified};
use millrace_queue::store::{S3Uri, Store, StoreError};

/// Threads of a pull at most: each takes about a GiB a second from its connections.
const PULL_THREADS_MAX: usize = 8;

/// A verified model folder on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    /// Where it is.
    pub path: PathBuf,
    /// Digest of its manifest.
    pub digest: ModelDigest,
    /// Size of all files.
    pub bytes: u64,
    /// Bytes that came over the network; 0 when the cache had all of them.
    pub pulled_bytes: u64,
}

/// Why a model's files cannot be had. The messages name field or file, value and limit.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The address is of no known kind.
    #[error("model.uri is {0:?}; it must begin with s3:// or file:///")]
    Scheme(String),
    /// The folder is not what it should be.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The object store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The files are larger than allowed.
    #[error("the model has {bytes} bytes; model.bytesMax is {limit}")]
    TooLarge {
        /// Size of all files.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The cache's disk is too small.
    #[error("the model needs {needed} bytes in {folder}; {free} are free")]
    Disk {
        /// Bytes still to come.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// The cache folder.
        folder: String,
    },
    /// The files are not those that the configuration wants.
    #[error("model.digest is {wanted}; the files have {found}")]
    Digest {
        /// The digest wanted.
        wanted: ModelDigest,
        /// The digest found.
        found: ModelDigest,
    },
}

impl From<ManifestError> for PullError {
    fn from(error: ManifestError) -> Self {
        FolderError::from(error).into()
    }
}

/// Brings the model's files to this machine and compares them with their manifest and the configured digest.
///
/// # Errors
/// When the files cannot be had or are not what they should be.
pub async fn pull(config: &ModelConfig) -> Result<Folder, PullError> {
    let wanted = config.digest.as_deref().map(ModelDigest::parse).transpose()?;
    let folder = match config.uri.strip_prefix("file://") {
        Some(path) if path.starts_with('/') => {
            let path = PathBuf::from(path);
            let limit = config.bytes_max.0;
            tokio::task::spawn_blocking(move || verify(path, limit))
                .await
                .expect("verifying does not panic")?
        }
        None if config.uri.starts_with("s3://") => {
            let (config, wanted) = (config.clone(), wanted.clone());
            on_own_threads(async move {
                let store = Store::connect(&config.store).await?;
                pull::Pull { store, config, wanted }.run().await
            })
            .await?
        }
        _ => return Err(PullError::Scheme(config.uri.chars().take(200).collect())),
    };
    match wanted {
        Some(wanted) if wanted != folder.digest => Err(PullError::Digest { wanted, found: folder.digest }),
        _ => Ok(folder),
    }
}

/// Threads of a pull that write, and threads that hash: half as many as there are processors, so that together they
/// are no more than these.
fn pull_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get() / 2).clamp(1, PULL_THREADS_MAX)
}

/// Runs a pull on threads of its own, because it writes there, and a slow disk must not keep others from running.
/// Dropping the future ends the pull.
async fn on_own_threads(
    pull: impl Future<Output = Result<Folder, PullError>> + Send + 'static,
) -> Result<Folder, PullError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(pull_threads())
        .thread_name("pull")
        .enable_all()
        .build()
        .map_err(io(Path::new("the pull's threads")))?;
    let runtime = Background(Some(runtime));
    runtime.0.as_ref().expect("taken only at the end").spawn(pull).await.expect("a pull does not panic")
}

/// A runtime that ends without being waited for, which async code may not do.
struct Background(Option<tokio::runtime::Runtime>);

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Names and sizes of the files of a folder in the store, and of those in its one folder for chat templates.
///
/// # Errors
/// What the store said.
pub async fn list(store: &Store, uri: &S3Uri) -> Result<Vec<(String, u64)>, StoreError> {
    let mut files = store.list(uri).await?;
    let templates = store.list(&uri.join(TEMPLATES_FOLDER)).await?;
    files.extend(templates.into_iter().map(|(name, bytes)| (format!("{TEMPLATES_FOLDER}/{name}"), bytes)));
    Ok(files)
}

/// Uploads a model folder, the manifest last, so that a reader that sees it sees all.
///
/// # Errors
/// When the folder is not what its manifest says, or the store refuses.
pub async fn upload(path: &Path, uri: &str, store: &Store) -> Result<Folder, PullError> {
    let target: S3Uri = uri.parse()?;
    let owned = path.to_owned();
    let manifest = tokio::task::spawn_blocking(move || verified(&owned, hash::hash_file))
        .await
        .expect("verifying does not panic")?;
    for file in manifest.files() {
        store.put_file(&target.join(&file.name), &path.join(&file.name)).await?;
    }
    store.put(&target.join(MANIFEST_NAME), manifest.canonical().into()).await?;
    let (path, bytes) = (path.to_owned(), manifest.total_bytes());
    Ok(Folder { path, digest: manifest.digest(), bytes, pulled_bytes: 0 })
}

/// Verifies a local folder. The manifest that its files make has no digest of chunks: what it takes to pin the digest
/// of such a model shall not change.
fn verify(path: PathBuf, limit: u64) -> Result<Folder, PullError> {
    let manifest =
        verified(&path, |path, name| hash::hash_as(path, &FileEntry::unknown(name.to_owned(), 0)))?;
    let bytes = manifest.total_bytes();
    if bytes > limit {
        return Err(PullError::TooLarge { bytes, limit });
    }
    Ok(Folder { path, digest: manifest.digest(), bytes, pulled_bytes: 0 })
}
