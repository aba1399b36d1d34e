//! From a GGUF's metadata and tensor names to Hugging Face's: `config.json` and the plan of tensors.
//!
//! Pure. It refuses architectures other than Llama (with Mistral), Qwen2, Qwen3 and Gemma 3, tensors that it does not
//! know, tensors that are missing, and shapes other than those that the metadata imply; so what it lets pass
//! is a complete model.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};

use super::ImportError;
use super::gguf::{Gguf, GgufError, TensorInfo, invalid, required};
use super::rope;

/// Layers of one model; the deepest published dense ones have 126.
const LAYERS_MAX: u64 = 1024;
/// Any width or head count of a model.
const WIDTH_MAX: u64 = 1 << 20;
/// Longest context.
const CONTEXT_MAX: u64 = 1 << 28;
/// Largest vocabulary.
pub const VOCABULARY_MAX: u64 = 1 << 21;

/// A model family by its name in `general.architecture`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama, SmolLM2, and Mistral, which GGUF writes as Llama.
    Llama,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: norms on q and k.
    Qwen3,
    /// Gemma 3, the decoder of its text.
    Gemma3,
}

impl Family {
    fn from_gguf(name: &str) -> Result<Self, GgufError> {
        match name {
            "llama" | "mistral" => Ok(Self::Llama),
            "qwen2" => Ok(Self::Qwen2),
            "qwen3" => Ok(Self::Qwen3),
            "gemma3" => Ok(Self::Gemma3),
            other => {
                let rule = "imported are llama, mistral, qwen2, qwen3 and gemma3";
                Err(invalid("general.architecture", other, rule))
            }
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Gemma3 => "Gemma3ForCausalLM",
        }
    }

    fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3_text",
        }
    }
}

/// One tensor to write: where it comes from and under which name it goes.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedTensor {
    /// Hugging Face name.
    pub name: String,
    /// The tensor in the GGUF.
    pub source: TensorInfo,
    /// Rows of one head when the rows must be un-permuted: llama.cpp interleaves the two halves of each rotary
    /// head of q and k, which Hugging Face keeps apart.
    pub unpermute_rows: Option<u64>,
    /// What is added to each number: llama.cpp stores Gemma's norms with the 1 that the model adds to them.
    pub offset: f32,
}

/// The sizes of a model, as its metadata and embedding say.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelLayout {
    /// The family.
    pub family: Family,
    /// Whether q, k and v have biases.
    pub attention_bias: bool,
    /// Whether the LM head is the embedding.
    pub tied: bool,
    /// Tokens of the embedding.
    pub vocabulary: u64,
    /// Longest context.
    pub context: u64,
    layers: u64,
    hidden: u64,
    feed_forward: u64,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
    norm_eps: f32,
    rope_theta: f32,
    rope_scaling: Json,
    gemma: Option<Gemma>,
}

/// What only Gemma 3 has.
#[derive(Debug, Clone, PartialEq)]
struct Gemma {
    window: u64,
    local_theta: f32,
    score_scalar: u64,
}

/// Layers of the one model of Gemma 3 whose scores are scaled by the width over the heads, as llama.cpp knows it.
const GEMMA_27B_LAYERS: u64 = 62;

impl ModelLayout {
    /// Reads the sizes and checks that they fit together.
    pub fn read(
        gguf: &Gguf,
        rope_factors: Option<&[f32]>,
        notes: &mut Vec<String>,
    ) -> Result<Self, ImportError> {
        let name = required(gguf.text("general.architecture")?, "general.architecture")?;
        let family = Family::from_gguf(name)?;
        let key = |suffix: &str| format!("{name}.{suffix}");
        let size = |suffix: &str, max: u64| -> Result<u64, GgufError> {
            let value = required(gguf.integer(&key(suffix), max)?, &key(suffix))?;
            if value == 0 { Err(invalid(&key(suffix), 0, "it must be at least 1")) } else { Ok(value) }
        };
        if let Some(experts @ 1..) = gguf.integer(&key("expert_count"), u64::MAX)? {
            return Err(invalid(&key("expert_count"), experts, "mixtures of experts are not imported").into());
        }
        let hidden = size("embedding_length", WIDTH_MAX)?;
        let heads = size("attention.head_count", WIDTH_MAX)?;
        let kv_heads = match gguf.get(&key("attention.head_count_kv")) {
            None => heads,
            Some(_) => size("attention.head_count_kv", WIDTH_MAX)?,
        };
        let head_dim = head_dim(gguf, name, hidden, heads)?;
        if !heads.is_multiple_of(kv_heads) {
            let rule = format!("it must divide {heads}, the number of query heads");
            return Err(invalid(&key("attention.head_count_kv"), kv_heads, &rule).into());
        }
        let layers = size("block_count", LAYERS_MAX)?;
        let score_scalar = if layers == GEMMA_27B_LAYERS { hidden / heads } else { head_dim };
        let gemma = gemma((gguf, name), family, score_scalar, notes)?;
        let embedding = find(gguf, "token_embd.weight")?;
        let context = size("context_length", CONTEXT_MAX)?;
        let eps_key = key("attention.layer_norm_rms_epsilon");
        let norm_eps = required(gguf.float(&eps_key)?, &eps_key)?;
        let theta_key = key("rope.freq_base");
        // llama.cpp's default, which old Llama files rely on.
        let rope_theta = gguf.float(&theta_key)?.unwrap_or(10_000.0);
        if rope_theta <= 0.0 || norm_eps < 0.0 {
            return Err(
                invalid(&theta_key, rope_theta, "it must be positive, and the epsilon not negative").into()
            );
        }
        Ok(Self {
            family,
            attention_bias: gguf.tensors.iter().any(|tensor| tensor.name == "blk.0.attn_q.bias"),
            tied: !gguf.tensors.iter().any(|tensor| tensor.name == "output.weight"),
            vocabulary: embedding.shape[0],
            context,
            layers,
            gemma,
            hidden,
            feed_forward: size("feed_forward_length", WIDTH_MAX)?,
            heads,
            kv_heads,
            head_dim,
            norm_eps,
            rope_theta,
            rope_scaling: rope::scaling(
                gguf,
                name,
                &rope::Rotary { theta: rope_theta, head_dim, context },
                rope_factors,
                notes,
            )?,
        })
    }

