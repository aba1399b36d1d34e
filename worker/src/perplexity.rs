//! `millrace-worker perplexity`: how well a model predicts a text, to compare numeric types and checkpoints with.
//!
//! The text is cut into windows of tokens that do not overlap; each token but the first of a window is scored after
//! those before it in the window. Perplexity = e^(mean of the negative log probabilities), in f64.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use millrace_crds::config::{Device, Dtype, EngineConfig, KvCacheDtype, Quantization};
use millrace_crds::units::Bytes;
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::schedule::request::{Event, Request, Sampling};
use millrace_engine::start::Engine;
use millrace_engine::text::prompt::Text;
use millrace_kernels::sha256;
use serde_json::json;

use crate::bench::lowercase;

/// Windows that run at once.
const AT_ONCE: usize = 64;
/// Longest window.
const WINDOW_MAX: usize = 1 << 16;

/// `millrace-worker perplexity`
#[derive(Debug, Args)]
pub struct PerplexityArgs {
    /// The model's folder
    #[arg(long, value_name = "FOLDER")]
    model: PathBuf,
    /// The text
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window
    #[arg(long, default_value_t = 512)]
    window: usize,
    /// Most tokens of the text that are read; all when absent
    #[arg(long)]
    tokens: Option<usize>,
    /// auto, cpu or cuda
    #[arg(long, default_value = "cpu", value_parser = lowercase::<Device>)]
    device: Device,
    /// auto, f32 or bf16
    #[arg(long, default_value = "auto", value_parser = lowercase::<Dtype>)]
    dtype: Dtype,
    /// none, int8, int4 or fp8
    #[arg(long, default_value = "none", value_parser = lowercase::<Quantization>)]
    quantization: Quantization,
    /// auto, bf16 or fp8_e4m3
    #[arg(long, default_value = "auto", value_parser = lowercase::<KvCacheDtype>)]
    kv_cache_dtype: KvCacheDtype,
    /// Threads that compute; all cores when absent
    #[arg(long)]
    threads: Option<u32>,
}

/// Measures and prints one JSON object.
///
/// # Errors
/// When the model, the text or the sizes are not usable.
pub fn run(args: &PerplexityArgs) -> anyhow::Result<()> {
    let model = DecoderConfig::read(&args.model)?;
    let longest = WINDOW_MAX.min(model.positions_max as usize);
    if !(2..=longest).contains(&args.window) {
        bail!("--window is {}; it must be from 2 to {longest}", args.window);
    }
    let text = std::fs::read(&args.text).with_context(|| args.text.display().to_string())?;
    let hash: String = sha256::digests(&text, text.len().max(1)).iter().map(hex::encode).collect();
    let text = String::from_utf8(text).with_context(|| args.text.display().to_string())?;
    let tokenizer = Text::open(&args.model, "perplexity")?;
    let mut tokens = tokenizer.encode(&text, false).map_err(|reject| anyhow::anyhow!("{reject:?}"))?;
    tokens.truncate(args.tokens.unwrap_or(usize::MAX));
    if tokens.len() < 2 {
        bail!("the text has {} tokens; at least 2 are needed", tokens.len());
    }
    let cache = 2 * 4 * model.layers() * model.kv_heads * model.head_dim * (args.window + 32) * AT_ONCE;
    let config = EngineConfig {
        device: args.device,
        dtype: args.dtype,
        quantization: args.quantization,
        kv_cache_dtype: args.kv_cache_dtype,
        max_model_len: Some(args.window as u32),
        max_sequences: Some(AT_ONCE as u32),
        kv_cache_bytes: Some(Bytes(cache as u64)),
        prefix_cache: false,
        threads: args.threads,
        ..EngineConfig::default()
    };
    let engine = Engine::load(&args.model, &config)?;
    let windows: Vec<&[u32]> = tokens.chunks(args.window).filter(|window| window.len() > 1).collect();
    let (mut sum, mut scored) = (0.0_f64, 0_usize);
    for windows in windows.chunks(AT_ONCE) {
        let running = windows.iter().map(|window| engine.generate_stream(request(window)));
        for (running, window) in running.collect::<Vec<_>>().into_iter().zip(windows) {
            let mut generation = running?;
            let before = scored;
            while let Some(event) = generation.next_blocking() {
                match event {
                    Event::Token(token) => {
                        let logprobs = token.logprobs.context("log probabilities were asked for")?;
                        sum -= f64::from(logprobs.chosen);
                        scored += 1;
                    }
                    Event::Finished(..) => break,
                    Event::Failed(reason) => bail!("the engine failed on a window: {reason}"),
                }
            }
            if scored - before != window.len() - 1 {
                bail!("{} of {} tokens of a window were scored", scored - before, window.len() - 1);
            }
        }
    }
    let info = engine.info();
    let report = json!({
        "perplexity": (sum / scored as f64).exp(),
        "tokens": scored,
        "window": args.window,
        "text_sha256": hash,
        "weight_bytes": info.weight_bytes,
        "quantization": config.quantization,
        "checkpoint": info.model.quantised.as_ref().map(ToString::to_string),
        "precision": format!("{:?}", info.precision).to_lowercase(),
        "hardware": info.hardware.to_string(),
    });
    println!("{report}");
    Ok(())
}

/// One that is led through a window.
fn request(window: &[u32]) -> Request {
    let sampling = Sampling { logprobs: Some(0), forced: window[1..].to_vec(), ..Sampling::default() };
    let max_tokens = window.len() as u32 - 1;
    Request { sampling, ..Request::greedy(window[..1].to_vec(), max_tokens) }
}
