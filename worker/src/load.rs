//! From the model's address to an engine that runs: verified files, then text and weights.
//!
//! A folder with a manifest must equal it, file by file; a folder without one gets the manifest that it would
//! have. Either way the digest that the records carry is that of the bytes that were loaded.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use millrace_crds::config::{ModelConfig, WorkerConfig};
use sha2::{Digest, Sha256};

use crate::engine::handle::EngineHandle;
use crate::prompt::Text;
use crate::start::Engine;
use crate::weights::manifest::{FileEntry, MANIFEST_NAME, Manifest};

/// Bytes hashed at a time.
const READ_BYTES: usize = 1 << 20;

/// Verified files of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    /// Where they are.
    pub path: PathBuf,
    /// `sha256:` and the digest of their manifest.
    pub digest: String,
}

/// A model that runs.
#[derive(Debug)]
pub struct Model {
    /// Its text side.
    pub text: Text,
    /// Its engine.
    pub engine: EngineHandle,
    /// Digest of its files.
    pub digest: String,
}

/// Brings the model's files here and verifies them.
///
/// # Errors
/// When they cannot be had, differ from their manifest or from `model.digest`, or are too large.
pub async fn pull(config: &WorkerConfig) -> anyhow::Result<Folder> {
    let model = config.model.clone();
    let Some(path) = model.uri.strip_prefix("file://").map(PathBuf::from) else {
        bail!("model.uri: {:?} is not file:///path", model.uri);
    };
    tokio::task::spawn_blocking(move || verify(path, &model)).await?
}

fn verify(path: PathBuf, model: &ModelConfig) -> anyhow::Result<Folder> {
    let named = path.join(MANIFEST_NAME);
    let manifest = match std::fs::read(&named) {
        Ok(bytes) => {
            let manifest = Manifest::parse(&bytes).with_context(|| named.display().to_string())?;
            check_size(&manifest, model)?;
            let names: Vec<&str> = manifest.files().iter().map(|file| file.name.as_str()).collect();
            let found = hash_all(&path, &names)?;
            for (file, found) in manifest.files().iter().zip(&found) {
                ensure!(
                    file == found,
                    "{}: {found:?} is not what the manifest says: {file:?}",
                    path.display()
                );
            }
            manifest
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let names = model_files(&path)?;
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            Manifest::new(hash_all(&path, &names)?).with_context(|| path.display().to_string())?
        }
        Err(error) => return Err(error).with_context(|| named.display().to_string()),
    };
    check_size(&manifest, model)?;
    let digest = format!("sha256:{}", manifest.digest().hex());
    if let Some(pinned) = &model.digest {
        ensure!(*pinned == digest, "model.digest: the files have {digest}, not {pinned}");
    }
    Ok(Folder { path, digest })
}

fn check_size(manifest: &Manifest, model: &ModelConfig) -> anyhow::Result<()> {
    let (total, limit) = (manifest.total_bytes(), model.bytes_max.0);
    ensure!(total <= limit, "model.bytesMax: the files have {total} bytes; {limit} are allowed");
    Ok(())
}

fn model_files(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let known = [".json", ".safetensors", ".jinja"].iter().any(|suffix| name.ends_with(suffix));
        if known && entry.metadata()?.is_file() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// One thread a file: a model has few, and hashing is bound by one core each.
fn hash_all(folder: &Path, names: &[&str]) -> anyhow::Result<Vec<FileEntry>> {
    std::thread::scope(|scope| {
        let hashing: Vec<_> =
            names.iter().map(|name| scope.spawn(move || hash(&folder.join(name), name))).collect();
        hashing.into_iter().map(|thread| thread.join().expect("a panic aborts")).collect()
    })
}

fn hash(path: &Path, name: &str) -> anyhow::Result<FileEntry> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer).with_context(|| path.display().to_string())? {
            0 => break,
            read => {
                digest.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
    Ok(FileEntry { name: name.to_owned(), bytes, sha256: hex::encode(digest.finalize()) })
}

/// Loads text and weights, and starts the engine.
///
/// # Errors
/// When a file, the configuration or the machine does not allow it.
pub async fn load(config: &WorkerConfig, folder: Folder) -> anyhow::Result<Model> {
    let (engine, name) = (config.engine.clone(), config.model.name.clone());
    let loading = move || {
        let path = &folder.path;
        let text = Text::open(path, name.as_str()).with_context(|| path.display().to_string())?;
        let engine = Engine::load(path, &engine).with_context(|| path.display().to_string())?;
        let info = engine.info();
        tracing::info!(
            precision = ?info.precision,
            isa = ?info.isa,
            threads = info.threads,
            kv_cache_bytes = info.kv_cache_bytes,
            limits = ?info.limits,
            digest = folder.digest,
            "loaded"
        );
        anyhow::Ok(Model { text, engine: engine.handle().clone(), digest: folder.digest })
    };
    tokio::task::spawn_blocking(loading).await?
}
