//! Batch invariance: a request's tokens and log probabilities are the same bytes whatever runs beside it.
//!
//! The same 64 requests run alone and in batches of 7, 16 and 64; with and without prefix hits; under step budgets
//! that cut prompts into chunks; with too few KV blocks, so that sequences are preempted and computed again; and with
//! each step queued before the tokens of the one before are known; in f32, bf16 and int8, and with a KV cache in 8
//! bits. Retries, resumption and exactly-once results rest on this.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use millrace_crds::config::{Device, Dtype, EngineConfig, KvCacheDtype, OutputReserve, Quantization};
use millrace_crds::units::Bytes;
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::model::files::Files;
use millrace_engine::schedule::handle::EngineLoad;
use millrace_engine::schedule::request::{Finish, Request, Sampling};
use millrace_engine::schedule::{Moment, Observer};
use millrace_engine::start::{Engine, Tuning};
use millrace_kernels::isa::Isa;
use millrace_tests::checkpoint;
use millrace_tests::random::Random;
use serde_json::{Value, json};

const REQUESTS: usize = 64;
const VOCABULARY: u32 = 131;
/// Longest prompt plus output.
const POSITIONS: u32 = 256;
/// Enough for every sequence at its longest.
const PLENTY: u64 = 64 << 20;

/// Blocks for one or two long sequences, or a few short ones: no sequence has more than 14.
const SCARCE_BLOCKS: u64 = 32;

/// What may not matter.
#[derive(Debug, Clone, Copy)]
struct Circumstances {
    /// Most sequences in a step.
    sequences: u32,
    /// Most tokens in a step.
    budget: u32,
    prefix_cache: bool,
    /// Too few KV blocks for all, and none set aside for output, so that sequences are preempted.
    scarce: bool,
    /// A step is queued while the one before is not collected.
    overlap: bool,
}

/// The rows of a table read better than their fields' names.
const fn under(sequences: u32, budget: u32, prefix_cache: bool, scarce: bool) -> Circumstances {
    Circumstances { sequences, budget, prefix_cache, scarce, overlap: false }
}

const fn overlapping(at: Circumstances) -> Circumstances {
    Circumstances { overlap: true, ..at }
}

const CIRCUMSTANCES: [Circumstances; 16] = [
    under(1, 32, true, false),
    under(7, 32, false, false),
    under(7, 32, true, false),
    under(7, 512, true, false),
    under(16, 32, true, false),
    under(16, 512, false, false),
    // 64 decodes leave 32 tokens of each step to prompts.
    under(64, 96, false, false),
    under(64, 96, true, false),
    under(64, 512, true, false),
    under(64, 512, false, true),
    under(64, 96, true, true),
    overlapping(under(1, 32, false, false)),
    overlapping(under(7, 32, true, false)),
    overlapping(under(64, 96, true, false)),
    overlapping(under(64, 512, false, true)),
    overlapping(under(64, 96, true, true)),
];

