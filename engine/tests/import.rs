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
use millrace_engine::model::config::{DecoderConfig, QkNorms};
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
/// file is row `s half + j`. Gemma's norms stand there with the 1 that the model adds.
fn expected(model: &Model, family: &str) -> HashMap<String, Vec<f32>> {
    let values = |(_, name, tensor): &(String, String, candle_core::quantized::QTensor)| {
        let tensor = tensor.dequantize(&Device::Cpu).expect("dequantised");
        let numbers: Vec<f32> = tensor.flatten_all().and_then(|t| t.to_vec1()).expect("numbers");
        let numbers: Vec<f32> = match family == "gemma3" && name.ends_with("norm.weight") {
            true => numbers.into_iter().map(|number| number - 1.0).collect(),
            false => numbers,
        };
        let interleaved = family == "llama";
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
    for (name, expected) in expected(model, family) {
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
    for (family, class) in [
        ("llama", "LlamaForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("gemma3", "Gemma3ForCausalLM"),
    ] {
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
            let normed = config.qk_norm != QkNorms::None;
            assert_eq!((config.qkv_bias, normed), (family == "qwen2", ["qwen3", "gemma3"].contains(&family)));
            assert_eq!((config.tied, config.positions_max), (["qwen2", "gemma3"].contains(&family), 128));
            assert_eq!(config.windows[0], (family == "gemma3").then_some(32));
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
            |m| set(m, "llama.rope.scaling.type", Value::String("longrope".into())),
            &["scaling.type", "longrope", "llama3"],
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
        (|m| m.metadata.retain(|e| e.0 != "tokenizer.ggml.pre"), &["tokenizer.ggml.pre", "absent", "--pre"]),
        (|m| set(m, "tokenizer.ggml.pre", Value::String("default".into())), &["pre", "default", "--pre"]),
        (|m| set(m, "llama.rope.scale_linear", Value::F32(0.5)), &["rope.scale_linear", "0.5", "at least 1"]),
        (|m| set(m, "split.count", Value::U16(2)), &["split.count", "part 1 of 2", "-00001-of-00002.gguf"]),
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

/// Sets the texts of tokens 0, 1, 258 and 259, and their kinds; nothing is merged.
fn special(model: &mut Model, texts: [&str; 4], kinds: [i32; 4]) {
    let mut tokens = gguf::tokens();
    let mut all = vec![1; tokens.len()];
    for ((id, text), kind) in [0, 1, 258, 259].into_iter().zip(texts).zip(kinds) {
        (tokens[id], all[id]) = (text.to_owned(), kind);
    }
    set(model, "tokenizer.ggml.tokens", Value::Array(tokens.into_iter().map(Value::String).collect()));
    set(model, "tokenizer.ggml.token_type", Value::Array(all.into_iter().map(Value::I32).collect()));
    set(model, "tokenizer.ggml.merges", Value::Array(Vec::new()));
}

/// Ends of an imported model, as both of its files say them.
fn ends(folder: &Path) -> Vec<u32> {
    Text::open(folder, "tiny").expect("a tokenizer").end_tokens().to_vec()
}

/// Texts of four tokens, keys with their ids, and the ends that follow.
type Ends<'a> = ([&'a str; 4], &'a [(&'a str, u32)], &'a [u32]);

#[test]
fn ends_are_found_by_key_and_by_text() {
    let llama3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"];
    let harmony = ["<|return|>", "<|call|>", "<|end|>", "xy"];
    let plain = ["<|a|>", "<|b|>", "<|c|>", "<|d|>"];
    let cases: [Ends<'_>; 5] = [
        (llama3, &[("eos_token_id", 1)], &[1, 258, 259]),
        (plain, &[("eos_token_id", 1), ("eot_token_id", 258), ("fim_rep_token_id", 259)], &[1, 258, 259]),
        // An id beyond the vocabulary is no id.
        (llama3, &[("eos_token_id", 9999)], &[1, 258, 259]),
        (plain, &[("eos_token_id", 9999)], &[]),
        // There, this one closes a part of an answer.
        (harmony, &[("eos_token_id", 0)], &[0, 1]),
    ];
    for (texts, ids, right) in cases {
        let mut model = Model::new("llama", GgmlDType::Q8_0, 1);
        special(&mut model, texts, [3; 4]);
        model.metadata.retain(|entry| entry.0 != "tokenizer.ggml.eos_token_id");
        for (name, id) in ids {
            set(&mut model, &format!("tokenizer.ggml.{name}"), Value::U32(*id));
        }
        let (folder, imported) = import(&model.bytes(), &options(ImportDtype::Bf16));
        let imported = imported.expect("imported");
        assert_eq!(ends(&folder.path().join("out")), right, "{texts:?} {ids:?}");
        let guesses = right.iter().filter(|id| !ids.iter().any(|named| named.1 == **id)).count();
        assert!(imported.notes.len() >= guesses, "{:?}", imported.notes);
    }
}

#[test]
fn control_tokens_typed_as_text_are_control_tokens() {
    let mut model = Model::new("llama", GgmlDType::Q8_0, 1);
    special(&mut model, ["<|im_start|>", "<|im_end|>", "<turn>", "ab"], [1, 1, 1, 1]);
    let (folder, imported) = import(&model.bytes(), &options(ImportDtype::Bf16));
    let notes = imported.expect("imported").notes.join("\n");
    for token in ["\"<|im_start|>\"", "\"<|im_end|>\""] {
        assert!(notes.contains(token), "{notes}");
    }
    assert!(!notes.contains("\"ab\""), "{notes}");
    let text = Text::open(&folder.path().join("out"), "tiny").expect("a tokenizer");
    let tokens = text.encode("<|im_start|>hi<|im_end|>", false).expect("tokens");
    assert_eq!((tokens.len(), tokens[0], tokens[3]), (4, 0, 1));
}

#[test]
fn a_template_for_tools_is_imported_beside_the_default_one() {
    let mut model = Model::new("llama", GgmlDType::Q8_0, 1);
    set(&mut model, "tokenizer.chat_template", Value::String("{{ messages[0].content }}".into()));
    set(&mut model, "tokenizer.chat_template.tool_use", Value::String("{{ tools[0].function.name }}".into()));
    let (folder, imported) = import(&model.bytes(), &options(ImportDtype::Bf16));
    imported.expect("imported");
    let text = fs::read(folder.path().join("out/tokenizer_config.json")).expect("a configuration");
    let config: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let right = serde_json::json!([
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
    ]);
    assert_eq!(config["chat_template"], right);
}

/// The `rope_scaling` of an imported model with these keys, and the notes.
fn scaling(keys: &[(&str, Value)]) -> (serde_json::Value, Vec<String>) {
    let mut model = Model::new("llama", GgmlDType::Q8_0, 1);
    for (key, value) in keys {
        set(&mut model, &format!("llama.rope.{key}"), value.clone());
    }
    let (folder, imported) = import(&model.bytes(), &options(ImportDtype::Bf16));
    let notes = imported.expect("imported").notes;
    let text = fs::read(folder.path().join("out/config.json")).expect("a configuration");
    let config: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    (config["rope_scaling"].clone(), notes)
}

#[test]
fn a_scaling_factor_counts_under_both_keys_and_without_a_type() {
    let text = |text: &str| Value::String(text.into());
    let linear = serde_json::json!({"rope_type": "linear", "factor": 4.0});
    for keys in [
        vec![("scale_linear", Value::F32(4.0))],
        vec![("scaling.factor", Value::F32(4.0))],
        vec![("scaling.type", text("linear")), ("scaling.factor", Value::F32(4.0))],
        // The newer key wins.
        vec![("scaling.factor", Value::F32(4.0)), ("scale_linear", Value::F32(8.0))],
    ] {
        let (found, notes) = scaling(&keys);
        assert_eq!(found, linear, "{keys:?}");
        assert_eq!(notes.is_empty(), keys[0].0 == "scaling.type", "what is guessed is said: {notes:?}");
    }
    for keys in [
        vec![("scaling.type", text("none")), ("scaling.factor", Value::F32(4.0))],
        vec![("scaling.factor", Value::F32(0.0))],
        vec![("scaling.type", text("linear"))],
    ] {
        assert_eq!(scaling(&keys).0, serde_json::Value::Null, "{keys:?}");
    }
}

/// Writes the model in two parts and gives the first one's path.
fn split(folder: &Path, model: Model, at: usize) -> std::path::PathBuf {
    let Model { metadata, mut tensors } = model;
    let rest = tensors.split_off(at);
    let place = |number| {
        vec![
            ("split.no".to_owned(), Value::U16(number)),
            ("split.count".to_owned(), Value::U16(2)),
            ("split.tensors.count".to_owned(), Value::I32((at + rest.len()) as i32)),
        ]
    };
    let (first, second) = (place(0), place(1));
    let path = |number: usize| folder.join(format!("m-{number:05}-of-00002.gguf"));
    let first = Model { metadata: [metadata, first].concat(), tensors };
    fs::write(path(1), first.bytes()).expect("written");
    fs::write(path(2), Model { metadata: second, tensors: rest }.bytes()).expect("written");
    path(1)
}

#[test]
fn a_split_file_is_read_by_its_first_part() {
    let whole = Model::new("llama", GgmlDType::Q4_0, 3);
    let folder = tempfile::tempdir().expect("a folder");
    let first = split(folder.path(), Model::new("llama", GgmlDType::Q4_0, 3), 7);
    let (out, options) = (folder.path().join("out"), options(ImportDtype::F32));
    import::run(&first, &out, &options).expect("imported");
    compare(&out, &whole, "llama", |value| value);
    let second = folder.path().join("m-00002-of-00002.gguf");
    let refused = |path: &Path| {
        import::run(path, &folder.path().join("other"), &options).expect_err("refused").to_string()
    };
    assert!(refused(&second).contains("give the first one, m-00001-of-00002.gguf"), "{}", refused(&second));
    fs::remove_file(&second).expect("removed");
    assert!(refused(&first).contains("m-00002-of-00002.gguf"), "{}", refused(&first));
    let pointer = folder.path().join("pointer.gguf");
    fs::write(&pointer, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        .expect("written");
    assert!(refused(&pointer).contains("git lfs pull"), "{}", refused(&pointer));
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
