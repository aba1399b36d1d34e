//! The engine's numbers against candle-transformers, an implementation that shares no code with it.
//!
//! Every decoder family runs on the same random weights in both, in every instruction set that the processor
//! has, as one prefill and as chunks over scattered blocks; SmolLM2 runs on its real weights. The error of
//! logits is the largest difference divided by the largest logit of the reference, over a sequence's positions
//! (single logits near zero have no relative error that means anything), and the same in the mean of squares.

mod bare;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use bare::{BF16, Bare, Bound, F32, FP8_KV, INT8, Types, error};
use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, quantized_llama, qwen2, qwen3};
use millrace_crds::config::{Dtype, EngineConfig};
use millrace_crds::units::Bytes;
use millrace_engine::import::{self, ImportDtype, ImportOptions};
use millrace_engine::model::config::{DecoderConfig, QkNorms};
use millrace_engine::schedule::request::Request;
use millrace_engine::start::Engine;
use millrace_engine::text::prompt::Text;
use millrace_kernels::e4m3;
use millrace_kernels::isa::Isa;

use millrace_tests::random::Random;
use millrace_tests::{checkpoint, model, tools};
use serde_json::{Value, json};

/// Tokens of the random sequences: several blocks, a part of one, and more than any window here.
const TOKENS: usize = 53;
/// Longest sequence of the real model's tests.
const POSITIONS: usize = 256;

// --- the reference ---

enum Reference {
    Llama(Box<llama::Llama>, llama::Config),
    Mistral(mistral::Model),
    Qwen2(qwen2::ModelForCausalLM),
    Qwen3(qwen3::ModelForCausalLM),
}

impl Reference {
    /// Loads a folder in f32, whatever its weights are stored in.
    fn load(folder: &Path) -> Result<Self> {
        let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json"))?)?;
        let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
        let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        Ok(match config["architectures"][0].as_str().context("an architecture")? {
            "LlamaForCausalLM" => {
                let config = serde_json::from_value::<llama::LlamaConfig>(config)?.into_config(false);
                Self::Llama(Box::new(llama::Llama::load(weights, &config)?), config)
            }
            "MistralForCausalLM" => {
                Self::Mistral(mistral::Model::new(&serde_json::from_value(candles_window(config))?, weights)?)
            }
            "Qwen2ForCausalLM" => {
                let config = serde_json::from_value(candles_window(config))?;
                Self::Qwen2(qwen2::ModelForCausalLM::new(&config, weights)?)
            }
            "Qwen3ForCausalLM" => {
                Self::Qwen3(qwen3::ModelForCausalLM::new(&serde_json::from_value(config)?, weights)?)
            }
            other => anyhow::bail!("no reference for {other}"),
        })
    }

    /// The logits that follow `tokens`.
    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let input = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let logits = match self {
            Self::Llama(model, config) => {
                let mut cache = llama::Cache::new(true, DType::F32, config, &Device::Cpu)?;
                model.forward(&input, 0, &mut cache)?
            }
            Self::Mistral(model) => {
                model.clear_kv_cache();
                model.forward(&input, 0)?
            }
            Self::Qwen2(model) => {
                model.clear_kv_cache();
                model.forward(&input, 0)?
            }
            Self::Qwen3(model) => {
                model.clear_kv_cache();
                model.forward(&input, 0)?
            }
        };
        Ok(logits.flatten_all()?.to_vec1()?)
    }
}

/// A window is how many positions a token sees, its own included, as in transformers
/// (`kv_idx > q_idx - sliding_window`); candle's mask lets one more in.
fn candles_window(mut config: Value) -> Value {
    if let Some(window) = config["sliding_window"].as_u64() {
        config["sliding_window"] = json!(window - 1);
    }
    config
}

fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
    best.expect("a vocabulary has tokens") as u32
}

// --- random weights ---

