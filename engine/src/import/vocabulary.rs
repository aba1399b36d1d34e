//! A GGUF's vocabulary: texts, kinds and the ids of special tokens.
//!
//! What the file's keys leave open is decided as llama.cpp decides it (`src/llama-vocab.cpp`, November 2026): by the
//! defaults of the tokenizer's model, and by the tokens' texts. Everything that was decided so is said in a note.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde_json::{Map, Value as Json, json};

use super::gguf::{Gguf, GgufError, invalid, required};
use super::layout::VOCABULARY_MAX;

const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";

/// Texts of tokens that end a generation, whatever the keys say.
const ENDS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];
/// Keys of tokens for code infilling that end a generation, and their texts where the key is absent.
const INFILL_ENDS: [(&str, &[&str]); 3] = [
    ("fim_pad_token_id", &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    ("fim_rep_token_id", &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"]),
    ("fim_sep_token_id", &["<|file_sep|>"]),
];
/// `<|end|>` ends nothing where both of a pair are there: it closes a part of an answer then.
const INNER_END: (&str, [[&str; 2]; 2]) =
    ("<|end|>", [["<|return|>", "<|call|>"], ["<|calls|>", "<|flush|>"]]);
/// Other texts that only control tokens have.
const MARKERS: [&str; 8] =
    ["<start_of_turn>", "<bos>", "<pad>", "<unk>", "<s>", "[INST]", "[/INST]", "<start_of_image>"];

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
    fn from_gguf(kind: i64) -> Option<Self> {
        Some(match kind {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
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
    /// The beginning of a text.
    pub bos: Option<u32>,
    /// The end of a text.
    pub eos: Option<u32>,
    /// Stands for unknown text.
    pub unknown: Option<u32>,
    /// Fills up.
    pub padding: Option<u32>,
    /// Tokens that end a generation; `eos` first.
    pub ends: Vec<u32>,
}

impl<'a> Vocabulary<'a> {
    /// Reads and checks tokens, kinds and special ids. `embeddings` is the number of rows of the embedding.
    pub fn read(gguf: &'a Gguf, embeddings: u64, notes: &mut Vec<String>) -> Result<Self, GgufError> {
        let tokens = required(gguf.texts(TOKENS)?, TOKENS)?;
        let limit = VOCABULARY_MAX.min(embeddings);
        if tokens.is_empty() || tokens.len() as u64 > limit {
            let rule = format!("it must be 1 to {limit}, the rows of the embedding");
            return Err(invalid(&format!("length of {TOKENS}"), tokens.len(), &rule));
        }
        let mut kinds = kinds(gguf, tokens, notes)?;
        let ids = ids(tokens, &kinds)?;
        retype(gguf, tokens, &mut kinds, notes)?;
        let special = Special { gguf, tokens, kinds: &kinds, sentencepiece: sentencepiece(gguf)? };
        let eos = special.id("eos_token_id", Some(2), notes)?;
        let mut all = Self {
            tokens,
            bos: special.id("bos_token_id", Some(1), notes)?,
            eos,
            unknown: special.id("unknown_token_id", Some(0), notes)?,
            padding: special.id("padding_token_id", None, notes)?,
            ends: special.ends(eos, &ids, notes)?,
            ids,
            kinds: Vec::new(),
        };
        all.kinds = kinds;
        Ok(all)
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
        // Null where there is none: absent would be the default of the model's class.
        ids.insert(
            "eos_token_id",
            match self.ends.as_slice() {
                [] => Json::Null,
                [end] => json!(end),
                ends => json!(ends),
            },
        );
        if let Some(padding) = self.padding {
            ids.insert("pad_token_id", json!(padding));
        }
        ids
    }

    /// The tokens that are found in a text before it is split.
    pub fn added(&self) -> Vec<Json> {
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

/// Whether the tokenizer is SentencePiece's, by the name in the file.
fn sentencepiece(gguf: &Gguf) -> Result<bool, GgufError> {
    Ok(gguf.text("tokenizer.ggml.model")? == Some("llama"))
}

fn kinds(gguf: &Gguf, tokens: &[String], notes: &mut Vec<String>) -> Result<Vec<TokenKind>, GgufError> {
    const KINDS: &str = "tokenizer.ggml.token_type";
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    if let Some(numbers) = gguf.integers(KINDS)? {
        if numbers.len() < tokens.len() {
            let rule = format!("it must be {}, one per token", tokens.len());
            return Err(invalid(&format!("length of {KINDS}"), numbers.len(), &rule));
        }
        for (id, (kind, number)) in kinds.iter_mut().zip(numbers).enumerate() {
            match TokenKind::from_gguf(*number) {
                Some(known) => *kind = known,
                None => notes
                    .push(format!("{KINDS}[{id}] is {number}, which means nothing: taken as a normal token")),
            }
        }
    }
    for (kind, _) in kinds.iter_mut().zip(tokens).filter(|(_, token)| token.is_empty()) {
        *kind = TokenKind::Unused;
    }
    Ok(kinds)
}

fn ids<'a>(tokens: &'a [String], kinds: &[TokenKind]) -> Result<HashMap<&'a str, u32>, GgufError> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, (token, kind)) in tokens.iter().zip(kinds).enumerate() {
        if *kind == TokenKind::Unused {
            continue;
        }
        if let Some(first) = ids.insert(token.as_str(), id as u32) {
            let rule = format!("token {first} has the same text");
            return Err(invalid(&format!("{TOKENS}[{id}]"), format!("{token:?}"), &rule));
        }
    }
    Ok(ids)
}

/// Makes control tokens of those that only look like normal ones in the file: else a prompt would hold their letters.
/// One that the merges make of its letters is reached as text, and stays.
fn retype(
    gguf: &Gguf,
    tokens: &[String],
    kinds: &mut [TokenKind],
    notes: &mut Vec<String>,
) -> Result<(), GgufError> {
    let merges = gguf.texts(MERGES)?.unwrap_or_default();
    let merged: HashSet<String> = merges.iter().map(|merge| merge.replacen(' ', "", 1)).collect();
    for (id, (token, kind)) in tokens.iter().zip(kinds).enumerate() {
        let control = ENDS.contains(&token.as_str()) || looks_like_control(token) && !merged.contains(token);
        if control && *kind == TokenKind::Normal {
            *kind = TokenKind::Control;
            notes.push(format!("token {id}, {token:?}, is typed as normal text: taken as a control token"));
        }
    }
    Ok(())
}

fn looks_like_control(token: &str) -> bool {
    let between = |open: &str, close: &str| {
        token
            .strip_prefix(open)
            .and_then(|rest| rest.strip_suffix(close))
            .is_some_and(|name| !name.is_empty())
    };
    between("<|", "|>") || between("<｜", "｜>") || MARKERS.contains(&token)
}

/// What special ids are read from.
struct Special<'a> {
    gguf: &'a Gguf,
    tokens: &'a [String],
    kinds: &'a [TokenKind],
    sentencepiece: bool,
}

impl Special<'_> {
    /// The id under a key. An id outside of the vocabulary counts as absent; absent, SentencePiece has a default.
    fn id(
        &self,
        name: &str,
        default: Option<u32>,
        notes: &mut Vec<String>,
    ) -> Result<Option<u32>, GgufError> {
        let key = format!("tokenizer.ggml.{name}");
        let found = self.gguf.integer(&key, u64::MAX)?;
        if let Some(id) = found.and_then(|id| u32::try_from(id).ok()).filter(|&id| self.has(id)) {
            return Ok(Some(id));
        }
        let fallen = default.filter(|&id| self.sentencepiece && self.has(id));
        let taken = fallen.map_or("none is taken".to_owned(), |id| {
            format!("{id} is taken, {:?}", self.tokens[id as usize])
        });
        match found {
            Some(id) => {
                notes.push(format!("{key} is {id}, beyond the {} tokens: {taken}", self.tokens.len()))
            }
            None if fallen.is_some() => notes.push(format!("{key} is absent: {taken}")),
            None => {}
        }
        Ok(fallen)
    }

    fn has(&self, id: u32) -> bool {
        self.kinds.get(id as usize).is_some_and(|kind| *kind != TokenKind::Unused)
    }

    /// All tokens that end a generation: those of the keys, and those that are known by their texts.
    fn ends(
        &self,
        eos: Option<u32>,
        ids: &HashMap<&str, u32>,
        notes: &mut Vec<String>,
    ) -> Result<Vec<u32>, GgufError> {
        let mut by_key: BTreeSet<u32> = eos.into_iter().collect();
        for name in ["eot_token_id", "eom_token_id"] {
            by_key.extend(self.id(name, None, notes)?);
        }
        let mut by_text: BTreeSet<u32> = ENDS.iter().filter_map(|text| ids.get(text).copied()).collect();
        for (name, texts) in INFILL_ENDS {
            match self.id(name, None, notes)? {
                Some(id) => drop(by_key.insert(id)),
                None => by_text.extend(texts.iter().find_map(|text| ids.get(text).copied())),
            }
        }
        let (inner, pairs) = INNER_END;
        if pairs.iter().any(|pair| pair.iter().all(|text| ids.contains_key(text)))
            && let Some(id) = ids.get(inner)
        {
            by_text.remove(id);
            by_key.remove(id);
        }
        for &id in by_text.difference(&by_key) {
            notes.push(format!(
                "token {id}, {:?}, ends a generation: by its text, no key says so",
                self.tokens[id as usize]
            ));
        }
        let first = eos.filter(|eos| by_key.contains(eos));
        let rest: BTreeSet<u32> = by_key.union(&by_text).copied().filter(|id| Some(*id) != first).collect();
        let ends: Vec<u32> = first.into_iter().chain(rest).collect();
        if ends.is_empty() {
            notes.push("no token ends a generation: answers end at their limit".to_owned());
        }
        Ok(ends)
    }
}
