//! The import against candle: every format and every family, number by number.
//!
//! candle writes the GGUF files and dequantises them; the imported folder must hold the same numbers under
//! Hugging Face's names, with llama.cpp's interleaving of rotary rows undone, and must be a model that the
//! worker opens.

mod gguf;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device};
use gguf::{HEAD_DIM, HEADS, HIDDEN, KV_HEADS, Model};
use millrace_engine::import::{self, ImportDtype, ImportError, ImportOptions, Imported};
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::model::files::Files;
use millrace_engine::model::source::{StoredDtype, TensorSource};
use millrace_engine::text::prompt::Text;
use tempfile::TempDir;

const FORMATS: [GgmlDType; 13] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

fn import(bytes: &[u8], options: &ImportOptions) -> (TempDir, Result<Imported, ImportError>) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.gguf");
    fs::write(&file, bytes).expect("written");
    let imported = import::run(&file, &folder.path().join("out"), options);
    (folder, imported)
}

fn options(dtype: ImportDtype) -> ImportOptions {
    ImportOptions { dtype, ..ImportOptions::default() }
}

/// The numbers of a tensor as Hugging Face orders them: of each rotary head of a Llama, row `2 j + s` of the
/// file is row `s half + j`.
fn expected(model: &Model, interleaved: bool) -> HashMap<String, Vec<f32>> {
    let values = |(_, name, tensor): &(String, String, candle_core::quantized::QTensor)| {
        let tensor = tensor.dequantize(&Device::Cpu).expect("dequantised");
        let numbers: Vec<f32> = tensor.flatten_all().and_then(|t| t.to_vec1()).expect("numbers");
        let rotary = name.contains("q_proj.weight") || name.contains("k_proj.weight");
        if !(interleaved && rotary) {
            return (name.clone(), numbers);
        }
        let mut ordered = numbers.clone();
        for (row, values) in numbers.chunks(HIDDEN).enumerate() {
            let (head, within) = (row / HEAD_DIM, row % HEAD_DIM);
            let to = head * HEAD_DIM + within % 2 * (HEAD_DIM / 2) + within / 2;
            ordered[to * HIDDEN..][..HIDDEN].copy_from_slice(values);
        }
        (name.clone(), ordered)
    };
    model.tensors.iter().map(values).collect()
}

fn numbers(files: &Files, name: &str) -> (StoredDtype, Vec<f32>) {
    let tensor = files.tensor(name).expect(name);
    let widen = |bytes: &[u8]| match tensor.dtype {
        StoredDtype::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        StoredDtype::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        StoredDtype::Bf16 => half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
    };
    (tensor.dtype, tensor.data.chunks(tensor.dtype.bytes()).map(widen).collect())
}

fn compare(folder: &Path, model: &Model, family: &str, narrow: fn(f32) -> f32) {
    let files = Files::read(folder).expect("the worker reads the files");
    for (name, expected) in expected(model, family == "llama") {
        let (_, found) = numbers(&files, &name);
        let expected: Vec<u32> = expected.into_iter().map(|value| narrow(value).to_bits()).collect();
        let found: Vec<u32> = found.into_iter().map(f32::to_bits).collect();
        assert!(found == expected, "{name} of {family} differs");
    }
}

#[test]
fn every_format_gives_candles_numbers() {
    for (format, seed) in FORMATS.into_iter().zip(1..) {
        let model = Model::new("llama", format, seed);
        let (folder, imported) = import(&model.bytes(), &options(ImportDtype::F32));
        let imported = imported.unwrap_or_else(|error| panic!("{format:?}: {error}"));
        assert_eq!(imported.tensors, model.tensors.len());
        compare(&folder.path().join("out"), &model, "llama", |value| value);
    }
}

