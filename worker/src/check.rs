//! `millrace-worker check`: a look at a model folder, at what a worker would refuse at its start, without pulling
//! weights.
//!
//! The files that say how the model is built and how it reads text are fetched and opened by the engine's own code.
//! Of the weights only names and sizes are compared; their hashes are checked when they are pulled.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use clap::Args;
use millrace_crds::check::{Check, Grade};
use millrace_engine::folder::manifest::{MANIFEST_BYTES_MAX, MANIFEST_NAME, Manifest};
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::text::prompt::Text;
use millrace_queue::args::StoreArgs;
use millrace_queue::store::{S3Uri, Store};

/// `millrace-worker check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The model's folder: a path, file:///path or s3://bucket/prefix
    #[arg(value_name = "MODEL")]
    uri: String,
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
const CONFIG: &str = "model config";
const TEXT: &str = "tokenizer";

/// Files that are fetched to be opened.
const OPENED: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
/// Largest of them: a tokenizer of 256k entries has some 35 MB.
const OPENED_BYTES_MAX: u64 = 128 << 20;

enum Folder {
    Local(PathBuf),
    Remote(Store, S3Uri),
}

impl Folder {
    async fn open(args: &CheckArgs) -> Result<Self, String> {
        if !args.uri.starts_with("s3://") {
            return Ok(Self::Local(args.uri.strip_prefix("file://").unwrap_or(&args.uri).into()));
        }
        let remote = args.uri.parse().map_err(|e| format!("{e}"))?;
        Ok(Self::Remote(Store::connect(&args.store.config()).await.map_err(|e| e.to_string())?, remote))
    }

    async fn list(&self) -> Result<BTreeMap<String, u64>, String> {
        match self {
            Self::Remote(store, uri) => {
                Ok(store.list(uri).await.map_err(|e| e.to_string())?.into_iter().collect())
            }
            Self::Local(path) => {
                let entries = std::fs::read_dir(path).map_err(|e| e.to_string())?;
                let sizes = entries.map(|entry| {
                    let entry = entry?;
                    Ok((entry.file_name().to_string_lossy().into_owned(), entry.metadata()?.len()))
                });
                sizes.collect::<std::io::Result<_>>().map_err(|e| e.to_string())
            }
        }
    }

    async fn get(&self, name: &str, limit: u64) -> Result<Bytes, String> {
        match self {
            Self::Remote(store, uri) => store.get(&uri.join(name), limit).await.map_err(|e| e.to_string()),
            Self::Local(path) => {
                let path = path.join(name);
                let bytes = std::fs::metadata(&path).map_err(|e| e.to_string())?.len();
                if bytes > limit {
                    return Err(format!("{bytes} bytes; {limit} are allowed"));
                }
                std::fs::read(path).map(Bytes::from).map_err(|e| e.to_string())
            }
        }
    }
}

async fn check(args: &CheckArgs) -> Vec<Check> {
    let uri = &args.uri;
    let reached = async {
        let folder = Folder::open(args).await?;
        let sizes = folder.list().await?;
        Ok::<_, String>((folder, sizes))
    };
    let (folder, sizes) = match reached.await {
        Ok(reached) => reached,
        Err(error) => {
            let fix = "check the address, --s3-endpoint and the credentials";
            return vec![Check::fail(REACH, format!("{uri}: {error}"), fix)];
        }
    };
    if sizes.is_empty() {
        let fix = format!("upload the model: millrace import FILE.gguf --out FOLDER --to {uri}");
        return vec![Check::fail(REACH, format!("{uri} is empty"), fix)];
    }
    let mut checks = vec![Check::ok(REACH, format!("{uri}: {} files", sizes.len()))];
    checks.push(files(&folder, &sizes).await);
    checks.extend(opened(&folder, &sizes).await);
    checks
}

async fn files(folder: &Folder, sizes: &BTreeMap<String, u64>) -> Check {
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

async fn opened(folder: &Folder, sizes: &BTreeMap<String, u64>) -> Vec<Check> {
    let fix = "import the model again, or choose one of the supported architectures";
    let fetched = async {
        let copy = tempfile::tempdir().map_err(|e| e.to_string())?;
        for name in OPENED.into_iter().filter(|name| sizes.contains_key(*name)) {
            let bytes = folder.get(name, OPENED_BYTES_MAX).await.map_err(|e| format!("{name}: {e}"))?;
            std::fs::write(copy.path().join(name), bytes).map_err(|e| format!("{name}: {e}"))?;
        }
        Ok::<_, String>(copy)
    };
    let copy = match fetched.await {
        Ok(copy) => copy,
        Err(error) => return vec![Check::fail(CONFIG, error, "make the files readable")],
    };
    let config = match DecoderConfig::read(copy.path()) {
        Ok(config) => Check::ok(
            CONFIG,
            format!("{} layers, {} parameters, supported", config.layers(), config.parameters()),
        ),
        Err(error) => Check::fail(CONFIG, error.to_string(), fix),
    };
    let text = match Text::open(copy.path(), "check") {
        Ok(_) => Check::ok(TEXT, "opens"),
        Err(error) => Check::fail(TEXT, error.to_string(), fix),
    };
    vec![config, text]
}
