//! Rotary position embeddings: the table of inverse frequencies that a configuration asks for.
//!
//! Known are no scaling, linear scaling (position interpolation, <https://arxiv.org/abs/2306.15595>) and the
//! rule of Llama 3. Both spellings of Hugging Face's configuration are read: `rope_theta` beside
//! `rope_scaling`, and the newer `rope_parameters`. Frequencies are computed in single precision, as there.

use std::f32::consts::PI;

use super::config::fields::Fields;
use super::config::{ModelConfigError, refuse};

/// A position embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// How they are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by the factor.
    Linear {
        /// The factor, at least 1.
        factor: f32,
    },
    /// Long wavelengths divided by the factor, short ones kept, a ramp between.
    Llama3 {
        /// The factor, at least 1.
        factor: f32,
        /// Wavelengths above `original_positions / low` are divided.
        low: f32,
        /// Wavelengths below `original_positions / high` are kept; above `low`.
        high: f32,
        /// Positions that the model was first trained for.
        original_positions: f32,
    },
}

/// Reads the position embedding of a `config.json`: `rope_parameters`, or else `rope_scaling`, with `rope_theta` in it or
/// beside it.
pub(super) fn parse(config: Fields<'_>, theta_default: f64) -> Result<Rope, ModelConfigError> {
    let newer = config.object("rope_parameters")?;
    let raw = if newer.is_some() { newer } else { config.object("rope_scaling")? };
    let theta = match raw.map(|raw| raw.number("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => config.number("rope_theta")?.unwrap_or(theta_default),
    };
    if !(1.0..=1e12).contains(&theta) {
        return refuse("rope_theta", theta, "from 1 to 1e12");
    }
    let scaling = match raw {
        None => RopeScaling::None,
        Some(raw) => scaling(raw)?,
    };
    Ok(Rope { theta: theta as f32, scaling })
}

fn scaling(raw: Fields<'_>) -> Result<RopeScaling, ModelConfigError> {
    if let Some(share) = raw.number("partial_rotary_factor")?
        && share != 1.0
    {
        return refuse("rope_parameters.partial_rotary_factor", share, "1");
    }
    let factor = || {
        let factor = number(raw, "factor", "rope_scaling.factor")?;
        if factor >= 1.0 { Ok(factor) } else { refuse("rope_scaling.factor", factor, "at least 1") }
    };
    match raw.any(&["rope_type", "type"]).map(|(_, kind)| kind) {
        None => Ok(RopeScaling::None),
        Some(kind) => match kind.as_str() {
            Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: factor()? }),
            Some("llama3") => {
                let low = number(raw, "low_freq_factor", "rope_scaling.low_freq_factor")?;
                let high = number(raw, "high_freq_factor", "rope_scaling.high_freq_factor")?;
                if high <= low {
                    let expected = format!("above low_freq_factor, {low}");
                    return refuse("rope_scaling.high_freq_factor", high, expected);
                }
                let original = "original_max_position_embeddings";
                let original_positions =
                    number(raw, original, "rope_scaling.original_max_position_embeddings")?;
                Ok(RopeScaling::Llama3 { factor: factor()?, low, high, original_positions })
            }
            _ => refuse("rope_scaling.rope_type", kind, "default, linear or llama3"),
        },
    }
}

fn number(raw: Fields<'_>, name: &'static str, field: &'static str) -> Result<f32, ModelConfigError> {
    match raw.number(name)? {
        Some(value) if value > 0.0 && value <= 1e12 => Ok(value as f32),
        Some(value) => refuse(field, value, "above 0 and at most 1e12"),
        None => refuse(field, "absent", "a number for this rope_type"),
    }
}

impl Rope {
    /// One frequency for each pair of a head's elements.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim)
            .step_by(2)
            .map(|index| 1.0 / self.theta.powf(index as f32 / head_dim as f32))
            .map(|frequency| self.scaling.apply(frequency))
            .collect()
    }
}

impl RopeScaling {
    fn apply(self, frequency: f32) -> f32 {
        match self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low, high, original_positions } => {
                let wavelength = 2.0 * PI / frequency;
                if wavelength < original_positions / high {
                    frequency
                } else if wavelength > original_positions / low {
                    frequency / factor
                } else {
                    let smooth = (original_positions / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}
