//! Callers' text in tokens of the vocabulary alone: what reads like an added token is text.
//!
//! transformers splits special tokens so, and leaves other added tokens, such as those around calls of tools, whole;
//! here both are text.

use tokenizers::{
    Encoding, Model, NormalizedString, Normalizer, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer,
};

use crate::text::job::Reject;
use crate::text::marks::Marker;

/// Finds the tokens that callers may not write. Blanks that are added tokens (Gemma's) are ordinary text.
pub(super) fn marker(tokenizer: &Tokenizer) -> Marker {
    let added = tokenizer.get_added_tokens_decoder().into_values().map(|token| token.content);
    Marker::new(added.filter(|text| !text.trim().is_empty()))
}

/// Tokenizes text past the added tokens. With `special` the tokenizer adds its own tokens around it.
pub(super) fn encode(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<Vec<u32>, Reject> {
    let failed = |error: tokenizers::Error| Reject::Tokenizer(error.to_string());
    let mut encoding = pieces(tokenizer, text).map_err(failed)?;
    let added = tokenizer.get_added_vocabulary();
    let forged = |id: &u32| tokenizer.id_to_token(*id).is_some_and(|token| added.is_special_token(&token));
    // A vocabulary may have a special token's text among its pieces.
    if encoding.get_ids().iter().any(forged) {
        let mut buffer = [0; 4];
        let single = text.chars().map(|c| pieces(tokenizer, c.encode_utf8(&mut buffer)));
        let single = single.collect::<tokenizers::Result<Vec<_>>>().map_err(failed)?;
        encoding = Encoding::merge(single, false);
    }
    let whole = tokenizer.post_process(encoding, None, special).map_err(failed)?;
    Ok(whole.get_ids().to_vec())
}

fn pieces(tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Encoding> {
    let mut normalized = NormalizedString::from(text);
    if let Some(normalizer) = tokenizer.get_normalizer() {
        normalizer.normalize(&mut normalized)?;
    }
    let mut split = PreTokenizedString::from(normalized);
    if let Some(splitter) = tokenizer.get_pre_tokenizer() {
        splitter.pre_tokenize(&mut split)?;
    }
    split.tokenize(|piece| tokenizer.get_model().tokenize(piece.get()))?;
    split.into_encoding(None, 0, OffsetType::Byte)
}
