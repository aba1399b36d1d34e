//! A small model folder for tests: its tokenizer has one token for each byte. Behind the feature `testing`.

use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::Text;

/// Tokens of [`tiny_folder`]: one for each byte, by its value, and these.
pub const END: u32 = 256;
/// Begins a turn.
pub const TURN: u32 = 257;

/// The image of each byte in GPT-2's table, written independently of the decoder under test.
fn image(byte: u8) -> char {
    let printable = |b: u8| (0x21..=0x7E).contains(&b) || (0xA1..=0xAC).contains(&b) || b >= 0xAE;
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + before).unwrap()
}

/// Its `tokenizer.json`.
pub fn tokenizer() -> Value {
    let vocab: serde_json::Map<String, Value> =
        (0..=255u8).map(|byte| (image(byte).to_string(), json!(byte))).collect();
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [added(END, "<|end|>"), added(TURN, "<|turn|>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocab, "merges": []},
    })
}

/// Its chat template.
pub const TEMPLATE: &str = "{% for message in messages %}<|turn|>{{ message.role }}: {{ message.content }}\n\
    {% endfor %}{% if add_generation_prompt %}<|turn|>assistant: {% endif %}";

/// A folder whose tokenizer has one token per byte.
pub fn tiny_folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    let write = |name: &str, value: &Value| {
        std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    };
    write("tokenizer.json", &tokenizer());
    write("tokenizer_config.json", &json!({"eos_token": "<|end|>", "chat_template": TEMPLATE}));
    folder
}

/// The text side of [`tiny_folder`].
pub fn tiny() -> Text {
    Text::open(tiny_folder().path(), "tiny").unwrap()
}

/// The real model's folder, where the demo or the harness has put it.
pub fn smollm2() -> Option<PathBuf> {
    let cache = std::env::var_os("MILLRACE_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache/millrace")))?;
    let folder = cache.join("models/smollm2-135m-instruct-bf16-3");
    if !folder.join("tokenizer.json").exists() {
        eprintln!("SKIPPED: {} is not there", folder.display());
        return None;
    }
    Some(folder)
}