#[test]
fn every_family_becomes_a_folder_that_the_worker_opens() {
    for (family, class) in
        [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")]
    {
        let model = Model::new(family, GgmlDType::Q8_0, 7);
        for (dtype, narrow) in [
            (ImportDtype::F32, (|value| value) as fn(f32) -> f32),
            (ImportDtype::F16, |value| half::f16::from_f32(value).to_f32()),
            (ImportDtype::Bf16, |value| half::bf16::from_f32(value).to_f32()),
        ] {
            let (folder, imported) = import(&model.bytes(), &options(dtype));
            let imported = imported.unwrap_or_else(|error| panic!("{family}: {error}"));
            let out = folder.path().join("out");
            compare(&out, &model, family, narrow);
            let config = DecoderConfig::read(&out).expect("the worker takes the configuration");
            assert_eq!((config.heads, config.kv_heads, config.head_dim), (HEADS, KV_HEADS, HEAD_DIM));
            assert_eq!((config.qkv_bias, config.qk_norm), (family == "qwen2", family == "qwen3"));
            assert_eq!((config.tied, config.positions_max), (family == "qwen2", 128));
            assert_eq!(config.parameters() as u64, imported.parameters);
            let text = fs::read_to_string(out.join("config.json")).expect("a configuration");
            assert!(text.contains(class), "{text}");
            let text = Text::open(&out, "tiny").expect("the worker takes the tokenizer");
            let tokens = text.encode("hello 1é<|end|>", false).expect("tokens");
            assert_eq!(text.decode(tokens.iter().copied()), "hello 1é");
            assert_eq!(tokens.first(), Some(&259), "h, e and l are merged");
            assert_eq!((text.end_tokens(), tokens.last()), (&[1][..], Some(&1)));
        }
    }
}

#[test]
fn shards_hold_the_same_model() {
    let model = Model::new("llama", GgmlDType::Q4_0, 3);
    let sharded = ImportOptions { shard_bytes_max: Some(300_000), ..options(ImportDtype::Bf16) };
    let (folder, imported) = import(&model.bytes(), &sharded);
    imported.expect("imported");
    let out = folder.path().join("out");
    let shards = fs::read_dir(&out).expect("a folder").filter(|entry| {
        entry.as_ref().is_ok_and(|entry| entry.file_name().to_string_lossy().ends_with(".safetensors"))
    });
    assert!(shards.count() > 3);
    compare(&out, &model, "llama", |value| half::bf16::from_f32(value).to_f32());
    let reference =
        candle_core::safetensors::load(out.join("model-00001-of-00006.safetensors"), &Device::Cpu);
    if let Ok(tensors) = reference {
        assert!(tensors.values().all(|tensor| tensor.dtype() == DType::BF16), "candle reads them too");
    }
}

/// A change of the metadata or tensors, and what the refusal must name.
type Case = (fn(&mut Model), &'static [&'static str]);

fn set(model: &mut Model, key: &str, value: Value) {
    model.metadata.retain(|entry| entry.0 != key);
    model.metadata.push((key.to_owned(), value));
}