/// A small decoder with grouped queries, sizes that fill no tile, and the given differences.
fn config(architecture: &str, changes: Value) -> Value {
    let sizes = json!({
        "architectures": [architecture], "hidden_size": 72, "intermediate_size": 100,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 131,
        "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": false, "attention_bias": false,
    });
    checkpoint::with(&sizes, &changes)
}

/// A configuration that the reference reads, too: it asks for fields of Qwen and Mistral that may be absent.
fn family(architecture: &str, changes: Value) -> Value {
    let mut config = config(architecture, changes);
    let more = match architecture {
        "LlamaForCausalLM" => json!({}),
        "MistralForCausalLM" => json!({"sliding_window": null}),
        _ => json!({"sliding_window": POSITIONS + 1, "max_window_layers": 0, "use_sliding_window": false}),
    };
    for (field, value) in more.as_object().expect("an object") {
        if config.get(field).is_none() {
            config[field] = value.clone();
        }
    }
    config
}

fn families() -> Vec<(&'static str, Value)> {
    let llama = |changes| family("LlamaForCausalLM", changes);
    let mistral = |changes| family("MistralForCausalLM", changes);
    let qwen = family;
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    vec![
        ("llama, untied", llama(json!({}))),
        ("llama, tied, all heads", llama(json!({"tie_word_embeddings": true, "num_key_value_heads": 6}))),
        ("llama, one head for all", llama(json!({"num_key_value_heads": 1}))),
        ("llama, scaled rope", llama(json!({"rope_scaling": llama3, "hidden_size": 96}))),
        ("mistral, no window", mistral(json!({}))),
        ("mistral, window 20", mistral(json!({"sliding_window": 20}))),
        ("mistral, window 1, own head width", mistral(json!({"sliding_window": 1, "head_dim": 20}))),
        ("qwen2, untied", qwen("Qwen2ForCausalLM", json!({}))),
        ("qwen2, tied", qwen("Qwen2ForCausalLM", json!({"tie_word_embeddings": true}))),
        (
            "qwen2, window 17",
            qwen("Qwen2ForCausalLM", json!({"use_sliding_window": true, "sliding_window": 17})),
        ),
        ("qwen3, untied", qwen("Qwen3ForCausalLM", json!({"head_dim": 12}))),
        (
            "qwen3, tied, own head width",
            qwen("Qwen3ForCausalLM", json!({"head_dim": 32, "tie_word_embeddings": true})),
        ),
        ("qwen3, biases", qwen("Qwen3ForCausalLM", json!({"head_dim": 12, "attention_bias": true}))),
    ]
}

#[test]
fn each_family_computes_what_the_reference_computes() -> Result<()> {
    let mut random = Random::new(11);
    for (number, (name, config)) in families().into_iter().enumerate() {
        for (stored, kinds) in [("float32", &[F32][..]), ("bfloat16", &[BF16, INT8, FP8_KV][..])] {
            let folder = tempfile::tempdir()?;
            let mut config = config.clone();
            config["torch_dtype"] = json!(stored);
            checkpoint::write(folder.path(), &config, number as u64)?;
            let tokens: Vec<u32> = (0..TOKENS).map(|_| random.within(0..131) as u32).collect();
            let mut reference = Reference::load(folder.path())?;
            let expected: Vec<Vec<f32>> =
                (1..=TOKENS).map(|end| reference.logits(&tokens[..end])).collect::<Result<_>>()?;
            for &types in kinds {
                for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                    check(folder.path(), (types, isa), &tokens, &expected)
                        .with_context(|| format!("{name}, {types:?}, {isa}"))?;
                }
            }
        }
    }
    Ok(())
}

