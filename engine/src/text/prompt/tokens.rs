//! Special and added tokens, which a folder's files name in several places.
//!
//! The order is that of transformers 5.24 (`PreTrainedTokenizerBase._from_pretrained`): `added_tokens_decoder` of
//! tokenizer_config.json decides where it stands; else special_tokens_map.json stands above tokenizer_config.json, and
//! added_tokens.json and the list of tokenizer.json add to it. What the tokenizer lacks, or has with other marks, is
//! added to it.

use std::path::Path;

use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

use super::TextError;
use super::files::read_json;

/// Tokens that are variables of the chat template.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Most tokens that files may add.
const ADDED_MAX: usize = 1 << 17;

/// What the files say.
#[derive(Debug, Default)]
pub(super) struct SpecialTokens {
    /// By name, as the chat template sees them.
    pub named: Vec<(String, String)>,
    /// Named tokens and further special ones, as tokens.
    special: Vec<AddedToken>,
    /// Tokens with ids, in the order of these.
    added: Vec<(u32, AddedToken)>,
}

fn malformed(file: &str, error: String) -> TextError {
    TextError::Malformed { file: file.into(), error }
}

impl SpecialTokens {
    /// `defaults` are those of the tokenizer's class, for names that no file has.
    pub(super) fn read(folder: &Path, config: &Value, defaults: &[(&str, &str)]) -> Result<Self, TextError> {
        let mut fields = config.as_object().cloned().unwrap_or_default();
        let mut found = Self::default();
        if let Some(added) = fields.remove("added_tokens_decoder") {
            let file = "tokenizer_config.json";
            for (id, token) in added.as_object().into_iter().flatten() {
                let number = id.parse::<u32>();
                let id = number.map_err(|_| {
                    malformed(file, format!("added_tokens_decoder: {id:?} is not a token id"))
                })?;
                found.added.extend(token_of(token, false).map(|token| (id, token)));
            }
        } else {
            let map = read_json(folder, "special_tokens_map.json")?;
            for (name, value) in map.as_ref().and_then(Value::as_object).into_iter().flatten() {
                fields.insert(name.clone(), value.clone());
            }
            found.read_added(folder, &fields)?;
        }
        for (name, token) in defaults {
            // `null` is an answer: there is none.
            fields.entry(*name).or_insert_with(|| Value::from(*token));
        }
        found.added.sort_by_key(|(id, _)| *id);
        for name in NAMED {
            if let Some(token) = fields.get(name).and_then(|value| token_of(value, true)) {
                found.named.push((name.to_owned(), token.content.clone()));
                let known = found.added.iter().find(|(_, added)| added.content == token.content);
                found.special.push(known.map_or(token, |(_, added)| added.clone()));
            }
        }
        let extra = ["extra_special_tokens", "additional_special_tokens"].map(|name| fields.get(name));
        let says = |value: &&Value| value.as_array().is_some_and(|all| !all.is_empty()) || value.is_object();
        let mut named: Vec<(&String, &Value)> = Vec::new();
        match extra.into_iter().flatten().find(says) {
            Some(Value::Array(tokens)) => {
                found.special.extend(tokens.iter().filter_map(|token| token_of(token, true)))
            }
            Some(Value::Object(tokens)) => named.extend(tokens),
            _ => {}
        }
        // Names such as `image_token` are a model's own; the template sees them too.
        named.extend(fields.iter().filter(|(name, value)| {
            name.ends_with("_token")
                && !NAMED.contains(&name.as_str())
                && (value.is_string() || is_token(value))
        }));
        // Others count only where none of those is there.
        if let (true, Some(Value::Object(tokens))) =
            (named.is_empty(), fields.get("model_specific_special_tokens"))
        {
            named.extend(tokens);
        }
        for (name, value) in named {
            if let Some(token) = token_of(value, true) {
                found.named.push((name.clone(), token.content.clone()));
                found.special.push(token);
            }
        }
        match found.added.len() + found.special.len() {
            count if count > ADDED_MAX => Err(malformed(
                "tokenizer_config.json",
                format!("{count} added tokens exceed the limit of {ADDED_MAX}"),
            )),
            _ => Ok(found),
        }
    }

    /// The older file: ids by text.
    fn read_added(
        &mut self,
        folder: &Path,
        fields: &serde_json::Map<String, Value>,
    ) -> Result<(), TextError> {
        let file = "added_tokens.json";
        let Some(added) = read_json(folder, file)? else { return Ok(()) };
        let special: Vec<&str> = NAMED.iter().filter_map(|name| content(fields.get(*name)?)).collect();
        for (text, id) in added.as_object().into_iter().flatten() {
            let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let number =
                number.ok_or_else(|| malformed(file, format!("{text:?}: {id} is not a token id")))?;
            let special = special.contains(&text.as_str());
            self.added.push((number, AddedToken::from(text.clone(), special).normalized(!special)));
        }
        Ok(())
    }
}

fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn is_token(value: &Value) -> bool {
    value.get("__type").is_some_and(|kind| kind == "AddedToken")
}

/// A token is written as its text, or as an object with its marks.
fn token_of(value: &Value, special: bool) -> Option<AddedToken> {
    let text = content(value).filter(|text| !text.is_empty())?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(special);
    let token = AddedToken::from(text.to_owned(), special);
    Some(
        token
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .single_word(flag("single_word").unwrap_or(false))
            .normalized(flag("normalized").unwrap_or(!special)),
    )
}

/// Adds to the tokenizer what the files name and it lacks.
pub(super) fn add(tokenizer: &mut Tokenizer, tokens: &SpecialTokens) -> Result<(), TextError> {
    let known: Vec<AddedToken> = tokenizer.get_added_tokens_decoder().into_values().collect();
    let same = |a: &AddedToken, b: &AddedToken| {
        let marks = |token: &AddedToken| {
            (token.single_word, token.lstrip, token.rstrip, token.normalized, token.special)
        };
        a.content == b.content && marks(a) == marks(b)
    };
    let named = |text: &str| tokens.named.iter().any(|(_, token)| token == text);
    let mut missing: Vec<AddedToken> = Vec::new();
    for (_, token) in &tokens.added {
        if !known.iter().any(|other| same(other, token)) {
            missing.push(token.clone());
        }
    }
    for token in &tokens.special {
        let has = |other: &AddedToken| other.content == token.content;
        if !known.iter().any(has) && !missing.iter().any(has) {
            missing.push(token.clone());
        }
    }
    for token in &mut missing {
        token.special |= named(&token.content);
    }
    if missing.is_empty() {
        return Ok(());
    }
    let added = tokenizer.add_tokens(missing);
    added.map(|_| ()).map_err(|error| malformed("tokenizer_config.json", error.to_string()))
}
