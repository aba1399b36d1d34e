//! Seeded mutations of good files: the readers of GGUF, safetensors, manifests and configurations either refuse
//! a file or give something that is whole; they never panic and never hang.
//!
//! A few seconds by default; `MILLRACE_MUTATIONS` multiplies the number of cases, `MILLRACE_SEED` changes them. A
//! failure names the seed of its case.

mod gguf;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::quantized::GgmlDType;
use gguf::{Model, Random};
use millrace_engine::folder::manifest::{FileEntry, Manifest};
use millrace_engine::import::{self, Gguf, ImportOptions};
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::model::files::Files;
use millrace_engine::model::source::TensorSource;
use millrace_engine::text::prompt::Text;
use serde_json::json;

/// Most mutations of one case: enough for one to hide another, few enough that most of the file is good.
const CHANGES_MAX: usize = 4;
/// Most bytes that one mutation inserts or repeats.
const SPLICE_MAX: usize = 64;

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn below(random: &mut Random, end: usize) -> usize {
    (random.next() % end.max(1) as u64) as usize
}

/// Numbers that break size arithmetic.
fn extreme(random: &mut Random) -> u64 {
    let base = [0, 1, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 40, 1 << 62, 1 << 63, u64::MAX];
    let near = below(random, 3) as u64;
    base[below(random, base.len())].wrapping_add(near).wrapping_sub(1)
}

/// Changes bytes up to `reach` from the start: the interesting part of most formats.
fn mutate(bytes: &mut Vec<u8>, reach: usize, random: &mut Random) {
    for _ in 0..1 + below(random, CHANGES_MAX) {
        let at = below(random, bytes.len().min(reach));
        let rest = bytes.len() - at;
        match below(random, 8) {
            0 if rest > 0 => bytes[at] ^= 1 << below(random, 8),
            1 if rest > 0 => bytes[at] = random.next() as u8,
            2 if rest >= 8 => bytes[at..at + 8].copy_from_slice(&extreme(random).to_le_bytes()),
            3 if rest >= 4 => bytes[at..at + 4].copy_from_slice(&(extreme(random) as u32).to_le_bytes()),
            4 => bytes.truncate(at),
            5 => {
                let inserted: Vec<u8> = (0..below(random, SPLICE_MAX)).map(|_| random.next() as u8).collect();
                bytes.splice(at..at, inserted);
            }
            6 => drop(bytes.drain(at..at + below(random, SPLICE_MAX).min(rest))),
            _ => {
                let repeated = bytes[at..at + below(random, SPLICE_MAX).min(rest)].to_vec();
                let to = below(random, bytes.len().min(reach));
                bytes.splice(to..to, repeated);
            }
        }
    }
}

/// Runs `check` on mutations of `good`; returns how many it took and how many it refused.
fn run(
    name: &str,
    cases: u64,
    reach: usize,
    good: &[u8],
    mut check: impl FnMut(&[u8]) -> bool,
) -> (u64, u64) {
    let seed = variable("MILLRACE_SEED", 1);
    let (mut taken, mut refused) = (0, 0);
    for case in 0..cases * variable("MILLRACE_MUTATIONS", 1) {
        let mut random = Random(seed.wrapping_mul(0x1_0000_0001).wrapping_add(case));
        let mut bytes = good.to_vec();
        mutate(&mut bytes, reach, &mut random);
        match catch_unwind(AssertUnwindSafe(|| check(&bytes))) {
            Ok(true) => taken += 1,
            Ok(false) => refused += 1,
            Err(panic) => panic!("{name}, MILLRACE_SEED={seed}, case {case}: {panic:?}"),
        }
    }
    assert!(refused > cases / 3, "{name}: only {refused} of {cases} were refused");
    (taken, refused)
}

/// A message for people is there, and of a bounded length whatever the file holds.
fn refused(error: &dyn std::error::Error) -> bool {
    let message = error.to_string();
    assert!(!message.is_empty() && message.len() < 4096, "a message of {} bytes", message.len());
    false
}

#[test]
fn gguf_headers() {
    for (family, version3) in [("llama", false), ("qwen3", true)] {
        let mut good = Model::new(family, GgmlDType::Q4_0, 2).bytes();
        if version3 {
            good[4] = 3;
        }
        let data = Gguf::read(&good[..], good.len() as u64).expect("good").tensors[0].offset as usize;
        run("gguf", 20_000, data, &good, |bytes| match Gguf::read(bytes, bytes.len() as u64) {
            Ok(header) => {
                for tensor in &header.tensors {
                    let end = tensor.offset.checked_add(tensor.bytes).expect("in 64 bits");
                    assert!(end <= bytes.len() as u64, "{} ends at {end}", tensor.name);
                    let blocks = tensor.elements() / tensor.format.elements() as u64;
                    assert_eq!(blocks * tensor.format.bytes() as u64, tensor.bytes);
                }
                true
            }
            Err(error) => refused(&error),
        });
    }
}

