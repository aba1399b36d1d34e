//! From a GGUF's vocabulary to `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.
//!
//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`) and SentencePiece BPE (`llama`) are written; others are
//! refused. GGUF names the pre-tokenizer (`tokenizer.ggml.pre`) without saying what it does, so only names
//! whose definition is known here are accepted: a wrong split would silently change every prompt.

use serde_json::{Map, Value as Json, json};

use super::ImportError;
use super::gguf::{Gguf, GgufError, invalid, required};
use super::sentencepiece;
use super::vocabulary::Vocabulary;
use crate::folder::manifest::TEMPLATES_MAX;

/// The key of the default chat template; others have a name behind it.
const TEMPLATE: &str = "tokenizer.chat_template";
/// The split of Llama 3.
const LLAMA3_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// The split of Qwen2 and Qwen3: as Llama 3's, but each digit alone.
const QWEN2_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The files of the tokenizer, by name.
pub struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer: Json,
    /// `tokenizer_config.json`.
    pub config: Json,
    /// `generation_config.json`.
    pub generation: Json,
}

/// Writes a tokenizer for the vocabulary. `pre` overrides the pre-tokenizer that the file names.
pub fn build(gguf: &Gguf, vocabulary: &Vocabulary, pre: Option<&str>) -> Result<TokenizerFiles, ImportError> {
    const MODEL: &str = "tokenizer.ggml.model";
    let add_bos = gguf.bool("tokenizer.ggml.add_bos_token")?;
    let model = required(gguf.text(MODEL)?, MODEL)?;
    let (mut tokenizer, add_bos) = match model {
        "gpt2" => {
            let pre = PreTokenizer::read(gguf, pre)?;
            let add_bos = add_bos.unwrap_or(pre == PreTokenizer::Llama3);
            (byte_level(gguf, vocabulary, pre)?, add_bos)
        }
        // llama.cpp adds the beginning of the text unless the file says otherwise.
        "llama" => (sentencepiece::build(gguf, vocabulary)?, add_bos.unwrap_or(true)),
        other => return Err(invalid(MODEL, other, "imported are gpt2 and llama").into()),
    };
    let add_eos = gguf.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let around = (vocabulary.bos.filter(|_| add_bos), vocabulary.eos.filter(|_| add_eos));
    tokenizer["post_processor"] = post_processor(vocabulary, around, model == "gpt2");
    tokenizer["added_tokens"] = Json::Array(vocabulary.added());
    Ok(TokenizerFiles {
        tokenizer,
        config: tokenizer_config(gguf, vocabulary, add_bos)?,
        generation: generation_config(vocabulary),
    })
}

/// The pre-tokenizers whose definition is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PreTokenizer {
    Gpt2,
    SmolLm,
    Llama3,
    /// Splits as Llama 3, and follows merges for whole words too.
    Smaug,
    Qwen2,
}

impl PreTokenizer {
    fn read(gguf: &Gguf, overriding: Option<&str>) -> Result<Self, GgufError> {
        const PRE: &str = "tokenizer.ggml.pre";
        let known = "name the one that the model was trained with: --pre gpt-2, smollm, llama-bpe, smaug-bpe or qwen2";
        let name = match overriding {
            Some(name) => name,
            None => match gguf.text(PRE)? {
                // Files of before May 2024 have none, and then llama.cpp, too, only guesses.
                None => return Err(invalid(PRE, "absent", known)),
                Some("default") => return Err(invalid(PRE, "default", known)),
                Some(name) => name,
            },
        };
        match name {
            "gpt-2" | "gpt2" | "olmo" | "phi-2" | "gigachat" | "a.x-4.0" | "mellum" | "exaone4" => {
                Ok(Self::Gpt2)
            }
            "smollm" | "starcoder" | "refact" => Ok(Self::SmolLm),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0"
            | "lfm2" => Ok(Self::Llama3),
            "smaug-bpe" | "dbrx" => Ok(Self::Smaug),
            "qwen2" | "deepseek-r1-qwen" => Ok(Self::Qwen2),
            other => Err(invalid(PRE, other, known)),
        }
    }

    fn normalizer(self) -> Json {
        if self == Self::Qwen2 { json!({"type": "NFC"}) } else { Json::Null }
    }

    fn definition(self) -> Json {
        let bytes = |split: bool| {
            json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": split,
            })
        };
        let split = |pattern: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                bytes(false),
            ]})
        };
        match self {
            Self::Gpt2 => bytes(true),
            Self::SmolLm => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                bytes(true),
            ]}),
            Self::Llama3 | Self::Smaug => split(LLAMA3_SPLIT),
            Self::Qwen2 => split(QWEN2_SPLIT),
        }
    }
}

