//! `millrace import`: a GGUF file into a model folder, and the folder into an object store.
//!
//! The manifest is uploaded last: a worker that sees it sees every file that it names.

use std::path::Path;

use millrace_worker::import::{self, ImportOptions};
use millrace_worker::store::{S3Uri, Store};
use millrace_worker::weights::manifest::MANIFEST_NAME;
use serde_json::json;

use crate::args::{Global, ImportArgs, ImportDtype};
use crate::failure::{Failure, Verdict};
use crate::output::{Printer, note};

/// Runs the command.
///
/// # Errors
/// [`Failure::Usage`] when the file is refused: the message names field, value and limit.
pub async fn run(global: &Global, args: &ImportArgs) -> Result<Verdict, Failure> {
    let printer = Printer { json: global.json };
    // A wrong address or unreadable credentials are said before the work, not after it.
    let target = match &args.to {
        None => None,
        Some(text) => {
            let wrong = |e: &dyn std::fmt::Display| Failure::Usage(format!("--to {text:?}: {e}"));
            let uri: S3Uri = text.parse().map_err(|e| wrong(&e))?;
            Some((Store::connect(&args.store.config()).await.map_err(|e| wrong(&e))?, uri))
        }
    };
    let options = ImportOptions {
        dtype: match args.dtype {
            ImportDtype::Bf16 => import::ImportDtype::Bf16,
            ImportDtype::F16 => import::ImportDtype::F16,
            ImportDtype::F32 => import::ImportDtype::F32,
        },
        ..ImportOptions::default()
    };
    let (gguf, out) = (args.gguf.clone(), args.out.clone());
    note(&format!("importing {}", gguf.display()));
    let imported = tokio::task::spawn_blocking(move || import::run(&gguf, &out, &options))
        .await
        .map_err(|error| Failure::Refused(format!("the import ended: {error}")))?
        .map_err(|error| Failure::Usage(format!("{}: {error}", args.gguf.display())))?;
    if let Some((store, uri)) = &target {
        upload(store, uri, &imported.folder).await?;
    }
    let folder = imported.folder.display().to_string();
    printer.object(&json!({
        "folder": folder,
        "digest": imported.digest,
        "parameters": imported.parameters,
        "bytes": imported.bytes,
        "uploaded_to": args.to,
    }));
    printer.say(&format!("{folder}: {} parameters, {}", imported.parameters, imported.digest));
    Ok(Verdict::Well)
}

/// Uploads each file of the folder, the manifest last.
async fn upload(store: &Store, uri: &S3Uri, folder: &Path) -> Result<(), Failure> {
    let fail = |e| Failure::file(folder.display(), e);
    let entries =
        std::fs::read_dir(folder).map_err(fail)?.collect::<std::io::Result<Vec<_>>>().map_err(fail)?;
    let mut names: Vec<String> =
        entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_by_key(|name| (name == MANIFEST_NAME, name.clone()));
    for name in names {
        note(&format!("uploading {name}"));
        let put = store.put_file(&uri.join(&name), &folder.join(&name)).await;
        put.map_err(|error| Failure::Refused(format!("--to {uri}: {name}: {error}")))?;
    }
    Ok(())
}