    /// The `config.json` of the model, with the ids of special tokens and the dtype of the files.
    pub fn config(&self, special: &BTreeMap<&'static str, Json>, torch_dtype: &str) -> Json {
        let mut config = Map::new();
        config.insert("architectures".into(), json!([self.family.class()]));
        config.insert("attention_bias".into(), json!(self.attention_bias));
        config.insert("attention_dropout".into(), json!(0.0));
        for (key, value) in special {
            config.insert((*key).into(), value.clone());
        }
        config.insert("head_dim".into(), json!(self.head_dim));
        match &self.gemma {
            None => drop(config.insert("hidden_act".into(), json!("silu"))),
            Some(gemma) => {
                config.insert("hidden_activation".into(), json!("gelu_pytorch_tanh"));
                config.insert("query_pre_attn_scalar".into(), json!(gemma.score_scalar));
                config.insert("rope_local_base_freq".into(), decimal(gemma.local_theta));
                config.insert("sliding_window".into(), json!(gemma.window));
            }
        }
        config.insert("hidden_size".into(), json!(self.hidden));
        config.insert("initializer_range".into(), json!(0.02));
        config.insert("intermediate_size".into(), json!(self.feed_forward));
        config.insert("max_position_embeddings".into(), json!(self.context));
        config.insert("mlp_bias".into(), json!(false));
        config.insert("model_type".into(), json!(self.family.model_type()));
        config.insert("num_attention_heads".into(), json!(self.heads));
        config.insert("num_hidden_layers".into(), json!(self.layers));
        config.insert("num_key_value_heads".into(), json!(self.kv_heads));
        config.insert("rms_norm_eps".into(), decimal(self.norm_eps));
        config.insert("rope_scaling".into(), self.rope_scaling.clone());
        config.insert("rope_theta".into(), decimal(self.rope_theta));
        config.insert("tie_word_embeddings".into(), json!(self.tied));
        config.insert("torch_dtype".into(), json!(torch_dtype));
        config.insert("use_cache".into(), json!(true));
        config.insert("vocab_size".into(), json!(self.vocabulary));
        Json::Object(config)
    }

    /// Every tensor of the model under its Hugging Face name, sorted; complete and of the right shapes.
    pub fn plan(&self, gguf: &Gguf) -> Result<Vec<PlannedTensor>, ImportError> {
        let expected = self.expected();
        let mut by_name: BTreeMap<&str, &TensorInfo> =
            gguf.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        by_name.remove(rope::FACTORS_TENSOR);
        let mut planned = Vec::with_capacity(expected.len());
        for wanted in expected {
            let Some(source) = by_name.remove(wanted.gguf.as_str()) else {
                return Err(ImportError::TensorMissing { name: wanted.gguf });
            };
            if source.shape != wanted.shape {
                let (name, found, expected) = (wanted.gguf, source.shape.clone(), wanted.shape);
                return Err(ImportError::Shape { name, found, expected });
            }
            planned.push(PlannedTensor {
                name: wanted.name,
                source: source.clone(),
                unpermute_rows: (wanted.rotary && self.family == Family::Llama).then_some(self.head_dim),
                offset: if self.family == Family::Gemma3 && wanted.norm { -1.0 } else { 0.0 },
            });
        }
        if let Some(name) = by_name.keys().next() {
            return Err(ImportError::TensorUnknown { name: (*name).to_owned() });
        }
        planned.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(planned)
    }

