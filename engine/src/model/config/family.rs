//! The decoder families by their names, and what an absent key of their `config.json` means.
//!
//! An absent key has the default of the model's own class, never that of another: the values are those of the
//! `configuration_*.py` of transformers 5.24.0, class by class. `null` is not absent; what it means is said where a key
//! is read.

use super::{Architecture, GateActivation};

/// Key-value heads where `num_key_value_heads` is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvHeads {
    /// As many as query heads.
    All,
    /// This many.
    Count(usize),
}

/// The defaults of a family's configuration class.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FamilyDefaults {
    /// Which it is.
    pub architecture: Architecture,
    /// Its class in `architectures`.
    pub class: &'static str,
    /// Its `model_type`, and further names of it.
    pub model_types: &'static [&'static str],
    /// `hidden_size`.
    pub hidden: usize,
    /// `intermediate_size`.
    pub intermediate: usize,
    /// `num_hidden_layers`.
    pub layers: usize,
    /// `num_attention_heads`.
    pub heads: usize,
    /// `num_key_value_heads`.
    pub kv_heads: KvHeads,
    /// `head_dim`; hidden size over heads where there is none.
    pub head_dim: Option<usize>,
    /// `vocab_size`.
    pub vocabulary: usize,
    /// `max_position_embeddings`.
    pub positions: usize,
    /// `rms_norm_eps`.
    pub eps: f64,
    /// `rope_theta`; for Gemma that of layers without a window.
    pub theta: f64,
    /// `tie_word_embeddings`.
    pub tied: bool,
    /// `sliding_window`.
    pub window: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `hidden_act`, for Gemma `hidden_activation`.
    pub activation: GateActivation,
}

const LLAMA: FamilyDefaults = FamilyDefaults {
    architecture: Architecture::Llama,
    class: "LlamaForCausalLM",
    model_types: &["llama"],
    hidden: 4096,
    intermediate: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: KvHeads::All,
    head_dim: None,
    vocabulary: 32_000,
    positions: 2048,
    eps: 1e-6,
    theta: 10_000.0,
    tied: false,
    window: None,
    eos: Some(2),
    activation: GateActivation::Silu,
};

const QWEN2: FamilyDefaults = FamilyDefaults {
    architecture: Architecture::Qwen2,
    class: "Qwen2ForCausalLM",
    model_types: &["qwen2"],
    intermediate: 22_016,
    kv_heads: KvHeads::Count(32),
    vocabulary: 151_936,
    positions: 32_768,
    window: Some(4096),
    eos: None,
    ..LLAMA
};

/// All families, in the order in which they are listed to users.
pub const FAMILIES: [FamilyDefaults; 9] = [
    LLAMA,
    FamilyDefaults {
        architecture: Architecture::Mistral,
        class: "MistralForCausalLM",
        model_types: &["mistral"],
        intermediate: 14_336,
        kv_heads: KvHeads::Count(8),
        positions: 4096 * 32,
        window: Some(4096),
        ..LLAMA
    },
    QWEN2,
    FamilyDefaults {
        architecture: Architecture::Qwen3,
        class: "Qwen3ForCausalLM",
        model_types: &["qwen3"],
        head_dim: Some(128),
        ..QWEN2
    },
    FamilyDefaults {
        architecture: Architecture::Gemma3,
        class: "Gemma3ForCausalLM",
        model_types: &["gemma3_text"],
        hidden: 2304,
        intermediate: 9216,
        layers: 26,
        heads: 8,
        kv_heads: KvHeads::Count(4),
        head_dim: Some(256),
        vocabulary: 262_208,
        positions: 131_072,
        theta: 1_000_000.0,
        tied: true,
        window: Some(4096),
        eos: Some(1),
        activation: GateActivation::GeluTanh,
        ..LLAMA
    },
    FamilyDefaults {
        architecture: Architecture::Phi3,
        class: "Phi3ForCausalLM",
        model_types: &["phi3"],
        hidden: 3072,
        intermediate: 8192,
        vocabulary: 32_064,
        positions: 4096,
        eps: 1e-5,
        eos: Some(32_000),
        ..LLAMA
    },
    FamilyDefaults {
        architecture: Architecture::SmolLm3,
        class: "SmolLM3ForCausalLM",
        model_types: &["smollm3"],
        hidden: 2048,
        layers: 36,
        heads: 16,
        kv_heads: KvHeads::Count(4),
        vocabulary: 128_256,
        positions: 32_768,
        theta: 2_000_000.0,
        tied: true,
        eos: Some(128_001),
        ..LLAMA
    },
    FamilyDefaults {
        architecture: Architecture::Olmo2,
        class: "Olmo2ForCausalLM",
        model_types: &["olmo2"],
        vocabulary: 50_304,
        eps: 1e-5,
        eos: Some(50_279),
        ..LLAMA
    },
    FamilyDefaults {
        architecture: Architecture::Granite,
        class: "GraniteForCausalLM",
        model_types: &["granite"],
        ..LLAMA
    },
];

impl FamilyDefaults {
    /// The family that `architectures` or, without a name there, `model_type` says.
    ///
    /// A class that is not known says nothing about its arithmetic, whatever the model type, with two exceptions: the
    /// bare model of a family (`LlamaModel`), whose tensors are the same, and another way to write a class
    /// (`LLaMAForCausalLM`, of the first Llama conversions).
    pub fn of(architectures: &[String], model_type: Option<&str>) -> Option<&'static FamilyDefaults> {
        let named = |class: &str| FAMILIES.iter().find(|family| family.names(class));
        if let Some(family) = architectures.iter().find_map(|class| named(class)) {
            return Some(family);
        }
        let of_type = |model_type| FAMILIES.iter().find(|family| family.model_types.contains(&model_type));
        of_type(model_type?).filter(|_| architectures.is_empty())
    }

    fn names(&self, class: &str) -> bool {
        let stem = self.class.strip_suffix("ForCausalLM").unwrap_or(self.class);
        class.eq_ignore_ascii_case(self.class) || class.strip_suffix("Model") == Some(stem)
    }
}
