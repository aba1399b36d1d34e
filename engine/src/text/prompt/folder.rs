//! Reads the files of a model folder that concern text.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::class::TokenizerClass;
use super::files::{self, read, read_json, read_text};
use super::tokens::{self, SpecialTokens};
use super::{Defaults, Parts, Templates, TextError};
use crate::folder::manifest::{TEMPLATES_FOLDER, TEMPLATES_MAX};
use crate::model::config::class_eos;
use crate::text::detokenize::Pieces;
use crate::text::template::{SOURCE_BYTES_MAX, Template};

/// Largest `tokenizer.json`. Gemma's, with 262,144 tokens, has 33 MiB.
const TOKENIZER_BYTES_MAX: u64 = 128 << 20;
/// Most tokens that end a sequence.
const END_TOKENS_MAX: usize = 64;
/// How a byte-level part of a tokenizer is called in its file.
const BYTE_LEVEL: &str = "\"ByteLevel\"";
/// The template for conversations with tools, as transformers calls it.
const TOOL_USE: &str = "tool_use";

pub(super) fn open(folder: &Path, model: &str) -> Result<Parts, TextError> {
    let file = "tokenizer.json";
    let bytes = read(folder, file, TOKENIZER_BYTES_MAX)?.ok_or_else(|| files::no_tokenizer(folder))?;
    let malformed = |error: String| TextError::Malformed { file: file.into(), error };
    let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| malformed(error.to_string()))?;
    // Some files carry the padding and truncation of their training.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| malformed(error.to_string()))?;
    let parts: FileParts = serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
    let (decoder, parts) = parts.split();
    let config = read_json(folder, "tokenizer_config.json")?.unwrap_or(Value::Null);
    files::check_versions(&config)?;
    let generation = read_json(folder, "generation_config.json")?.unwrap_or(Value::Null);
    let model_config = read_json(folder, "config.json")?.unwrap_or(Value::Null);
    let is_byte_level = [&decoder, &parts].iter().any(|part| part.to_string().contains(BYTE_LEVEL));
    let class = TokenizerClass::of(&config, &model_config, is_byte_level);
    let special =
        SpecialTokens::read(folder, &config, class.map(TokenizerClass::defaults).unwrap_or_default())?;
    tokens::add(&mut tokenizer, &special)?;
    let pieces =
        Pieces::new(&tokenizer, &decoder).map_err(|error| TextError::Decoder { file: file.into(), error })?;
    let split = config["split_special_tokens"].as_bool().unwrap_or(false);
    Ok(Parts {
        model: model.to_owned(),
        templates: templates(folder, &config, &special)?,
        defaults: defaults(&generation)?,
        end_tokens: end_tokens(&tokenizer, &special, &generation, &model_config)?,
        tokenizer,
        splitting: std::sync::OnceLock::new(),
        marker: std::sync::OnceLock::new(),
        split,
        split_callers: false,
        notes: class.and_then(|class| class.replacement(&config, &parts)).into_iter().collect(),
        pieces,
    })
}

/// The fields of `tokenizer.json` that the tokenizer does not show again.
#[derive(serde::Deserialize)]
struct FileParts {
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
}

impl FileParts {
    /// The decoder, and what comes before the vocabulary, by name.
    fn split(self) -> (Value, Value) {
        let parts = serde_json::json!({"normalizer": self.normalizer, "pre_tokenizer": self.pre_tokenizer});
        (self.decoder, parts)
    }
}