    /// Every tensor that a model of these sizes has.
    fn expected(&self) -> Vec<Wanted> {
        let (hidden, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut all = vec![
            wanted("token_embd.weight", "model.embed_tokens.weight", &[self.vocabulary, hidden]),
            wanted("output_norm.weight", "model.norm.weight", &[hidden]),
        ];
        if !self.tied {
            all.push(wanted("output.weight", "lm_head.weight", &[self.vocabulary, hidden]));
        }
        for layer in 0..self.layers {
            let mut add = |gguf: &str, name: &str, shape: &[u64]| {
                let gguf = format!("blk.{layer}.{gguf}");
                all.push(wanted(&gguf, &format!("model.layers.{layer}.{name}"), shape));
            };
            add("attn_norm.weight", "input_layernorm.weight", &[hidden]);
            if self.family == Family::Gemma3 {
                add("post_attention_norm.weight", "post_attention_layernorm.weight", &[hidden]);
                add("ffn_norm.weight", "pre_feedforward_layernorm.weight", &[hidden]);
                add("post_ffw_norm.weight", "post_feedforward_layernorm.weight", &[hidden]);
            } else {
                add("ffn_norm.weight", "post_attention_layernorm.weight", &[hidden]);
            }
            add("attn_q.weight", "self_attn.q_proj.weight", &[q, hidden]);
            add("attn_k.weight", "self_attn.k_proj.weight", &[kv, hidden]);
            add("attn_v.weight", "self_attn.v_proj.weight", &[kv, hidden]);
            add("attn_output.weight", "self_attn.o_proj.weight", &[hidden, q]);
            if self.attention_bias {
                add("attn_q.bias", "self_attn.q_proj.bias", &[q]);
                add("attn_k.bias", "self_attn.k_proj.bias", &[kv]);
                add("attn_v.bias", "self_attn.v_proj.bias", &[kv]);
                // `attention_bias` of the others covers the output's projection.
                if self.family != Family::Qwen2 {
                    add("attn_output.bias", "self_attn.o_proj.bias", &[hidden]);
                }
            }
            if matches!(self.family, Family::Qwen3 | Family::Gemma3) {
                add("attn_q_norm.weight", "self_attn.q_norm.weight", &[self.head_dim]);
                add("attn_k_norm.weight", "self_attn.k_norm.weight", &[self.head_dim]);
            }
            add("ffn_gate.weight", "mlp.gate_proj.weight", &[self.feed_forward, hidden]);
            add("ffn_up.weight", "mlp.up_proj.weight", &[self.feed_forward, hidden]);
            add("ffn_down.weight", "mlp.down_proj.weight", &[hidden, self.feed_forward]);
        }
        all
    }
}

struct Wanted {
    gguf: String,
    name: String,
    shape: Vec<u64>,
    rotary: bool,
    norm: bool,
}

fn wanted(gguf: &str, name: &str, shape: &[u64]) -> Wanted {
    let rotary = [".q_proj.", ".k_proj."].iter().any(|part| name.contains(part));
    let norm = name.ends_with("norm.weight");
    Wanted { gguf: gguf.into(), name: name.into(), shape: shape.to_vec(), rotary, norm }
}

/// What Gemma 3 has; the window of another family is not read, and that is said.
fn gemma(
    (gguf, name): (&Gguf, &str),
    family: Family,
    score_scalar: u64,
    notes: &mut Vec<String>,
) -> Result<Option<Gemma>, GgufError> {
    let key = format!("{name}.attention.sliding_window");
    let window = gguf.integer(&key, u64::MAX)?;
    if family == Family::Gemma3 {
        let window = required(window, &key)?;
        let local_theta = gguf.float(&format!("{name}.rope.freq_base_swa"))?.unwrap_or(10_000.0);
        return Ok(Some(Gemma { window, local_theta, score_scalar }));
    }
    if let Some(window) = window {
        notes.push(format!("{key} is {window}: not applied, as llama.cpp does not for {name}"));
    }
    Ok(None)
}

fn find<'a>(gguf: &'a Gguf, name: &str) -> Result<&'a TensorInfo, ImportError> {
    let tensor = gguf.tensors.iter().find(|tensor| tensor.name == name);
    tensor.ok_or_else(|| ImportError::TensorMissing { name: name.into() })
}

/// Width of a head: stated, or hidden size over heads; even, and rotated as a whole.
fn head_dim(gguf: &Gguf, name: &str, hidden: u64, heads: u64) -> Result<u64, GgufError> {
    let key = |suffix: &str| format!("{name}.{suffix}");
    let stated = gguf.integer(&key("attention.key_length"), WIDTH_MAX)?;
    let head_dim = match stated {
        Some(stated) => stated,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let rule = format!("it must divide {hidden}, the width, or attention.key_length must be there");
            return Err(invalid(&key("attention.head_count"), heads, &rule));
        }
    };
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(invalid(&key("attention.key_length"), head_dim, "a head's width is even and not 0"));
    }
    for suffix in ["attention.value_length", "rope.dimension_count"] {
        if let Some(other) = gguf.integer(&key(suffix), WIDTH_MAX)?
            && other != head_dim
        {
            return Err(invalid(&key(suffix), other, &format!("it must equal the head's width, {head_dim}")));
        }
    }
    Ok(head_dim)
}

/// The shortest decimal that reads back as the same f32: 1e-5 instead of 9.999999747378752e-6.
pub fn decimal(number: f32) -> Json {
    let text = number.to_string();
    let number: f64 = text.parse().expect("a printed finite float parses");
    json!(number)
}
