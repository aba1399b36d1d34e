//! From the fields of a `config.json`, with the defaults of its class, to a decoder's sizes and choices.

use super::family::{FamilyDefaults, KvHeads};
use super::fields::Fields;
use super::layers::Layered;
use super::{
    Architecture, DecoderConfig, EOS_MAX, GateActivation, LAYERS_MAX, ModelConfigError, NormPlaces,
    POSITIONS_MAX, QkNorms, WIDTH_MAX, bounded, refuse,
};
use crate::model::rope;
use crate::model::source::StoredDtype;

/// The key of the cap of scores.
const SCORE_CAP: &str = "attn_logit_softcapping";

/// A `config.json` beside the defaults of its class.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    pub family: &'static FamilyDefaults,
    pub fields: Fields<'a>,
}

impl Reader<'_> {
    /// Whether the family is one of these.
    pub fn is(&self, architectures: &[Architecture]) -> bool {
        architectures.contains(&self.family.architecture)
    }

    /// Everything that the decoder is, checked. `ends` are further files that name ends of a sequence.
    pub fn decoder(&self, ends: [Option<Fields<'_>>; 2]) -> Result<DecoderConfig, ModelConfigError> {
        use Architecture::{Gemma2, Gemma3, Mistral, Olmo2, Phi3, Qwen2, Qwen3};
        let activation = self.check_unsupported()?;
        let (family, fields) = (self.family, self.fields);
        let hidden =
            bounded("hidden_size", fields.count("hidden_size")?.unwrap_or(family.hidden), WIDTH_MAX)?;
        let (heads, kv_heads, head_dim) = self.heads(hidden)?;
        let vocabulary = fields.count("vocab_size")?.unwrap_or(family.vocabulary);
        let positions = fields.count("max_position_embeddings")?.unwrap_or(family.positions);
        let positions = bounded("max_position_embeddings", positions, POSITIONS_MAX)?;
        let intermediate = fields.count("intermediate_size")?.unwrap_or(family.intermediate);
        let bias = !self.is(&[Qwen2, Mistral, Phi3]) && fields.flag("attention_bias")?.unwrap_or(false);
        let layers = fields.count("num_hidden_layers")?.unwrap_or(family.layers);
        let layers = bounded("num_hidden_layers", layers, LAYERS_MAX)?;
        let layered = Layered { raw: *self, layers };
        let (windows, unturned) = (layered.windows()?, layered.unturned()?);
        let (ropes, local) = rope::parse(fields, family, (head_dim, positions))?;
        let rope_of = |layer: usize| match windows[layer] {
            _ if unturned[layer] => None,
            Some(_) => Some(local),
            None => Some(0),
        };
        let rope_of = (0..layers).map(rope_of).collect();
        let factors = self.factors(hidden, head_dim)?;
        Ok(DecoderConfig {
            architecture: family.architecture,
            hidden,
            intermediate: bounded("intermediate_size", intermediate, WIDTH_MAX)?,
            heads,
            kv_heads,
            head_dim,
            vocabulary: bounded("vocab_size", vocabulary, WIDTH_MAX)?,
            positions_max: positions as u32,
            rms_norm_eps: self.eps()?,
            norm_offset: if self.is(&[Gemma2, Gemma3]) { 1.0 } else { 0.0 },
            norms: match family.architecture {
                Gemma2 | Gemma3 => NormPlaces::Around,
                Olmo2 => NormPlaces::Behind,
                _ => NormPlaces::Before,
            },
            activation,
            ropes,
            rope_of,
            qkv_bias: bias || self.is(&[Qwen2]),
            output_bias: bias,
            qk_norm: match family.architecture {
                Qwen3 | Gemma3 => QkNorms::Heads,
                Olmo2 => QkNorms::Whole,
                _ => QkNorms::None,
            },
            fused: self.is(&[Phi3]),
            tied: fields.flag("tie_word_embeddings")?.unwrap_or(family.tied),
            attention_scale: factors.attention,
            embedding_scale: factors.embedding,
            branch_scale: factors.branch,
            logits_divisor: factors.logits,
            score_cap: self.cap(SCORE_CAP, family.score_cap)?,
            logits_cap: self.cap("final_logit_softcapping", family.logits_cap)?,
            windows,
            eos: self.eos(ends, vocabulary)?,
            stored: self.stored(),
            quantised: None,
        })
    }

    /// The factors of Gemma and Granite.
    fn factors(&self, hidden: usize, head_dim: usize) -> Result<Factors, ModelConfigError> {
        let positive = |field| match self.fields.number(field)? {
            Some(factor) if factor > 0.0 && factor <= 1e6 => Ok(Some(factor as f32)),
            Some(factor) => refuse(field, factor, "above 0 and at most 1e6"),
            None => Ok(None),
        };
        let usual =
            Factors { attention: (head_dim as f32).powf(-0.5), embedding: 1.0, branch: 1.0, logits: 1.0 };
        Ok(match self.family.architecture {
            Architecture::Gemma2 | Architecture::Gemma3 => {
                if self.fields.flag("use_bidirectional_attention")? == Some(true) {
                    return refuse("use_bidirectional_attention", true, "false");
                }
                let scalar = positive("query_pre_attn_scalar")?.unwrap_or(256.0);
                Factors { attention: scalar.powf(-0.5), embedding: (hidden as f32).sqrt(), ..usual }
            }
            Architecture::Granite => Factors {
                attention: positive("attention_multiplier")?.unwrap_or(1.0),
                embedding: positive("embedding_multiplier")?.unwrap_or(1.0),
                branch: positive("residual_multiplier")?.unwrap_or(1.0),
                logits: positive("logits_scaling")?.unwrap_or(1.0),
            },
            _ => usual,
        })
    }

    /// A soft cap, where the family knows them: absent it is the class's, `null` is none.
    fn cap(&self, field: &'static str, absent: Option<f32>) -> Result<Option<f32>, ModelConfigError> {
        if !self.is(&[Architecture::Gemma2, Architecture::Gemma3]) {
            return Ok(None);
        }
        match self.fields.number(field)? {
            // transformers 5.24 reads that of scores for Gemma 3 and does not apply it; other engines do.
            Some(cap) if field == SCORE_CAP && self.is(&[Architecture::Gemma3]) => {
                refuse(field, cap, "null: whether Gemma 3 caps its scores depends on who computes it")
            }
            Some(cap) if cap > 0.0 && cap <= 1e6 => Ok(Some(cap as f32)),
            Some(cap) => refuse(field, cap, "above 0 and at most 1e6, or null"),
            None if self.fields.is_null(field) => Ok(None),
            None => Ok(absent),
        }
    }

    /// Refuses what the decoder does not do; gives the activation.
    fn check_unsupported(&self) -> Result<GateActivation, ModelConfigError> {
        let has_mlp_bias = self.is(&[Architecture::Llama, Architecture::SmolLm3, Architecture::Granite]);
        if has_mlp_bias && self.fields.flag("mlp_bias")? == Some(true) {
            return refuse("mlp_bias", true, "false");
        }
        let gemma = self.is(&[Architecture::Gemma2, Architecture::Gemma3]);
        let field = if gemma { "hidden_activation" } else { "hidden_act" };
        match self.fields.text(field)? {
            None => Ok(self.family.activation),
            Some("silu" | "swish") => Ok(GateActivation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(GateActivation::GeluTanh),
            Some(other) => refuse(field, format!("{other:?}"), "\"silu\" or \"gelu_pytorch_tanh\""),
        }
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
    pub fn window(&self) -> Result<Option<u32>, ModelConfigError> {
        const FIELD: &str = "sliding_window";
        match self.fields.count(FIELD)? {
            Some(0) => refuse(FIELD, 0, "at least 1, or null"),
            // A window beyond all positions is none.
            Some(window) => Ok(u32::try_from(window).ok()),
            None if self.fields.is_null(FIELD) => Ok(None),
            None => Ok(self.family.window),
        }
    }

    /// The ids of both files. One outside of the vocabulary can never come and ends nothing.
    fn eos(&self, ends: [Option<Fields<'_>>; 2], vocabulary: usize) -> Result<Vec<u32>, ModelConfigError> {
        const FIELD: &str = "eos_token_id";
        let mut eos = Vec::new();
        let files = [Some(self.fields), ends[0], ends[1]].into_iter().flatten();
        let said = files.filter_map(|file| file.value(FIELD));
        let mut names_any = self.fields.is_null(FIELD);
        for ids in said {
            names_any = true;
            let list = ids.as_array().map_or(std::slice::from_ref(ids), Vec::as_slice);
            for id in list {
                // A whole number may stand as a float.
                let whole = id.as_f64().filter(|id| id.fract() == 0.0 && id.abs() < 1e15);
                match id.as_i64().or(whole.map(|id| id as i64)) {
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

/// Factors of a decoder; see [`DecoderConfig`].
struct Factors {
    attention: f32,
    embedding: f32,
    branch: f32,
    logits: f32,
}
