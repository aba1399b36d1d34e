//! `check` on small folders: a whole one, and one fault each, which it names.

use std::fs;
use std::path::Path;

use millrace_engine::model::binding::{names, shape_of};
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::text::prompt::tiny::tiny_folder;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::*;

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 258, "max_position_embeddings": 64, "eos_token_id": 256,
    })
}

/// Weights of zeros, as safetensors.
fn weights(config: &Value) -> Vec<u8> {
    let config = DecoderConfig::parse(&config.to_string(), None).expect("valid");
    let (mut header, mut bytes) = (Map::new(), 0);
    for name in names(&config) {
        let shape = shape_of(&config, &name).expect("known");
        let end = bytes + 4 * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [bytes, end]}));
        bytes = end;
    }
    let text = serde_json::to_vec(&header).expect("JSON");
    [&(text.len() as u64).to_le_bytes()[..], &text, &vec![0; bytes]].concat()
}

fn folder() -> TempDir {
    let folder = tiny_folder();
    fs::write(folder.path().join("config.json"), config().to_string()).expect("written");
    fs::write(folder.path().join("model.safetensors"), weights(&config())).expect("written");
    fs::write(folder.path().join("README.md"), "x").expect("written");
    folder
}

/// All lines, and whether nothing fails.
fn checked(path: &Path) -> (String, bool) {
    let args =
        CheckArgs { uri: path.display().to_string(), pre: None, json: false, store: StoreArgs::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let checks = runtime.block_on(check(&args));
    let lines: Vec<String> = checks.iter().map(Check::lines).collect();
    (lines.join("\n"), checks.iter().all(|check| check.grade != Grade::Fail))
}

#[test]
fn a_whole_folder_is_described() {
    let folder = folder();
    let (said, well) = checked(folder.path());
    assert!(well, "{said}");
    for part in [
        "Llama: 1 layers",
        "12 tensors are there",
        "answers end at 256 \"<|end|>\"",
        "[257, 117, 115, 101, 114, 58,",
        "of the text \"<|turn|>user: Name the three states of matter.\\n<|turn|>assistant: \"",
        "config.json (sizes and choices of the decoder)",
        "not read: README.md",
        "a GPU takes heads of [64, 96, 128, 256], not of 4",
    ] {
        assert!(said.contains(part), "{said}\nlacks {part}");
    }
}

#[test]
fn each_fault_is_named() {
    type Fault = (&'static str, fn(&Path), &'static str);
    let faults: [Fault; 6] = [
        (
            "pointer",
            |f| {
                fs::write(f.join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\n")
                    .unwrap()
            },
            "git lfs pull",
        ),
        ("wide", |f| fs::write(f.join("config.json"), b"\xff\xfe{\0}\0").unwrap(), "UTF-16"),
        ("family", |f| fs::write(f.join("config.json"), r#"{"model_type": "gpt2"}"#).unwrap(), "gpt2"),
        (
            "template",
            |f| fs::write(f.join("chat_template.jinja"), "{% if %}").unwrap(),
            "chat_template.jinja",
        ),
        (
            "tokenizer",
            |f| {
                fs::rename(f.join("tokenizer.json"), f.join("tokenizer.model")).unwrap();
            },
            "save_pretrained",
        ),
        (
            "size",
            |f| fs::write(f.join("config.json"), config().to_string().replace("258", "300")).unwrap(),
            "implies [300, 8]",
        ),
    ];
    for (name, spoil, what) in faults {
        let folder = folder();
        spoil(folder.path());
        let (said, well) = checked(folder.path());
        assert!(!well && said.contains(what), "{name}: {said}");
    }
}
