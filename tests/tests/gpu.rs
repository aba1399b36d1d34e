//! The engine on a GPU: the same bytes under any circumstance, as graphs and op by op, and the CPU's answers.
//!
//! The same 64 requests run alone, in batches of 7 and 64, four times over in one of 256, cut into chunks, with prefix
//! hits, with too few KV blocks, so that sequences are preempted, and with and without a step being queued while one
//! runs. The CPU's answers are compared with those of the kernels for chips with little shared memory, too. Without a
//! GPU the tests say that they were skipped; with MILLRACE_REQUIRE_CUDA they fail.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use millrace_crds::config::{Device, Dtype, EngineConfig, KvCacheDtype, OutputReserve};
use millrace_crds::units::Bytes;
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::model::files::Files;
use millrace_engine::schedule::handle::EngineLoad;
use millrace_engine::schedule::request::{Request, Sampling};
use millrace_engine::start::{Engine, Generated, Tuning};
use millrace_engine::text::prompt::Text;
use millrace_kernels::cuda;
use millrace_tests::random::Random;
use millrace_tests::{checkpoint, model, tools};
use serde_json::{Value, json};

const REQUESTS: usize = 64;
const VOCABULARY: u32 = 5003;
/// Longest prompt plus output: over one split of attention.
const POSITIONS: u32 = 1024;
/// Enough for every sequence at its longest.
const PLENTY: u64 = 256 << 20;
/// Blocks for the longest sequence and one or two more.
const SCARCE_BLOCKS: u64 = 80;
/// The GPU may lie so many times as far from the CPU as the CPU's own bf16 from its f32, which is measured beside it.
/// On an H200 it was at most 2.5 times as far, and 7 more of 64 answers parted.
const APART: f32 = 4.0;
/// Answers that may part beyond that: chance in a small number.
const PART_MORE: usize = 12;

fn missing() -> bool {
    let missing = !cuda::is_present();
    assert!(!missing || std::env::var_os("MILLRACE_REQUIRE_CUDA").is_none(), "a GPU is required");
    if missing {
        // Past the test's captured output, which only a failure shows.
        let _ = writeln!(std::io::stderr(), "SKIPPED: there is no GPU, or no kernels in this build");
    }
    missing
}

/// Sizes of all models.
fn sizes() -> Value {
    json!({
        "hidden_size": 192, "intermediate_size": 328, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    })
}

