//! `millrace-worker batch`: a file of requests to a file of answers, without any service.
//!
//! The output holds one line for each request, in the input's order. It only grows, so that a run that was
//! killed at any point goes on where it stopped, and ends with the same bytes as a run that was not: nothing
//! in an answer depends on time or attempt. What the output answers stands in a file beside it
//! (`OUTPUT.state`); another input, model or setting is refused instead of mixed in. Memory does not grow
//! with the files, save for 16 bytes per request to find a `custom_id` that is there twice.

mod input;
mod output;
#[cfg(test)]
mod tests;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use futures::stream::{self, TryStreamExt};
use millrace_crds::config::{Dtype, EngineConfig, ModelConfig, Quantization, StoreConfig};
use millrace_crds::units::Bytes;
use millrace_engine::schedule::handle::EngineHandle;
use millrace_engine::start::Engine;
use millrace_engine::text::generate::{AnswerError, Requests, Totals};
use millrace_engine::text::job::JobLimits;
use millrace_engine::text::prompt::Text;
use sha2::{Digest, Sha256};

use crate::weights;
use input::Input;
use output::{Output, State};

/// What the ids of answers begin with, in place of a job's id.
const ID: &str = "batch";
/// How often progress is shown on a terminal, and in a log.
const PROGRESS_TERMINAL: Duration = Duration::from_millis(200);
const PROGRESS_LOG: Duration = Duration::from_secs(30);

/// Answers a file of requests.
#[derive(Debug, Args)]
pub struct BatchArgs {
    /// Model folder in Hugging Face layout: a path, file:// or s3://.
    #[arg(long)]
    model: String,
    /// Requests: OpenAI batch lines, or request bodies, one a line.
    #[arg(long)]
    input: PathBuf,
    /// Answers: OpenAI batch output lines, in the input's order. An interrupted run goes on.
    #[arg(long)]
    output: PathBuf,
    /// The model's name in the answers; by default the last part of its address.
    #[arg(long)]
    name: Option<String>,
    /// Numeric type: auto, f32 or bf16.
    #[arg(long, default_value = "auto", value_parser = word::<Dtype>)]
    dtype: Dtype,
    /// Quantisation of the weights: none, int8, int4 or fp8.
    #[arg(long, default_value = "none", value_parser = word::<Quantization>)]
    quantization: Quantization,
    /// Longest prompt plus output, in tokens; the model's own limit by default.
    #[arg(long)]
    max_model_len: Option<u32>,
    /// Most sequences that run at once; by default 256 on a GPU and 64 on a processor.
    #[arg(long)]
    max_sequences: Option<u32>,
    /// Most tokens in one step; by default 8192 on a GPU and 512 on a processor.
    #[arg(long)]
    max_batch_tokens: Option<u32>,
    /// Size of the KV cache, such as 2Gi; a share of the free memory by default.
    #[arg(long)]
    kv_cache_bytes: Option<Bytes>,
    /// Threads; all cores by default.
    #[arg(long)]
    threads: Option<u32>,
    /// Take special tokens in requests for text, unless a request says otherwise.
    #[arg(long)]
    split_special_tokens: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// Where an s3:// model comes from.
#[derive(Debug, Args)]
struct StoreArgs {
    /// Address of the S3 service; AWS by default.
    #[arg(long)]
    endpoint: Option<String>,
    /// Region of the S3 service.
    #[arg(long)]
    region: Option<String>,
    /// Put the bucket into the path instead of the host name.
    #[arg(long)]
    path_style: bool,
    /// Folder with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; the AWS chain by default.
    #[arg(long)]
    credentials_dir: Option<PathBuf>,
    /// Folder where pulled models are kept.
    #[arg(long, default_value = "/var/cache/millrace")]
    cache_dir: PathBuf,
}

/// A word of the configuration file, such as `bf16`.
fn word<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(serde_json::Value::from(text)).map_err(|error| error.to_string())
}

/// What a finished run did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Summary {
    /// Requests that an earlier run had answered.
    resumed: usize,
    /// What this run answered.
    totals: Totals,
    /// There are requests, and none of them has an answer, from this run or an earlier one.
    all_failed: bool,
}

/// Runs the subcommand; false when there were requests and every one of them failed.
///
/// # Errors
/// When the model, a file or the engine fails. What was answered stays; the same command goes on with it.
pub fn run(args: &BatchArgs) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let model = model_config(args)?;
    let folder = runtime.block_on(weights::pull(&model)).context("the model")?;
    let name = args.name.clone().unwrap_or_else(|| last_part(&args.model).to_owned());
    let text =
        Text::open_for(&folder.path, &name, args.split_special_tokens).context("the model's folder")?;
    let config = engine_config(args);
    let settings = settings(&folder.digest.to_string(), &name, &config);
    let engine = Engine::load(&folder.path, &config).context("the engine")?;
    let begun = Instant::now();
    let files = FilePair { input: &args.input, output: &args.output, settings: &settings };
    let summary = runtime.block_on(answer_file(&files, &text, engine.handle()))?;
    let totals = summary.totals;
    let seconds = begun.elapsed().as_secs_f64();
    eprintln!(
        "{} answered, {} refused, {} from an earlier run; {} prompt and {} output tokens in {seconds:.1} s \
         ({:.1} output tokens/s)",
        totals.answered,
        totals.refused,
        summary.resumed,
        totals.prompt_tokens,
        totals.output_tokens,
        totals.output_tokens as f64 / seconds.max(f64::MIN_POSITIVE),
    );
    if summary.all_failed {
        eprintln!("{}: every request failed; each line says why", args.output.display());
    }
    Ok(!summary.all_failed)
}

