//! `millrace-worker bench`: how fast the engine is on this machine, beside what the machine could do at best.
//!
//! Sequences are greedy and never end early, so that every run does the same work. Loading is not counted, and
//! prefixes are not reused unless asked for. The machine's limits are measured on the spot, before the engine
//! starts; a step's limit is the longer of reading its bytes and computing its operations at these rates.

mod record;
mod requests;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use millrace_crds::config::{Device, Dtype, EngineConfig, KvCacheDtype, Quantization};
use millrace_crds::units::Bytes;
use millrace_kernels::bounds::{Bounds, ModelShape};
use millrace_kernels::cpu::Precision;
use millrace_kernels::ops::KvDtype;
use millrace_kernels::wait_until_real;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use millrace_engine::model::config::DecoderConfig;
use millrace_engine::model::files::Files;
use millrace_engine::model::random::RandomSource;
use millrace_engine::model::source::TensorSource;
use millrace_engine::schedule::request::{Request, Sampling};
use millrace_engine::start::{Engine, Info, Tuning};
use record::{Recorder, Steps};
use requests::Item;

/// Seed of random weights and random prompts: runs are comparable.
const SEED: u64 = 0;

/// Most repetitions.
const REPEAT_MAX: u32 = 1000;

/// What to measure.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Folder of the model, in Hugging Face layout.
    #[arg(long, required_unless_present = "config", conflicts_with = "config")]
    model: Option<PathBuf>,
    /// `dummy`: random weights of the shapes that `--config` says.
    #[arg(long, value_parser = ["dummy"], requires = "config")]
    load_format: Option<String>,
    /// A config.json, for `--load-format dummy`.
    #[arg(long, requires = "load_format")]
    config: Option<PathBuf>,
    /// Request list: lines of `{"prompt_token_ids":[...],"max_tokens":N}`.
    #[arg(long, conflicts_with = "synthetic", required_unless_present = "synthetic")]
    requests: Option<PathBuf>,
    /// Random prompts instead: N,PROMPT,OUTPUT (requests, tokens in, tokens out).
    #[arg(long)]
    synthetic: Option<requests::Synthetic>,
    /// Most sequences at once.
    #[arg(long, default_value_t = 64)]
    concurrency: u32,
    /// Most tokens in one step.
    #[arg(long, default_value_t = 512)]
    max_batch_tokens: u32,
    /// auto, cpu or cuda.
    #[arg(long, default_value = "cpu", value_parser = lowercase::<Device>)]
    device: Device,
    /// 0 is greedy; otherwise tokens are drawn, with seeds of their own.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Run a GPU's decodes op by op instead of as captured graphs.
    #[arg(long)]
    eager: bool,
    /// Wait for a GPU's step before the next one is prepared.
    #[arg(long)]
    no_overlap: bool,
    /// auto, f32 or bf16.
    #[arg(long, default_value = "auto", value_parser = lowercase::<Dtype>)]
    dtype: Dtype,
    /// none, int8, int4 or fp8.
    #[arg(long, default_value = "none", value_parser = lowercase::<Quantization>)]
    quantization: Quantization,
    /// auto, bf16 or fp8_e4m3.
    #[arg(long, default_value = "auto", value_parser = lowercase::<KvCacheDtype>)]
    kv_cache_dtype: KvCacheDtype,
    /// Threads that compute; all cores when absent.
    #[arg(long)]
    threads: Option<u32>,
    /// Runs; the one with the median speed is reported.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    /// Reuse prefixes, also those of earlier runs.
    #[arg(long)]
    prefix_cache: bool,
    /// Of this many waiting sequences the one with the longest output starts first.
    #[arg(long, default_value_t = 1)]
    longest_first: usize,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Reads a value as the configuration file spells it.
pub(crate) fn lowercase<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(Value::String(text.to_owned())).map_err(|error| error.to_string())
}

/// One run over all requests.
struct Run {
    wall_s: f64,
    output_tokens: usize,
    prompt_tokens: usize,
    steps: Steps,
}

impl Run {
    fn output_tokens_per_s(&self) -> f64 {
        self.output_tokens as f64 / self.wall_s
    }
}