/// Files come first, as in transformers: with any of them, the configuration's templates do not count. Of several
/// templates, `tool_use` serves conversations with tools and `default` the others.
fn templates(folder: &Path, config: &Value, special: &SpecialTokens) -> Result<Templates, TextError> {
    let mut sources = template_files(folder)?;
    if sources.is_empty() {
        let file = "tokenizer_config.json";
        let named = |entry: &Value| {
            let text = |name: &str| entry[name].as_str().map(str::to_owned);
            Some((text("name")?, text("template")?, file.to_owned()))
        };
        sources = match &config["chat_template"] {
            Value::String(source) => vec![("default".to_owned(), source.clone(), file.to_owned())],
            Value::Array(entries) => entries.iter().filter_map(named).collect(),
            Value::Object(map) => map
                .iter()
                .filter_map(|(name, source)| {
                    Some((name.clone(), source.as_str()?.to_owned(), file.to_owned()))
                })
                .collect(),
            _ => Vec::new(),
        };
    }
    let compile = |wanted: &str| {
        let Some((_, source, file)) = sources.iter().rev().find(|(name, ..)| name == wanted) else {
            return Ok(None);
        };
        let template = Template::new(source, special.named.clone());
        template.map(Some).map_err(|error| TextError::Template { file: file.clone(), error })
    };
    Ok(Templates { default: compile("default")?, tool_use: compile(TOOL_USE)? })
}

/// Name, source and file of each template that is a file.
fn template_files(folder: &Path) -> Result<Vec<(String, String, String)>, TextError> {
    let mut found = Vec::new();
    let file = "chat_template.jinja";
    if let Some(source) = read_text(folder, file, SOURCE_BYTES_MAX as u64)? {
        found.push(("default".to_owned(), source, file.to_owned()));
    }
    let Ok(entries) = std::fs::read_dir(folder.join(TEMPLATES_FOLDER)) else { return Ok(found) };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    for name in names.iter().filter_map(|name| name.strip_suffix(".jinja")).take(TEMPLATES_MAX) {
        let file = format!("{TEMPLATES_FOLDER}/{name}.jinja");
        if let Some(source) = read_text(folder, &file, SOURCE_BYTES_MAX as u64)? {
            found.push((name.to_owned(), source, file));
        }
    }
    Ok(found)
}

/// The union of what the files say: `eos_token_id` of both configurations, a number or a list, and the
/// tokenizer's `eos_token`, which instruction-tuned models end their turns with. A negative id is none. Where neither
/// configuration has the key, the model's class has a default.
fn end_tokens(
    tokenizer: &Tokenizer,
    special: &SpecialTokens,
    generation: &Value,
    model_config: &Value,
) -> Result<Vec<u32>, TextError> {
    const KEY: &str = "eos_token_id";
    let eos = special.named.iter().find(|(name, _)| name == "eos_token");
    let mut tokens: Vec<u32> = eos.and_then(|(_, token)| tokenizer.token_to_id(token)).into_iter().collect();
    let file = "config.json";
    let said = [
        ("generation_config.json", generation.get(KEY)),
        (file, model_config.get(KEY)),
        (file, model_config["text_config"].get(KEY)),
    ];
    if said.iter().all(|(_, value)| value.is_none()) {
        tokens.extend(model_config.as_object().and_then(class_eos));
    }
    for (file, value) in said {
        let ids = match value {
            None | Some(Value::Null) => continue,
            Some(Value::Array(ids)) => ids.clone(),
            Some(id) => vec![id.clone()],
        };
        for id in ids.iter().filter(|id| !id.is_null() && id.as_i64().is_none_or(|id| id >= 0)) {
            let whole = id.as_u64().or(id.as_f64().filter(|id| id.fract() == 0.0).map(|id| id as u64));
            let token = whole.and_then(|id| u32::try_from(id).ok());
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
        // A nucleus of nothing is its most probable token.
        top_p: number("top_p", 1.0, 0.0..=1.0)?.max(f32::MIN_POSITIVE),
        // -1 is vLLM's "off"; the cast takes it to 0, and what is beyond every vocabulary to the largest number.
        top_k: number("top_k", 0.0, -1.0..=1e18)? as u32,
        min_p: number("min_p", 0.0, 0.0..=1.0)?,
        repetition_penalty: number("repetition_penalty", 1.0, 0.01..=10.0)?,
    })
}