/// What the import lets pass is a model that the worker opens.
#[test]
fn gguf_imports() {
    let good = Model::new("llama", GgmlDType::Q4_0, 2).bytes();
    let data = Gguf::read(&good[..], good.len() as u64).expect("good").tensors[0].offset as usize;
    let folder = tempfile::tempdir().expect("a folder");
    let (file, out) = (folder.path().join("model.gguf"), folder.path().join("out"));
    // Small mutations far from the sizes pass; most others do not.
    run("import", 400, data, &good, |bytes| {
        fs::write(&file, bytes).expect("written");
        match import::run(&file, &out, &ImportOptions::default()) {
            Ok(imported) => {
                let config = DecoderConfig::read(&out).expect("the worker takes the configuration");
                let files = Files::read(&out).expect("the worker takes the tensors");
                assert!(files.has("model.norm.weight") && config.parameters() as u64 == imported.parameters);
                Text::open(&out, "x").expect("the worker takes the tokenizer");
                fs::remove_dir_all(&out).expect("removed");
                true
            }
            Err(error) => {
                assert!(!out.exists(), "a refused import leaves nothing");
                refused(&error)
            }
        }
    });
}

/// A safetensors file of three tensors, and its header's end.
fn safetensors() -> (Vec<u8>, usize) {
    let header = json!({
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F16", "shape": [0], "data_offsets": [32, 32]},
    });
    let text = header.to_string();
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.bytes());
    let data = bytes.len();
    bytes.extend((0..32).map(|byte| byte as u8));
    (bytes, data)
}

/// Opens a folder's tensors and looks at those of these names.
fn open(folder: &Path, names: &[&str]) -> bool {
    match Files::read(folder) {
        Ok(files) => {
            for tensor in names.iter().filter_map(|name| files.tensor(name).ok()) {
                let elements: usize = tensor.shape.iter().product();
                assert_eq!(tensor.data.len(), elements * tensor.dtype.bytes());
                // Every byte is there to be read.
                std::hint::black_box(tensor.data.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)));
            }
            true
        }
        Err(error) => refused(&error),
    }
}

#[test]
fn safetensors_files() {
    let (good, data) = safetensors();
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("model.safetensors"), &good).expect("written");
    assert!(open(folder.path(), &["a", "b", "c"]));
    run("safetensors", 10_000, data, &good, |bytes| {
        // Another file each time: one that is mapped is never changed.
        let name = folder.path().join("next");
        fs::write(&name, bytes).expect("written");
        fs::rename(&name, folder.path().join("model.safetensors")).expect("renamed");
        open(folder.path(), &["a", "b", "c"])
    });
}

#[test]
fn safetensors_indices() {
    let index = json!({"metadata": {"total_size": 32}, "weight_map":
        {"a": "model.safetensors", "b": "model.safetensors", "c": "model.safetensors"}});
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("model.safetensors"), safetensors().0).expect("written");
    run("index", 5_000, usize::MAX, index.to_string().as_bytes(), |bytes| {
        fs::write(folder.path().join("model.safetensors.index.json"), bytes).expect("written");
        open(folder.path(), &["a", "b", "c"])
    });
}

#[test]
fn manifests() {
    let entry = |name: &str, chunks: Option<&str>| FileEntry {
        name: name.into(),
        bytes: 7,
        sha256: "0a".repeat(32),
        chunks_sha256: chunks.map(|digit| digit.repeat(64)),
    };
    let files = vec![entry("config.json", None), entry("model.safetensors", Some("b"))];
    let good = Manifest::new(files).expect("good").canonical();
    run("manifest", 20_000, usize::MAX, &good, |bytes| match Manifest::parse(bytes) {
        Ok(manifest) => {
            for file in manifest.files() {
                assert!(!file.name.contains('/') && !file.name.starts_with('.') && !file.name.is_empty());
            }
            assert!(manifest.total_bytes() < u64::MAX);
            assert_eq!(Manifest::parse(&manifest.canonical()).expect("its own form"), manifest);
            true
        }
        Err(error) => refused(&error),
    });
}

#[test]
fn configurations() {
    let good = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 32,
        "use_sliding_window": true, "max_window_layers": 1, "eos_token_id": [1, 2], "torch_dtype": "bfloat16",
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    });
    let good = good.to_string();
    DecoderConfig::parse(&good, None).expect("good");
    run("config", 20_000, usize::MAX, good.as_bytes(), |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return false };
        match DecoderConfig::parse(text, None) {
            Ok(config) => {
                assert!(
                    config.heads % config.kv_heads == 0 && config.head_dim % 2 == 0 && config.layers() > 0
                );
                assert!(config.parameters() > 0 && config.qkv_width() > 0);
                let frequencies =
                    config.ropes.iter().flat_map(|rope| rope.plan(config.head_dim, 64).inverse_frequencies);
                assert!(frequencies.into_iter().all(f32::is_finite));
                true
            }
            Err(error) => refused(&error),
        }
    });
}
