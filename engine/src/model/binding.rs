//! A model's weights by name: which tensors a configuration implies, checked and put onto the device.
//!
//! Names and shapes are those of Hugging Face checkpoints. A tensor of another shape is refused by name; one
//! that the configuration does not imply is left alone.

use millrace_kernels::ops::Ops;
use millrace_kernels::tensor::{DType, HostTensor, LoadError};

use super::config::{DecoderConfig, NormPlaces, QkNorms};
use super::quantised::on_load::OnLoad;
use super::source::{SourceError, StoredDtype, TensorSource};

/// Why weights could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The source does not have a tensor.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A tensor has another shape than the configuration implies.
    #[error("tensor {name:?} has shape {found:?}; config.json implies {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that it must have.
        expected: Vec<usize>,
    },
    /// A scale of the KV cache cannot be divided by.
    #[error("tensor {name:?} is {value}; a scale must be above 0 and finite, as must be its inverse")]
    Scale {
        /// The tensor.
        name: String,
        /// Its value.
        value: f32,
    },
    /// A scale of the KV cache stands without its counterpart.
    #[error("tensor {name:?} is there and {missing:?} is not; scales of values need those of keys")]
    Alone {
        /// The tensor.
        name: String,
        /// What is missing.
        missing: String,
    },
    /// The device does not take a tensor.
    #[error("tensor {name:?}: {source}")]
    Load {
        /// The tensor, or the first of those stacked.
        name: String,
        /// Why.
        source: LoadError,
    },
}

/// The shape that a configuration implies for a tensor; `None` for a name that it does not know.
pub fn shape_of(config: &DecoderConfig, name: &str) -> Option<Vec<usize>> {
    let (hidden, head_dim) = (config.hidden, config.head_dim);
    let part = match name.strip_prefix("model.layers.") {
        None => {
            return match name {
                "model.embed_tokens.weight" => Some(vec![config.vocabulary, hidden]),
                "lm_head.weight" if !config.tied => Some(vec![config.vocabulary, hidden]),
                "model.norm.weight" => Some(vec![hidden]),
                _ => None,
            };
        }
        Some(rest) => {
            let (layer, part) = rest.split_once('.')?;
            layer.parse::<usize>().ok().filter(|&layer| layer < config.layers())?;
            part
        }
    };
    let (q, kv) = (config.heads * head_dim, config.kv_heads * head_dim);
    let (before, behind) = (config.norms != NormPlaces::Behind, config.norms != NormPlaces::Before);
    let normed = |all: usize| match config.qk_norm {
        QkNorms::None => None,
        QkNorms::Heads => Some(vec![head_dim]),
        QkNorms::Whole => Some(vec![all]),
    };
    match part {
        "input_layernorm.weight" if before => Some(vec![hidden]),
        "post_attention_layernorm.weight" => Some(vec![hidden]),
        "pre_feedforward_layernorm.weight" if config.norms == NormPlaces::Around => Some(vec![hidden]),
        "post_feedforward_layernorm.weight" if behind => Some(vec![hidden]),
        "self_attn.qkv_proj.weight" if config.fused => Some(vec![q + 2 * kv, hidden]),
        "self_attn.q_proj.weight" if !config.fused => Some(vec![q, hidden]),
        "self_attn.k_proj.weight" | "self_attn.v_proj.weight" if !config.fused => Some(vec![kv, hidden]),
        "self_attn.o_proj.weight" => Some(vec![hidden, q]),
        "self_attn.q_proj.bias" if config.qkv_bias => Some(vec![q]),
        "self_attn.k_proj.bias" | "self_attn.v_proj.bias" if config.qkv_bias => Some(vec![kv]),
        "self_attn.o_proj.bias" if config.output_bias => Some(vec![hidden]),
        "self_attn.q_norm.weight" => normed(q),
        "self_attn.k_norm.weight" => normed(kv),
        "mlp.gate_up_proj.weight" if config.fused => Some(vec![2 * config.intermediate, hidden]),
        "mlp.gate_proj.weight" | "mlp.up_proj.weight" if !config.fused => {
            Some(vec![config.intermediate, hidden])
        }
        "mlp.down_proj.weight" => Some(vec![hidden, config.intermediate]),
        _ => None,
    }
}

/// Names of all tensors that a configuration implies, in the order in which they are loaded.
pub fn names(config: &DecoderConfig) -> Vec<String> {
    let mut names = vec!["model.embed_tokens.weight".to_owned()];
    let parts = [
        "input_layernorm.weight",
        "self_attn.qkv_proj.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "self_attn.o_proj.weight",
        "self_attn.o_proj.bias",
        "post_attention_layernorm.weight",
        "pre_feedforward_layernorm.weight",
        "mlp.gate_up_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "post_feedforward_layernorm.weight",
    ];
    for layer in 0..config.layers() {
        names.extend(parts.iter().map(|part| format!("model.layers.{layer}.{part}")));
    }
    names.extend(["model.norm.weight".to_owned(), "lm_head.weight".to_owned()]);
    names.retain(|name| shape_of(config, name).is_some());
    names
}

