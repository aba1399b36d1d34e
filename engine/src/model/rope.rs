//! Rotary position embeddings: the tables of inverse frequencies that a configuration asks for.
//!
//! Known are no scaling, linear scaling (position interpolation, <https://arxiv.org/abs/2306.15595>), dynamic NTK, YaRN
//! (<https://arxiv.org/abs/2309.00071>), LongRoPE (<https://arxiv.org/abs/2402.13753>) and the rule of Llama 3. All
//! spellings of Hugging Face's configuration are read: `rope_theta` beside `rope_scaling`, the newer `rope_parameters`,
//! and both by kind of layer. Frequencies are computed in single precision, as there.

use std::f32::consts::PI;

use millrace_kernels::ops::RopePlan;
use serde_json::Value;

use super::config::family::FamilyDefaults;
use super::config::fields::Fields;
use super::config::{Architecture, ModelConfigError, refuse};

/// YaRN's bounds of the ramp, in turns over the original positions, where the file names none.
const BETA_FAST: f64 = 32.0;
const BETA_SLOW: f64 = 1.0;
/// Base of Gemma 3's layers with a window, where the file names none.
const LOCAL_THETA: f64 = 10_000.0;

/// A position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// Share of a head's elements that are turned, above 0 and at most 1.
    pub share: f32,
    /// How they are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all. So, too, dynamic NTK: it stretches beyond `max_position_embeddings` alone, where nothing is served.
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
    /// As Llama 3's with a ramp over the frequencies' numbers, and a factor on cosine and sine.
    Yarn {
        /// The factor.
        factor: f32,
        /// First and last number of the ramp.
        ramp: (f32, f32),
        /// Factor on cosine and sine.
        amplitude: f32,
    },
    /// Each frequency divided by a factor of its own: one set up to the original positions, another for longer
    /// contexts.
    Long {
        /// Of contexts up to `original_positions`.
        short: Vec<f32>,
        /// Of longer ones.
        long: Vec<f32>,
        /// Positions that the model was first trained for.
        original_positions: usize,
        /// Factor on cosine and sine.
        amplitude: f32,
    },
}

/// Sizes that a position embedding depends on: elements of a head, and positions of the model.
type Sizes = (usize, usize);

/// Reads the position embeddings of a `config.json`: that of layers without a window first, and the number of that of
/// layers with one.
pub(super) fn parse(
    config: Fields<'_>,
    family: &FamilyDefaults,
    sizes: Sizes,
) -> Result<(Vec<Rope>, usize), ModelConfigError> {
    let gemma = family.architecture == Architecture::Gemma3;
    let (newer, older) = (config.object("rope_parameters")?, config.object("rope_scaling")?);
    let theta = config.number("rope_theta")?;
    let kinds = ["full_attention", "sliding_attention"];
    let nested =
        newer.filter(|newer| kinds.iter().any(|kind| newer.0.get(*kind).is_some_and(Value::is_object)));
    let reader = Reader { config, family, sizes };
    let (full, sliding) = match nested {
        Some(nested) => (nested.object(kinds[0])?.or(older.filter(|_| gemma)), nested.object(kinds[1])?),
        None => (newer.or(older), if gemma { None } else { newer.or(older) }),
    };
    let full = reader.rope(full, theta.unwrap_or(family.theta))?;
    let sliding = match gemma {
        true => reader.rope(sliding, config.number("rope_local_base_freq")?.unwrap_or(LOCAL_THETA))?,
        false => reader.rope(sliding, theta.unwrap_or(family.theta))?,
    };
    Ok(if full == sliding { (vec![full], 0) } else { (vec![full, sliding], 1) })
}

/// Reads one position embedding.
struct Reader<'a> {
    config: Fields<'a>,
    family: &'a FamilyDefaults,
    sizes: Sizes,
}

