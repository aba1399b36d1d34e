//! What a model's `config.json` says, checked: a decoder of the Llama, Mistral, Qwen2 or Qwen3 family.
//!
//! Fields that change nothing for inference are ignored, whatever they hold; fields that would change the arithmetic in
//! a way the decoder does not do (another activation, biases in the MLP, quantised checkpoints) are refused, as is every
//! size that contradicts another. An absent field has the default of its [`family`]. Each error names the field, its
//! value and what it may be.

use std::fmt::Display;
use std::path::Path;

use serde_json::{Map, Value};

use self::family::{FAMILIES, Family, KvHeads};
use self::fields::Fields;
use super::rope::{self, Rope};
use super::source::StoredDtype;
use crate::folder::json;

pub mod family;
pub(super) mod fields;

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

/// `max_window_layers` where it is absent, of Qwen2 and Qwen3.
const WINDOW_LAYERS_DEFAULT: usize = 28;

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

/// What the MLP's gate goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
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
    #[error("{file}: {reason}")]
    Json {
        /// The file.
        file: &'static str,
        /// Why.
        reason: String,
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
        Self::parse_bytes(&config, generation.as_deref())
    }

    /// Checks the text of both files.
    ///
    /// # Errors
    /// When they say something that the decoder cannot do.
    pub fn parse(config: &str, generation: Option<&str>) -> Result<Self, ModelConfigError> {
        Self::parse_bytes(config.as_bytes(), generation.map(str::as_bytes))
    }

    fn parse_bytes(config: &[u8], generation: Option<&[u8]>) -> Result<Self, ModelConfigError> {
        let object = |file, bytes| {
            json::parse::<Map<String, Value>>(bytes).map_err(|reason| ModelConfigError::Json { file, reason })
        };
        let config = object("config.json", config)?;
        let generation = generation.map(|bytes| object("generation_config.json", bytes)).transpose()?;
        let config = Fields(&config);
        let raw = Raw { family: family(config)?, fields: config };
        raw.decoder(generation.as_ref().map(Fields))
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

/// The family that the file names.
fn family(fields: Fields<'_>) -> Result<&'static Family, ModelConfigError> {
    let listed =
        fields.value("architectures").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let classes: Vec<&str> = listed.iter().filter_map(Value::as_str).collect();
    let model_type = fields.text("model_type")?;
    match Family::of(&classes, model_type) {
        Some(family) => Ok(family),
        None => {
            let found = match model_type.filter(|_| classes.is_empty()) {
                Some(model_type) => format!("{classes:?} with model_type {model_type:?}"),
                None => format!("{classes:?}"),
            };
            let known: Vec<&str> = FAMILIES.iter().map(|family| family.class).collect();
            refuse("architectures", found, format!("one of {}", known.join(", ")))
        }
    }
}

/// A `config.json` beside the defaults of its class.
#[derive(Clone, Copy)]
struct Raw<'a> {
    family: &'static Family,
    fields: Fields<'a>,
}

impl Raw<'_> {
    fn decoder(&self, generation: Option<Fields<'_>>) -> Result<DecoderConfig, ModelConfigError> {
        self.check_unsupported()?;
        let (family, fields) = (self.family, self.fields);
        let hidden =
            bounded("hidden_size", fields.count("hidden_size")?.unwrap_or(family.hidden), WIDTH_MAX)?;
        let (heads, kv_heads, head_dim) = self.heads(hidden)?;
        let vocabulary = fields.count("vocab_size")?.unwrap_or(family.vocabulary);
        let positions = fields.count("max_position_embeddings")?.unwrap_or(family.positions);
        let intermediate = fields.count("intermediate_size")?.unwrap_or(family.intermediate);
        let has_bias = !matches!(family.architecture, Architecture::Qwen2 | Architecture::Mistral);
        let bias = has_bias && fields.flag("attention_bias")?.unwrap_or(false);
        Ok(DecoderConfig {
            architecture: family.architecture,
            hidden,
            intermediate: bounded("intermediate_size", intermediate, WIDTH_MAX)?,
            heads,
            kv_heads,
            head_dim,
            vocabulary: bounded("vocab_size", vocabulary, WIDTH_MAX)?,
            positions_max: bounded("max_position_embeddings", positions, POSITIONS_MAX)? as u32,
            rms_norm_eps: self.eps()?,
            rope: rope::parse(fields, family.theta)?,
            qkv_bias: bias || family.architecture == Architecture::Qwen2,
            output_bias: bias,
            qk_norm: family.architecture == Architecture::Qwen3,
            tied: fields.flag("tie_word_embeddings")?.unwrap_or(family.tied),
            windows: self.windows()?,
            eos: self.eos(generation, vocabulary)?,
            stored: self.stored(),
        })
    }

    fn check_unsupported(&self) -> Result<(), ModelConfigError> {
        // The second is how compressed-tensors wrote it at first.
        let quantised = self.fields.any(&["quantization_config", "compression_config"]);
        if let Some((field, quantization)) = quantised
            && quantization.as_object().is_none_or(|object| !object.is_empty())
        {
            let method = quantization["quant_method"].as_str();
            return refuse(
                field,
                method.unwrap_or("present"),
                "absent: quantised checkpoints are not read, weights are quantised at load time",
            );
        }
        match self.fields.text("hidden_act")? {
            None | Some("silu" | "swish") => {}
            Some(other) => return refuse("hidden_act", format!("{other:?}"), "\"silu\""),
        }
        if self.family.architecture == Architecture::Llama && self.fields.flag("mlp_bias")? == Some(true) {
            return refuse("mlp_bias", true, "false");
        }
        Ok(())
    }

    /// Query heads, key-value heads and elements of a head.
    fn heads(&self, hidden: usize) -> Result<(usize, usize, usize), ModelConfigError> {
        let (family, fields) = (self.family, self.fields);
        let heads = bounded(
            "num_attention_heads",
            fields.count("num_attention_heads")?.unwrap_or(family.heads),
            4096,
        )?;
        let kv_heads = match (fields.count("num_key_value_heads")?, family.kv_heads) {
            (Some(count), _) => count,
            // `null` is all heads in every class.
            (None, KvHeads::Count(count)) if !fields.is_null("num_key_value_heads") => count,
            (None, _) => heads,
        };
        let kv_heads = bounded("num_key_value_heads", kv_heads, heads)?;
        if heads % kv_heads != 0 {
            let expected = format!("a divisor of num_attention_heads, {heads}");
            return refuse("num_key_value_heads", kv_heads, expected);
        }
        let head_dim = match fields.count("head_dim")?.or(family.head_dim) {
            Some(head_dim) => bounded("head_dim", head_dim, 1024)?,
            None if hidden.is_multiple_of(heads) => bounded("head_dim", hidden / heads, 1024)?,
            None => {
                let expected =
                    format!("a multiple of num_attention_heads, {heads}, since head_dim is absent");
                return refuse("hidden_size", hidden, expected);
            }
        };
        if head_dim % 2 != 0 {
            return refuse("head_dim", head_dim, "even");
        }
        Ok((heads, kv_heads, head_dim))
    }

    fn eps(&self) -> Result<f32, ModelConfigError> {
        let eps = self.fields.number("rms_norm_eps")?.unwrap_or(self.family.eps);
        if eps > 0.0 && eps < 1.0 {
            Ok(eps as f32)
        } else {
            refuse("rms_norm_eps", eps, "above 0 and below 1")
        }
    }

    /// `sliding_window`, where the family reads it: absent it is the class's, `null` is none.
    fn window(&self) -> Result<Option<u32>, ModelConfigError> {
        const FIELD: &str = "sliding_window";
        match self.fields.count(FIELD)? {
            Some(0) => refuse(FIELD, 0, "at least 1, or null"),
            // A window beyond all positions is none.
            Some(window) => Ok(u32::try_from(window).ok()),
            None if self.fields.is_null(FIELD) => Ok(None),
            None => Ok(self.family.window),
        }
    }

    /// The window of each layer. Mistral has one for all; Qwen switches it on, for layers from
    /// `max_window_layers` on or as `layer_types` lists.
    fn windows(&self) -> Result<Vec<Option<u32>>, ModelConfigError> {
        let layers = self.fields.count("num_hidden_layers")?.unwrap_or(self.family.layers);
        let layers = bounded("num_hidden_layers", layers, LAYERS_MAX)?;
        let (all, window) = match self.family.architecture {
            Architecture::Llama => (true, None),
            Architecture::Mistral => (true, self.window()?),
            Architecture::Qwen2 | Architecture::Qwen3 => {
                let used = self.fields.flag("use_sliding_window")?.unwrap_or(false);
                (false, if used { self.window()? } else { None })
            }
        };
        let Some(window) = window else { return Ok(vec![None; layers]) };
        if all {
            return Ok(vec![Some(window); layers]);
        }
        let Some(types) = self.fields.by_layer("layer_types", layers)? else {
            let first = self.fields.count("max_window_layers")?.unwrap_or(WINDOW_LAYERS_DEFAULT);
            return Ok((0..layers).map(|layer| (layer >= first).then_some(window)).collect());
        };
        let of = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => Ok(Some(window)),
            _ => refuse("layer_types", kind, "full_attention or sliding_attention in each entry"),
        };
        types.iter().map(of).collect()
    }

    /// The ids of both files. One outside of the vocabulary can never come and ends nothing.
    fn eos(&self, generation: Option<Fields<'_>>, vocabulary: usize) -> Result<Vec<u32>, ModelConfigError> {
        const FIELD: &str = "eos_token_id";
        let mut eos = Vec::new();
        let said = [Some(self.fields), generation].into_iter().flatten().filter_map(|file| file.value(FIELD));
        let mut names_any = self.fields.is_null(FIELD);
        for ids in said {
            names_any = true;
            let list = ids.as_array().map_or(std::slice::from_ref(ids), Vec::as_slice);
            for id in list {
                match id.as_i64() {
                    Some(id) => eos.extend(u32::try_from(id).ok().filter(|&id| (id as usize) < vocabulary)),
                    None => return refuse(FIELD, id, "a token id, or a list of them"),
                }
            }
        }
        if !names_any {
            eos.extend(self.family.eos.filter(|&id| (id as usize) < vocabulary));
        }
        eos.sort_unstable();
        eos.dedup();
        if eos.len() > EOS_MAX {
            return refuse(FIELD, format!("{} ids", eos.len()), format!("at most {EOS_MAX} ids"));
        }
        Ok(eos)
    }

    /// What the file says about the weights' type, where it is one that is known: the weights themselves decide.
    fn stored(&self) -> Option<StoredDtype> {
        let (_, dtype) = self.fields.any(&["dtype", "torch_dtype"])?;
        match dtype.as_str()?.trim_start_matches("torch.") {
            "float32" => Some(StoredDtype::F32),
            "float16" => Some(StoredDtype::F16),
            "bfloat16" => Some(StoredDtype::Bf16),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
