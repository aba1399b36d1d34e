//! A model's weights by name: which tensors a configuration implies, checked and put onto the device.
//!
//! Names and shapes are those of Hugging Face checkpoints. A tensor of another shape is refused by name; one
//! that the configuration does not imply is left alone.

use millrace_kernels::ops::Ops;
use millrace_kernels::tensor::{DType, HostTensor, LoadError};

use super::config::DecoderConfig;
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
    match part {
        "input_layernorm.weight" | "post_attention_layernorm.weight" => Some(vec![hidden]),
        "self_attn.q_proj.weight" => Some(vec![q, hidden]),
        "self_attn.k_proj.weight" | "self_attn.v_proj.weight" => Some(vec![kv, hidden]),
        "self_attn.o_proj.weight" => Some(vec![hidden, q]),
        "self_attn.q_proj.bias" if config.qkv_bias => Some(vec![q]),
        "self_attn.k_proj.bias" | "self_attn.v_proj.bias" if config.qkv_bias => Some(vec![kv]),
        "self_attn.o_proj.bias" if config.output_bias => Some(vec![hidden]),
        "self_attn.q_norm.weight" | "self_attn.k_norm.weight" if config.qk_norm => Some(vec![head_dim]),
        "mlp.gate_proj.weight" | "mlp.up_proj.weight" => Some(vec![config.intermediate, hidden]),
        "mlp.down_proj.weight" => Some(vec![hidden, config.intermediate]),
        _ => None,
    }
}

/// Names of all tensors that a configuration implies, in the order in which they are loaded.
pub fn names(config: &DecoderConfig) -> Vec<String> {
    let mut names = vec!["model.embed_tokens.weight".to_owned()];
    let parts = [
        "input_layernorm.weight",
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
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    ];
    for layer in 0..config.layers() {
        names.extend(parts.iter().map(|part| format!("model.layers.{layer}.{part}")));
    }
    names.extend(["model.norm.weight".to_owned(), "lm_head.weight".to_owned()]);
    names.retain(|name| shape_of(config, name).is_some());
    names
}

/// Takes tensors out of a source and onto a device.
pub(super) struct Binding<'a, O: Ops> {
    /// Implies the shapes.
    pub config: &'a DecoderConfig,
    /// Has the tensors.
    pub source: &'a dyn TensorSource,
    /// Takes the weights.
    pub ops: &'a mut O,
}

impl<'a, O: Ops> Binding<'a, O> {
    fn tensor(&self, name: &str) -> Result<HostTensor<'a>, BindError> {
        let stored = self.source.tensor(name)?;
        let expected =
            shape_of(self.config, name).expect("the decoder asks for tensors of its configuration");
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

    fn tensors(&self, prefix: &str, parts: &[&str]) -> Result<Vec<HostTensor<'a>>, BindError> {
        parts.iter().map(|part| self.tensor(&format!("{prefix}{part}"))).collect()
    }

    /// Matrices, stacked by rows.
    pub fn matrix(&mut self, prefix: &str, parts: &[&str]) -> Result<O::Matrix, BindError> {
        let tensors = self.tensors(prefix, parts)?;
        self.ops.matrix(&tensors).map_err(|source| load_error(&format!("{prefix}{}", parts[0]), source))
    }

    /// The projections of queries, keys and values of a layer.
    pub fn qkv_matrix(&mut self, prefix: &str, parts: &[&str]) -> Result<O::Matrix, BindError> {
        let tensors = self.tensors(prefix, parts)?;
        let loaded = self.ops.qkv_matrix(&tensors, self.config.head_dim);
        loaded.map_err(|source| load_error(&format!("{prefix}{}", parts[0]), source))
    }

    /// Gate and up projection.
    pub fn gated_matrix(&mut self, gate: &str, up: &str) -> Result<O::Matrix, BindError> {
        let (gate_tensor, up_tensor) = (self.tensor(gate)?, self.tensor(up)?);
        self.ops.gated_matrix(&gate_tensor, &up_tensor).map_err(|source| load_error(gate, source))
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
