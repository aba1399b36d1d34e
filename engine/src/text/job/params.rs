//! The parameters of a request: each one's range, and what is ignored or refused.

use serde_json::Value;

use super::fields::{Fields, is_empty, refuse, refuse_kind, text, token};
use super::{JobLimits, Params, Reject};

/// Most choices per prompt, as in OpenAI's API.
pub const CHOICES_MAX: u32 = 128;
/// Most stop strings. OpenAI allows 4; each costs a state per choice.
pub const STOPS_MAX: usize = 16;
/// Longest stop string, in bytes: as much text may be held back while a choice streams.
pub const STOP_BYTES_MAX: usize = 256;
/// Most stop tokens.
pub const STOP_TOKENS_MAX: usize = 256;
/// Most words that are never generated.
pub const BAD_WORDS_MAX: usize = 128;
/// Most tokens that alone are allowed; each costs an operation per step.
pub const ALLOWED_TOKENS_MAX: usize = 1024;
/// Most tokens with a bias; each costs an operation per step.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Most alternatives in log probabilities, as in OpenAI's API.
pub const TOP_LOGPROBS_MAX: u32 = 20;
/// Beyond it, sampling is uniform over the vocabulary for all that is known.
const TEMPERATURE_MAX: f64 = 100.0;
/// OpenAI's range is -2 to 2.
const PENALTY_MAX: f64 = 2.0;
/// Beyond it every repetition is impossible anyway.
const REPETITION_PENALTY_MAX: f64 = 10.0;

/// Fields that callers send and that change nothing here. The queue has decided on the model, on streaming
/// and on service classes; the rest is bookkeeping of the caller.
const IGNORED: [&str; 10] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "stream_options",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "request_id",
];

/// Fields of other servers that are known and refused, unless their value is the one that changes nothing.
const NEUTRAL: [(&str, &str); 5] = [
    ("length_penalty", "1"),
    ("early_stopping", "false"),
    ("priority", "0"),
    ("spaces_between_special_tokens", "true"),
    ("include_reasoning", "true"),
];

/// Fields that are known and refused unless they say nothing.
const UNSUPPORTED: [(&str, &str); 16] = [
    ("functions", "leave it out"),
    ("function_call", "leave it out"),
    ("modalities", "only text is generated"),
    ("audio", "only text is generated"),
    ("prediction", "leave it out"),
    ("web_search_options", "leave it out"),
    ("reasoning_effort", "use chat_template_kwargs if the template knows it"),
    ("verbosity", "leave it out"),
    ("suffix", "text can only be continued"),
    ("best_of", "use n"),
    ("use_beam_search", "use sampling"),
    ("guided_json", "output cannot be constrained"),
    ("guided_regex", "output cannot be constrained"),
    ("guided_choice", "output cannot be constrained"),
    ("guided_grammar", "output cannot be constrained"),
    ("structured_outputs", "output cannot be constrained"),
];

fn refuse_unless_neutral(fields: &mut Fields) -> Result<(), Reject> {
    for (name, neutral) in NEUTRAL {
        let Some(value) = fields.take(name) else { continue };
        let says_nothing = match &value {
            Value::Bool(flag) => flag.to_string() == neutral,
            Value::Number(number) => number.as_f64() == neutral.parse().ok(),
            other => is_empty(other),
        };
        if !says_nothing {
            return Err(refuse(fields.path_of(name), &value, &format!("{neutral}, which alone is done")));
        }
    }
    Ok(())
}