fn check(folder: &Path, (types, isa): (Types, Isa), tokens: &[u32], expected: &[Vec<f32>]) -> Result<()> {
    let mut ours = Bare::load(folder, (types, isa), POSITIONS)?;
    let whole = ours.logits(tokens, &[tokens.len()])?;
    let worst = error(&whole.concat(), &expected.concat());
    println!("{types:?} {isa}: {worst}");
    anyhow::ensure!(worst.within(Bound::of(types)), "{worst}, at most {:?}", Bound::of(types));
    for chunks in [vec![1; tokens.len()], vec![16, 1, 1, 30, 5], vec![7, 46]] {
        let again = ours.logits(tokens, &chunks)?;
        let bits = |rows: &[Vec<f32>]| rows.concat().iter().map(|logit| logit.to_bits()).collect::<Vec<_>>();
        anyhow::ensure!(bits(&again) == bits(&whole), "chunks {chunks:?} give other bytes than one prefill");
    }
    Ok(())
}

/// The matrices of a checkpoint's layers in a quantised format, and the weights that these stand for.
struct Rewritten {
    header: serde_json::Map<String, Value>,
    data: Vec<u8>,
    dense: HashMap<String, Tensor>,
}

impl Rewritten {
    fn put(&mut self, name: String, dtype: &str, shape: &[usize], bytes: impl IntoIterator<Item = u8>) {
        let start = self.data.len();
        self.data.extend(bytes);
        let offsets = [start, self.data.len()];
        self.header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
    }

    /// Codes of 4 bits in groups of `GROUP` columns, in the order that `group_of` says, as GPTQ or compressed-tensors.
    fn int4(&mut self, module: &str, weights: &[Vec<f32>], gptq: bool) -> Result<()> {
        const GROUP: usize = 16;
        let (rows, columns) = (weights.len(), weights[0].len());
        let groups = columns / GROUP;
        let group_of = |column: usize| if gptq { groups - 1 - column / GROUP } else { column / GROUP };
        let (mut scales, mut zeros) = (vec![0.0_f32; rows * groups], vec![0_u32; rows * groups]);
        let mut codes = vec![0_u32; rows * columns];
        let mut dense = vec![0.0_f32; rows * columns];
        for (row, weights) in weights.iter().enumerate() {
            for group in 0..groups {
                let part = (0..columns).filter(|&column| group_of(column) == group);
                let values = || part.clone().map(|column| weights[column]);
                let (low, high) = (values().fold(0.0, f32::min), values().fold(0.0, f32::max));
                let scale = (high - low) / 15.0;
                let zero = (-low / scale).round();
                (scales[row * groups + group], zeros[row * groups + group]) = (scale, zero as u32);
                for column in part.clone() {
                    let code = ((weights[column] / scale).round() + zero).clamp(0.0, 15.0);
                    codes[row * columns + column] = code as u32;
                    dense[row * columns + column] = (code - zero) * scale;
                }
            }
        }
        let word = |fields: &mut dyn Iterator<Item = u32>| {
            fields.enumerate().fold(0_u32, |word, (at, field)| word | field << (4 * at))
        };
        let bytes = |words: Vec<u32>| words.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
        let floats = |values: Vec<f32>| values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
        if gptq {
            let packed = (0..columns / 8).flat_map(|at| (0..rows).map(move |row| (at, row)));
            let code = |row: usize, column: usize| codes[row * columns + column];
            let packed =
                packed.map(|(at, row)| word(&mut (8 * at..8 * at + 8).map(|column| code(row, column))));
            self.put(format!("{module}.qweight"), "I32", &[columns / 8, rows], bytes(packed.collect()));
            let places = (0..groups).flat_map(|group| (0..rows / 8).map(move |at| (group, at)));
            let zero = |row: usize, group: usize| zeros[row * groups + group];
            let packed = places.map(|(group, at)| {
                word(&mut (8 * at..8 * at + 8).map(|row| zero(row, group))).wrapping_sub(0x1111_1111)
            });
            self.put(format!("{module}.qzeros"), "I32", &[groups, rows / 8], bytes(packed.collect()));
            let turned = (0..groups).flat_map(|group| (0..rows).map(move |row| row * groups + group));
            let turned: Vec<f32> = turned.map(|at| scales[at]).collect();
            self.put(format!("{module}.scales"), "F32", &[groups, rows], floats(turned));
            let order = (0..columns).map(|column| group_of(column) as u32).collect();
            self.put(format!("{module}.g_idx"), "I32", &[columns], bytes(order));
        } else {
            let packed = codes.chunks(8).map(|codes| word(&mut codes.iter().copied())).collect();
            self.put(format!("{module}.weight_packed"), "I32", &[rows, columns / 8], bytes(packed));
            let places = (0..rows / 8).flat_map(|at| (0..groups).map(move |group| (at, group)));
            let zero = |row: usize, group: usize| zeros[row * groups + group];
            let packed = places
                .map(|(at, group)| word(&mut (8 * at..8 * at + 8).map(|row| zero(row, group))))
                .collect();
            self.put(format!("{module}.weight_zero_point"), "I32", &[rows / 8, groups], bytes(packed));
            self.put(format!("{module}.weight_scale"), "F32", &[rows, groups], floats(scales));
        }
        self.dense
            .insert(format!("{module}.weight"), Tensor::from_vec(dense, (rows, columns), &Device::Cpu)?);
        Ok(())
    }