fn byte_level(gguf: &Gguf, vocabulary: &Vocabulary, pre: PreTokenizer) -> Result<Json, GgufError> {
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": pre.normalizer(),
        "pre_tokenizer": pre.definition(),
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            // Llama 3 takes a word that is a token as it is, without following merges.
            "ignore_merges": pre == PreTokenizer::Llama3,
            "vocab": vocabulary.object(),
            "merges": merges(gguf, vocabulary)?,
        },
    }))
}

/// The merges as pairs; both parts and their union must be tokens.
fn merges(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<Vec<Json>, GgufError> {
    const MERGES: &str = "tokenizer.ggml.merges";
    // Writers leave an empty list out.
    let merges = gguf.texts(MERGES)?.unwrap_or_default();
    let mut pairs = Vec::with_capacity(merges.len());
    for (index, merge) in merges.iter().enumerate() {
        let refuse = |rule: &str| invalid(&format!("{MERGES}[{index}]"), format!("{merge:?}"), rule);
        // Byte-level tokens hold no plain space, so the first one after the first character divides.
        let space = merge.char_indices().skip(1).find(|(_, symbol)| *symbol == ' ');
        let (at, _) = space.ok_or_else(|| refuse("a merge is two tokens and a space"))?;
        let (left, right) = (&merge[..at], &merge[at + 1..]);
        let joined = format!("{left}{right}");
        if [left, right, joined.as_str()].iter().any(|token| !vocabulary.ids.contains_key(token)) {
            return Err(refuse("both parts and their union must be in the vocabulary"));
        }
        pairs.push(json!([left, right]));
    }
    Ok(pairs)
}

/// Puts the tokens that begin and end a text around it.
fn post_processor(vocabulary: &Vocabulary, (bos, eos): (Option<u32>, Option<u32>), byte_level: bool) -> Json {
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    if (bos, eos) == (None, None) {
        return if byte_level { bytes } else { Json::Null };
    }
    let text = |id: u32| &vocabulary.tokens[id as usize];
    let special = |id: Option<u32>, type_id: u32| {
        id.map(|id| json!({"SpecialToken": {"id": text(id), "type_id": type_id}}))
    };
    let around = |name: &str, type_id: u32| {
        let sequence = json!({"Sequence": {"id": name, "type_id": type_id}});
        [special(bos, type_id), Some(sequence), special(eos, type_id)].into_iter().flatten()
    };
    let tokens = [bos, eos].into_iter().flatten();
    let tokens: Map<String, Json> = tokens
        .map(|id| (text(id).clone(), json!({"id": text(id), "ids": [id], "tokens": [text(id)]})))
        .collect();
    let template = json!({
        "type": "TemplateProcessing",
        "single": around("A", 0).collect::<Vec<_>>(),
        "pair": around("A", 0).chain(around("B", 1)).collect::<Vec<_>>(),
        "special_tokens": tokens,
    });
    if byte_level { json!({"type": "Sequence", "processors": [bytes, template]}) } else { template }
}

fn tokenizer_config(gguf: &Gguf, vocabulary: &Vocabulary, add_bos: bool) -> Result<Json, GgufError> {
    let mut config = Map::new();
    config.insert("add_bos_token".into(), json!(add_bos));
    if let Some(add_eos) = gguf.bool("tokenizer.ggml.add_eos_token")? {
        config.insert("add_eos_token".into(), json!(add_eos));
    }
    let specials = [
        ("bos_token", vocabulary.bos),
        ("eos_token", vocabulary.eos),
        ("pad_token", vocabulary.padding),
        ("unk_token", vocabulary.unknown),
    ];
    for (key, id) in specials {
        if let Some(id) = id {
            config.insert(key.into(), json!(vocabulary.tokens[id as usize]));
        }
    }
    match (gguf.text(TEMPLATE)?, named_templates(gguf)?) {
        (default, named) if !named.is_empty() => {
            let default = default.map(|template| json!({"name": "default", "template": template}));
            config.insert("chat_template".into(), default.into_iter().chain(named).collect());
        }
        (Some(template), _) => drop(config.insert("chat_template".into(), json!(template))),
        (None, _) => {}
    }
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    Ok(Json::Object(config))
}

/// The templates beside the default one, such as that for chats with tools.
fn named_templates(gguf: &Gguf) -> Result<Vec<Json>, GgufError> {
    let keys =
        gguf.metadata.keys().filter_map(|key| Some((key, key.strip_prefix(TEMPLATE)?.strip_prefix('.')?)));
    let named = keys.take(TEMPLATES_MAX).map(|(key, name)| {
        let template = required(gguf.text(key)?, key)?;
        Ok(json!({"name": name, "template": template}))
    });
    named.collect()
}

fn generation_config(vocabulary: &Vocabulary) -> Json {
    let mut config = Map::new();
    config.insert("_from_model_config".into(), json!(true));
    for (key, value) in vocabulary.special_ids() {
        config.insert(key.into(), value);
    }
    Json::Object(config)
}