/// Reads every parameter. `chat` tells the two meanings of `logprobs` apart.
pub(super) fn read(fields: &mut Fields, chat: bool, limits: &JobLimits) -> Result<Params, Reject> {
    refuse_unsupported(fields)?;
    refuse_unless_neutral(fields)?;
    fields.ignore(&IGNORED);
    fields.boolean("stream")?;
    fields.text("model", 0..=MODEL_BYTES_MAX)?;
    let penalty = -PENALTY_MAX..=PENALTY_MAX;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    let prompt_logprobs = fields.count("prompt_logprobs", 0, TOP_LOGPROBS_MAX)?;
    // Who only wants to know the prompt's values needs no token.
    let least = if echo && !chat || prompt_logprobs.is_some() { 0 } else { 1 };
    let max_tokens = max_tokens(fields, least, limits)?;
    Ok(Params {
        n: fields.count("n", 1, CHOICES_MAX)?.unwrap_or(1),
        max_tokens,
        stop: stops(fields)?,
        include_stop: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
        stop_token_ids: tokens(fields, "stop_token_ids", STOP_TOKENS_MAX, limits)?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        skip_special_tokens: fields.boolean("skip_special_tokens")?.unwrap_or(true),
        // A negative seed is as good as any other: its bits are taken as they are.
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned),
        logprobs: if chat {
            chat_logprobs(fields)?
        } else {
            fields.count("logprobs", 0, TOP_LOGPROBS_MAX)?
        },
        temperature: fields.number("temperature", 0.0..=TEMPERATURE_MAX)?,
        top_p: top_p(fields)?,
        top_k: top_k(fields)?,
        min_p: fields.number("min_p", 0.0..=1.0)?,
        repetition_penalty: fields.number("repetition_penalty", 0.01..=REPETITION_PENALTY_MAX)?,
        presence_penalty: fields.number("presence_penalty", penalty.clone())?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", penalty)?.unwrap_or(0.0),
        logit_bias: logit_bias(fields, limits)?,
        min_tokens: fields.count("min_tokens", 0, max_tokens.unwrap_or(limits.max_model_len))?.unwrap_or(0),
        bad_words: bad_words(fields)?,
        allowed_token_ids: tokens(fields, "allowed_token_ids", ALLOWED_TOKENS_MAX, limits)?,
        truncate_prompt_tokens: truncation(fields, limits)?,
        prompt_logprobs,
        echo,
        tokens_as_ids: fields.boolean("return_tokens_as_token_ids")?.unwrap_or(false),
        split_special_tokens: fields.boolean("split_special_tokens")?,
    })
}

/// -1 is the model's length, as in vLLM.
fn truncation(fields: &mut Fields, limits: &JobLimits) -> Result<Option<u32>, Reject> {
    let field = "truncate_prompt_tokens";
    let most = fields.integer(field, -1..=i64::from(limits.max_model_len))?;
    match most {
        Some(0) => Err(Reject::Value {
            field: fields.path_of(field),
            value: "0".into(),
            expected: format!("-1, or a whole number from 1 to {}", limits.max_model_len),
        }),
        Some(most) => Ok(Some(u32::try_from(most).unwrap_or(limits.max_model_len))),
        None => Ok(None),
    }
}

fn bad_words(fields: &mut Fields) -> Result<Vec<String>, Reject> {
    let field = fields.path_of("bad_words");
    let values = fields.list("bad_words", "words", BAD_WORDS_MAX)?.unwrap_or_default();
    let word = |(i, value)| text(&format!("{field}[{i}]"), value, 1..=STOP_BYTES_MAX);
    values.into_iter().enumerate().map(word).collect()
}

/// Longest model name in a request. The name does not choose the model, the job's subject does.
const MODEL_BYTES_MAX: usize = 256;

fn refuse_unsupported(fields: &mut Fields) -> Result<(), Reject> {
    for (name, reason) in UNSUPPORTED {
        let field = fields.path_of(name);
        let says_nothing = match fields.take(name) {
            None | Some(Value::Bool(false)) => true,
            Some(Value::Array(values)) if name == "modalities" => values.is_empty() || values == ["text"],
            Some(Value::Number(number)) => name == "best_of" && number.as_u64() == Some(1),
            Some(Value::String(choice)) if name == "function_call" => {
                ["", "none", "auto"].contains(&choice.as_str())
            }
            Some(value) => is_empty(&value),
        };
        if !says_nothing {
            return Err(Reject::Unsupported { field, reason });
        }
    }
    let field = fields.path_of("response_format");
    if let Some(format) = fields.take("response_format").filter(|format| !is_empty(format))
        && format.get("type").and_then(Value::as_str) != Some("text")
    {
        return Err(Reject::Unsupported { field, reason: "only {\"type\": \"text\"} is" });
    }
    Ok(())
}

