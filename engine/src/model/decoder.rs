//! A decoder of any supported family: its weights on a device, and the order of the ops in a step.
//!
//! Pre-norm transformer with grouped-query attention and a gated MLP (Llama, <https://arxiv.org/abs/2307.09288>);
//! the families differ in biases, norms on heads, windows and the RoPE table, all of which the configuration
//! says. It knows neither the backend nor who is in the batch, and never computes logits of a row that nobody
//! samples: past the last attention only those rows go on.

use millrace_kernels::ops::{
    ArenaPlan, AttentionShape, Batch, Buffer, BufferKind, BufferPlan, KvDtype, KvPlan, KvScales, Ops, QkNorm,
    RopePlan, StepError,
};
use millrace_kernels::sampling::SampleRow;

use super::binding::{BindError, Binding};
use super::config::DecoderConfig;
use super::kv_scales::kv_scales;
use super::source::TensorSource;

/// The residual stream.
const RESIDUAL: Buffer = Buffer(0);
/// Its norm: the operand of QKV, of the MLP and of the head.
const NORMED: Buffer = Buffer(1);
/// Queries, keys and values.
const QKV: Buffer = Buffer(2);
/// What attention gives.
const ATTENDED: Buffer = Buffer(3);
/// The inside of the MLP.
const GATED: Buffer = Buffer(4);

/// Sizes of an arena that the model does not decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaSizes {
    /// Most rows in a step.
    pub rows_max: usize,
    /// Most rows of a step that are sampled.
    pub logits_rows_max: usize,
    /// Longest sequence.
    pub positions_max: usize,
    /// KV blocks.
    pub kv_blocks: usize,
    /// Numeric type of these.
    pub kv_dtype: KvDtype,
}

struct Layer<O: Ops> {
    input_norm: O::Vector,
    qkv: O::Matrix,
    qkv_bias: Option<O::Vector>,
    head_norms: Option<(O::Vector, O::Vector)>,
    output: O::Matrix,
    output_bias: Option<O::Vector>,
    mlp_norm: O::Vector,
    gate_up: O::Matrix,
    down: O::Matrix,
    shape: AttentionShape,
}

/// A model on a device.
pub struct Decoder<O: Ops> {
    config: DecoderConfig,
    embedding: O::Matrix,
    layers: Vec<Layer<O>>,
    norm: O::Vector,
    /// The embedding's matrix serves when absent.
    head: Option<O::Matrix>,
}

