//! `millrace import`: a GGUF file into a model folder.

use millrace_worker::import::{self, ImportOptions};
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
    let folder = imported.folder.display().to_string();
    printer.object(&json!({
        "folder": folder,
        "digest": imported.digest,
        "parameters": imported.parameters,
    }));
    printer.say(&format!("{folder}: {} parameters, {}", imported.parameters, imported.digest));
    Ok(Verdict::Well)
}