    /// 8-bit floats with a scale a row.
    fn fp8(&mut self, module: &str, weights: &[Vec<f32>]) -> Result<()> {
        let (rows, columns) = (weights.len(), weights[0].len());
        let (mut scales, mut codes, mut dense) = (Vec::new(), Vec::new(), Vec::new());
        for weights in weights {
            let scale = weights.iter().fold(0.0_f32, |most, weight| most.max(weight.abs())) / e4m3::GREATEST;
            scales.extend(scale.to_le_bytes());
            for weight in weights {
                let code = e4m3::encode(weight / scale);
                codes.push(code);
                dense.push(e4m3::decode(code) * scale);
            }
        }
        self.put(format!("{module}.weight"), "F8_E4M3", &[rows, columns], codes);
        self.put(format!("{module}.weight_scale"), "F32", &[rows, 1], scales);
        self.dense
            .insert(format!("{module}.weight"), Tensor::from_vec(dense, (rows, columns), &Device::Cpu)?);
        Ok(())
    }
}

/// Rewrites the layers of `from` by a quantisation; `dense` gets the weights that the codes stand for.
fn rewrite(from: &Path, quantised: &Path, dense: &Path, quantisation: &Value) -> Result<()> {
    let mut config: Value = serde_json::from_slice(&fs::read(from.join("config.json"))?)?;
    fs::write(dense.join("config.json"), config.to_string())?;
    config["quantization_config"] = quantisation.clone();
    fs::write(quantised.join("config.json"), config.to_string())?;
    let tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu)?;
    let mut all = Rewritten { header: serde_json::Map::new(), data: Vec::new(), dense: HashMap::new() };
    for (name, tensor) in tensors {
        match name.strip_suffix(".weight").filter(|module| module.ends_with("_proj")) {
            Some(module) if quantisation["quant_method"] == "fp8" => all.fp8(module, &tensor.to_vec2()?)?,
            Some(module) => all.int4(module, &tensor.to_vec2()?, quantisation["quant_method"] == "gptq")?,
            None => {
                let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
                all.put(name.clone(), "F32", tensor.dims(), values.into_iter().flat_map(f32::to_le_bytes));
                all.dense.insert(name, tensor);
            }
        }
    }
    fs::write(quantised.join("model.safetensors"), checkpoint::safetensors(&all.header, &all.data)?)?;
    candle_core::safetensors::save(&all.dense, dense.join("model.safetensors"))?;
    Ok(())
}

