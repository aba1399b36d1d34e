//! `millrace-worker import`: a GGUF file into a model folder, and the folder into an object store.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use millrace_engine::import::{self, ImportDtype, ImportOptions};
use millrace_queue::args::StoreArgs;
use millrace_queue::store::{S3Uri, Store};
use serde_json::json;

use crate::weights;

/// `millrace-worker import`
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The GGUF file; of a split one the first part, with the others beside it
    #[arg(value_name = "GGUF")]
    gguf: PathBuf,
    /// The folder to write, in Hugging Face layout
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
    /// Numeric type of the weights: bf16, f16 or f32
    #[arg(long, default_value = "bf16")]
    dtype: ImportDtype,
    /// The pre-tokenizer of a byte-level vocabulary, where the file names none or another is right: gpt-2, smollm,
    /// llama-bpe, smaug-bpe or qwen2
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Then upload the folder to s3://bucket/prefix
    #[arg(long, value_name = "URI")]
    to: Option<String>,
    /// Print JSON alone on standard output
    #[arg(long)]
    json: bool,
    /// How to reach the object store
    #[command(flatten)]
    store: StoreArgs,
}

/// Runs the command.
///
/// # Errors
/// When the file is refused, with the field, its value and the limit, or the store cannot be had. A wrong address is
/// said before the work, not after it.
pub fn run(args: &ImportArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let target = match &args.to {
        None => None,
        Some(text) => {
            text.parse::<S3Uri>().with_context(|| format!("--to {text:?}"))?;
            Some((runtime.block_on(Store::connect(&args.store.config()))?, text))
        }
    };
    eprintln!("importing {}", args.gguf.display());
    let options =
        ImportOptions { dtype: args.dtype, pre_tokenizer: args.pre.clone(), ..ImportOptions::default() };
    let imported =
        import::run(&args.gguf, &args.out, &options).with_context(|| format!("{}", args.gguf.display()))?;
    imported.notes.iter().for_each(|note| eprintln!("note: {note}"));
    if let Some((store, uri)) = target {
        eprintln!("uploading to {uri}");
        runtime.block_on(weights::upload(&imported.folder, uri, &store))?;
    }
    let folder = imported.folder.display().to_string();
    if args.json {
        let object = json!({
            "folder": folder,
            "digest": imported.digest,
            "parameters": imported.parameters,
            "bytes": imported.bytes,
            "notes": imported.notes,
            "uploaded_to": args.to,
        });
        println!("{object}");
    } else {
        println!("{folder}: {} parameters, {}", imported.parameters, imported.digest);
    }
    Ok(())
}
