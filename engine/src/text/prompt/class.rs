//! The tokenizer class that transformers 5.24 takes for a folder (`AutoTokenizer`).
//!
//! A class has special tokens of its own where the files name none. And some classes put their own normalizer and
//! pre-tokenizer in the place of those of tokenizer.json: here the file decides, and the difference is told.

use serde_json::{Value, json};

/// Special tokens by their names in tokenizer_config.json.
type Defaults = &'static [(&'static str, &'static str)];

/// A class that does more than to read tokenizer.json.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenizerClass {
    Llama,
    Qwen2,
    Gemma,
    Gpt2,
}

use TokenizerClass::{Gemma, Gpt2, Llama, Qwen2};

/// The split of `tokenization_qwen2.py`.
const QWEN2_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

impl TokenizerClass {
    /// The class of a folder; none where transformers takes tokenizer.json as it is.
    pub(super) fn of(config: &Value, model_config: &Value, is_byte_level: bool) -> Option<Self> {
        let text = |value: &Value| value.as_str().map(|class| class.trim_end_matches("Fast").to_owned());
        let named = text(&config["tokenizer_class"]).or_else(|| text(&model_config["tokenizer_class"]));
        let model_type = model_config["model_type"].as_str().unwrap_or_default();
        let registered = match model_type {
            "qwen2" | "qwen3" => Some(Some(Qwen2)),
            "gemma3" | "gemma3_text" => Some(Some(Gemma)),
            "mistral" | "phi3" | "olmo2" | "granite" => Some(None),
            _ => None,
        };
        match (named.as_deref(), registered) {
            (None, registered) => registered.flatten(),
            // Llama 3 and its relatives name it too.
            (Some("LlamaTokenizer"), _) if is_byte_level && model_type != "qwen2" => None,
            // Folders of Qwen2 that name another class are known to be wrong.
            (Some(_), Some(registered)) if model_type == "qwen2" || registered.is_none() => registered,
            (Some(class), _) => Self::named(class),
        }
    }

    fn named(class: &str) -> Option<Self> {
        [Llama, Qwen2, Gemma, Gpt2].into_iter().find(|known| known.name() == class)
    }

    fn name(self) -> &'static str {
        match self {
            Llama => "LlamaTokenizer",
            Qwen2 => "Qwen2Tokenizer",
            Gemma => "GemmaTokenizer",
            Gpt2 => "GPT2Tokenizer",
        }
    }

    /// Special tokens where the files do not have the key.
    pub(super) fn defaults(self) -> Defaults {
        const END: &str = "<|endoftext|>";
        match self {
            Llama => &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")],
            Qwen2 => &[("eos_token", END), ("unk_token", END), ("pad_token", END)],
            Gemma => &[
                ("bos_token", "<bos>"),
                ("eos_token", "<eos>"),
                ("unk_token", "<unk>"),
                ("pad_token", "<pad>"),
                ("mask_token", "<mask>"),
            ],
            Gpt2 => &[("bos_token", END), ("eos_token", END), ("unk_token", END)],
        }
    }

    /// Its own normalizer and pre-tokenizer.
    fn parts(self, config: &Value) -> [(&'static str, Value); 2] {
        let flag = |name: &str| config[name].as_bool();
        let spaced = flag("add_prefix_space");
        let begins_spaced = spaced.unwrap_or(false);
        let bytes =
            |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": begins_spaced, "use_regex": regex});
        let split = |pattern: Value, behavior: &str| {
            let behavior = Value::from(behavior);
            json!({"type": "Split", "pattern": pattern, "behavior": behavior, "invert": false})
        };
        let (normalizer, splitter) = match self {
            Llama => {
                let scheme = match (spaced.unwrap_or(true), flag("legacy").unwrap_or(false)) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                };
                let metaspace = json!({
                    "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": false,
                });
                (Value::Null, metaspace)
            }
            Qwen2 => {
                let first = split(json!({"Regex": QWEN2_SPLIT}), "Isolated");
                (json!({"type": "NFC"}), json!({"type": "Sequence", "pretokenizers": [first, bytes(false)]}))
            }
            Gemma => (
                json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}),
                split(json!({"String": " "}), "MergedWithPrevious"),
            ),
            Gpt2 => (Value::Null, bytes(true)),
        };
        [("normalizer", normalizer), ("pre_tokenizer", splitter)]
    }

    /// What transformers would tokenize with in the place of the file's parts, if anything.
    pub(super) fn replacement(self, config: &Value, tokenizer: &Value) -> Option<String> {
        let parts = self.parts(config);
        let differing: Vec<&str> =
            parts.iter().filter(|(name, own)| !same(own, &tokenizer[*name])).map(|(name, _)| *name).collect();
        (!differing.is_empty()).then(|| {
            let (class, differing) = (self.name(), differing.join(" and "));
            format!(
                "transformers 5.24 takes {class} for this folder, with a {differing} of its own; here tokenizer.json \
                 decides, so that ids may differ from those that it gives"
            )
        })
    }
}

/// Whether two parts of a tokenizer do the same: what they have beside is for offsets, or repeats a default.
fn same(own: &Value, file: &Value) -> bool {
    match (own, file) {
        (Value::Object(own), Value::Object(file)) => own.iter().all(|(name, value)| {
            let default = if name == "use_regex" { Value::Bool(true) } else { Value::Null };
            same(value, file.get(name).unwrap_or(&default))
        }),
        (Value::Array(own), Value::Array(file)) => {
            own.len() == file.len() && own.iter().zip(file).all(|(own, file)| same(own, file))
        }
        _ => own == file,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_is_found_as_transformers_finds_it() {
        let of = |class: Value, model_type: &str, bytes: bool| {
            TokenizerClass::of(&json!({"tokenizer_class": class}), &json!({"model_type": model_type}), bytes)
        };
        assert_eq!(of(json!("LlamaTokenizerFast"), "llama", false), Some(Llama));
        assert_eq!(of(json!("LlamaTokenizerFast"), "llama", true), None);
        assert_eq!(of(json!("LlamaTokenizer"), "mistral", false), None);
        assert_eq!(of(json!("LlamaTokenizer"), "qwen2", true), Some(Qwen2));
        assert_eq!(of(Value::Null, "qwen3", true), Some(Qwen2));
        assert_eq!(of(Value::Null, "llama", false), None);
        assert_eq!(of(json!("PreTrainedTokenizerFast"), "llama", true), None);
        assert_eq!(of(json!("GPT2Tokenizer"), "llama", true), Some(Gpt2));
        assert_eq!(of(json!("GemmaTokenizer"), "gemma3_text", false), Some(Gemma));
    }

    #[test]
    fn a_part_that_differs_is_told() {
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
        let file = json!({"normalizer": null, "pre_tokenizer": bytes});
        assert_eq!(Gpt2.replacement(&Value::Null, &file), None);
        let told = Qwen2.replacement(&Value::Null, &file).expect("they differ");
        assert!(told.contains("Qwen2Tokenizer") && told.contains("normalizer and pre_tokenizer"), "{told}");
        let composed = json!({"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        ]}});
        assert_eq!(Qwen2.replacement(&Value::Null, &composed), None);
    }
}