/// Llama's plain decoder, and one with windows, biases and norms on heads less Llama's.
fn models() -> [(&'static str, Value); 3] {
    let sizes = json!({
        "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    });
    let with = |changes: Value| checkpoint::with(&sizes, &changes);
    [
        ("llama", with(json!({"architectures": ["LlamaForCausalLM"]}))),
        (
            "mistral",
            with(json!({"architectures": ["MistralForCausalLM"], "sliding_window": 40, "head_dim": 20,
            "tie_word_embeddings": false})),
        ),
        (
            "qwen3",
            with(json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "attention_bias": true})),
        ),
    ]
}

/// Prompts of 1 to 150 tokens, half of them behind one of three shared prefixes; greedy and sampled, with every
/// option; outputs of 1 to 40 tokens.
fn requests() -> Vec<Request> {
    let mut random = Random::new(5);
    let mut draw = |end: u64| random.within(0..end) as u32;
    let prefixes: Vec<Vec<u32>> =
        [33, 64, 100].iter().map(|&length| (0..length).map(|_| draw(VOCABULARY.into())).collect()).collect();
    (0..REQUESTS)
        .map(|number| {
            let mut prompt = if number % 2 == 0 { prefixes[number / 2 % 3].clone() } else { Vec::new() };
            let own = 1 + draw(if number % 5 == 0 { 150 } else { 40 });
            prompt.extend((0..own).map(|_| draw(VOCABULARY.into())));
            prompt.truncate(180);
            let sampled = number % 3 != 0;
            Request {
                max_tokens: 1 + draw(40),
                stop_tokens: if number % 4 == 0 { vec![3, 77] } else { Vec::new() },
                sampling: Sampling {
                    temperature: if sampled { 0.5 + number as f32 / 64.0 } else { 0.0 },
                    top_p: if number % 6 == 1 { 0.9 } else { 1.0 },
                    top_k: if number % 6 == 2 { 20 } else { 0 },
                    min_p: if number % 6 == 4 { 0.05 } else { 0.0 },
                    repetition_penalty: if number % 7 == 0 { 1.2 } else { 1.0 },
                    presence_penalty: if number % 7 == 1 { 0.5 } else { 0.0 },
                    frequency_penalty: if number % 7 == 2 { 0.5 } else { 0.0 },
                    logit_bias: if number % 7 == 3 { vec![(5, 2.0), (9, -3.0)] } else { Vec::new() },
                    min_tokens: if number % 7 == 4 { 8 } else { 0 },
                    logprobs: Some(number as u32 % 6),
                    ..Sampling::default()
                },
                seed: number as u64 * 977,
                prompt,
            }
        })
        .collect()
}

/// A sequence as its bytes: token, log probabilities of it and of the most probable ones, and how it ended.
type Output = (Vec<(u32, u32, Vec<(u32, u32)>)>, Finish);

/// What a run gives, and what happened on the way.
struct Ran {
    outputs: Vec<Output>,
    block_bytes: u64,
    cached_tokens: u64,
    preemptions: u64,
    /// Steps that were decided before the one before was computed.
    ahead: u64,
}

/// Counts the steps that are decided ahead.
#[derive(Debug, Clone, Default)]
struct Ahead {
    count: Arc<AtomicU64>,
    in_flight: u64,
}

impl Observer for Ahead {
    fn observe(&mut self, moment: Moment) {
        match moment {
            Moment::Scheduled(_) => {
                self.count.fetch_add(self.in_flight, Ordering::Relaxed);
                self.in_flight += 1;
            }
            Moment::Computed(_) => self.in_flight -= 1,
            Moment::Begun | Moment::Reported => {}
        }
    }
}

/// Numeric types and the instructions that they are computed with.
#[derive(Debug, Clone, Copy)]
struct Arithmetic {
    types: Types,
    isa: Isa,
}

/// Of weights, and of keys and values.
type Types = (Dtype, Quantization, KvCacheDtype);

fn run(
    folder: &Path,
    arithmetic: Arithmetic,
    (at, kv_cache_bytes): (Circumstances, u64),
    requests: Vec<Request>,
) -> Result<Ran> {
    let model = DecoderConfig::read(folder)?;
    let config = EngineConfig {
        device: Device::Cpu,
        dtype: arithmetic.types.0,
        quantization: arithmetic.types.1,
        kv_cache_dtype: arithmetic.types.2,
        max_sequences: Some(at.sequences),
        max_batch_tokens: Some(at.budget),
        prefix_cache: at.prefix_cache,
        kv_cache_bytes: Some(Bytes(kv_cache_bytes)),
        output_reserve: if at.scarce { OutputReserve::None } else { OutputReserve::Full },
        threads: Some(2),
        ..EngineConfig::default()
    };
    let tuning = Tuning {
        longest_first_window: if at.scarce { 8 } else { 1 },
        isa: Some(arithmetic.isa),
        overlap: Some(at.overlap),
        ..Tuning::default()
    };
    let ahead = Ahead::default();
    let engine = Engine::start(&model, &Files::read(folder)?, &config, tuning, Box::new(ahead.clone()))?;
    let outputs = engine.generate_batch(requests);
    let outputs = outputs
        .into_iter()
        .map(|generated| {
            let generated = generated?;
            let bits = |(id, value): (u32, f32)| (id, value.to_bits());
            let tokens = generated.tokens.into_iter().map(|token| {
                let logprobs = token.logprobs.expect("every request asks for them");
                (token.id, logprobs.chosen.to_bits(), logprobs.top.into_iter().map(bits).collect())
            });
            Ok((tokens.collect(), generated.finish))
        })
        .collect::<Result<_>>()?;
    let (load, info) = (engine.handle().load(), engine.info());
    Ok(Ran {
        outputs,
        block_bytes: info.kv_cache_bytes / u64::from(info.limits.kv_blocks),
        cached_tokens: EngineLoad::get(&load.cached_tokens),
        preemptions: EngineLoad::get(&load.preemptions),
        ahead: ahead.count.load(Ordering::Relaxed),
    })
}

/// Runs the requests under all circumstances; the first run has them alone, one after the other, whole prompts at
/// once, and is what all others must equal. Penalties keep steps from overlapping: those runs happen without them
/// too.
fn check(folder: &Path, arithmetic: Arithmetic, circumstances: &[Circumstances]) -> Result<Vec<Output>> {
    let Ran { outputs: alone, block_bytes, .. } =
        run(folder, arithmetic, (under(1, 512, false, false), PLENTY), requests())?;
    for &at in circumstances {
        let bytes = if at.scarce { SCARCE_BLOCKS * block_bytes } else { PLENTY };
        for penalties in [true, false].into_iter().take(1 + usize::from(at.overlap)) {
            let taken = |request: &Request| penalties || !penalises(&request.sampling);
            let (numbers, requests): (Vec<usize>, Vec<Request>) =
                requests().into_iter().enumerate().filter(|(_, request)| taken(request)).unzip();
            let ran = run(folder, arithmetic, (at, bytes), requests)?;
            for (&number, found) in numbers.iter().zip(&ran.outputs) {
                let expected = &alone[number];
                anyhow::ensure!(
                    found == expected,
                    "request {number} under {at:?}, {arithmetic:?}:\n{found:?}\nalone:\n{expected:?}"
                );
            }
            anyhow::ensure!((ran.cached_tokens > 0) == at.prefix_cache, "{} tokens found", ran.cached_tokens);
            anyhow::ensure!((ran.preemptions > 0) == at.scarce, "{} preempted under {at:?}", ran.preemptions);
            anyhow::ensure!((ran.ahead > 0) == at.overlap, "{} steps ahead under {at:?}", ran.ahead);
        }
    }
    Ok(alone)
}

fn penalises(sampling: &Sampling) -> bool {
    let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = *sampling;
    (repetition_penalty, presence_penalty, frequency_penalty) != (1.0, 0.0, 0.0)
}

const TYPES: [Types; 6] = [
    (Dtype::F32, Quantization::None, KvCacheDtype::Auto),
    (Dtype::Bf16, Quantization::None, KvCacheDtype::Bf16),
    (Dtype::Bf16, Quantization::Int8, KvCacheDtype::Auto),
    (Dtype::Bf16, Quantization::None, KvCacheDtype::Fp8E4m3),
    (Dtype::Bf16, Quantization::Int4, KvCacheDtype::Auto),
    (Dtype::Bf16, Quantization::Fp8, KvCacheDtype::Auto),
];

fn each_arithmetic(name: &str, circumstances: &[Circumstances], isas: &[Isa]) -> Result<()> {
    let (_, config) = models().into_iter().find(|model| model.0 == name).context("a model of that name")?;
    let folder = tempfile::tempdir()?;
    checkpoint::write(folder.path(), &config, 21)?;
    let mut all = Vec::new();
    for types in TYPES {
        for &isa in isas {
            let arithmetic = Arithmetic { types, isa };
            let outputs = check(folder.path(), arithmetic, circumstances)
                .with_context(|| format!("{name}, {arithmetic:?}"))?;
            let different: HashSet<_> = outputs.iter().map(|output| &output.0).collect();
            anyhow::ensure!(different.len() > REQUESTS * 3 / 4, "outputs vary: {} do", different.len());
            all.push(outputs);
        }
    }
    let kinds: Vec<_> = all.chunks(isas.len()).map(|kind| &kind[0]).collect();
    for (number, kind) in kinds.iter().enumerate() {
        anyhow::ensure!(!kinds[..number].contains(kind), "{:?} changes nothing", TYPES[number]);
    }
    Ok(())
}

#[test]
fn no_circumstance_changes_a_byte() -> Result<()> {
    each_arithmetic("llama", &CIRCUMSTANCES, &[Isa::detect()])
}

#[test]
fn nor_with_windows_biases_and_norms_on_heads() -> Result<()> {
    let some = [
        under(7, 32, true, false),
        under(64, 512, false, false),
        under(64, 96, true, true),
        overlapping(under(64, 96, true, true)),
    ];
    each_arithmetic("mistral", &some, &[Isa::detect()])?;
    each_arithmetic("qwen3", &some, &[Isa::detect()])
}

#[test]
fn nor_with_any_instructions_of_this_processor() -> Result<()> {
    let some = [under(7, 32, true, false), under(64, 96, true, true)];
    let isas: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect();
    each_arithmetic("llama", &some, &isas)
}