/// Quantised layers beside an embedding and a head in floats: in f32 the logits of the weights that the codes stand
/// for, and with the codes multiplied as they are no further from them than 8 bits are.
#[test]
fn quantised_checkpoints_have_the_logits_of_their_weights() -> Result<()> {
    let int4 =
        json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": false});
    let quantisations = [
        json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": int4}}, "ignore": ["lm_head"]}),
        json!({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": true, "sym": false}),
        json!({"quant_method": "fp8", "activation_scheme": "dynamic"}),
    ];
    let [from, quantised, dense] = [tempfile::tempdir()?, tempfile::tempdir()?, tempfile::tempdir()?];
    let sizes = json!({"hidden_size": 96, "intermediate_size": 160});
    checkpoint::write(from.path(), &family("LlamaForCausalLM", sizes), 5)?;
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i * 7 % 131).collect();
    for quantisation in quantisations {
        rewrite(from.path(), quantised.path(), dense.path(), &quantisation)?;
        let mut reference = Reference::load(dense.path())?;
        let expected: Vec<Vec<f32>> =
            (1..=TOKENS).map(|end| reference.logits(&tokens[..end])).collect::<Result<_>>()?;
        for types in [F32, INT8] {
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                check(quantised.path(), (types, isa), &tokens, &expected)
                    .with_context(|| format!("{quantisation}, {types:?}, {isa}"))?;
            }
        }
    }
    Ok(())
}

/// A reference that cannot tell a wrong model from a right one guards nothing.
#[test]
fn the_reference_finds_each_forgotten_part() -> Result<()> {
    let forgotten = [
        ("MistralForCausalLM", json!({"sliding_window": 20}), json!({"sliding_window": 21})),
        ("LlamaForCausalLM", json!({"rope_theta": 10000.0}), json!({"rope_theta": 10100.0})),
        ("LlamaForCausalLM", json!({"rms_norm_eps": 1e-5}), json!({"rms_norm_eps": 1e-3})),
    ];
    for (architecture, right, wrong) in forgotten {
        let folder = tempfile::tempdir()?;
        checkpoint::write(folder.path(), &config(architecture, right), 3)?;
        let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i * 7 % 131).collect();
        let expected = Reference::load(folder.path())?.logits(&tokens)?;
        checkpoint::write(folder.path(), &config(architecture, wrong.clone()), 3)?;
        let mut ours = Bare::load(folder.path(), (F32, Isa::detect()), POSITIONS)?;
        let found = ours.logits(&tokens, &[TOKENS])?;
        let error = error(&found[TOKENS - 1], &expected);
        let unseen = error.within(Bound::of(F32));
        anyhow::ensure!(!unseen, "{architecture} with {wrong} differs by {error} only");
    }
    Ok(())
}

/// What a decoder may forget: the family, its configuration, and the part.
type Forgotten = (&'static str, Value, fn(&mut DecoderConfig));

/// Each bound finds a part that was forgotten, not only the strictest.
#[test]
fn every_precision_finds_a_forgotten_part() -> Result<()> {
    let head_dim = json!({"head_dim": 12});
    let forgotten: [Forgotten; 6] = [
        ("Qwen2ForCausalLM", json!({}), |config| config.qkv_bias = false),
        ("Qwen3ForCausalLM", head_dim, |config| config.qk_norm = QkNorms::None),
        ("LlamaForCausalLM", json!({}), |config| config.attention_scale = 1.0),
        ("MistralForCausalLM", json!({"sliding_window": 4}), |config| config.windows.fill(None)),
        ("LlamaForCausalLM", json!({}), |config| config.rope_of.fill(None)),
        ("Qwen3ForCausalLM", json!({"head_dim": 12, "attention_bias": true}), |config| {
            config.output_bias = false
        }),
    ];
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i * 7 % 131).collect();
    for (number, (architecture, changes, forget)) in forgotten.into_iter().enumerate() {
        for (stored, kinds) in [("float32", &[F32][..]), ("bfloat16", &[BF16, INT8, FP8_KV][..])] {
            let folder = tempfile::tempdir()?;
            let mut config = family(architecture, changes.clone());
            config["torch_dtype"] = json!(stored);
            checkpoint::write(folder.path(), &config, 3)?;
            let expected = Reference::load(folder.path())?.logits(&tokens)?;
            for &types in kinds {
                let right = DecoderConfig::read(folder.path())?;
                let mut wrong = right.clone();
                forget(&mut wrong);
                for (config, finds) in [(&right, false), (&wrong, true)] {
                    let mut ours = Bare::of(config, folder.path(), (types, Isa::detect()), POSITIONS)?;
                    let error = error(&ours.logits(&tokens, &[TOKENS])?[TOKENS - 1], &expected);
                    println!("{number} {architecture} {types:?} forgotten {finds}: {error}");
                    let found = !error.within(Bound::of(types));
                    anyhow::ensure!(found == finds, "{number}, {architecture} in {types:?}: {error}");
                }
            }
        }
    }
    Ok(())
}