/// Measures and prints.
///
/// # Errors
/// When the model, the request list or the sizes are not usable.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    if !(1..=REPEAT_MAX).contains(&args.repeat) {
        bail!("--repeat is {}; it must be from 1 to {REPEAT_MAX}", args.repeat);
    }
    let model = read_config(args)?;
    let items = match (&args.requests, args.synthetic) {
        (Some(path), _) => requests::read(path, model.vocabulary)?,
        (None, Some(synthetic)) => synthetic.draw(SEED, model.vocabulary),
        (None, None) => bail!("either --requests or --synthetic is needed"),
    };
    let begun = Instant::now();
    let recorder = Recorder::default();
    let engine = start(args, &model, &items, recorder.clone())?;
    let load_s = begun.elapsed().as_secs_f64();
    warm_up(&engine)?;
    let mut runs = Vec::new();
    for _ in 0..args.repeat {
        runs.push(measure(&engine, &items, args.temperature, &recorder)?);
    }
    let info = engine.info().clone();
    engine.join();
    let bounds = info.measure()?;
    runs.sort_by(|a, b| a.output_tokens_per_s().total_cmp(&b.output_tokens_per_s()));
    let all: Vec<f64> = runs.iter().map(Run::output_tokens_per_s).collect();
    let median = runs.swap_remove((runs.len() - 1) / 2);
    let report =
        report(&median, &info, bounds, json!({"load_s": load_s, "runs": all, "requests": items.len()}));
    if args.json {
        println!("{report}")
    } else {
        print_text(&report)
    }
    Ok(())
}

fn read_config(args: &BenchArgs) -> anyhow::Result<DecoderConfig> {
    match (&args.model, &args.config) {
        (Some(folder), _) => Ok(DecoderConfig::read(folder)?),
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            Ok(DecoderConfig::parse(&text, None)?)
        }
        (None, None) => bail!("either --model or --load-format dummy --config is needed"),
    }
}

fn start(
    args: &BenchArgs,
    model: &DecoderConfig,
    items: &[Item],
    recorder: Recorder,
) -> anyhow::Result<Engine> {
    let longest = items.iter().map(|item| item.prompt.len() + item.max_tokens as usize).max().unwrap_or(0);
    let max_model_len = longest.max(WARM_UP_TOKENS).min(model.positions_max as usize);
    let blocks = u64::from(args.concurrency) * (max_model_len as u64).div_ceil(16);
    let kv_bytes = 2 * 4 * 16 * model.layers() as u64 * (model.kv_heads * model.head_dim) as u64;
    // On the processor the widest cache type; what is not needed is not taken.
    let kv_cache_bytes = (args.device == Device::Cpu).then_some(Bytes(2 * blocks * kv_bytes));
    let config = EngineConfig {
        device: args.device,
        dtype: args.dtype,
        quantization: args.quantization,
        kv_cache_dtype: args.kv_cache_dtype,
        max_model_len: Some(max_model_len as u32),
        max_sequences: Some(args.concurrency),
        max_batch_tokens: Some(args.max_batch_tokens.max(args.concurrency).max(16)),
        kv_cache_bytes,
        prefix_cache: args.prefix_cache,
        threads: args.threads,
        ..EngineConfig::default()
    };
    let source: Box<dyn TensorSource> = match &args.model {
        Some(folder) => Box::new(Files::read(folder)?),
        None => Box::new(RandomSource::new(model, SEED)),
    };
    let tuning = Tuning {
        longest_first_window: args.longest_first,
        graphs: !args.eager,
        overlap: args.no_overlap.then_some(false),
        ..Tuning::default()
    };
    Ok(Engine::start(model, source.as_ref(), &config, tuning, Box::new(recorder))?)
}

/// Tokens of the warm-up's prompt and output.
const WARM_UP_TOKENS: usize = 40;

/// One short sequence, so that threads are awake, with memory that is real already.
fn warm_up(engine: &Engine) -> anyhow::Result<()> {
    wait_until_real();
    let prompt = vec![0; (WARM_UP_TOKENS - 8).min(engine.info().limits.max_model_len as usize - 1)];
    let room = engine.info().limits.max_model_len - prompt.len() as u32;
    engine.generate(request(&prompt, room.min(8), 0.0))?;
    Ok(())
}

fn request(prompt: &[u32], max_tokens: u32, temperature: f32) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        stop_tokens: Vec::new(),
        sampling: Sampling { temperature, ..Sampling::default() },
        seed: u64::from(prompt.first().copied().unwrap_or(0)),
    }
}

