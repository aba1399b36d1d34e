//! A tiny random model in a Hugging Face folder: a real Llama for every part of the worker, small enough that
//! a step takes well under a millisecond.
//!
//! Its tokenizer is byte-level without merges, so that any text can be encoded; its answers are noise, but
//! the same noise for the same seed, which is what tests of retries need.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::checkpoint;

const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 128;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = HIDDEN / HEADS;
/// Longest prompt plus output.
pub const POSITIONS: usize = 2048;
/// Special tokens come first, then one token for each byte.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const VOCABULARY: usize = SPECIAL.len() + 256;

const CHAT_TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\
    {{ message['content'] }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Writes the model's files into `folder`, which must exist.
///
/// # Errors
/// When a file cannot be written.
pub fn write(folder: &Path, seed: u64) -> Result<()> {
    let file = |name: &str, value: &Value| fs::write(folder.join(name), serde_json::to_vec_pretty(value)?);
    checkpoint::write(folder, &config(), seed)?;
    file("generation_config.json", &json!({"eos_token_id": 2}))?;
    file("tokenizer.json", &tokenizer())?;
    let tokenizer_config = json!({
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[2],
        "unk_token": SPECIAL[0],
        "add_bos_token": false,
        "chat_template": CHAT_TEMPLATE,
    });
    file("tokenizer_config.json", &tokenizer_config)?;
    Ok(())
}

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": false,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    })
}

/// GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the others follow from 256.
fn byte_letters() -> Vec<char> {
    let stands_for_itself = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 256;
    let mut letter = |byte: u32| {
        if stands_for_itself(byte) {
            return char::from_u32(byte).unwrap_or(' ');
        }
        next += 1;
        char::from_u32(next - 1).unwrap_or(' ')
    };
    (0..256).map(&mut letter).collect()
}

fn tokenizer() -> Value {
    let mut vocabulary = Map::new();
    let special = |(id, content): (usize, &&str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    for (id, content) in SPECIAL.iter().enumerate() {
        vocabulary.insert((*content).to_owned(), json!(id));
    }
    for (byte, letter) in byte_letters().into_iter().enumerate() {
        vocabulary.insert(letter.to_string(), json!(SPECIAL.len() + byte));
    }
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": SPECIAL.iter().enumerate().map(special).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [],
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_folder_is_whole_and_the_same_each_time() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(one.path(), 1).unwrap();
        write(two.path(), 1).unwrap();
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
            let bytes = fs::read(one.path().join(file)).unwrap();
            assert_eq!(bytes, fs::read(two.path().join(file)).unwrap(), "{file}");
        }
        let bytes = fs::read(one.path().join("model.safetensors")).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let end = header.values().map(|t| t["data_offsets"][1].as_u64().unwrap()).max().unwrap();
        assert_eq!(8 + length + end as usize, bytes.len());
    }

    #[test]
    fn each_byte_has_a_letter_of_its_own() {
        let letters = byte_letters();
        assert_eq!(letters.iter().collect::<BTreeSet<_>>().len(), 256);
        assert_eq!(
            (letters[b'A' as usize], letters[b' ' as usize], letters[b'\n' as usize]),
            ('A', 'Ġ', 'Ċ')
        );
    }
}
