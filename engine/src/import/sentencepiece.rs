//! SentencePiece BPE vocabularies (Llama 2, Mistral, TinyLlama) as a `tokenizer.json`.
//!
//! SentencePiece holds scores and no merges; the merges are every split of a piece into two pieces, best score
//! of the union first, as `generate_merges` of transformers' `convert_slow_tokenizer.py` does it. Spaces become
//! U+2581, and what no piece covers falls back to bytes.

use serde_json::{Value as Json, json};

use super::gguf::{Gguf, GgufError, invalid, required};
use super::vocabulary::{TokenKind, Vocabulary};

/// Characters of a piece that is split into merges; SentencePiece's own default is 16, and some vocabularies
/// hold long runs of spaces.
const PIECE_CHARACTERS_MAX: usize = 512;

/// Builds the tokenizer without its post-processor and added tokens.
pub fn build(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<Json, GgufError> {
    let byte_fallback = check_bytes(vocabulary)?;
    let prefix = gguf.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let normalizer = if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}, replace]})
    } else {
        replace
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": vocabulary.unknown_text(),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": byte_fallback, "ignore_merges": false,
            "vocab": vocabulary.object(),
            "merges": merges(gguf, vocabulary)?,
        },
    }))
}

/// Whether the vocabulary has byte tokens; then it must have all 256 under their usual names.
fn check_bytes(vocabulary: &Vocabulary) -> Result<bool, GgufError> {
    let bytes = vocabulary.kinds.iter().filter(|kind| **kind == TokenKind::Byte).count();
    if bytes == 0 {
        return Ok(false);
    }
    for byte in 0..=255_u8 {
        let name = format!("<0x{byte:02X}>");
        if !vocabulary.ids.contains_key(name.as_str()) {
            return Err(invalid(
                "tokenizer.ggml.tokens",
                format!("{bytes} byte tokens without {name}"),
                "256 are needed",
            ));
        }
    }
    Ok(true)
}

fn merges(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<Vec<Json>, GgufError> {
    const SCORES: &str = "tokenizer.ggml.scores";
    let scores = required(gguf.floats(SCORES)?, SCORES)?;
    if scores.len() < vocabulary.tokens.len() {
        let rule = format!("it must be {}, one per token", vocabulary.tokens.len());
        return Err(invalid(&format!("length of {SCORES}"), scores.len(), &rule));
    }
    let mut found: Vec<(f32, u32, u32)> = Vec::new();
    for (id, piece) in vocabulary.tokens.iter().enumerate() {
        if !matches!(vocabulary.kinds[id], TokenKind::Normal | TokenKind::UserDefined) {
            continue;
        }
        if scores[id].is_nan() {
            return Err(invalid(&format!("{SCORES}[{id}]"), scores[id], "it must be a number"));
        }
        let mut splits: Vec<(u32, u32)> = piece
            .char_indices()
            .skip(1)
            .take(PIECE_CHARACTERS_MAX)
            .filter_map(|(at, _)| {
                let (left, right) = piece.split_at(at);
                Some((*vocabulary.ids.get(left)?, *vocabulary.ids.get(right)?))
            })
            .collect();
        splits.sort_unstable();
        found.extend(splits.into_iter().map(|(left, right)| (scores[id], left, right)));
    }
    // A stable sort: equal scores keep the order of ids.
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    let text = |id: u32| &vocabulary.tokens[id as usize];
    Ok(found.iter().map(|(_, left, right)| json!([text(*left), text(*right)])).collect())
}