impl<O: Ops> Decoder<O> {
    /// Puts the weights onto the device. A cache in 8 bits gets the scales that the checkpoint has for it.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape than the configuration implies.
    pub fn load(
        config: &DecoderConfig,
        source: &dyn TensorSource,
        ops: &mut O,
        kv_dtype: KvDtype,
    ) -> Result<Self, BindError> {
        let mut binding = Binding { config, source, ops };
        let scales = |layer| match kv_dtype {
            KvDtype::Operand => Ok(KvScales::ONE),
            KvDtype::Fp8E4m3 => kv_scales(source, layer),
        };
        let layers = (0..config.layers())
            .map(|layer| load_layer(&mut binding, layer, scales(layer)?))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            embedding: binding.matrix("model.", &["embed_tokens.weight"])?,
            layers,
            norm: binding.vector("model.", &["norm.weight"])?,
            head: if config.tied { None } else { Some(binding.matrix("", &["lm_head.weight"])?) },
            config: config.clone(),
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Starts a step and computes it up to the operand of the head, for the rows that want logits.
    ///
    /// # Errors
    /// When the batch does not fit the arena.
    pub fn forward(&self, ops: &mut O, batch: &Batch<'_>) -> Result<(), StepError> {
        let eps = self.config.rms_norm_eps;
        ops.begin(batch)?;
        ops.embed(&self.embedding, RESIDUAL);
        for (index, layer) in self.layers.iter().enumerate() {
            let last = index + 1 == self.layers.len();
            ops.rms_norm(RESIDUAL, &layer.input_norm, eps, NORMED);
            ops.linear(&layer.qkv, layer.qkv_bias.as_ref(), NORMED, QKV);
            let norms = layer.head_norms.as_ref().map(|(q, k)| QkNorm { q, k, eps });
            ops.rope_cache(index, QKV, &layer.shape, norms);
            if last && batch.logits_rows.is_empty() {
                // A step of unfinished prompts has done its work once the last keys and values are written.
                return Ok(());
            }
            ops.attention(index, QKV, &layer.shape, ATTENDED);
            if last {
                ops.narrow(&[ATTENDED, RESIDUAL]);
            }
            ops.linear_add(&layer.output, layer.output_bias.as_ref(), ATTENDED, RESIDUAL);
            ops.rms_norm(RESIDUAL, &layer.mlp_norm, eps, NORMED);
            ops.linear_silu_mul(&layer.gate_up, NORMED, GATED);
            ops.linear_add(&layer.down, None, GATED, RESIDUAL);
        }
        ops.rms_norm(RESIDUAL, &self.norm, eps, NORMED);
        Ok(())
    }

    /// Queues the step that [`Self::forward`] has begun, with the next token of each row that wants one;
    /// [`Ops::collect`] gives them.
    ///
    /// # Errors
    /// When the device failed.
    pub fn sample(&self, ops: &mut O, rows: &[SampleRow<'_>]) -> Result<(), StepError> {
        ops.sample(self.head(), NORMED, rows)
    }

    /// The logits of each row that wants them, after [`Self::forward`].
    ///
    /// # Errors
    /// When the device failed.
    pub fn logits(&self, ops: &mut O, out: &mut [f32]) -> Result<(), StepError> {
        ops.logits(self.head(), NORMED, out)
    }

    fn head(&self) -> &O::Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// The cache that a model needs, of this many blocks.
pub fn kv_plan(config: &DecoderConfig, blocks: usize, dtype: KvDtype) -> KvPlan {
    let DecoderConfig { kv_heads, head_dim, .. } = *config;
    KvPlan { layers: config.layers(), kv_heads, head_dim, blocks, dtype }
}

/// Everything that steps of these sizes need on the device.
pub fn arena_plan(config: &DecoderConfig, sizes: ArenaSizes) -> ArenaPlan {
    let values = |width| BufferPlan { width, kind: BufferKind::Values };
    let operand = |width| BufferPlan { width, kind: BufferKind::Operand };
    ArenaPlan {
        rows_max: sizes.rows_max,
        logits_rows_max: sizes.logits_rows_max,
        positions_max: sizes.positions_max,
        vocabulary: config.vocabulary,
        heads: config.heads,
        buffers: vec![
            values(config.hidden),
            operand(config.hidden),
            values(config.qkv_width()),
            operand(config.heads * config.head_dim),
            operand(config.intermediate),
        ],
        kv: kv_plan(config, sizes.kv_blocks, sizes.kv_dtype),
        rope: RopePlan {
            inverse_frequencies: config.rope.inverse_frequencies(config.head_dim),
            amplitude: 1.0,
        },
    }
}

fn load_layer<O: Ops>(
    binding: &mut Binding<'_, O>,
    layer: usize,
    kv_scales: KvScales,
) -> Result<Layer<O>, BindError> {
    let config = binding.config;
    let prefix = &format!("model.layers.{layer}.");
    let bias = ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"];
    let qkv = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"];
    Ok(Layer {
        input_norm: binding.vector(prefix, &["input_layernorm.weight"])?,
        qkv: binding.qkv_matrix(prefix, &qkv)?,
        qkv_bias: if config.qkv_bias { Some(binding.vector(prefix, &bias)?) } else { None },
        head_norms: if config.qk_norm {
            let q = binding.vector(prefix, &["self_attn.q_norm.weight"])?;
            Some((q, binding.vector(prefix, &["self_attn.k_norm.weight"])?))
        } else {
            None
        },
        output: binding.matrix(prefix, &["self_attn.o_proj.weight"])?,
        output_bias: if config.output_bias {
            Some(binding.vector(prefix, &["self_attn.o_proj.bias"])?)
        } else {
            None
        },
        mlp_norm: binding.vector(prefix, &["post_attention_layernorm.weight"])?,
        gate_up: binding
            .gated_matrix(&format!("{prefix}mlp.gate_proj.weight"), &format!("{prefix}mlp.up_proj.weight"))?,
        down: binding.matrix(prefix, &["mlp.down_proj.weight"])?,
        shape: AttentionShape {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: (config.head_dim as f32).powf(-0.5),
            sliding_window: config.windows[layer],
            kv_scales,
        },
    })
}
