//! Rotary position embeddings: the table of inverse frequencies that a configuration asks for.
//!
//! Known are no scaling, linear scaling (position interpolation, <https://arxiv.org/abs/2306.15595>) and the
//! rule of Llama 3. Both spellings of Hugging Face's configuration are read: `rope_theta` beside
//! `rope_scaling`, and the newer `rope_parameters`. Frequencies are computed in single precision, as there.

use std::f32::consts::PI;

use serde::Deserialize;

use super::config::{ModelConfigError, refuse};

/// Base of the frequencies when a configuration names none.
const THETA_DEFAULT: f64 = 10_000.0;

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

/// `rope_scaling` or `rope_parameters` as they stand in the file.
#[derive(Debug, Deserialize)]
pub(super) struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

/// Checks both spellings; the newer one wins where both stand.
pub(super) fn parse(
    theta: Option<f64>,
    scaling: Option<&RawRope>,
    parameters: Option<&RawRope>,
) -> Result<Rope, ModelConfigError> {
    let raw = parameters.or(scaling);
    let theta = raw.and_then(|raw| raw.rope_theta).or(theta).unwrap_or(THETA_DEFAULT);
    if !(1.0..=1e12).contains(&theta) {
        return refuse("rope_theta", theta, "from 1 to 1e12");
    }
    let scaling = match raw {
        None => RopeScaling::None,
        Some(raw) => raw.scaling()?,
    };
    Ok(Rope { theta: theta as f32, scaling })
}

impl RawRope {
    fn scaling(&self) -> Result<RopeScaling, ModelConfigError> {
        if let Some(share) = self.partial_rotary_factor
            && share != 1.0
        {
            return refuse("rope_parameters.partial_rotary_factor", share, "1");
        }
        match self.rope_type.as_deref() {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: self.factor()? }),
            Some("llama3") => {
                let low = number("rope_scaling.low_freq_factor", self.low_freq_factor)?;
                let high = number("rope_scaling.high_freq_factor", self.high_freq_factor)?;
                if high <= low {
                    return refuse(
                        "rope_scaling.high_freq_factor",
                        high,
                        format!("above low_freq_factor, {low}"),
                    );
                }
                let original = "rope_scaling.original_max_position_embeddings";
                let original_positions = number(original, self.original_max_position_embeddings)?;
                Ok(RopeScaling::Llama3 { factor: self.factor()?, low, high, original_positions })
            }
            Some(other) => refuse("rope_scaling.rope_type", other, "default, linear or llama3"),
        }
    }

    fn factor(&self) -> Result<f32, ModelConfigError> {
        let factor = number("rope_scaling.factor", self.factor)?;
        if factor >= 1.0 { Ok(factor) } else { refuse("rope_scaling.factor", factor, "at least 1") }
    }
}

fn number(field: &'static str, value: Option<f64>) -> Result<f32, ModelConfigError> {
    match value {
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
