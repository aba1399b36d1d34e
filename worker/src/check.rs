//! `millrace-worker check`: a look at a model folder or a GGUF file, at what a worker would refuse at its start,
//! without pulling weights.
//!
//! The files that say how the model is built and how it reads text are fetched and opened by the engine's own code.
//! Of the weights names, types and shapes are compared; their hashes are checked when they are pulled.

mod copy;
mod look;

use std::collections::BTreeMap;
use std::path::Path;

use clap::Args;
use copy::FolderAt;
use millrace_crds::check::{Check, Grade};
use millrace_engine::folder::manifest::{MANIFEST_BYTES_MAX, MANIFEST_NAME, Manifest};
use millrace_engine::import::{self, ImportOptions};
use millrace_queue::args::StoreArgs;

/// `millrace-worker check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The model's folder: a path, file:///path or s3://bucket/prefix; or the path of a GGUF file
    #[arg(value_name = "MODEL")]
    uri: String,
    /// The pre-tokenizer of a GGUF file, as `import` takes it
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    /// How to reach the object store
    #[command(flatten)]
    store: StoreArgs,
}

/// Runs the command; false when something fails.
///
/// # Errors
/// When nothing could be looked at.
pub fn run(args: &CheckArgs) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let checks = runtime.block_on(check(args));
    for check in &checks {
        if args.json {
            println!("{}", serde_json::to_string(check)?);
        } else {
            println!("{}", check.lines());
        }
    }
    Ok(checks.iter().all(|check| check.grade != Grade::Fail))
}

const REACH: &str = "model folder";
const FILES: &str = "model files";
const GGUF: &str = "GGUF file";

async fn check(args: &CheckArgs) -> Vec<Check> {
    let uri = &args.uri;
    let path = Path::new(uri.strip_prefix("file://").unwrap_or(uri));
    if path.is_file() {
        return gguf(args, path);
    }
    let reached = async {
        let folder = FolderAt::open(uri, &args.store).await?;
        let sizes = folder.list().await?;
        Ok::<_, String>((folder, sizes))
    };
    let (folder, sizes) = match reached.await {
        Ok(reached) => reached,
        Err(error) => {
            let fix = "check the address, --s3-endpoint and the credentials";
            // The store's own errors begin with the address.
            let found = if error.starts_with(uri.as_str()) { error } else { format!("{uri}: {error}") };
            return vec![Check::fail(REACH, found, fix)];
        }
    };
    if sizes.is_empty() {
        let fix = format!("upload the model: millrace import FILE.gguf --out FOLDER --to {uri}");
        return vec![Check::fail(REACH, format!("{uri} is empty"), fix)];
    }
    let mut checks = vec![Check::ok(REACH, format!("{uri}: {} files", sizes.len()))];
    checks.push(files(&folder, &sizes).await);
    let copied = async {
        let copy = tempfile::tempdir().map_err(|e| e.to_string())?;
        folder.copy(&sizes, copy.path()).await.map(|()| copy)
    };
    match copied.await {
        Ok(copy) => {
            let (config, decoder) = look::config(copy.path());
            checks.extend(config);
            checks.extend(decoder.iter().flat_map(|decoder| look::weights(copy.path(), decoder)));
            checks.extend(look::text(copy.path(), &sizes));
        }
        Err(error) => checks.push(Check::fail(FILES, error, "make the files readable")),
    }
    checks.extend(look::files(&sizes));
    checks
}

/// What an import of a GGUF file would give.
fn gguf(args: &CheckArgs, path: &Path) -> Vec<Check> {
    let options =
        ImportOptions { pre_tokenizer: args.pre.clone(), without_tensors: true, ..ImportOptions::default() };
    let folder = match tempfile::tempdir() {
        Ok(folder) => folder,
        Err(error) => return vec![Check::fail(REACH, error.to_string(), "make room for a temporary folder")],
    };
    let out = folder.path().join("model");
    let imported = match import::run(path, &out, &options) {
        Ok(imported) => imported,
        Err(error) => {
            let found = format!("{}: {error}", path.display());
            return vec![Check::fail(
                GGUF,
                found,
                "mend the file, or choose another conversion of the model",
            )];
        }
    };
    let found = format!(
        "{}: {} tensors, {} parameters; `millrace import` makes a folder of it",
        path.display(),
        imported.tensors,
        imported.parameters
    );
    let mut checks = vec![Check::ok(GGUF, found)];
    checks.extend(
        imported.notes.into_iter().map(|note| Check::warn(GGUF, note, "look whether the guess is right")),
    );
    checks.extend(look::config(&out).0);
    checks.extend(look::text(&out, &BTreeMap::new()));
    checks
}

async fn files(folder: &FolderAt, sizes: &BTreeMap<String, u64>) -> Check {
    let again = "import or upload the model again";
    if !sizes.contains_key(MANIFEST_NAME) {
        let fix = "upload it with `millrace import --to`, or pin model.digest; without either, nothing says \
                   what the files should be";
        return Check::warn(FILES, format!("no {MANIFEST_NAME}"), fix);
    }
    let read = folder.get(MANIFEST_NAME, MANIFEST_BYTES_MAX).await;
    let manifest = match read.and_then(|bytes| Manifest::parse(&bytes).map_err(|e| e.to_string())) {
        Ok(manifest) => manifest,
        Err(error) => return Check::fail(FILES, format!("{MANIFEST_NAME}: {error}"), again),
    };
    for file in manifest.files() {
        match sizes.get(&file.name) {
            Some(bytes) if *bytes == file.bytes => {}
            Some(bytes) => {
                let found = format!("{} has {bytes} bytes; the manifest says {}", file.name, file.bytes);
                return Check::fail(FILES, found, again);
            }
            None => return Check::fail(FILES, format!("{} is missing", file.name), again),
        }
    }
    let (count, bytes) = (manifest.files().len(), manifest.total_bytes());
    Check::ok(FILES, format!("{count} files, {bytes} bytes as the manifest says; {}", manifest.digest()))
}

#[cfg(test)]
mod tests;