// --- SmolLM2's real weights ---

#[test]
fn smollm2_computes_what_the_reference_computes() -> Result<()> {
    if !tools::have(&[model::GGUF]) {
        return Ok(());
    }
    let folder = model::smollm2()?;
    let text = Text::open(&folder, "smollm2")?;
    let prompts = model::prompts(&text, 4)?;
    let mut reference = Reference::load(&folder)?;
    let expected: Vec<Vec<f32>> =
        prompts.iter().map(|prompt| reference.logits(prompt)).collect::<Result<_>>()?;
    for types in [F32, BF16, INT8, FP8_KV] {
        let mut ours = Bare::load(&folder, (types, Isa::detect()), POSITIONS)?;
        for (prompt, expected) in prompts.iter().zip(&expected) {
            let found = ours.logits(prompt, &[prompt.len()])?;
            let error = error(&found[prompt.len() - 1], expected);
            println!("{types:?}, {} tokens: {error}", prompt.len());
            // In int8 and with keys and values in 8 bits twice what was measured, in the mean.
            let (most, mean) = match types {
                INT8 => (0.15, 0.11),
                FP8_KV => (0.065, 0.06),
                _ => (Bound::of(types).most, Bound::of(types).mean),
            };
            anyhow::ensure!(error.within(Bound { most, mean }), "{types:?}: {error}");
        }
    }
    Ok(())
}

/// Prompts of the reference's batch must have equal lengths: groups of five, cut at the front to the shortest.
#[test]
fn smollm2_says_what_the_reference_says() -> Result<()> {
    const PROMPTS: usize = 20;
    const GROUP: usize = 5;
    const OUTPUT: usize = 64;
    if !tools::have(&[model::GGUF]) {
        return Ok(());
    }
    let folder = model::smollm2()?;
    let text = Text::open(&folder, "smollm2")?;
    let mut prompts = model::prompts(&text, PROMPTS)?;
    prompts.sort_by_key(Vec::len);
    for group in prompts.chunks_mut(GROUP) {
        let shortest = group[0].len();
        group.iter_mut().for_each(|prompt| *prompt = prompt.split_off(prompt.len() - shortest));
    }
    let config = EngineConfig {
        dtype: Dtype::F32,
        max_model_len: Some(512),
        kv_cache_bytes: Some(Bytes(512 << 20)),
        ..EngineConfig::default()
    };
    let engine = Engine::load(&folder, &config)?;
    let request = |prompt: &Vec<u32>| Request::greedy(prompt.clone(), OUTPUT as u32);
    let answers = engine.generate_batch(prompts.iter().map(request).collect());
    let Reference::Llama(model, config) = Reference::load(&folder)? else {
        anyhow::bail!("SmolLM2 is a Llama");
    };
    let mut texts = Vec::new();
    for (group, answers) in prompts.chunks(GROUP).zip(answers.chunks(GROUP)) {
        let expected = greedy(&model, &config, group, OUTPUT)?;
        for (expected, answer) in expected.into_iter().zip(answers) {
            let answer = answer.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
            let found: Vec<u32> = answer.tokens.iter().map(|token| token.id).collect();
            texts.push(text.decode(found.iter().copied()));
            assert_eq!(texts[texts.len() - 1], text.decode(expected.iter().copied()));
            assert_eq!(found, expected);
        }
    }
    assert_eq!(texts.len(), PROMPTS);
    texts.sort_unstable();
    texts.dedup();
    assert!(texts.len() > PROMPTS / 2, "the answers vary: {texts:?}");
    Ok(())
}