fn refusals() -> Vec<Case> {
    vec![
        (|m| set(m, "general.architecture", Value::String("gpt2".into())), &["general.architecture", "gpt2"]),
        (|m| m.metadata.retain(|entry| entry.0 != "llama.block_count"), &["llama.block_count", "missing"]),
        (|m| set(m, "llama.block_count", Value::U32(3)), &["blk.2.", "missing"]),
        (|m| set(m, "llama.block_count", Value::U32(1)), &["blk.1.", "not part"]),
        (|m| set(m, "llama.block_count", Value::String("2".into())), &["llama.block_count", "an integer"]),
        (|m| set(m, "llama.feed_forward_length", Value::U32(128)), &["ffn_", "shape", "512", "128"]),
        (|m| set(m, "llama.attention.head_count", Value::U32(7)), &["head_count", "7", "256"]),
        (|m| set(m, "llama.attention.head_count_kv", Value::U32(3)), &["head_count_kv", "3", "8"]),
        (|m| set(m, "llama.attention.layer_norm_rms_epsilon", Value::F32(0.0)), &["rms_norm_eps", "0"]),
        (|m| set(m, "llama.rope.freq_base", Value::F64(1e300)), &["rope.freq_base", "finite"]),
        (|m| set(m, "llama.rope.freq_base", Value::F32(-1.0)), &["rope.freq_base", "-1", "positive"]),
        (|m| set(m, "llama.rope.dimension_count", Value::U32(16)), &["dimension_count", "16", "32"]),
        (
            |m| set(m, "llama.rope.scaling.type", Value::String("yarn".into())),
            &["scaling.type", "yarn", "llama3"],
        ),
        (|m| set(m, "llama.expert_count", Value::U32(8)), &["expert_count", "8", "experts"]),
        (|m| set(m, "general.alignment", Value::U32(12)), &["general.alignment", "12", "power of two"]),
        (
            |m| set(m, "tokenizer.ggml.model", Value::String("t5".into())),
            &["tokenizer.ggml.model", "t5", "gpt2"],
        ),
        (
            |m| set(m, "tokenizer.ggml.pre", Value::String("bert".into())),
            &["tokenizer.ggml.pre", "bert", "smollm"],
        ),
        (|m| set(m, "tokenizer.ggml.eos_token_id", Value::U32(9999)), &["eos_token_id", "9999", "259"]),
        (
            |m| set(m, "tokenizer.ggml.merges", Value::Array(vec![Value::String("x".into())])),
            &["merges[0]", "two tokens"],
        ),
        (
            |m| set(m, "tokenizer.ggml.token_type", Value::Array(vec![Value::I32(1)])),
            &["token_type", "1", "260"],
        ),
        (
            |m| set(m, "tokenizer.chat_template", Value::String("{% if %}".into())),
            &["chat template", "line 1"],
        ),
        (
            |m| set(m, "tokenizer.chat_template", Value::String("x".repeat(300_000))),
            &["chat_template", "300000", "262144"],
        ),
        (|m| drop(m.tensors.remove(1)), &["output_norm.weight", "missing"]),
        (|m| m.tensors[1].0 = "output_norm.bias".into(), &["output_norm.weight", "missing"]),
        (|m| m.tensors.swap(0, 1), &[]),
    ]
}

#[test]
fn refusals_name_the_field_its_value_and_what_it_may_be() {
    for (number, (change, names)) in refusals().into_iter().enumerate() {
        let mut model = Model::new("llama", GgmlDType::Q8_0, 1);
        change(&mut model);
        let (folder, imported) = import(&model.bytes(), &options(ImportDtype::Bf16));
        if names.is_empty() {
            // The order of tensors says nothing.
            imported.expect("imported");
            continue;
        }
        let message = imported.expect_err(names[0]).to_string();
        names.iter().for_each(|name| assert!(message.contains(name), "{number}: {message:?} lacks {name:?}"));
        let left: Vec<_> = fs::read_dir(folder.path()).expect("a folder").collect();
        assert_eq!(left.len(), 1, "{number}: a refused import leaves nothing behind");
    }
}

#[test]
fn a_target_that_holds_something_is_not_touched() {
    let model = Model::new("llama", GgmlDType::Q8_0, 1);
    let folder = tempfile::tempdir().expect("a folder");
    let (file, out) = (folder.path().join("model.gguf"), folder.path().join("out"));
    fs::write(&file, model.bytes()).expect("written");
    fs::create_dir(&out).expect("created");
    fs::write(out.join("mine"), "x").expect("written");
    let error = import::run(&file, &out, &ImportOptions::default()).expect_err("refused").to_string();
    assert!(error.contains("not an empty folder"), "{error}");
    assert_eq!(fs::read_to_string(out.join("mine")).expect("still there"), "x");
    fs::remove_file(out.join("mine")).expect("removed");
    import::run(&file, &out, &ImportOptions::default()).expect("an empty folder is taken");
    let infinite = ImportOptions { dtype: ImportDtype::F16, ..ImportOptions::default() };
    let mut large = Model::new("llama", GgmlDType::F32, 1);
    let huge = candle_core::Tensor::full(1e30_f32, HIDDEN, &Device::Cpu).expect("a tensor");
    large.tensors[1].2 = candle_core::quantized::QTensor::quantize(&huge, GgmlDType::F32).expect("a tensor");
    let (_folder, imported) = import(&large.bytes(), &infinite);
    let error = imported.expect_err("beyond f16").to_string();
    assert!(error.contains("output_norm.weight") && error.contains("not finite in F16"), "{error}");
}