/// The tensor of a name in the form that the checkpoint has it in.
///
/// # Errors
/// When it is missing, unreadable, or of another shape than the configuration implies.
///
/// # Panics
/// When the configuration does not imply the tensor.
pub fn stored<'a>(
    config: &DecoderConfig,
    source: &'a dyn TensorSource,
    name: &str,
) -> Result<HostTensor<'a>, BindError> {
    let expected = shape_of(config, name).expect("a tensor of the configuration");
    if let (Some(quantised), &[rows, columns]) = (&config.quantised, &expected[..])
        && name != "model.embed_tokens.weight"
        && let Some(matrix) = quantised.matrix(source, name, (rows, columns))?
    {
        return Ok(matrix);
    }
    let stored = source.tensor(name)?;
    if stored.shape != expected {
        return Err(BindError::Shape { name: name.to_owned(), found: stored.shape, expected });
    }
    let dtype = match stored.dtype {
        StoredDtype::F32 => DType::F32,
        StoredDtype::F16 => DType::F16,
        StoredDtype::Bf16 => DType::Bf16,
    };
    HostTensor::new(dtype, &stored.shape, stored.data).map_err(|source| load_error(name, source))
}

/// Takes tensors out of a source and onto a device.
pub(super) struct Binding<'a, O: Ops> {
    /// Implies the shapes.
    pub config: &'a DecoderConfig,
    /// Has the tensors.
    pub source: &'a dyn TensorSource,
    /// What the matrices of layers become, where they are not quantised.
    pub on_load: Option<OnLoad>,
    /// Takes the weights.
    pub ops: &'a mut O,
}

impl<'a, O: Ops> Binding<'a, O> {
    fn tensor(&self, name: &str) -> Result<HostTensor<'a>, BindError> {
        let stored = stored(self.config, self.source, name)?;
        let in_layer = stored.shape().len() == 2 && name.starts_with("model.layers.");
        match self.on_load.filter(|_| in_layer && stored.as_coded().is_none()) {
            None => Ok(stored),
            Some(form) => form.quantise(&stored).map_err(|source| load_error(name, source)),
        }
    }

    fn tensors(&self, prefix: &str, parts: &[&str]) -> Result<Vec<HostTensor<'a>>, BindError> {
        parts.iter().map(|part| self.tensor(&format!("{prefix}{part}"))).collect()
    }

    /// Matrices, stacked by rows.
    pub fn matrix(&mut self, prefix: &str, parts: &[&str]) -> Result<O::Matrix, BindError> {
        let tensors = self.tensors(prefix, parts)?;
        self.ops.matrix(&tensors).map_err(|source| load_error(&format!("{prefix}{}", parts[0]), source))
    }

    /// A stored matrix cut into parts of these rows.
    fn cut(&self, name: &str, rows: &[usize]) -> Result<Vec<HostTensor<'a>>, BindError> {
        let whole = self.tensor(name)?;
        let mut first = 0;
        let mut parts = Vec::with_capacity(rows.len());
        for &rows in rows {
            parts.push(whole.part(first, rows).map_err(|source| load_error(name, source))?);
            first += rows;
        }
        Ok(parts)
    }

    /// The projections of queries, keys and values of a layer.
    pub fn qkv_matrix(&mut self, prefix: &str, layer: usize) -> Result<O::Matrix, BindError> {
        let DecoderConfig { heads, kv_heads, head_dim, .. } = *self.config;
        let names = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"];
        let stored = if self.config.fused { "self_attn.qkv_proj.weight" } else { names[0] };
        let first = format!("{prefix}{stored}");
        let tensors = if self.config.fused {
            self.cut(&first, &[heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])?
        } else {
            self.tensors(prefix, &names)?
        };
        let whole_heads = self.config.qk_norm != QkNorms::Whole && self.config.whole_rope(layer).is_some();
        let loaded =
            if whole_heads { self.ops.qkv_matrix(&tensors, head_dim) } else { self.ops.matrix(&tensors) };
        loaded.map_err(|source| load_error(&first, source))
    }

    /// Gate and up projection.
    pub fn gated_matrix(&mut self, prefix: &str) -> Result<O::Matrix, BindError> {
        let stored = if self.config.fused { "mlp.gate_up_proj.weight" } else { "mlp.gate_proj.weight" };
        let first = format!("{prefix}{stored}");
        let tensors = if self.config.fused {
            self.cut(&first, &[self.config.intermediate; 2])?
        } else {
            self.tensors(prefix, &["mlp.gate_proj.weight", "mlp.up_proj.weight"])?
        };
        self.ops.gated_matrix(&tensors[0], &tensors[1]).map_err(|source| load_error(&first, source))
    }

    /// The weight of a norm, with the family's offset, times a factor.
    pub fn norm(&mut self, name: &str, factor: f32) -> Result<O::Vector, BindError> {
        let offset = self.config.norm_offset;
        let stored = self.tensor(name)?;
        let mut weight = vec![0.0; stored.shape()[0]];
        stored.read_f32(0, &mut weight);
        let changed = |weight: f32| (weight + offset) * factor;
        let bytes: Vec<u8> = weight.into_iter().flat_map(|weight| changed(weight).to_le_bytes()).collect();
        let tensor = match (offset, factor) {
            (0.0, 1.0) => stored,
            _ => HostTensor::new(DType::F32, stored.shape(), &bytes)
                .map_err(|source| load_error(name, source))?,
        };
        self.ops.vector(&[tensor]).map_err(|source| load_error(name, source))
    }

    /// Vectors, one after the other.
    pub fn vector(&mut self, prefix: &str, parts: &[&str]) -> Result<O::Vector, BindError> {
        let tensors = self.tensors(prefix, parts)?;
        self.ops.vector(&tensors).map_err(|source| load_error(&format!("{prefix}{}", parts[0]), source))
    }
}

/// The device's refusal of a tensor.
pub(super) fn load_error(name: &str, source: LoadError) -> BindError {
    BindError::Load { name: name.to_owned(), source }
}
