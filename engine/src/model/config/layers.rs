//! What differs from layer to layer: windows, and where there is no RoPE.

use serde_json::Value;

use super::reader::Reader;
use super::{Architecture, ModelConfigError, refuse};

/// `max_window_layers` where it is absent, of Qwen2 and Qwen3.
const WINDOW_LAYERS_DEFAULT: usize = 28;
/// `sliding_window_pattern` where it is absent, of Gemma 3.
const PATTERN_DEFAULT: usize = 6;
/// `no_rope_layer_interval` where it is absent, of SmolLM3.
const UNTURNED_DEFAULT: usize = 4;

/// A configuration whose number of layers is known.
pub(super) struct Layered<'a> {
    pub raw: Reader<'a>,
    pub layers: usize,
}

impl Layered<'_> {
    /// The window of each layer. Mistral and Phi-3 have one for all, Gemma 2 for each second, Gemma 3
    /// for all but each sixth; Qwen and SmolLM3
    /// switch it on. `layer_types` decides where the family reads it.
    pub fn windows(&self) -> Result<Vec<Option<u32>>, ModelConfigError> {
        use Architecture::{Gemma2, Gemma3, Granite, Llama, Mistral, Olmo2, Phi3, Qwen2, Qwen3, SmolLm3};
        let window = match self.raw.family.architecture {
            Llama | Olmo2 | Granite => None,
            Mistral | Phi3 | Gemma2 | Gemma3 => self.raw.window()?,
            Qwen2 | Qwen3 | SmolLm3 => {
                let used = self.raw.fields.flag("use_sliding_window")?.unwrap_or(false);
                if used { self.raw.window()? } else { None }
            }
        };
        let Some(window) = window else { return Ok(vec![None; self.layers]) };
        if self.raw.is(&[Mistral, Phi3]) {
            return Ok(vec![Some(window); self.layers]);
        }
        let slides = match self.raw.fields.by_layer("layer_types", self.layers)? {
            Some(types) => types.iter().map(slides).collect::<Result<Vec<_>, _>>()?,
            None => self.slides_by_rule()?,
        };
        Ok(slides.into_iter().map(|slides| slides.then_some(window)).collect())
    }

    fn slides_by_rule(&self) -> Result<Vec<bool>, ModelConfigError> {
        let fields = self.raw.fields;
        Ok(match self.raw.family.architecture {
            Architecture::Gemma2 => (0..self.layers).map(|layer| layer % 2 == 0).collect(),
            Architecture::Gemma3 => {
                let names = ["sliding_window_pattern", "_sliding_window_pattern"];
                let name = fields.any(&names).map_or(names[0], |(name, _)| name);
                let pattern = fields.count(name)?.unwrap_or(PATTERN_DEFAULT).max(1);
                (1..=self.layers).map(|number| number % pattern != 0).collect()
            }
            Architecture::SmolLm3 => self.unturned()?,
            _ => {
                let first = fields.count("max_window_layers")?.unwrap_or(WINDOW_LAYERS_DEFAULT);
                (0..self.layers).map(|layer| layer >= first).collect()
            }
        })
    }

    /// Whether a layer has no RoPE, which only SmolLM3 knows.
    pub fn unturned(&self) -> Result<Vec<bool>, ModelConfigError> {
        if !self.raw.is(&[Architecture::SmolLm3]) {
            return Ok(vec![false; self.layers]);
        }
        // The list says where there is RoPE, whatever its name.
        if let Some(turned) = self.raw.fields.by_layer("no_rope_layers", self.layers)? {
            let of = |entry: &Value| match entry.as_u64().or(entry.as_bool().map(u64::from)) {
                Some(turned @ 0..=1) => Ok(turned == 0),
                _ => refuse("no_rope_layers", entry, "0 or 1 in each entry"),
            };
            return turned.iter().map(of).collect();
        }
        let interval = self.raw.fields.count("no_rope_layer_interval")?.unwrap_or(UNTURNED_DEFAULT).max(1);
        Ok((1..=self.layers).map(|number| number % interval == 0).collect())
    }
}

fn slides(kind: &Value) -> Result<bool, ModelConfigError> {
    match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => refuse("layer_types", kind, "full_attention or sliding_attention in each entry"),
    }
}