/// Greedy tokens of the reference for prompts of equal length.
fn greedy(
    model: &llama::Llama,
    config: &llama::Config,
    prompts: &[Vec<u32>],
    count: usize,
) -> Result<Vec<Vec<u32>>> {
    let mut cache = llama::Cache::new(true, DType::F32, config, &Device::Cpu)?;
    let (width, length) = (prompts.len(), prompts[0].len());
    let mut input = Tensor::from_vec(prompts.concat(), (width, length), &Device::Cpu)?;
    let (mut position, mut outputs) = (0, vec![Vec::new(); width]);
    for _ in 0..count {
        let logits = model.forward(&input, position, &mut cache)?;
        position += input.dim(1)?;
        let next: Vec<u32> =
            (0..width).map(|row| Ok(argmax(&logits.i(row)?.to_vec1()?))).collect::<Result<_>>()?;
        outputs.iter_mut().zip(&next).for_each(|(output, token)| output.push(*token));
        input = Tensor::from_vec(next, (width, 1), &Device::Cpu)?;
    }
    Ok(outputs)
}

// --- the import ---

/// candle runs the GGUF file itself: the imported folder must be the same model, whose weights are then the
/// same numbers, permuted. candle rounds activations to 8 bits on the way, the only difference that is left.
#[test]
fn the_imported_folder_is_the_model_of_the_gguf_file() -> Result<()> {
    /// As measured: rounded activations give about 2e-2.
    const ERROR_MAX: f32 = 5e-2;
    if !tools::have(&[model::GGUF]) {
        return Ok(());
    }
    let gguf = tools::tool(model::GGUF)?;
    let folder = tempfile::tempdir()?;
    let imported = folder.path().join("smollm2");
    import::run(&gguf, &imported, &ImportOptions { dtype: ImportDtype::F32, ..ImportOptions::default() })?;
    let mut file = fs::File::open(&gguf)?;
    let content = gguf_file::Content::read(&mut file)?;
    let tokens_of_file: HashMap<String, u32> = content.metadata["tokenizer.ggml.tokens"]
        .to_vec()?
        .iter()
        .zip(0..)
        .map(|(token, id)| Ok((token.to_string()?.clone(), id)))
        .collect::<Result<_>>()?;
    let mut reference = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
    let text = Text::open(&imported, "smollm2")?;
    assert_eq!(text.encode("<|im_start|>", false)?, [tokens_of_file["<|im_start|>"]]);
    let mut ours = Bare::load(&imported, (F32, Isa::detect()), POSITIONS)?;
    for prompt in model::prompts(&text, 4)? {
        let input = Tensor::new(&prompt[..], &Device::Cpu)?.unsqueeze(0)?;
        reference.clear_kv_cache();
        let expected: Vec<f32> = reference.forward(&input, 0)?.flatten_all()?.to_vec1()?;
        let found = ours.logits(&prompt, &[prompt.len()])?;
        let found = &found[prompt.len() - 1];
        let error = error(found, &expected);
        println!("GGUF, {} tokens: {error}", prompt.len());
        assert!(error.most <= ERROR_MAX, "{error}");
        assert_eq!(argmax(found), argmax(&expected));
    }
    Ok(())
}