impl Reader<'_> {
    fn rope(&self, raw: Option<Fields<'_>>, theta_default: f64) -> Result<Rope, ModelConfigError> {
        let theta = raw.map(|raw| raw.number("rope_theta")).transpose()?.flatten().unwrap_or(theta_default);
        if !(1.0..=1e12).contains(&theta) {
            return refuse("rope_theta", theta, "from 1 to 1e12");
        }
        const SHARE: &str = "partial_rotary_factor";
        let inner = raw.map(|raw| raw.number(SHARE)).transpose()?.flatten();
        let phi3 = self.family.architecture == Architecture::Phi3;
        let share = match inner {
            Some(share) => share,
            None if phi3 => self.config.number(SHARE)?.unwrap_or(1.0),
            None => 1.0,
        };
        if share != 1.0 && !phi3 || !(share > 0.0 && share <= 1.0) {
            return refuse(SHARE, share, if phi3 { "above 0 and at most 1" } else { "1" });
        }
        let mut rope = Rope { theta: theta as f32, share: share as f32, scaling: RopeScaling::None };
        if rope.turned(self.sizes.0) < 2 {
            return refuse(SHARE, share, "enough for 2 elements of a head");
        }
        if let Some(raw) = raw {
            rope.scaling = self.scaling(raw, &rope)?;
        }
        Ok(rope)
    }

    fn scaling(&self, raw: Fields<'_>, rope: &Rope) -> Result<RopeScaling, ModelConfigError> {
        let Some((_, kind)) = raw.any(&["rope_type", "type"]) else { return Ok(RopeScaling::None) };
        let phi3 = self.family.architecture == Architecture::Phi3;
        match kind.as_str() {
            Some("default" | "dynamic") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: factor(raw)? }),
            Some("llama3") => self.llama3(raw),
            // The first Phi-3 files said so.
            Some("longrope") => self.long(raw, rope),
            Some("su" | "yarn") if phi3 => self.long(raw, rope),
            Some("yarn") => self.yarn(raw, rope),
            _ => refuse("rope_scaling.rope_type", kind, "default, linear, dynamic, yarn, longrope or llama3"),
        }
    }

    /// Positions before stretching: beside the scaling's object, in it, or the model's.
    fn original(&self, raw: Fields<'_>) -> Result<f32, ModelConfigError> {
        const NAME: &str = "original_max_position_embeddings";
        let beside = number(self.config, NAME, NAME)?;
        let found = beside.map_or_else(
            || number(raw, NAME, "rope_scaling.original_max_position_embeddings"),
            |f| Ok(Some(f)),
        )?;
        let default = match self.family.architecture {
            Architecture::Phi3 => 4096.0,
            _ => self.sizes.1 as f32,
        };
        Ok(found.unwrap_or(default))
    }

    fn llama3(&self, raw: Fields<'_>) -> Result<RopeScaling, ModelConfigError> {
        let low = required(raw, "low_freq_factor", "rope_scaling.low_freq_factor")?;
        let high = required(raw, "high_freq_factor", "rope_scaling.high_freq_factor")?;
        if high <= low {
            let expected = format!("above low_freq_factor, {low}");
            return refuse("rope_scaling.high_freq_factor", high, expected);
        }
        let original_positions = self.original(raw)?;
        Ok(RopeScaling::Llama3 { factor: factor(raw)?, low, high, original_positions })
    }

    fn yarn(&self, raw: Fields<'_>, rope: &Rope) -> Result<RopeScaling, ModelConfigError> {
        let original = self.original(raw)?;
        let given = number(raw, "factor", "rope_scaling.factor")?;
        let factor = given.unwrap_or(self.sizes.1 as f32 / original);
        let amplitude = match number(raw, "attention_factor", "rope_scaling.attention_factor")? {
            Some(amplitude) => amplitude,
            None => {
                let of =
                    |share: f64| if factor <= 1.0 { 1.0 } else { 0.1 * share * f64::from(factor).ln() + 1.0 };
                // 0 is none, as in Python.
                let share = |name| Ok::<_, ModelConfigError>(raw.number(name)?.filter(|share| *share != 0.0));
                match (share("mscale")?, share("mscale_all_dim")?) {
                    (Some(share), Some(all)) => (of(share) / of(all)) as f32,
                    _ => of(1.0) as f32,
                }
            }
        };
        if !amplitude.is_finite() || amplitude <= 0.0 {
            return refuse("rope_scaling.mscale", amplitude, "such that the factor on cosines is above 0");
        }
        let beta = |name, default| {
            Ok::<_, ModelConfigError>(raw.number(name)?.filter(|beta| *beta > 0.0).unwrap_or(default))
        };
        let turned = rope.turned(self.sizes.0) as f64;
        // The number of the frequency that turns so often within the original positions.
        let number_of = |turns: f64| {
            let wavelengths = f64::from(original) / (turns * 2.0 * std::f64::consts::PI);
            turned * wavelengths.ln() / (2.0 * f64::from(rope.theta).ln())
        };
        let (low, high) =
            (number_of(beta("beta_fast", BETA_FAST)?), number_of(beta("beta_slow", BETA_SLOW)?));
        let whole = raw.flag("truncate")?.unwrap_or(true);
        let (low, high) = if whole { (low.floor(), high.ceil()) } else { (low, high) };
        let ramp = (low.max(0.0) as f32, high.min(turned - 1.0) as f32);
        if ramp.0.is_finite() && ramp.1.is_finite() {
            Ok(RopeScaling::Yarn { factor, ramp, amplitude })
        } else {
            refuse("rope_theta", rope.theta, "above 1 for yarn")
        }
    }

    fn long(&self, raw: Fields<'_>, rope: &Rope) -> Result<RopeScaling, ModelConfigError> {
        let pairs = rope.turned(self.sizes.0) / 2;
        let original = self.original(raw)?;
        let given = number(raw, "factor", "rope_scaling.factor")?;
        let factor = given.unwrap_or(self.sizes.1 as f32 / original);
        let amplitude = match number(raw, "attention_factor", "rope_scaling.attention_factor")? {
            Some(amplitude) => amplitude,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + f64::from(factor).ln() / f64::from(original).ln()).sqrt() as f32,
        };
        if !amplitude.is_finite() {
            return refuse("original_max_position_embeddings", original, "above 1");
        }
        Ok(RopeScaling::Long {
            short: factors(raw, "short_factor", pairs)?,
            long: factors(raw, "long_factor", pairs)?,
            original_positions: original as usize,
            amplitude,
        })
    }
}

