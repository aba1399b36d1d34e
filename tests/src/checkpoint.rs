//! Random checkpoints: for any model configuration, the weights that it implies, written as safetensors.
//!
//! Matrices keep the residual stream of order one, so that greedy answers vary with the prompt; norms and
//! biases are random too, so that a model that forgets one gives other logits. Equal seeds give equal bytes.
//! A configuration that the worker refuses has no weights.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use millrace_engine::model::binding::{names, shape_of};
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::model::source::StoredDtype;
use serde_json::{Map, Value, json};

use crate::random::Random;

/// Writes `config.json` and `model.safetensors` into `folder`, which must exist. The numbers are stored in the
/// configuration's `torch_dtype`, `float32` or `bfloat16`; without one in 32 bits.
///
/// # Errors
/// When the configuration is refused or a file cannot be written.
pub fn write(folder: &Path, config: &Value, seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    write_drawn(folder, config, |name, shape| {
        (0..shape.iter().product()).map(|_| draw(&mut random, name, shape)).collect()
    })
}

/// As [`write`], with numbers that follow from the tensors' names alone, exact in bfloat16: those of
/// `tests/golden/families/make.py`.
///
/// # Errors
/// As [`write`].
pub fn write_named(folder: &Path, config: &Value) -> Result<()> {
    let gemma = config["model_type"].as_str().is_some_and(|kind| kind.starts_with("gemma"));
    let offset = if gemma { 0.0 } else { 1.0 };
    write_drawn(folder, config, |name, shape| {
        let start = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let unit = |number: u64| {
            let bits = mixed(start.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            (bits >> 40) as f64 / f64::from(1 << 23) - 1.0
        };
        let value = |number| match shape {
            _ if name.ends_with("norm.weight") => offset + 0.3 * unit(number),
            [_] => 0.3 * unit(number),
            _ => unit(number) * (3.0 / shape[shape.len() - 1] as f64).sqrt(),
        };
        let elements = shape.iter().product::<usize>() as u64;
        (0..elements).map(|number| f32::from_bits(u32::from(to_bf16(value(number) as f32)) << 16)).collect()
    })
}

/// SplitMix64's finalizer (Steele, Lea, Flood 2014).
fn mixed(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Writes the folder with the numbers that `draw` gives for each tensor.
fn write_drawn(
    folder: &Path,
    config: &Value,
    mut draw: impl FnMut(&str, &[usize]) -> Vec<f32>,
) -> Result<()> {
    let text = serde_json::to_string_pretty(config)?;
    let decoder = DecoderConfig::parse(&text, None)?;
    let narrow = decoder.stored == Some(StoredDtype::Bf16);
    let mut header = Map::new();
    let mut data = Vec::new();
    for name in names(&decoder) {
        let shape = shape_of(&decoder, &name).context("the configuration implies its own tensors")?;
        let start = data.len();
        for value in draw(&name, &shape) {
            if narrow {
                data.extend(to_bf16(value).to_le_bytes());
            } else {
                data.extend(value.to_le_bytes());
            }
        }
        let dtype = if narrow { "BF16" } else { "F32" };
        header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
    }
    fs::write(folder.join("config.json"), text)?;
    fs::write(folder.join("model.safetensors"), safetensors(&header, &data)?)?;
    Ok(())
}

/// A configuration with some of its fields changed.
///
/// # Panics
/// When the changes are no object.
pub fn with(config: &Value, changes: &Value) -> Value {
    let mut config = config.clone();
    for (field, value) in changes.as_object().expect("changes are an object") {
        config[field] = value.clone();
    }
    config
}

fn draw(random: &mut Random, name: &str, shape: &[usize]) -> f32 {
    let normal = random.normal();
    match shape {
        _ if name.ends_with("norm.weight") => 1.0 + 0.2 * normal,
        [_] => 0.3 * normal,
        _ => normal / (shape[shape.len() - 1] as f32).sqrt(),
    }
}

/// The upper half of the 32 bits, rounded to nearest, ties to even. The values here are finite.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The safetensors form: length of the header, header as JSON, data.
/// A file of tensors.
///
/// # Errors
/// When the header is no JSON.
pub fn safetensors(header: &Map<String, Value>, data: &[u8]) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec(header)?;
    // Data begins at a multiple of eight, as the format asks.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes.extend(data);
    Ok(bytes)
}
