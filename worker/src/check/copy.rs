//! A copy of a model folder without its weights: the small files whole, of the weights what says names and shapes.
//!
//! The engine's own code opens the copy, so that what it says of the copy holds for the folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use millrace_engine::folder::{belongs, local_files};
use millrace_queue::args::StoreArgs;
use millrace_queue::store::{S3Uri, Store};

use crate::weights;

/// Largest small file: a tokenizer of 256k entries has some 35 MB.
const SMALL_BYTES_MAX: u64 = 128 << 20;
/// Largest header of a file of weights, as the engine reads it.
const HEADER_BYTES_MAX: u64 = 64 << 20;

/// Where a folder lies.
pub enum FolderAt {
    /// On this machine.
    Local(PathBuf),
    /// In an object store.
    Remote(Store, S3Uri),
}

impl FolderAt {
    /// Reaches the folder.
    pub async fn open(uri: &str, store: &StoreArgs) -> Result<Self, String> {
        if !uri.starts_with("s3://") {
            return Ok(Self::Local(uri.strip_prefix("file://").unwrap_or(uri).into()));
        }
        let remote = uri.parse().map_err(|e| format!("{e}"))?;
        Ok(Self::Remote(Store::connect(&store.config()).await.map_err(|e| e.to_string())?, remote))
    }

    /// Names and sizes of its files.
    pub async fn list(&self) -> Result<BTreeMap<String, u64>, String> {
        match self {
            Self::Remote(store, uri) => {
                Ok(weights::list(store, uri).await.map_err(|e| e.to_string())?.into_iter().collect())
            }
            Self::Local(path) => Ok(local_files(path).map_err(|e| e.to_string())?.into_iter().collect()),
        }
    }

    /// A whole file.
    pub async fn get(&self, name: &str, limit: u64) -> Result<Vec<u8>, String> {
        match self {
            Self::Remote(store, uri) => {
                store.get(&uri.join(name), limit).await.map(|bytes| bytes.to_vec()).map_err(|e| e.to_string())
            }
            Self::Local(path) => {
                let path = path.join(name);
                let bytes = std::fs::metadata(&path).map_err(|e| e.to_string())?.len();
                if bytes > limit {
                    return Err(format!("{bytes} bytes; {limit} are allowed"));
                }
                std::fs::read(path).map_err(|e| e.to_string())
            }
        }
    }

    /// The first bytes of a file, as many as there are up to `count`.
    async fn first(&self, name: &str, count: u64) -> Result<Vec<u8>, String> {
        if count == 0 {
            return Ok(Vec::new());
        }
        match self {
            Self::Remote(store, uri) => {
                let uri = uri.join(name);
                let head = store.head(&uri).await.map_err(|e| e.to_string())?;
                let body = store.get_range(&uri, &head, 0, count).await;
                let mut body = body.map_err(|e| e.to_string())?;
                let mut bytes = Vec::new();
                while let Some(more) = body.next().await.map_err(|e| e.to_string())? {
                    bytes.extend_from_slice(&more);
                }
                Ok(bytes)
            }
            Self::Local(path) => {
                let mut file = File::open(path.join(name)).map_err(|e| e.to_string())?;
                let mut bytes = Vec::new();
                file.seek(SeekFrom::Start(0)).map_err(|e| e.to_string())?;
                file.take(count).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
                Ok(bytes)
            }
        }
    }

    /// Copies into an empty folder. A file of weights has its size and its header there, and zeros for data.
    pub async fn copy(&self, sizes: &BTreeMap<String, u64>, into: &Path) -> Result<(), String> {
        for (name, &bytes) in sizes.iter().filter(|(name, _)| belongs(name)) {
            let named = |error: String| format!("{name}: {error}");
            if let Some(folder) = into.join(name).parent() {
                std::fs::create_dir_all(folder).map_err(|e| named(e.to_string()))?;
            }
            if !name.ends_with(".safetensors") {
                let content = self.get(name, SMALL_BYTES_MAX).await.map_err(named)?;
                std::fs::write(into.join(name), content).map_err(|e| named(e.to_string()))?;
                continue;
            }
            let start = self.first(name, bytes.min(8)).await.map_err(named)?;
            let length = start.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
            // What is no such file has no such length; its first bytes say what it is.
            let header = if length <= HEADER_BYTES_MAX { 8 + length } else { 4096 };
            let content = self.first(name, header.min(bytes)).await.map_err(named)?;
            let sparse = || {
                let file = File::create(into.join(name))?;
                file.write_all_at(&content, 0)?;
                file.set_len(bytes)
            };
            sparse().map_err(|e| named(e.to_string()))?;
        }
        Ok(())
    }
}