fn factor(raw: Fields<'_>) -> Result<f32, ModelConfigError> {
    let factor = required(raw, "factor", "rope_scaling.factor")?;
    if factor >= 1.0 { Ok(factor) } else { refuse("rope_scaling.factor", factor, "at least 1") }
}

fn required(raw: Fields<'_>, name: &'static str, field: &'static str) -> Result<f32, ModelConfigError> {
    match number(raw, name, field)? {
        Some(value) => Ok(value),
        None => refuse(field, "absent", "a number for this rope_type"),
    }
}

fn number(raw: Fields<'_>, name: &'static str, field: &'static str) -> Result<Option<f32>, ModelConfigError> {
    match raw.number(name)? {
        Some(value) if value > 0.0 && value <= 1e12 => Ok(Some(value as f32)),
        Some(value) => refuse(field, value, "above 0 and at most 1e12"),
        None => Ok(None),
    }
}

/// A list of one factor for each pair.
fn factors(raw: Fields<'_>, name: &'static str, pairs: usize) -> Result<Vec<f32>, ModelConfigError> {
    let list = raw.value(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    if list.len() != pairs {
        return refuse(
            name,
            format!("{} numbers", list.len()),
            format!("{pairs} numbers, one for each pair"),
        );
    }
    let one = |value: &Value| match value.as_f64() {
        Some(factor) if factor > 0.0 && factor <= 1e12 => Ok(factor as f32),
        _ => refuse(name, value, "a list of numbers above 0"),
    };
    list.iter().map(one).collect()
}

impl Rope {
    /// Elements of a head that are turned.
    pub fn turned(&self, head_dim: usize) -> usize {
        (head_dim as f32 * self.share) as usize / 2 * 2
    }

    /// The table for contexts of up to `positions`.
    pub fn plan(&self, head_dim: usize, positions: usize) -> RopePlan {
        let turned = self.turned(head_dim);
        let wavelengths =
            (0..turned).step_by(2).map(|index| self.theta.powf(index as f32 / turned as f32)).enumerate();
        let inverse_frequencies = wavelengths
            .map(|(number, wavelength)| self.scaling.apply(number, wavelength, positions))
            .collect();
        let amplitude = match self.scaling {
            RopeScaling::Yarn { amplitude, .. } | RopeScaling::Long { amplitude, .. } => amplitude,
            _ => 1.0,
        };
        RopePlan { inverse_frequencies, amplitude }
    }
}

impl RopeScaling {
    /// The frequency of a number, of which the inverse without scaling is given.
    fn apply(&self, number: usize, inverse: f32, positions: usize) -> f32 {
        let frequency = 1.0 / inverse;
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
            RopeScaling::Yarn { factor, ramp: (low, high), .. } => {
                let width = if low == high { 0.001 } else { high - low };
                let kept = 1.0 - ((number as f32 - low) / width).clamp(0.0, 1.0);
                1.0 / (factor * inverse) * (1.0 - kept) + frequency * kept
            }
            RopeScaling::Long { short, long, original_positions, .. } => {
                let factors = if positions > *original_positions { long } else { short };
                1.0 / (factors[number] * inverse)
            }
        }
    }
}