fn max_tokens(fields: &mut Fields, least: u32, limits: &JobLimits) -> Result<Option<u32>, Reject> {
    let new = fields.count("max_completion_tokens", least, limits.max_model_len)?;
    let old = fields.count("max_tokens", least, limits.max_model_len)?;
    match (new, old) {
        (Some(new), Some(old)) if new != old => Err(Reject::Value {
            field: fields.path_of("max_tokens"),
            value: old.to_string(),
            expected: format!("equal to max_completion_tokens {new}; send one of them"),
        }),
        _ => Ok(new.or(old)),
    }
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, Reject> {
    let field = fields.path_of("stop");
    let values = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(values)) => values,
        Some(value @ Value::String(_)) => vec![value],
        Some(other) => return Err(refuse(field, &other, "a string or an array of strings")),
    };
    if values.len() > STOPS_MAX {
        return Err(Reject::TooMany { field, what: "stop strings", limit: STOPS_MAX });
    }
    let stop = |(i, value)| text(&format!("{field}[{i}]"), value, 1..=STOP_BYTES_MAX);
    values.into_iter().enumerate().map(stop).collect()
}

fn tokens(fields: &mut Fields, name: &str, limit: usize, limits: &JobLimits) -> Result<Vec<u32>, Reject> {
    let field = fields.path_of(name);
    let values = fields.list(name, "token ids", limit)?.unwrap_or_default();
    let id = |(i, value)| token(&format!("{field}[{i}]"), value, limits.vocabulary);
    values.iter().enumerate().map(id).collect()
}

fn chat_logprobs(fields: &mut Fields) -> Result<Option<u32>, Reject> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0, TOP_LOGPROBS_MAX)?;
    match (wanted, top) {
        (false, Some(top)) if top > 0 => Err(Reject::Value {
            field: fields.path_of("top_logprobs"),
            value: top.to_string(),
            expected: "allowed without logprobs: true".into(),
        }),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

/// Above 0: a nucleus of no probability holds no token.
fn top_p(fields: &mut Fields) -> Result<Option<f32>, Reject> {
    match fields.number("top_p", 0.0..=1.0)? {
        Some(top_p) if top_p <= 0.0 => Err(Reject::Value {
            field: fields.path_of("top_p"),
            value: "0".into(),
            expected: "a number above 0 and up to 1".into(),
        }),
        other => Ok(other),
    }
}

/// -1 is off too, as in vLLM.
fn top_k(fields: &mut Fields) -> Result<Option<u32>, Reject> {
    Ok(fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| u32::try_from(k).unwrap_or(0)))
}

fn logit_bias(fields: &mut Fields, limits: &JobLimits) -> Result<Vec<(u32, f32)>, Reject> {
    let field = fields.path_of("logit_bias");
    let map = match fields.take("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(refuse_kind(field, &other, "an object of token ids and numbers")),
    };
    if map.len() > LOGIT_BIAS_MAX {
        return Err(Reject::TooMany { field, what: "tokens", limit: LOGIT_BIAS_MAX });
    }
    let mut biases = Vec::with_capacity(map.len());
    for (key, value) in map {
        let id = key.parse::<u64>().map_or_else(|_| Value::String(key.clone()), Value::from);
        let id = token(&field, &id, limits.vocabulary)?;
        let bias = value.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let bias =
            bias.ok_or_else(|| refuse(format!("{field}.{id}"), &value, "a number from -100 to 100"))?;
        biases.push((id, bias as f32));
    }
    // Two spellings of one id ("7" and "07") are one token; the order of an object's fields means nothing.
    biases.sort_by_key(|&(id, _)| id);
    match biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(Reject::Value {
            field,
            value: pair[0].0.to_string(),
            expected: "a token id that stands there once".into(),
        }),
        None => Ok(biases),
    }
}
