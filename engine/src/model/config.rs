//! What a model's `config.json` says, checked: a decoder of the Llama, Mistral, Qwen2 or Qwen3 family.
//!
//! Fields that change nothing for inference are ignored; fields that would change the arithmetic in a way the
//! decoder does not do (another activation, biases in the MLP, other RoPE scalings, quantised checkpoints) are
//! refused, as is every size that contradicts another. Each error names the field, its value and what it may be.

use std::fmt::Display;
use std::path::Path;

use serde::Deserialize;

use super::rope::{self, Rope};
use super::source::StoredDtype;

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
}

/// The names of the supported families in `architectures`.
const ARCHITECTURES: [(&str, Architecture); 4] = [
    ("LlamaForCausalLM", Architecture::Llama),
    ("MistralForCausalLM", Architecture::Mistral),
    ("Qwen2ForCausalLM", Architecture::Qwen2),
    ("Qwen3ForCausalLM", Architecture::Qwen3),
];

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
    /// The position embedding.
    pub rope: Rope,
    /// Whether Q, K and V have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the heads of Q and K are normed before RoPE.
    pub qk_norm: bool,
    /// Whether the head is the embedding's matrix.
    pub tied: bool,
    /// For each layer, how many positions a token sees up to its own; `None` is all.
    pub windows: Vec<Option<u32>>,
    /// Tokens that end a sequence, of both configuration files.
    pub eos: Vec<u32>,
    /// What the checkpoint claims to be stored in.
    pub stored: Option<StoredDtype>,
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
    #[error("{file}: {source}")]
    Json {
        /// The file.
        file: &'static str,
        /// Why.
        source: serde_json::Error,
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

/// One id or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Several(Vec<u32>),
}

/// The fields of `config.json` that matter here, as they stand in the file.
#[derive(Debug, Deserialize)]
struct Raw {
    architectures: Option<Vec<String>>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: u32,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<rope::RawRope>,
    rope_parameters: Option<rope::RawRope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    sliding_window: Option<u32>,
    #[serde(default)]
    use_sliding_window: bool,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<serde_json::Value>,
    eos_token_id: Option<Ids>,
    #[serde(alias = "torch_dtype")]
    dtype: Option<String>,
}

/// The field of `generation_config.json` that matters here.
#[derive(Debug, Deserialize)]
struct RawGeneration {
    eos_token_id: Option<Ids>,
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
        Self::parse(&config, generation.as_deref())
    }

    /// Checks the text of both files.
    ///
    /// # Errors
    /// When they say something that the decoder cannot do.
    pub fn parse(config: &str, generation: Option<&str>) -> Result<Self, ModelConfigError> {
        let raw: Raw = serde_json::from_str(config)
            .map_err(|source| ModelConfigError::Json { file: "config.json", source })?;
        let architecture = raw.architecture()?;
        raw.check_unsupported()?;
        let heads = raw.heads()?;
        let config = Self {
            architecture,
            hidden: raw.hidden_size,
            intermediate: bounded("intermediate_size", raw.intermediate_size, WIDTH_MAX)?,
            heads: heads.0,
            kv_heads: heads.1,
            head_dim: heads.2,
            vocabulary: bounded("vocab_size", raw.vocab_size, WIDTH_MAX)?,
            positions_max: bounded(
                "max_position_embeddings",
                raw.max_position_embeddings as usize,
                POSITIONS_MAX,
            )? as u32,
            rms_norm_eps: raw.eps()?,
            rope: rope::parse(raw.rope_theta, raw.rope_scaling.as_ref(), raw.rope_parameters.as_ref())?,
            qkv_bias: match architecture {
                Architecture::Qwen2 => true,
                Architecture::Mistral => false,
                Architecture::Llama | Architecture::Qwen3 => raw.attention_bias,
            },
            output_bias: match architecture {
                Architecture::Qwen2 | Architecture::Mistral => false,
                Architecture::Llama | Architecture::Qwen3 => raw.attention_bias,
            },
            qk_norm: architecture == Architecture::Qwen3,
            tied: raw.tie_word_embeddings,
            windows: raw.windows(architecture)?,
            eos: raw.eos(generation)?,
            stored: raw.stored()?,
        };
        Ok(config)
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.windows.len()
    }

    /// Width of a row of queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Parameters, tied ones once.
    pub fn parameters(&self) -> usize {
        let attention = self.hidden * self.qkv_width() + self.heads * self.head_dim * self.hidden;
        let biases = if self.qkv_bias { self.qkv_width() } else { 0 }
            + if self.output_bias { self.hidden } else { 0 }
            + if self.qk_norm { 2 * self.head_dim } else { 0 };
        let layer = attention + biases + 3 * self.hidden * self.intermediate + 2 * self.hidden;
        let embeddings = if self.tied { 1 } else { 2 } * self.vocabulary * self.hidden;
        self.layers() * layer + embeddings + self.hidden
    }
}

fn read_bounded(path: &Path) -> Result<String, ModelConfigError> {
    let file = path.display().to_string();
    let bytes = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(source) => return Err(ModelConfigError::Read { file, source }),
    };
    if bytes > FILE_BYTES_MAX {
        return Err(ModelConfigError::Size { file, bytes });
    }
    std::fs::read_to_string(path).map_err(|source| ModelConfigError::Read { file, source })
}

fn bounded(field: &'static str, value: usize, most: usize) -> Result<usize, ModelConfigError> {
    if (1..=most).contains(&value) { Ok(value) } else { refuse(field, value, format!("from 1 to {most}")) }
}

