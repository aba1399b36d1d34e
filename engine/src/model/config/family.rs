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
    /// The published models, for the documents.
    pub models: &'static str,
    /// What it has beside the first family, for the documents.
    pub own: &'static str,
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
    /// `attn_logit_softcapping`.
    pub score_cap: Option<f32>,
    /// `final_logit_softcapping`.
    pub logits_cap: Option<f32>,
}

const LLAMA: FamilyDefaults = FamilyDefaults {
    architecture: Architecture::Llama,
    class: "LlamaForCausalLM",
    model_types: &["llama"],
    models: "Llama 1 to 3, SmolLM2 and relatives",
    own: "",
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
    score_cap: None,
    logits_cap: None,
};

const QWEN2: FamilyDefaults = FamilyDefaults {
    architecture: Architecture::Qwen2,
    class: "Qwen2ForCausalLM",
    model_types: &["qwen2"],
    models: "Qwen2, Qwen2.5",
    own: "biases on Q, K and V; windows by layer",
    intermediate: 22_016,
    kv_heads: KvHeads::Count(32),
    vocabulary: 151_936,
    positions: 32_768,
    window: Some(4096),
    eos: None,
    ..LLAMA
};

const GEMMA2: FamilyDefaults = FamilyDefaults {
    architecture: Architecture::Gemma2,
    class: "Gemma2ForCausalLM",
    model_types: &["gemma2"],
    models: "Gemma 2",
    own: "windows on each second layer, norms around both branches, scaled embeddings, soft caps",
    hidden: 2304,
    intermediate: 9216,
    layers: 26,
    heads: 8,
    kv_heads: KvHeads::Count(4),
    head_dim: Some(256),
    vocabulary: 256_000,
    positions: 8192,
    tied: true,
    window: Some(4096),
    eos: Some(1),
    activation: GateActivation::GeluTanh,
    score_cap: Some(50.0),
    logits_cap: Some(30.0),
    ..LLAMA
};

/// All families, in the order in which they are listed to users.
pub const FAMILIES: [FamilyDefaults; 10] = [
    LLAMA,
    FamilyDefaults {
        architecture: Architecture::Mistral,
        class: "MistralForCausalLM",
        model_types: &["mistral"],
        models: "Mistral",
        own: "one sliding window for all layers, where `sliding_window` is set",
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
        models: "Qwen3",
        own: "norms on the heads of Q and K; windows by layer",
        head_dim: Some(128),
        ..QWEN2
    },
    GEMMA2,
    FamilyDefaults {
        architecture: Architecture::Gemma3,
        class: "Gemma3ForCausalLM",
        model_types: &["gemma3_text"],
        models: "Gemma 3, text",
        own: "windows but for each sixth layer, norms around both branches and on the heads of Q and K",
        vocabulary: 262_208,
        positions: 131_072,
        theta: 1_000_000.0,
        score_cap: None,
        logits_cap: None,
        ..GEMMA2
    },
    FamilyDefaults {
        architecture: Architecture::Phi3,
        class: "Phi3ForCausalLM",
        model_types: &["phi3"],
        models: "Phi-3, Phi-4",
        own: "matrices stored together, RoPE of a part of a head",
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
        models: "SmolLM3",
        own: "each fourth layer without RoPE",
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
        models: "OLMo 2",
        own: "norms behind both branches, and over all of Q and of K",
        vocabulary: 50_304,
        eps: 1e-5,
        eos: Some(50_279),
        ..LLAMA
    },
    FamilyDefaults {
        architecture: Architecture::Granite,
        class: "GraniteForCausalLM",
        model_types: &["granite"],
        models: "Granite",
        own: "factors on embeddings, branches, scores and logits",
        ..LLAMA
    },
];

/// The families as the documents list them: a table in Markdown.
pub fn table() -> String {
    let mut table = "| architecture | `model_type` | models | of its own |\n|---|---|---|---|\n".to_owned();
    for family in &FAMILIES {
        let types = family.model_types.join("`, `");
        let own = if family.own.is_empty() { String::new() } else { format!("{} ", family.own) };
        table += &format!("| `{}` | `{types}` | {} | {own}|\n", family.class, family.models);
    }
    table
}

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// `MILLRACE_UPDATE=1` writes the page's table anew.
    #[test]
    fn the_page_of_models_lists_the_families() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/models.md");
        let page = std::fs::read_to_string(path).unwrap();
        let begin = page.find("| architecture |").unwrap();
        let end = begin + page[begin..].find("\n\n").unwrap() + 1;
        if std::env::var_os("MILLRACE_UPDATE").is_some() {
            std::fs::write(path, format!("{}{}{}", &page[..begin], table(), &page[end..])).unwrap();
            return;
        }
        assert_eq!(page[begin..end], table(), "look, then run with MILLRACE_UPDATE=1");
    }

    #[test]
    fn each_family_is_described_by_itself() {
        let of = |text: fn(&FamilyDefaults) -> &'static str| -> BTreeSet<&str> {
            FAMILIES.iter().map(text).collect()
        };
        assert_eq!(of(|family| family.models).len(), FAMILIES.len());
        assert_eq!(of(|family| family.own).len(), FAMILIES.len());
        assert_eq!(of(|family| family.class).len(), FAMILIES.len());
    }
}
