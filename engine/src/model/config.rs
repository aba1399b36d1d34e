//! What a model's `config.json` says, checked: a decoder of one of the known [families](family).
//!
//! Fields that change nothing for inference are ignored, whatever they hold; fields that would change the arithmetic
//! in a way the decoder does not do (another activation, biases in the MLP) are refused, as is every size that
//! contradicts another. An absent field has the default of its [`family`]. Each error names the field,
//! its value and what it may be.

use std::fmt::Display;
use std::path::Path;

use serde_json::{Map, Value};

use self::family::{FAMILIES, FamilyDefaults};
use self::fields::Fields;
use self::reader::Reader;
use super::binding::{names, shape_of};
use super::quantised::Quantised;
use super::quantised::config::{FILES, of_config, of_file};
use super::rope::Rope;
use super::source::StoredDtype;
use crate::folder::json;

pub mod family;
pub(super) mod fields;
mod layers;
mod reader;

/// Largest `config.json` or `generation_config.json` that is read. Real ones have a few kilobytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Most layers. The deepest published decoders have about 130.
const LAYERS_MAX: usize = 1024;

/// Largest width of any matrix, vocabulary included. Keeps every size computed from two of them in 64 bits.
const WIDTH_MAX: usize = 1 << 22;

/// Longest context. The longest published ones have some ten million positions.
const POSITIONS_MAX: usize = 1 << 28;

/// Most end-of-sequence ids.
const EOS_MAX: usize = 64;

/// Decoder families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`: Llama 1 to 3, SmolLM2 and relatives.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
    /// `Qwen2ForCausalLM`: biases on Q, K and V.
    Qwen2,
    /// `Qwen3ForCausalLM`: norms on the heads of Q and K.
    Qwen3,
    /// `Gemma2ForCausalLM`: windows on each second layer, norms around both branches, scaled embeddings, soft caps.
    Gemma2,
    /// `Gemma3ForCausalLM`: windows but for each sixth layer, norms around both branches, scaled embeddings.
    Gemma3,
    /// `Phi3ForCausalLM`: Phi-3 and Phi-4; matrices stored together, RoPE of a part of a head.
    Phi3,
    /// `SmolLM3ForCausalLM`: each fourth layer without RoPE.
    SmolLm3,
    /// `Olmo2ForCausalLM`: norms behind both branches, and over all of Q and of K.
    Olmo2,
    /// `GraniteForCausalLM`: factors on embeddings, branches, scores and logits.
    Granite,
}

/// What queries and keys are normed over before RoPE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorms {
    /// Not normed.
    None,
    /// Each head.
    Heads,
    /// All heads of a token at once.
    Whole,
}

/// Where the norms of a layer's two branches are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlaces {
    /// Before each branch.
    Before,
    /// Behind each branch, before it is added.
    Behind,
    /// Both.
    Around,
}

/// What the MLP's gate goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateActivation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its approximation with a hyperbolic tangent.
    GeluTanh,
}

/// A decoder's sizes and choices.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Tokens in the vocabulary.
    pub vocabulary: usize,
    /// Longest sequence that the model was made for.
    pub positions_max: u32,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f32,
    /// What is added to the weights of norms: Gemma stores them less 1.
    pub norm_offset: f32,
    /// Where norms are.
    pub norms: NormPlaces,
    /// What the MLP's gate goes through.
    pub activation: GateActivation,
    /// Position embeddings, one or two.
    pub ropes: Vec<Rope>,
    /// For each layer, which of these it has; `None` is none at all.
    pub rope_of: Vec<Option<usize>>,
    /// Whether Q, K and V have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// What queries and keys are normed over before RoPE.
    pub qk_norm: QkNorms,
    /// Whether Q, K and V are stored as one matrix, and gate and up as one.
    pub fused: bool,
    /// Whether the head is the embedding's matrix.
    pub tied: bool,
    /// Factor on scores.
    pub attention_scale: f32,
    /// Factor on embeddings.
    pub embedding_scale: f32,
    /// Factor on what a branch adds.
    pub branch_scale: f32,
    /// What logits are divided by.
    pub logits_divisor: f32,
    /// Scores come no further from 0 than this: `cap * tanh(score / cap)`.
    pub score_cap: Option<f32>,
    /// The same of logits.
    pub logits_cap: Option<f32>,
    /// For each layer, how many positions a token sees up to its own; `None` is all.
    pub windows: Vec<Option<u32>>,
    /// Tokens that end a sequence, of both configuration files.
    pub eos: Vec<u32>,
    /// What the checkpoint claims to be stored in.
    pub stored: Option<StoredDtype>,
    /// How quantised matrices are written, where there are any.
    pub quantised: Option<Quantised>,
}

/// What is wrong with a model's configuration.
#[derive(Debug, thiserror::Error)]
pub enum ModelConfigError {
    /// A file cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file is larger than any real one.
    #[error("{file} has {bytes} bytes; the limit is {FILE_BYTES_MAX}")]
    Size {
        /// The file.
        file: String,
        /// Its size.
        bytes: u64,
    },
    /// A file is no JSON of the expected form.
    #[error("{file}: {reason}")]
    Json {
        /// The file.
        file: &'static str,
        /// Why.
        reason: String,
    },
    /// A quantisation that is not read.
    #[error("config.json: {field} is {value}; it must be {expected}")]
    Quantised {
        /// The field, with those around it.
        field: String,
        /// Its value.
        value: String,
        /// What it may be.
        expected: String,
    },
    /// A field has a value that the decoder cannot do.
    #[error("config.json: {field} is {value}; it must be {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: String,
    },
}