impl Raw {
    fn architecture(&self) -> Result<Architecture, ModelConfigError> {
        let named = self.architectures.as_deref().unwrap_or_default();
        let known = |name: &String| ARCHITECTURES.iter().find(|known| known.0 == name).map(|known| known.1);
        match named.iter().find_map(known) {
            Some(architecture) => Ok(architecture),
            None => refuse(
                "architectures",
                format!("{named:?}"),
                format!("one of {}", ARCHITECTURES.map(|known| known.0).join(", ")),
            ),
        }
    }

    fn check_unsupported(&self) -> Result<(), ModelConfigError> {
        if let Some(quantization) = &self.quantization_config {
            let method = quantization.get("quant_method").and_then(|method| method.as_str());
            return refuse(
                "quantization_config",
                method.unwrap_or("present"),
                "absent: quantised checkpoints are not read, weights are quantised at load time",
            );
        }
        if let Some(activation) = &self.hidden_act
            && activation != "silu"
            && activation != "swish"
        {
            return refuse("hidden_act", format!("{activation:?}"), "\"silu\"");
        }
        if self.mlp_bias {
            return refuse("mlp_bias", true, "false");
        }
        Ok(())
    }

    /// Query heads, key-value heads and elements of a head.
    fn heads(&self) -> Result<(usize, usize, usize), ModelConfigError> {
        bounded("hidden_size", self.hidden_size, WIDTH_MAX)?;
        let heads = bounded("num_attention_heads", self.num_attention_heads, 4096)?;
        let kv_heads = bounded("num_key_value_heads", self.num_key_value_heads.unwrap_or(heads), heads)?;
        if heads % kv_heads != 0 {
            return refuse(
                "num_key_value_heads",
                kv_heads,
                format!("a divisor of num_attention_heads, {heads}"),
            );
        }
        let head_dim = match self.head_dim {
            Some(head_dim) => bounded("head_dim", head_dim, 1024)?,
            None if self.hidden_size.is_multiple_of(heads) => {
                bounded("head_dim", self.hidden_size / heads, 1024)?
            }
            None => {
                return refuse(
                    "hidden_size",
                    self.hidden_size,
                    format!("a multiple of num_attention_heads, {heads}, since head_dim is absent"),
                );
            }
        };
        if head_dim % 2 != 0 {
            return refuse("head_dim", head_dim, "even");
        }
        Ok((heads, kv_heads, head_dim))
    }

    fn eps(&self) -> Result<f32, ModelConfigError> {
        if self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0 {
            Ok(self.rms_norm_eps as f32)
        } else {
            refuse("rms_norm_eps", self.rms_norm_eps, "above 0 and below 1")
        }
    }

    /// The window of each layer. Mistral has one for all; Qwen switches it on, for layers from
    /// `max_window_layers` on or as `layer_types` lists.
    fn windows(&self, architecture: Architecture) -> Result<Vec<Option<u32>>, ModelConfigError> {
        let layers = bounded("num_hidden_layers", self.num_hidden_layers, LAYERS_MAX)?;
        let window = match architecture {
            Architecture::Llama => None,
            Architecture::Mistral => self.sliding_window,
            Architecture::Qwen2 | Architecture::Qwen3 => {
                self.sliding_window.filter(|_| self.use_sliding_window)
            }
        };
        let Some(window) = window else { return Ok(vec![None; layers]) };
        if window == 0 {
            return refuse("sliding_window", 0, "at least 1, or null");
        }
        if architecture == Architecture::Mistral {
            return Ok(vec![Some(window); layers]);
        }
        let Some(types) = &self.layer_types else {
            let first = self.max_window_layers.unwrap_or(0);
            return Ok((0..layers).map(|layer| (layer >= first).then_some(window)).collect());
        };
        if types.len() != layers {
            return refuse("layer_types", format!("{} entries", types.len()), format!("{layers} entries"));
        }
        types
            .iter()
            .map(|kind| match kind.as_str() {
                "full_attention" => Ok(None),
                "sliding_attention" => Ok(Some(window)),
                other => refuse("layer_types", other, "full_attention or sliding_attention in each entry"),
            })
            .collect()
    }

    fn eos(&self, generation: Option<&str>) -> Result<Vec<u32>, ModelConfigError> {
        let generation: Option<RawGeneration> = generation
            .map(serde_json::from_str)
            .transpose()
            .map_err(|source| ModelConfigError::Json { file: "generation_config.json", source })?;
        let mut eos = Vec::new();
        let named = [self.eos_token_id.clone(), generation.and_then(|generation| generation.eos_token_id)];
        for ids in named.into_iter().flatten() {
            match ids {
                Ids::One(id) => eos.push(id),
                Ids::Several(ids) => eos.extend(ids),
            }
        }
        eos.sort_unstable();
        eos.dedup();
        if eos.len() > EOS_MAX {
            return refuse("eos_token_id", format!("{} ids", eos.len()), format!("at most {EOS_MAX} ids"));
        }
        match eos.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(id) => refuse("eos_token_id", id, format!("below vocab_size, {}", self.vocab_size)),
            None => Ok(eos),
        }
    }

    fn stored(&self) -> Result<Option<StoredDtype>, ModelConfigError> {
        match self.dtype.as_deref() {
            None => Ok(None),
            Some("float32") => Ok(Some(StoredDtype::F32)),
            Some("float16") => Ok(Some(StoredDtype::F16)),
            Some("bfloat16") => Ok(Some(StoredDtype::Bf16)),
            Some(other) => refuse("torch_dtype", other, "float32, float16 or bfloat16"),
        }
    }
}

#[cfg(test)]
mod tests;
