//! A decoder of any supported family: its weights on a device, and the order of the ops in a step.
//!
//! Transformer with grouped-query attention and a gated MLP (Llama, <https://arxiv.org/abs/2307.09288>); the families
//! differ in biases, the places of norms, windows, RoPE and constant factors, all of which the configuration says. It
//! knows neither the backend nor who is in the batch, and never computes logits of a row that nobody samples: past the
//! last attention only those rows go on.

use millrace_kernels::ops::{
    ArenaPlan, AttentionShape, Batch, Buffer, BufferKind, BufferPlan, HeadWork, KvDtype, KvPlan, KvScales,
    Ops, PlanError, QkNorm, StepError,
};
use millrace_kernels::sampling::SampleRow;

use super::binding::{BindError, Binding};
use super::config::{DecoderConfig, GateActivation, NormPlaces, QkNorms};
use super::kv_scales::kv_scales;
use super::quantised::on_load::OnLoad;
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
/// What a branch gives, where it does not go straight into the residual stream.
const BRANCH: Buffer = Buffer(5);

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
    /// None where the norm is behind the branch.
    input_norm: Option<O::Vector>,
    qkv: O::Matrix,
    qkv_bias: Option<O::Vector>,
    head_norms: Option<(O::Vector, O::Vector)>,
    output: O::Matrix,
    output_bias: Option<O::Vector>,
    /// Norm behind attention.
    attended_norm: Option<O::Vector>,
    mlp_norm: Option<O::Vector>,
    gate_up: O::Matrix,
    down: O::Matrix,
    /// Norm behind the MLP.
    gated_norm: Option<O::Vector>,
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
        Self::load_as(config, source, ops, (kv_dtype, None))
    }

    /// [`Self::load`], with the matrices of layers quantised on the way.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_as(
        config: &DecoderConfig,
        source: &dyn TensorSource,
        ops: &mut O,
        (kv_dtype, on_load): (KvDtype, Option<OnLoad>),
    ) -> Result<Self, BindError> {
        let mut binding = Binding { config, source, on_load, ops };
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
            // Logits are linear in it.
            norm: binding.norm("model.norm.weight", 1.0 / config.logits_divisor)?,
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
        let config = &self.config;
        ops.begin(batch)?;
        ops.embed(&self.embedding, RESIDUAL);
        if config.embedding_scale != 1.0 {
            ops.scale(RESIDUAL, config.embedding_scale);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let last = index + 1 == self.layers.len();
            self.operand(ops, layer.input_norm.as_ref());
            ops.linear(&layer.qkv, layer.qkv_bias.as_ref(), NORMED, QKV);
            self.fill_cache(ops, index);
            if last && batch.logits_rows.is_empty() {
                // A step of unfinished prompts has done its work once the last keys and values are written.
                return Ok(());
            }
            ops.attention(index, QKV, &layer.shape, ATTENDED);
            if last {
                ops.narrow(&[ATTENDED, RESIDUAL]);
            }
            self.add(
                ops,
                (&layer.output, layer.output_bias.as_ref()),
                ATTENDED,
                layer.attended_norm.as_ref(),
            );
            self.operand(ops, layer.mlp_norm.as_ref());
            match config.activation {
                GateActivation::Silu => ops.linear_silu_mul(&layer.gate_up, NORMED, GATED),
                GateActivation::GeluTanh => ops.linear_gelu_mul(&layer.gate_up, NORMED, GATED),
            }
            self.add(ops, (&layer.down, None), GATED, layer.gated_norm.as_ref());
        }
        ops.rms_norm(RESIDUAL, &self.norm, config.rms_norm_eps, NORMED);
        Ok(())
    }

    /// What a branch reads.
    fn operand(&self, ops: &mut O, norm: Option<&O::Vector>) {
        match norm {
            Some(norm) => ops.rms_norm(RESIDUAL, norm, self.config.rms_norm_eps, NORMED),
            None => ops.round(RESIDUAL, NORMED),
        }
    }

    /// Norms and turns queries and keys, and writes keys and values into the cache.
    fn fill_cache(&self, ops: &mut O, index: usize) {
        let (layer, eps) = (&self.layers[index], self.config.rms_norm_eps);
        let norms = layer.head_norms.as_ref().map(|(q, k)| QkNorm { q, k, eps });
        let (rope, whole) = (self.config.rope_of[index], self.config.qk_norm == QkNorms::Whole);
        ops.heads_cache(index, QKV, &layer.shape, HeadWork { norms, whole, rope });
    }

    /// Adds a branch to the residual stream.
    fn add(
        &self,
        ops: &mut O,
        (matrix, bias): (&O::Matrix, Option<&O::Vector>),
        x: Buffer,
        norm: Option<&O::Vector>,
    ) {
        let scale = self.config.branch_scale;
        match norm {
            None if scale == 1.0 => ops.linear_add(matrix, bias, x, RESIDUAL),
            None => {
                ops.linear(matrix, bias, x, BRANCH);
                ops.scaled_add(BRANCH, scale, RESIDUAL);
            }
            Some(norm) => {
                ops.linear(matrix, bias, x, BRANCH);
                ops.norm_add(BRANCH, norm, self.config.rms_norm_eps, RESIDUAL);
            }
        }
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

/// Takes everything that steps of these sizes need on the device.
///
/// # Errors
/// When the device cannot do a size.
pub fn allocate<O: Ops>(ops: &mut O, config: &DecoderConfig, sizes: ArenaSizes) -> Result<(), PlanError> {
    ops.allocate(arena_plan(config, sizes))?;
    for rope in &config.ropes[1..] {
        ops.add_rope(&rope.plan(config.head_dim, sizes.positions_max))?;
    }
    Ok(())
}

fn arena_plan(config: &DecoderConfig, sizes: ArenaSizes) -> ArenaPlan {
    let values = |width| BufferPlan { width, kind: BufferKind::Values };
    let operand = |width| BufferPlan { width, kind: BufferKind::Operand };
    let mut buffers = vec![
        values(config.hidden),
        operand(config.hidden),
        values(config.qkv_width()),
        operand(config.heads * config.head_dim),
        operand(config.intermediate),
    ];
    if config.norms != NormPlaces::Before || config.branch_scale != 1.0 {
        buffers.push(values(config.hidden));
    }
    ArenaPlan {
        rows_max: sizes.rows_max,
        logits_rows_max: sizes.logits_rows_max,
        positions_max: sizes.positions_max,
        vocabulary: config.vocabulary,
        heads: config.heads,
        buffers,
        kv: kv_plan(config, sizes.kv_blocks, sizes.kv_dtype),
        rope: config.ropes[0].plan(config.head_dim, sizes.positions_max),
        score_cap: config.score_cap,
        logits_cap: config.logits_cap,
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
    // What lies before the MLP and behind attention has one name in most families.
    let (input, attended, mlp, gated) = match config.norms {
        NormPlaces::Before => (Some("input"), None, Some("post_attention"), None),
        NormPlaces::Behind => (None, Some("post_attention"), None, Some("post_feedforward")),
        NormPlaces::Around => {
            (Some("input"), Some("post_attention"), Some("pre_feedforward"), Some("post_feedforward"))
        }
    };
    let norm = |binding: &mut Binding<'_, O>, name: Option<&str>| {
        name.map(|name| binding.norm(&format!("{prefix}{name}_layernorm.weight"), 1.0)).transpose()
    };
    Ok(Layer {
        input_norm: norm(binding, input)?,
        qkv: binding.qkv_matrix(prefix, layer)?,
        qkv_bias: if config.qkv_bias { Some(binding.vector(prefix, &bias)?) } else { None },
        head_norms: if config.qk_norm == QkNorms::None {
            None
        } else {
            let q = binding.norm(&format!("{prefix}self_attn.q_norm.weight"), 1.0)?;
            Some((q, binding.norm(&format!("{prefix}self_attn.k_norm.weight"), 1.0)?))
        },
        output: binding.matrix(prefix, &["self_attn.o_proj.weight"])?,
        output_bias: if config.output_bias {
            Some(binding.vector(prefix, &["self_attn.o_proj.bias"])?)
        } else {
            None
        },
        attended_norm: norm(binding, attended)?,
        mlp_norm: norm(binding, mlp)?,
        gate_up: binding.gated_matrix(prefix)?,
        down: binding.matrix(prefix, &["mlp.down_proj.weight"])?,
        gated_norm: norm(binding, gated)?,
        shape: AttentionShape {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: config.attention_scale,
            sliding_window: config.windows[layer],
            kv_scales,
        },
    })
}
