//! From a GGUF's vocabulary to `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.
//!
//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`) and SentencePiece BPE (`llama`) are written; others are
//! refused. GGUF names the pre-tokenizer (`tokenizer.ggml.pre`) without saying what it does, so only names
//! whose definition is known here are accepted: a wrong split would silently change every prompt.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value as Json, json};

use super::ImportError;
use super::gguf::{Gguf, GgufError, invalid, required};
use super::layout::VOCABULARY_MAX;
use super::sentencepiece;

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

/// What a token is, in GGUF's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// Text.
    Normal,
    /// Stands for unknown text.
    Unknown,
    /// Begins or ends something; never part of the text.
    Control,
    /// Text that is never split.
    UserDefined,
    /// A hole in the vocabulary.
    Unused,
    /// One byte, written `<0x0A>`.
    Byte,
}

impl TokenKind {
    fn from_gguf(index: usize, kind: i64) -> Result<Self, GgufError> {
        Ok(match kind {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            other => {
                let field = format!("tokenizer.ggml.token_type[{index}]");
                return Err(invalid(&field, other, "token types are 1 to 6"));
            }
        })
    }
}

/// The vocabulary and the ids of its special tokens.
pub struct Vocabulary<'a> {
    /// Texts by id.
    pub tokens: &'a [String],
    /// Kinds by id.
    pub kinds: Vec<TokenKind>,
    /// Ids by text, holes left out.
    pub ids: HashMap<&'a str, u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    /// End of a turn, where it differs from the end of the text.
    eot: Option<u32>,
    unknown: Option<u32>,
    padding: Option<u32>,
}

impl<'a> Vocabulary<'a> {
    /// Reads and checks tokens, kinds and special ids. `embeddings` is the number of rows of the embedding.
    pub fn read(gguf: &'a Gguf, embeddings: u64) -> Result<Self, GgufError> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        let tokens = required(gguf.texts(TOKENS)?, TOKENS)?;
        let limit = VOCABULARY_MAX.min(embeddings);
        if tokens.is_empty() || tokens.len() as u64 > limit {
            let rule = format!("it must be 1 to {limit}, the rows of the embedding");
            return Err(invalid(&format!("length of {TOKENS}"), tokens.len(), &rule));
        }
        let kinds = kinds(gguf, tokens.len())?;
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, (token, kind)) in tokens.iter().zip(&kinds).enumerate() {
            if *kind == TokenKind::Unused {
                continue;
            }
            if let Some(first) = ids.insert(token.as_str(), id as u32) {
                let field = format!("{TOKENS}[{id}]");
                return Err(invalid(
                    &field,
                    format!("{token:?}"),
                    &format!("token {first} has the same text"),
                ));
            }
        }
        let special = |name: &str| special_id(gguf, name, tokens.len());
        Ok(Self {
            tokens,
            kinds,
            ids,
            bos: special("bos_token_id")?,
            eos: special("eos_token_id")?,
            eot: special("eot_token_id")?,
            unknown: special("unknown_token_id")?,
            padding: special("padding_token_id")?,
        })
    }

    /// The vocabulary object of `tokenizer.json`, in the order of ids.
    pub fn object(&self) -> Map<String, Json> {
        let known = self.tokens.iter().zip(&self.kinds).enumerate();
        known
            .filter(|(_, (_, kind))| **kind != TokenKind::Unused)
            .map(|(id, (token, _))| (token.clone(), json!(id)))
            .collect()
    }

    /// The text of the unknown token.
    pub fn unknown_text(&self) -> Option<&str> {
        self.unknown.map(|id| self.tokens[id as usize].as_str())
    }

    /// Special ids for `config.json` and `generation_config.json`.
    pub fn special_ids(&self) -> BTreeMap<&'static str, Json> {
        let mut ids = BTreeMap::new();
        if let Some(bos) = self.bos {
            ids.insert("bos_token_id", json!(bos));
        }
        match (self.eos, self.eot) {
            (Some(eos), Some(eot)) if eos != eot => ids.insert("eos_token_id", json!([eos, eot])),
            (Some(end), _) | (None, Some(end)) => ids.insert("eos_token_id", json!(end)),
            (None, None) => None,
        };
        if let Some(padding) = self.padding {
            ids.insert("pad_token_id", json!(padding));
        }
        ids
    }

    fn added(&self) -> Vec<Json> {
        let kinds = self.kinds.iter().enumerate();
        kinds
            .filter(|(_, kind)| {
                matches!(kind, TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined)
            })
            .map(|(id, kind)| {
                json!({
                    "id": id, "content": self.tokens[id], "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": *kind != TokenKind::UserDefined,
                })
            })
            .collect()
    }
}

fn kinds(gguf: &Gguf, tokens: usize) -> Result<Vec<TokenKind>, GgufError> {
    const KINDS: &str = "tokenizer.ggml.token_type";
    let Some(kinds) = gguf.integers(KINDS)? else {
        return Ok(vec![TokenKind::Normal; tokens]);
    };
    if kinds.len() != tokens {
        let rule = format!("it must be {tokens}, one per token");
        return Err(invalid(&format!("length of {KINDS}"), kinds.len(), &rule));
    }
    kinds.iter().enumerate().map(|(index, kind)| TokenKind::from_gguf(index, *kind)).collect()
}

fn special_id(gguf: &Gguf, name: &str, tokens: usize) -> Result<Option<u32>, GgufError> {
    let id = gguf.integer(&format!("tokenizer.ggml.{name}"), tokens as u64 - 1)?;
    Ok(id.map(|id| id as u32))
}

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
    let bos = vocabulary.bos.filter(|_| add_bos);
    let byte_level_processor = model == "gpt2";
    tokenizer["post_processor"] = post_processor(vocabulary, bos, byte_level_processor);
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
    Qwen2,
}

impl PreTokenizer {
    fn read(gguf: &Gguf, overriding: Option<&str>) -> Result<Self, GgufError> {
        const PRE: &str = "tokenizer.ggml.pre";
        let name = match overriding {
            Some(name) => name,
            None => required(gguf.text(PRE)?, PRE)?,
        };
        match name {
            "gpt-2" => Ok(Self::Gpt2),
            "smollm" => Ok(Self::SmolLm),
            "llama-bpe" | "llama3" | "llama-v3" => Ok(Self::Llama3),
            "qwen2" | "deepseek-r1-qwen" => Ok(Self::Qwen2),
            other => Err(invalid(PRE, other, "known are gpt-2, smollm, llama-bpe and qwen2")),
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
            Self::Llama3 => split(LLAMA3_SPLIT),
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
    let merges = required(gguf.texts(MERGES)?, MERGES)?;
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

fn post_processor(vocabulary: &Vocabulary, bos: Option<u32>, byte_level: bool) -> Json {
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let Some(bos) = bos else {
        return if byte_level { bytes } else { Json::Null };
    };
    let text = &vocabulary.tokens[bos as usize];
    let special = |type_id: u32| json!({"SpecialToken": {"id": text, "type_id": type_id}});
    let sequence = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
    let template = json!({
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
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
    if let Some(template) = gguf.text("tokenizer.chat_template")? {
        config.insert("chat_template".into(), json!(template));
    }
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    Ok(Json::Object(config))
}

fn generation_config(vocabulary: &Vocabulary) -> Json {
    let mut config = Map::new();
    config.insert("_from_model_config".into(), json!(true));
    for (key, value) in vocabulary.special_ids() {
        config.insert(key.into(), value);
    }
    Json::Object(config)
}
