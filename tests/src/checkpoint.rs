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
    let text = serde_json::to_string_pretty(config)?;
    let decoder = DecoderConfig::parse(&text, None)?;
    let narrow = decoder.stored == Some(StoredDtype::Bf16);
    let mut random = Random::new(seed);
    let mut header = Map::new();
    let mut data = Vec::new();
    for name in names(&decoder) {
        let shape = shape_of(&decoder, &name).context("the configuration implies its own tensors")?;
        let start = data.len();
        for _ in 0..shape.iter().product() {
            let value = draw(&mut random, &name, &shape);
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
fn safetensors(header: &Map<String, Value>, data: &[u8]) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec(header)?;
    // Data begins at a multiple of eight, as the format asks.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes.extend(data);
    Ok(bytes)
}