/// A refusal of one field.
pub(super) fn refuse<T>(
    field: &'static str,
    value: impl Display,
    expected: impl Into<String>,
) -> Result<T, ModelConfigError> {
    Err(ModelConfigError::Field { field, value: value.to_string(), expected: expected.into() })
}

impl DecoderConfig {
    /// Reads `config.json`, and `generation_config.json` if there is one, of a model folder.
    ///
    /// # Errors
    /// When a file cannot be read or says something that the decoder cannot do.
    pub fn read(folder: &Path) -> Result<Self, ModelConfigError> {
        let config = read_bounded(&folder.join("config.json"))?;
        let generation = folder.join("generation_config.json");
        let generation = if generation.exists() { Some(read_bounded(&generation)?) } else { None };
        let mut config = Self::parse_bytes(&config, generation.as_deref())?;
        for file in FILES {
            let path = folder.join(file);
            if config.quantised.is_none() && path.exists() {
                config.quantised = of_file(file, &object(file, &read_bounded(&path)?)?)?;
            }
        }
        Ok(config)
    }

    /// Checks the text of both files.
    ///
    /// # Errors
    /// When they say something that the decoder cannot do.
    pub fn parse(config: &str, generation: Option<&str>) -> Result<Self, ModelConfigError> {
        Self::parse_bytes(config.as_bytes(), generation.map(str::as_bytes))
    }

    fn parse_bytes(config: &[u8], generation: Option<&[u8]>) -> Result<Self, ModelConfigError> {
        let config = object("config.json", config)?;
        let generation = generation.map(|bytes| object("generation_config.json", bytes)).transpose()?;
        let whole = Fields(&config);
        let fields = text_of(whole);
        let family = family(whole, fields)?;
        let quantised = match of_config(whole)? {
            None => of_config(fields)?,
            found => found,
        };
        let decoder = Reader { family, fields }.decoder([Some(whole), generation.as_ref().map(Fields)])?;
        Ok(Self { quantised, ..decoder })
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.windows.len()
    }

    /// Width of a row of queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// The position embedding of a layer, if it turns whole heads.
    pub fn whole_rope(&self, layer: usize) -> Option<usize> {
        self.rope_of[layer].filter(|&rope| self.ropes[rope].turned(self.head_dim) == self.head_dim)
    }

    /// Parameters, tied ones once.
    pub fn parameters(&self) -> usize {
        let shapes = names(self).into_iter().filter_map(|name| shape_of(self, &name));
        shapes.map(|shape| shape.iter().product::<usize>()).sum()
    }
}

/// The token that ends a sequence by the default of the class that a `config.json` names; none where its class is not
/// known.
pub fn class_eos(config: &Map<String, Value>) -> Option<u32> {
    let whole = Fields(config);
    family(whole, text_of(whole)).ok()?.eos
}

/// A file's object.
fn object(file: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, ModelConfigError> {
    json::parse(bytes).map_err(|reason| ModelConfigError::Json { file, reason })
}

/// The decoder's part: a model that reads images, too, keeps its decoder's configuration apart.
fn text_of(whole: Fields<'_>) -> Fields<'_> {
    whole.object("text_config").ok().flatten().unwrap_or(whole)
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, ModelConfigError> {
    let file = path.display().to_string();
    let bytes = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(source) => return Err(ModelConfigError::Read { file, source }),
    };
    if bytes > FILE_BYTES_MAX {
        return Err(ModelConfigError::Size { file, bytes });
    }
    std::fs::read(path).map_err(|source| ModelConfigError::Read { file, source })
}

fn bounded(field: &'static str, value: usize, most: usize) -> Result<usize, ModelConfigError> {
    if (1..=most).contains(&value) { Ok(value) } else { refuse(field, value, format!("from 1 to {most}")) }
}

/// The family that the file names, or the part of it that describes the text's decoder.
fn family(whole: Fields<'_>, text: Fields<'_>) -> Result<&'static FamilyDefaults, ModelConfigError> {
    let classes = |fields: Fields<'_>| -> Vec<String> {
        let listed =
            fields.value("architectures").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        listed.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let apart = !std::ptr::eq(whole.0, text.0);
    let inner = if apart { classes(text) } else { Vec::new() };
    // Around a decoder stands a class of its own, which says nothing about it.
    let outer = classes(whole);
    let named = if apart && inner.is_empty() {
        &[][..]
    } else if apart {
        &inner
    } else {
        &outer
    };
    let model_type = text.text("model_type")?;
    match FamilyDefaults::of(named, model_type) {
        Some(family) => Ok(family),
        None => {
            let found = match model_type.filter(|_| named.is_empty()) {
                Some(model_type) => format!("{outer:?} with model_type {model_type:?}"),
                None => format!("{outer:?}"),
            };
            let known: Vec<&str> = FAMILIES.iter().map(|family| family.class).collect();
            refuse("architectures", found, format!("one of {}", known.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests;
