//! Reads the files of a model folder that concern text.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::{Defaults, Parts, TextError};
use crate::folder::{json, wrapping};
use crate::text::detokenize::Pieces;
use crate::text::template::{SOURCE_BYTES_MAX, Template};

/// Largest `tokenizer.json`. Gemma's, with 262,144 tokens, has 33 MiB.
const TOKENIZER_BYTES_MAX: u64 = 128 << 20;
/// Largest of the small JSON files; Mistral's `tokenizer_config.json` has about 200 KiB.
const CONFIG_BYTES_MAX: u64 = 8 << 20;
/// Most tokens that end a sequence.
const END_TOKENS_MAX: usize = 64;
/// Tokens that are variables of the chat template.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

pub(super) fn open(folder: &Path, model: &str) -> Result<Parts, TextError> {
    let file = "tokenizer.json";
    let bytes = read(folder, file, TOKENIZER_BYTES_MAX)?
        .ok_or_else(|| TextError::Read { file: file.into(), error: std::io::ErrorKind::NotFound.into() })?;
    let malformed = |error: String| TextError::Malformed { file: file.into(), error };
    let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| malformed(error.to_string()))?;
    // Some files carry the padding and truncation of their training.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| malformed(error.to_string()))?;
    let decoder = Decoder::of(&bytes).map_err(|error| malformed(error.to_string()))?;
    let pieces =
        Pieces::new(&tokenizer, &decoder).map_err(|error| TextError::Decoder { file: file.into(), error })?;
    let config = read_json(folder, "tokenizer_config.json")?.unwrap_or(Value::Null);
    let generation = read_json(folder, "generation_config.json")?.unwrap_or(Value::Null);
    let model_config = read_json(folder, "config.json")?.unwrap_or(Value::Null);
    let end_tokens = end_tokens(&tokenizer, &config, &generation, &model_config)?;
    Ok(Parts {
        model: model.to_owned(),
        template: template(folder, &config)?,
        defaults: defaults(&generation)?,
        tokenizer,
        pieces,
        end_tokens,
    })
}

/// The one field of `tokenizer.json` that the tokenizer does not show again.
#[derive(serde::Deserialize)]
struct Decoder {
    #[serde(default)]
    decoder: Value,
}

impl Decoder {
    fn of(bytes: &[u8]) -> serde_json::Result<Value> {
        serde_json::from_slice::<Decoder>(bytes).map(|file| file.decoder)
    }
}

fn read(folder: &Path, file: &str, limit: u64) -> Result<Option<Vec<u8>>, TextError> {
    let path = folder.join(file);
    let failed = |error| TextError::Read { file: file.into(), error };
    let bytes = match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
        Ok(metadata) => metadata.len(),
    };
    if bytes > limit {
        return Err(TextError::TooLarge { file: file.into(), bytes, limit });
    }
    let bytes = std::fs::read(&path).map_err(failed)?;
    let malformed = |what| TextError::Malformed { file: file.into(), error: format!("it {what}") };
    wrapping::text_of(&bytes).map(|text| Some(text.to_vec())).map_err(malformed)
}

fn read_json(folder: &Path, file: &str) -> Result<Option<Value>, TextError> {
    let Some(bytes) = read(folder, file, CONFIG_BYTES_MAX)? else { return Ok(None) };
    match json::parse::<Value>(&bytes) {
        Ok(value @ Value::Object(_)) => Ok(Some(value)),
        Ok(_) => Err(TextError::Malformed { file: file.into(), error: "is not a JSON object".into() }),
        Err(error) => Err(TextError::Malformed { file: file.into(), error }),
    }
}

/// `chat_template.jinja` comes first, as in transformers; then the configuration's string, or of a list of
/// named templates the one called `default`.
fn template(folder: &Path, config: &Value) -> Result<Option<Template>, TextError> {
    let file = "chat_template.jinja";
    if let Some(bytes) = read(folder, file, SOURCE_BYTES_MAX as u64)? {
        let source = String::from_utf8(bytes)
            .map_err(|error| TextError::Malformed { file: file.into(), error: error.to_string() })?;
        return compile(&source, file, config).map(Some);
    }
    let source = match &config["chat_template"] {
        Value::String(source) => Some(source.as_str()),
        Value::Array(named) => {
            named.iter().find(|entry| entry["name"] == "default").and_then(|entry| entry["template"].as_str())
        }
        _ => None,
    };
    source.map(|source| compile(source, "tokenizer_config.json", config)).transpose()
}

fn compile(source: &str, file: &str, config: &Value) -> Result<Template, TextError> {
    let special = SPECIAL_TOKENS
        .iter()
        .filter_map(|name| token_text(&config[*name]).map(|token| ((*name).to_owned(), token.to_owned())))
        .collect();
    Template::new(source, special).map_err(|error| TextError::Template { file: file.into(), error })
}

/// A token is written as its text, or as an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// The union of what the files say: `eos_token_id` of both configurations, a number or a list, and the
/// tokenizer's `eos_token`, which instruction-tuned models end their turns with.
fn end_tokens(
    tokenizer: &Tokenizer,
    config: &Value,
    generation: &Value,
    model_config: &Value,
) -> Result<Vec<u32>, TextError> {
    let mut tokens: Vec<u32> =
        token_text(&config["eos_token"]).and_then(|token| tokenizer.token_to_id(token)).into_iter().collect();
    for (file, value) in [("generation_config.json", generation), ("config.json", model_config)] {
        let ids = match &value["eos_token_id"] {
            Value::Null => continue,
            Value::Array(ids) => ids.clone(),
            id => vec![id.clone()],
        };
        for id in ids {
            let token = id.as_u64().and_then(|id| u32::try_from(id).ok());
            tokens.push(token.ok_or_else(|| TextError::Malformed {
                file: file.into(),
                error: format!("eos_token_id: {id} is not a token id"),
            })?);
        }
    }
    tokens.sort_unstable();
    tokens.dedup();
    if tokens.len() > END_TOKENS_MAX {
        return Err(TextError::Malformed {
            file: "generation_config.json".into(),
            error: format!("eos_token_id: {} tokens exceed the limit of {END_TOKENS_MAX}", tokens.len()),
        });
    }
    Ok(tokens)
}

fn defaults(generation: &Value) -> Result<Defaults, TextError> {
    let number = |name: &str, default: f32, range: std::ops::RangeInclusive<f64>| {
        let value = &generation[name];
        if value.is_null() {
            return Ok(default);
        }
        let number = value.as_f64().filter(|number| range.contains(number));
        number.map(|number| number as f32).ok_or_else(|| TextError::Malformed {
            file: "generation_config.json".into(),
            error: format!("{name}: {value} is not a number from {} to {}", range.start(), range.end()),
        })
    };
    Ok(Defaults {
        temperature: number("temperature", 1.0, 0.0..=100.0)?,
        top_p: number("top_p", 1.0, f64::MIN_POSITIVE..=1.0)?,
        top_k: number("top_k", 0.0, 0.0..=f64::from(1u32 << 20))? as u32,
        min_p: number("min_p", 0.0, 0.0..=1.0)?,
        repetition_penalty: number("repetition_penalty", 1.0, 0.01..=10.0)?,
    })
}