fn measure(engine: &Engine, items: &[Item], temperature: f32, recorder: &Recorder) -> anyhow::Result<Run> {
    recorder.take();
    let all = items.iter().map(|item| request(&item.prompt, item.max_tokens, temperature)).collect();
    let begun = Instant::now();
    let answers = engine.generate_batch(all);
    let wall_s = begun.elapsed().as_secs_f64();
    let mut output_tokens = 0;
    for (item, answer) in items.iter().zip(answers) {
        let tokens = answer?.tokens.len();
        assert_eq!(tokens, item.max_tokens as usize, "every request does all of its work");
        output_tokens += tokens;
    }
    let prompt_tokens = items.iter().map(|item| item.prompt.len()).sum();
    Ok(Run { wall_s, output_tokens, prompt_tokens, steps: recorder.take() })
}

/// Everything that was measured, as one JSON object.
fn report(run: &Run, info: &Info, bounds: Bounds, more: Value) -> Value {
    let model = &info.model;
    let shape = ModelShape {
        layers: model.layers(),
        hidden: model.hidden,
        heads: model.heads,
        kv_heads: model.kv_heads,
        head_dim: model.head_dim,
        ffn: model.intermediate,
        vocabulary: model.vocabulary,
    };
    let share = run.steps.share(&shape, (info.precision, info.kv_dtype), &bounds);
    json!({
        "output_tokens_per_s": run.output_tokens_per_s(),
        "prompt_tokens_per_s": run.prompt_tokens as f64 / run.wall_s,
        "bound_share": share.least_s / run.wall_s,
        "memory_share": share.read_s / run.wall_s,
        "compute_share": share.compute_s / run.wall_s,
        "decode_tokens_per_s": run.steps.decode_tokens_per_s(),
        "wall_s": run.wall_s,
        "output_tokens": run.output_tokens,
        "prompt_tokens": run.prompt_tokens,
        "host_us_per_step": run.steps.host_us_per_step(),
        "device_idle_share": run.steps.device_idle_share(),
        "steps": run.steps.summary(),
        "read_gb_per_s": bounds.read_bytes_per_s / 1e9,
        "compute_gop_per_s": bounds.operations_per_s / 1e9,
        "concurrency": info.limits.max_sequences,
        "max_batch_tokens": info.max_batch_tokens,
        "precision": format!("{:?}", info.precision).to_lowercase(),
        "kv_cache_dtype": kv_name(info),
        "kv_cache_bytes": info.kv_cache_bytes,
        "weight_bytes": info.weight_bytes,
        "kv_blocks": info.limits.kv_blocks,
        "hardware": info.hardware.to_string(),
        "parameters": model.parameters(),
        "run": more,
    })
}

/// What the cache holds, as the configuration spells it.
fn kv_name(info: &Info) -> &'static str {
    match (info.kv_dtype, info.precision) {
        (KvDtype::Fp8E4m3, _) => "fp8_e4m3",
        (KvDtype::Operand, Precision::F32) => "f32",
        (KvDtype::Operand, _) => "bf16",
    }
}

fn print_text(report: &Value) {
    let number = |field: &str| report[field].as_f64().unwrap_or(f64::NAN);
    println!(
        "{:.1} output tokens/s, {:.1} prompt tokens/s ({} out, {} in, {:.2} s; {} requests, {} at once)",
        number("output_tokens_per_s"),
        number("prompt_tokens_per_s"),
        report["output_tokens"],
        report["prompt_tokens"],
        number("wall_s"),
        report["run"]["requests"],
        report["concurrency"],
    );
    println!(
        "{:.1} % of the machine's limit (memory {:.1} %, compute {:.1} %; {:.1} GB/s, {:.0} Gop/s measured)",
        100.0 * number("bound_share"),
        100.0 * number("memory_share"),
        100.0 * number("compute_share"),
        number("read_gb_per_s"),
        number("compute_gop_per_s"),
    );
    println!(
        "{:.1} tokens/s in steps of decodes alone; {:.0} us of host work a step; {} with {} keys and values on {}",
        number("decode_tokens_per_s"),
        number("host_us_per_step"),
        report["precision"].as_str().unwrap_or_default(),
        report["kv_cache_dtype"].as_str().unwrap_or_default(),
        report["hardware"].as_str().unwrap_or_default(),
    );
    for (kind, steps) in report["steps"].as_object().into_iter().flatten() {
        let number = |field: &str| steps[field].as_f64().unwrap_or(f64::NAN);
        println!(
            "{kind:>8}: {} steps, {:.1} rows on average, p50 {:.2} ms, p99 {:.2} ms",
            steps["count"],
            number("rows"),
            number("p50_ms"),
            number("p99_ms"),
        );
    }
}
