//! RoPE scaling of a GGUF, as `rope_scaling` of `config.json`.
//!
//! llama.cpp bakes the scaling of Llama 3.1 and later into a tensor of frequency factors and drops the
//! parameters. They are found again by computing the factors that the published parameters give and comparing;
//! factors that match none are refused rather than guessed.

use serde_json::{Value as Json, json};

use super::gguf::{Gguf, GgufError, invalid, required};
use super::layout::decimal;

/// The tensor that holds the frequency factors.
pub const FACTORS_TENSOR: &str = "rope_freqs.weight";
/// Frequency factors of one model: half a head's width.
pub const FACTORS_MAX: u64 = 1 << 16;
/// Largest relative difference of a factor to the computed one; the file holds them as f32.
const FACTOR_ERROR_MAX: f32 = 1e-4;
/// `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings` of all Llama 3.1 to 3.3 models.
const LLAMA3: (f32, f32, f32) = (1.0, 4.0, 8192.0);

/// The rotary embedding before scaling.
pub struct Rotary {
    /// Base of the frequencies.
    pub theta: f32,
    /// Width of a head.
    pub head_dim: u64,
    /// Positions of the model.
    pub context: u64,
}

/// The `rope_scaling` entry: null, linear, yarn or llama3.
///
/// As in llama.cpp, a factor stands under one of two keys, and scales linearly where no type is named.
pub fn scaling(
    gguf: &Gguf,
    name: &str,
    rotary: &Rotary,
    factors: Option<&[f32]>,
    notes: &mut Vec<String>,
) -> Result<Json, GgufError> {
    let key = |suffix: &str| format!("{name}.rope.{suffix}");
    let type_key = key("scaling.type");
    let kind = gguf.text(&type_key)?;
    let (factor_key, older_key) = (key("scaling.factor"), key("scale_linear"));
    let newer = gguf.float(&factor_key)?;
    let (factor_key, factor) =
        if newer.is_some() { (factor_key, newer) } else { (older_key.clone(), gguf.float(&older_key)?) };
    // 0 is none, as there.
    let factor = factor.filter(|&factor| factor != 0.0);
    if let Some(factor) = factor
        && factor < 1.0
    {
        return Err(invalid(&factor_key, factor, "it must be at least 1"));
    }
    match (kind, factors, factor) {
        (None | Some("none" | "llama3" | "linear"), Some(factors), None) => llama3(rotary, factors),
        (Some("none"), Some(factors), Some(_)) => llama3(rotary, factors),
        (_, Some(_), _) => {
            let found = format!("{}, factor {factor:?}", kind.unwrap_or("absent"));
            Err(invalid(&type_key, found, "frequency factors go with none or llama3 only"))
        }
        (Some("none"), None, _) | (None | Some("linear"), None, None) => Ok(Json::Null),
        (None | Some("linear"), None, Some(factor)) => {
            if kind.is_none() {
                notes.push(format!("{factor_key} is {factor} and no type is named: taken as linear scaling"));
            }
            Ok(json!({"rope_type": "linear", "factor": decimal(factor)}))
        }
        (Some("yarn"), None, factor) => yarn(gguf, &key, rotary, required(factor, &key("scaling.factor"))?),
        (Some(other), None, _) => {
            Err(invalid(&type_key, other, "imported are none, linear, yarn, and llama3 with its factors"))
        }
    }
}

/// YaRN's parameters. llama.cpp multiplies its amplitude with a factor of the file.
fn yarn(gguf: &Gguf, key: &dyn Fn(&str) -> String, rotary: &Rotary, factor: f32) -> Result<Json, GgufError> {
    let original_key = key("scaling.original_context_length");
    let original = gguf.integer(&original_key, u64::from(u32::MAX))?.unwrap_or(rotary.context);
    let mut scaling = json!({
        "rope_type": "yarn", "factor": decimal(factor), "original_max_position_embeddings": original,
    });
    let multiplier = key("scaling.yarn_log_multiplier");
    if let Some(found) = gguf.float(&multiplier)?
        && found != 0.0
    {
        return Err(invalid(&multiplier, found, "it is not imported"));
    }
    for (suffix, name) in [("scaling.yarn_beta_fast", "beta_fast"), ("scaling.yarn_beta_slow", "beta_slow")] {
        if let Some(beta) = gguf.float(&key(suffix))? {
            scaling[name] = decimal(beta);
        }
    }
    if let Some(amplitude) = gguf.float(&key("scaling.attn_factor"))?
        && amplitude != 1.0
    {
        scaling["attention_factor"] = decimal(amplitude * (0.1 * factor.ln() + 1.0));
    }
    Ok(scaling)
}

/// Recovers Llama 3's parameters from its factors.
fn llama3(rotary: &Rotary, factors: &[f32]) -> Result<Json, GgufError> {
    let half = (rotary.head_dim / 2) as usize;
    if factors.len() != half {
        return Err(invalid(FACTORS_TENSOR, factors.len(), &format!("it must have {half} factors")));
    }
    // The lowest frequencies are divided by the whole factor.
    let factor = factors[half - 1];
    for (index, found) in factors.iter().enumerate() {
        let expected = llama3_factor(rotary, factor, index);
        let close = (found - expected).abs() <= FACTOR_ERROR_MAX * expected.abs();
        if !close {
            let rule =
                format!("llama3 scaling by {factor} gives {expected}; other scalings are not imported");
            return Err(invalid(&format!("{FACTORS_TENSOR}[{index}]"), found, &rule));
        }
    }
    if factor == 1.0 {
        return Ok(Json::Null);
    }
    let (low, high, original) = LLAMA3;
    Ok(json!({
        "rope_type": "llama3",
        "factor": decimal(factor),
        "low_freq_factor": decimal(low),
        "high_freq_factor": decimal(high),
        "original_max_position_embeddings": original as u64,
    }))
}

/// The factor of frequency `index`, as `convert_hf_to_gguf.py` of llama.cpp computes it.
pub fn llama3_factor(rotary: &Rotary, factor: f32, index: usize) -> f32 {
    let (low, high, original) = LLAMA3;
    let frequency = rotary.theta.powf(-2.0 * index as f32 / rotary.head_dim as f32);
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength < original / high {
        1.0
    } else if wavelength > original / low {
        factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}