fn models() -> [(&'static str, Value); 3] {
    let with = |changes: Value| checkpoint::with(&sizes(), &changes);
    [
        ("llama", with(json!({"architectures": ["LlamaForCausalLM"]}))),
        (
            "mistral",
            with(
                json!({"architectures": ["MistralForCausalLM"], "sliding_window": 100, "tie_word_embeddings": false}),
            ),
        ),
        (
            "qwen3",
            with(json!({"architectures": ["Qwen3ForCausalLM"], "num_attention_heads": 8, "head_dim": 128,
            "attention_bias": true})),
        ),
    ]
}

/// The wider families, each with what it has of its own, and groups of more query heads than one unit takes.
fn families() -> [(&'static str, Value); 7] {
    let with = |changes: Value| checkpoint::with(&sizes(), &changes);
    [
        (
            "gemma3",
            with(json!({"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 4, "head_dim": 256,
            "num_attention_heads": 4, "sliding_window": 100, "sliding_window_pattern": 2,
            "rope_local_base_freq": 300.0, "query_pre_attn_scalar": 4096})),
        ),
        (
            "gemma2",
            with(json!({"architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 4, "head_dim": 256,
            "num_attention_heads": 4, "sliding_window": 100, "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0})),
        ),
        ("phi3", with(json!({"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.75}))),
        ("smollm3", with(json!({"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4}))),
        ("olmo2", with(json!({"architectures": ["Olmo2ForCausalLM"]}))),
        (
            "granite",
            with(json!({"architectures": ["GraniteForCausalLM"], "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "logits_scaling": 2.0})),
        ),
        (
            "llama, groups of 12",
            with(json!({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 12,
            "num_key_value_heads": 1})),
        ),
    ]
}

/// Prompts of 1 to 700 tokens, some behind a shared prefix; greedy and drawn, with every option.
fn requests() -> Vec<Request> {
    let mut random = Random::new(5);
    let mut draw = |end: u64| random.within(0..end) as u32;
    let prefix: Vec<u32> = (0..100).map(|_| draw(VOCABULARY.into())).collect();
    (0..REQUESTS)
        .map(|number| {
            let mut prompt = if number % 2 == 0 { prefix.clone() } else { Vec::new() };
            let own = 1 + draw(if number % 8 == 0 { 600 } else { 60 });
            prompt.extend((0..own).map(|_| draw(VOCABULARY.into())));
            let drawn = number % 3 != 0;
            Request {
                max_tokens: 1 + draw(50),
                stop_tokens: Vec::new(),
                sampling: Sampling {
                    temperature: if drawn { 0.5 + number as f32 / 64.0 } else { 0.0 },
                    top_p: if number % 5 == 1 { 0.9 } else { 1.0 },
                    top_k: if number % 5 == 2 { 20 } else { 0 },
                    min_p: if number % 5 == 4 { 0.05 } else { 0.0 },
                    repetition_penalty: if number % 7 == 0 { 1.2 } else { 1.0 },
                    presence_penalty: if number % 7 == 1 { 0.5 } else { 0.0 },
                    frequency_penalty: if number % 7 == 2 { 0.5 } else { 0.0 },
                    logit_bias: if number % 7 == 3 { vec![(5, 2.0), (9, -3.0)] } else { Vec::new() },
                    logprobs: (number % 4 != 3).then_some(number as u32 % 4),
                    ..Sampling::default()
                },
                seed: number as u64 * 977,
                prompt,
            }
        })
        .collect()
}

/// What may not matter.
#[derive(Debug, Clone, Copy)]
struct Circumstances {
    sequences: u32,
    budget: u32,
    prefix_cache: bool,
    scarce: bool,
    graphs: bool,
    /// A step is queued while one runs, as far as penalties allow; else each one is waited for.
    overlap: bool,
}

const fn under(sequences: u32, budget: u32) -> Circumstances {
    Circumstances { sequences, budget, prefix_cache: false, scarce: false, graphs: true, overlap: true }
}

/// On what, in what floats, and with what in the KV cache.
type Place = (On, Dtype, KvCacheDtype);

#[derive(Debug, Clone, Copy, PartialEq)]
enum On {
    Cpu,
    /// With the kernels that are best for it.
    Gpu,
    /// With those for chips with little shared memory.
    SmallGpu,
}

const KV_DTYPES: [KvCacheDtype; 2] = [KvCacheDtype::Auto, KvCacheDtype::Fp8E4m3];

fn engine(
    config: &Value,
    (on, dtype, kv_cache_dtype): Place,
    at: Circumstances,
    kv_cache_bytes: u64,
) -> Result<Engine> {
    let folder = tempfile::tempdir()?;
    checkpoint::write(folder.path(), config, 21)?;
    let model = DecoderConfig::read(folder.path())?;
    let settings = EngineConfig {
        device: if on == On::Cpu { Device::Cpu } else { Device::Cuda },
        dtype,
        kv_cache_dtype,
        max_sequences: Some(at.sequences),
        max_batch_tokens: Some(at.budget),
        prefix_cache: at.prefix_cache,
        kv_cache_bytes: Some(Bytes(kv_cache_bytes)),
        output_reserve: if at.scarce { OutputReserve::None } else { OutputReserve::Full },
        ..EngineConfig::default()
    };
    let tuning = Tuning {
        graphs: at.graphs,
        small_gpu: on == On::SmallGpu,
        overlap: (!at.overlap).then_some(false),
        ..Tuning::default()
    };
    Ok(Engine::start(&model, &Files::read(folder.path())?, &settings, tuning, Box::new(()))?)
}

/// Every token and log probability, bit for bit.
fn bits(all: &[Generated]) -> Vec<Vec<(u32, Vec<u32>)>> {
    let of = |generated: &Generated| {
        let tokens = generated.tokens.iter().map(|token| {
            let logprobs = token.logprobs.iter();
            let numbers = logprobs.flat_map(|l| {
                [l.chosen.to_bits()].into_iter().chain(l.top.iter().flat_map(|t| [t.0, t.1.to_bits()]))
            });
            (token.id, numbers.collect())
        });
        tokens.collect()
    };
    all.iter().map(of).collect()
}

fn answers(engine: &Engine, requests: Vec<Request>) -> Result<Vec<Generated>> {
    Ok(engine.generate_batch(requests).into_iter().collect::<Result<_, _>>()?)
}

#[test]
fn no_circumstance_changes_a_byte_on_a_gpu() -> Result<()> {
    if missing() {
        return Ok(());
    }
    let cached = Circumstances { prefix_cache: true, ..under(64, 512) };
    let circumstances = [
        under(7, 64),
        under(64, 4096),
        under(256, 8192),
        under(64, 96),
        Circumstances { graphs: false, ..under(64, 4096) },
        Circumstances { overlap: false, ..under(64, 4096) },
        cached,
        Circumstances { scarce: true, ..under(64, 512) },
        Circumstances { scarce: true, graphs: false, ..cached },
    ];
    for (name, config) in models() {
        for kv in KV_DTYPES {
            check_invariance(&config, kv, &circumstances).with_context(|| format!("{name}, {kv:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn no_circumstance_changes_a_byte_of_the_wider_families() -> Result<()> {
    if missing() {
        return Ok(());
    }
    let circumstances = [
        under(7, 64),
        under(64, 4096),
        Circumstances { graphs: false, prefix_cache: true, ..under(64, 512) },
    ];
    for (name, config) in families() {
        check_invariance(&config, KvCacheDtype::Auto, &circumstances).with_context(|| name)?;
    }
    Ok(())
}

/// Every request, and then those that no step waits for: a penalty looks at the tokens so far.
fn check_invariance(config: &Value, kv: KvCacheDtype, circumstances: &[Circumstances]) -> Result<()> {
    let place = (On::Gpu, Dtype::Bf16, kv);
    let alone = engine(config, place, Circumstances { overlap: false, ..under(1, 4096) }, PLENTY)?;
    let block_bytes = alone.info().kv_cache_bytes / u64::from(alone.info().limits.kv_blocks);
    let expected = bits(&answers(&alone, requests())?);
    alone.join();
    let penalises = |sampling: &Sampling| {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = *sampling;
        (repetition_penalty, presence_penalty, frequency_penalty) != (1.0, 0.0, 0.0)
    };
    let taken = |penalties: bool, copies: usize| -> (Vec<usize>, Vec<Request>) {
        let all = (0..copies).flat_map(|_| requests().into_iter().enumerate());
        all.filter(|(_, request)| penalties || !penalises(&request.sampling)).unzip()
    };
    for &at in circumstances {
        let bytes = if at.scarce { SCARCE_BLOCKS * block_bytes } else { PLENTY };
        let engine = engine(config, place, at, bytes)?;
        let copies = (at.sequences as usize).div_ceil(REQUESTS);
        for (numbers, requests) in [taken(true, copies), taken(false, copies)] {
            let found = bits(&answers(&engine, requests)?);
            for (&number, found) in numbers.iter().zip(&found) {
                let expected = &expected[number];
                let place = found.iter().zip(expected).position(|(a, b)| a != b);
                ensure!(found == expected, "request {number} under {at:?} differs at {place:?}");
            }
        }
        let load = engine.handle().load();
        ensure!((EngineLoad::get(&load.preemptions) > 0) == at.scarce, "preemptions under {at:?}");
        ensure!((EngineLoad::get(&load.cached_tokens) > 0) == at.prefix_cache, "prefix hits under {at:?}");
        engine.join();
    }
    Ok(())
}

#[test]
fn a_gpu_answers_as_the_cpu_does() -> Result<()> {
    if missing() {
        return Ok(());
    }
    for (name, config) in models() {
        for kv in KV_DTYPES {
            check_answers((name, &config), kv).with_context(|| format!("{name}, {kv:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn a_gpu_answers_as_the_cpu_does_for_the_wider_families() -> Result<()> {
    if missing() {
        return Ok(());
    }
    for (name, config) in families() {
        check_answers((name, &config), KvCacheDtype::Auto).with_context(|| name)?;
    }
    Ok(())
}

/// Greedy answers with the two likeliest tokens of each step.
fn greedy(config: &Value, place: Place) -> Result<Vec<Generated>> {
    let greedy = |request: Request| Request {
        sampling: Sampling { logprobs: Some(2), ..Sampling::default() },
        ..request
    };
    let engine = engine(config, place, under(64, 4096), PLENTY)?;
    let all = answers(&engine, requests().into_iter().map(greedy).collect())?;
    engine.join();
    Ok(all)
}

fn check_answers((name, config): (&str, &Value), kv: KvCacheDtype) -> Result<()> {
    let exact = greedy(config, (On::Cpu, Dtype::F32, kv)).context("on the CPU in f32")?;
    let cpu = greedy(config, (On::Cpu, Dtype::Bf16, kv)).context("on the CPU")?;
    let rounding = spread(&exact, &cpu)?;
    for on in [On::Gpu, On::SmallGpu] {
        let device = spread(&cpu, &greedy(config, (on, Dtype::Bf16, kv))?)?;
        println!("{name}, {kv:?}: bf16 from f32 {rounding:?}; {on:?} from CPU {device:?}");
        device.within(&rounding).with_context(|| format!("{on:?}"))?;
    }
    Ok(())
}

/// The measure that the GPU is held to would find a fault: here, on the CPU, each part that is changed a little lies
/// further away than it allows.
#[test]
fn the_measure_of_a_gpu_finds_small_faults() -> Result<()> {
    let [(_, config), ..] = models();
    let kv = KvCacheDtype::Auto;
    let exact = greedy(&config, (On::Cpu, Dtype::F32, kv))?;
    let cpu = greedy(&config, (On::Cpu, Dtype::Bf16, kv))?;
    let rounding = spread(&exact, &cpu)?;
    println!("bf16 from f32 {rounding:?}");
    for fault in [
        json!({"rope_theta": 11000.0}),
        json!({"rms_norm_eps": 1e-2}),
        json!({"sliding_window": 100, "architectures": ["MistralForCausalLM"]}),
    ] {
        let wrong = greedy(&checkpoint::with(&config, &fault), (On::Cpu, Dtype::Bf16, kv))?;
        let found = spread(&cpu, &wrong)?;
        println!("{fault}: {found:?}");
        ensure!(found.within(&rounding).is_err(), "{fault} is not noticed: {found:?} beside {rounding:?}");
    }
    Ok(())
}

/// How far two lists of greedy answers lie apart.
#[derive(Debug, Clone, Copy, Default)]
struct Spread {
    /// Answers that part.
    parted: usize,
    /// The widest gap between the two likeliest tokens at which one parts.
    tie: f32,
    /// The most that the log probability of one token differs before that.
    near: f32,
    /// The mean of that over all tokens.
    mean: f32,
}

impl Spread {
    /// Whether this one is explained by the rounding that another one shows.
    fn within(&self, rounding: &Self) -> Result<()> {
        ensure!(
            self.parted as f32 <= APART * rounding.parted as f32 + PART_MORE as f32,
            "{self:?}, {rounding:?}"
        );
        ensure!(self.mean <= APART * rounding.mean, "{self:?}, {rounding:?}");
        ensure!(self.near <= APART * rounding.near, "{self:?}, {rounding:?}");
        // Answers part where the two likeliest tokens change places, each of which moved by that much at most.
        ensure!(self.tie <= 2.0 * APART * rounding.near, "{self:?}, {rounding:?}");
        Ok(())
    }
}

fn spread(expected: &[Generated], found: &[Generated]) -> Result<Spread> {
    let (mut spread, mut tokens) = (Spread::default(), 0);
    for (expected, found) in expected.iter().zip(found) {
        for (expected, found) in expected.tokens.iter().zip(&found.tokens) {
            let (expected_of, found_of) = (
                expected.logprobs.as_ref().context("asked for")?,
                found.logprobs.as_ref().context("asked for")?,
            );
            if expected.id != found.id {
                spread.parted += 1;
                spread.tie = spread.tie.max(expected_of.top[0].1 - expected_of.top[1].1);
                break;
            }
            let difference = (expected_of.chosen - found_of.chosen).abs();
            spread.near = spread.near.max(difference);
            spread.mean += difference;
            tokens += 1;
        }
    }
    spread.mean /= tokens.max(1) as f32;
    Ok(spread)
}

#[test]
fn smollm2_says_on_a_gpu_what_it_says_on_the_cpu() -> Result<()> {
    const PROMPTS: usize = 20;
    const OUTPUT: u32 = 64;
    if missing() || !tools::have(&[model::GGUF]) {
        return Ok(());
    }
    let folder = model::smollm2()?;
    let prompts = model::prompts(&Text::open(&folder, "smollm2")?, PROMPTS)?;
    let run = |device: Device, dtype: Dtype| -> Result<Vec<Generated>> {
        let settings = EngineConfig {
            device,
            dtype,
            max_model_len: Some(POSITIONS),
            kv_cache_bytes: Some(Bytes(PLENTY)),
            ..EngineConfig::default()
        };
        let engine = Engine::load(&folder, &settings)?;
        let with_logprobs = |prompt: &Vec<u32>| Request {
            sampling: Sampling { logprobs: Some(2), ..Sampling::default() },
            ..Request::greedy(prompt.clone(), OUTPUT)
        };
        let all = answers(&engine, prompts.iter().map(with_logprobs).collect())?;
        engine.join();
        Ok(all)
    };
    let exact = run(Device::Cpu, Dtype::F32)?;
    let (cpu, gpu) = (run(Device::Cpu, Dtype::Bf16)?, run(Device::Cuda, Dtype::Bf16)?);
    let (rounding, device) = (spread(&exact, &cpu)?, spread(&cpu, &gpu)?);
    println!("of {PROMPTS} answers: bf16 from f32 {rounding:?}; GPU from CPU {device:?}");
    device.within(&rounding)
}