fn last_part(address: &str) -> &str {
    address.trim_end_matches('/').rsplit('/').next().unwrap_or(address)
}

fn model_config(args: &BatchArgs) -> anyhow::Result<ModelConfig> {
    let uri = if args.model.contains("://") {
        args.model.clone()
    } else {
        let path =
            Path::new(&args.model).canonicalize().with_context(|| format!("--model {}", args.model))?;
        format!("file://{}", path.display())
    };
    let store = &args.store;
    let store = StoreConfig {
        endpoint: store.endpoint.clone(),
        region: store.region.clone(),
        path_style: store.path_style,
        credentials_dir: store.credentials_dir.clone(),
        ..StoreConfig::default()
    };
    // The rest has defaults, which only the file format knows.
    let config =
        serde_json::json!({"name": ID, "uri": uri, "store": store, "cacheDir": args.store.cache_dir});
    Ok(serde_json::from_value(config)?)
}

fn engine_config(args: &BatchArgs) -> EngineConfig {
    EngineConfig {
        dtype: args.dtype,
        quantization: args.quantization,
        max_model_len: args.max_model_len,
        max_sequences: args.max_sequences,
        max_batch_tokens: args.max_batch_tokens,
        kv_cache_bytes: args.kv_cache_bytes,
        threads: args.threads,
        split_special_tokens: args.split_special_tokens,
        ..EngineConfig::default()
    }
}

/// What the answers depend on, beside the input. Sizes of batches and caches are not among it: the engine's
/// output does not depend on them.
fn settings(digest: &str, name: &str, config: &EngineConfig) -> String {
    let mut parts = serde_json::json!({
        "model": digest,
        "name": name,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "maxModelLen": config.max_model_len,
    });
    if config.split_special_tokens {
        parts["splitSpecialTokens"] = true.into();
    }
    parts.to_string()
}

/// The files of a run, and what its answers depend on beside them.
struct FilePair<'a> {
    input: &'a Path,
    output: &'a Path,
    settings: &'a str,
}

/// Answers what is not answered yet.
async fn answer_file(files: &FilePair<'_>, text: &Text, engine: &EngineHandle) -> anyhow::Result<Summary> {
    let limits = JobLimits::from(engine.limits());
    let (sha256, created) = input::fingerprint(files.input).with_context(|| shown(files.input))?;
    let settings = hex::encode(Sha256::digest(files.settings));
    let state = State { input_sha256: sha256, settings_sha256: settings, created };
    let mut output = Output::open(files.output, &state).with_context(|| shown(files.output))?;
    let resumed = output.answered();
    let mut input = Input::open(files.input, limits).with_context(|| shown(files.input))?;
    for _ in 0..resumed {
        input.next().transpose()?.context("the output has more lines than the input")?;
    }
    // A file that breaks while it is read ends the stream of requests; the error is told afterwards.
    let mut broken = None;
    let lines = std::iter::from_fn(|| match input.next()? {
        Ok(line) => Some(line),
        Err(error) => {
            broken = Some(error);
            None
        }
    });
    let requests = Requests::new(text, engine, None);
    let mut totals = Totals::default();
    let mut progress = Progress::new(resumed);
    let mut answers = requests.answer_in_order(stream::iter(lines), output.created());
    while let Some(answer) = answers.try_next().await.map_err(explain)? {
        output.append(&answer.line).with_context(|| shown(files.output))?;
        totals.add(&answer);
        progress.show(&totals);
    }
    drop(answers);
    let all_failed = output.answered() > 0 && output.succeeded() == 0;
    output.close().with_context(|| shown(files.output))?;
    match broken {
        Some(error) => Err(error).with_context(|| shown(files.input)),
        None => Ok(Summary { resumed, totals, all_failed }),
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn explain(fault: AnswerError) -> anyhow::Error {
    anyhow::anyhow!("{fault}; what was answered stays, and the same command goes on with it")
}

/// Lines on stderr, seldom enough to cost nothing.
struct Progress {
    resumed: usize,
    begun: Instant,
    shown: Instant,
    terminal: bool,
}

impl Progress {
    fn new(resumed: usize) -> Self {
        let now = Instant::now();
        Self { resumed, begun: now, shown: now, terminal: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, totals: &Totals) {
        let pause = if self.terminal { PROGRESS_TERMINAL } else { PROGRESS_LOG };
        if self.shown.elapsed() < pause {
            return;
        }
        self.shown = Instant::now();
        let done = self.resumed + totals.answered + totals.refused;
        let rate = totals.output_tokens as f64 / self.begun.elapsed().as_secs_f64();
        let end = if self.terminal { "\r" } else { "\n" };
        let mut stderr = std::io::stderr().lock();
        // Progress that cannot be shown is no reason to stop.
        let _ = write!(stderr, "{done} requests done, {rate:.0} output tokens/s{end}");
    }
}
