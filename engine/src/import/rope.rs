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
}

/// The `rope_scaling` entry: null, linear or llama3.
pub fn scaling(gguf: &Gguf, name: &str, rotary: &Rotary, factors: Option<&[f32]>) -> Result<Json, GgufError> {
    let type_key = format!("{name}.rope.scaling.type");
    let kind = gguf.text(&type_key)?.unwrap_or("none");
    match (kind, factors) {
        ("none", None) => Ok(Json::Null),
        ("none" | "llama3", Some(factors)) => llama3(rotary, factors),
        ("linear", None) => {
            let key = format!("{name}.rope.scaling.factor");
            let factor = required(gguf.float(&key)?, &key)?;
            if factor < 1.0 {
                return Err(invalid(&key, factor, "it must be at least 1"));
            }
            Ok(json!({"rope_type": "linear", "factor": decimal(factor)}))
        }
        (_, Some(_)) => Err(invalid(&type_key, kind, "frequency factors go with none or llama3 only")),
        (other, None) => {
            Err(invalid(&type_key, other, "imported are none, linear and llama3 with its factors"))
        }
    }
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
