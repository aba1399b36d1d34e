//! Real configurations, both spellings of RoPE, and a table of refusals.

use serde_json::{Value, json};

use super::*;
use crate::model::rope::RopeScaling;

/// SmolLM2-135M-Instruct, as published.
fn smollm2() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": true,
        "max_position_embeddings": 8192, "mlp_bias": false, "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_interleaved": false, "rope_scaling": null,
        "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 49152
    })
}

fn with(changes: Value) -> Value {
    changed(&smollm2(), changes)
}

fn changed(object: &Value, changes: Value) -> Value {
    let mut object = object.clone();
    for (field, value) in changes.as_object().expect("an object") {
        object[field] = value.clone();
    }
    object
}

fn frequencies(rope: &Rope) -> Vec<f32> {
    rope.plan(64, 64).inverse_frequencies
}

fn parse(config: &Value) -> Result<DecoderConfig, ModelConfigError> {
    DecoderConfig::parse(&config.to_string(), None)
}

#[test]
fn smollm2_is_read() {
    let config = parse(&smollm2()).expect("valid");
    assert_eq!(config.parameters(), 134_515_008, "as published");
    assert_eq!((config.heads, config.kv_heads, config.head_dim, config.layers()), (9, 3, 64, 30));
    assert_eq!(config.ropes, [Rope { theta: 100_000.0, share: 1.0, scaling: RopeScaling::None }]);
    assert_eq!((config.eos.as_slice(), config.stored), ([2].as_slice(), Some(StoredDtype::Bf16)));
    assert!(config.tied && !config.qkv_bias && !config.output_bias && config.qk_norm == QkNorms::None);
    assert!(config.windows.iter().all(Option::is_none));
}

#[test]
fn both_files_name_ends_of_sequence() {
    let config = with(json!({"eos_token_id": [5, 2]})).to_string();
    let parsed = DecoderConfig::parse(&config, Some(r#"{"eos_token_id": 7}"#)).expect("valid");
    assert_eq!(parsed.eos, [2, 5, 7]);
    let error = DecoderConfig::parse(&config, Some("[")).expect_err("no JSON");
    assert!(error.to_string().starts_with("generation_config.json:"), "{error}");
}

#[test]
fn llama3_scaling_in_both_spellings() {
    let scaling = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let old = parse(&with(json!({"rope_scaling": scaling, "rope_theta": 500000.0}))).expect("valid");
    let mut parameters = scaling;
    parameters["rope_theta"] = json!(500000.0);
    let new = parse(&with(json!({"rope_parameters": parameters, "rope_theta": null}))).expect("valid");
    assert_eq!(old.ropes, new.ropes);
    let old = old.ropes[0].clone();
    let plain = Rope { scaling: RopeScaling::None, ..old.clone() };
    let (scaled, plain) = (frequencies(&old), frequencies(&plain));
    assert_eq!(scaled[0], plain[0], "the shortest wavelength is kept");
    assert_eq!(scaled[31], plain[31] / 32.0, "the longest is divided");
    assert!(scaled.windows(2).all(|pair| pair[0] > pair[1]));
}

#[test]
fn linear_scaling_divides_every_frequency() {
    let config = parse(&with(json!({"rope_scaling": {"type": "linear", "factor": 4.0}}))).expect("valid");
    let plain = parse(&smollm2()).expect("valid");
    let divided: Vec<f32> = frequencies(&plain.ropes[0]).iter().map(|f| f / 4.0).collect();
    assert_eq!(frequencies(&config.ropes[0]), divided);
}

#[test]
fn families_differ_where_they_should() {
    let qwen2 = parse(&with(json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32,
        "use_sliding_window": false})))
    .expect("valid");
    assert!(qwen2.qkv_bias && !qwen2.output_bias && qwen2.windows[0].is_none());
    let windowed = parse(&with(json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32,
        "use_sliding_window": true, "max_window_layers": 28})))
    .expect("valid");
    assert_eq!((windowed.windows[27], windowed.windows[28]), (None, Some(32)));
    let qwen3 = parse(&with(json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": 128}))).expect("valid");
    assert!(qwen3.qk_norm == QkNorms::Heads && !qwen3.qkv_bias);
    assert_eq!(qwen3.qkv_width(), 15 * 128);
    let mistral = parse(&with(json!({"architectures": ["MistralForCausalLM"], "sliding_window": 4096})))
        .expect("valid");
    assert_eq!(mistral.windows, vec![Some(4096); 30]);
    let biased = parse(&with(json!({"attention_bias": true}))).expect("valid");
    assert!(biased.qkv_bias && biased.output_bias);
}

#[test]
fn refusals_name_field_value_and_what_it_may_be() {
    let llama3 = |changes: Value| {
        let mut scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        for (field, value) in changes.as_object().expect("an object") {
            scaling[field] = value.clone();
        }
        json!({"rope_scaling": scaling})
    };
    let cases = [
        (json!({"architectures": ["GPT2LMHeadModel"]}), "architectures is [\"GPT2LMHeadModel\"]", "Qwen3"),
        (json!({"architectures": null}), "architectures is []", "LlamaForCausalLM"),
        (json!({"hidden_size": 0}), "hidden_size is 0", "from 1 to 4194304"),
        (json!({"hidden_size": 577}), "hidden_size is 577", "a multiple of num_attention_heads, 9"),
        (json!({"intermediate_size": 5_000_000}), "intermediate_size is 5000000", "from 1 to 4194304"),
        (json!({"num_hidden_layers": 100_000}), "num_hidden_layers is 100000", "from 1 to 1024"),
        (
            json!({"num_key_value_heads": 2}),
            "num_key_value_heads is 2",
            "a divisor of num_attention_heads, 9",
        ),
        (json!({"num_key_value_heads": 18}), "num_key_value_heads is 18", "from 1 to 9"),
        (json!({"head_dim": 63}), "head_dim is 63", "even"),
        (json!({"vocab_size": 0}), "vocab_size is 0", "from 1 to 4194304"),
        (json!({"max_position_embeddings": 0}), "max_position_embeddings is 0", "from 1"),
        (json!({"rms_norm_eps": -1e-5}), "rms_norm_eps is -0.00001", "above 0 and below 1"),
        (json!({"rope_theta": 0}), "rope_theta is 0", "from 1 to 1e12"),
        (
            json!({"rope_scaling": {"rope_type": "fisher", "factor": 4.0}}),
            "rope_type is \"fisher\"",
            "llama3",
        ),
        (json!({"rope_scaling": {"rope_type": "longrope"}}), "short_factor is 0 numbers", "32 numbers"),
        (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor is absent", "a number"),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 0.5}}),
            "rope_scaling.factor is 0.5",
            "at least 1",
        ),
        (llama3(json!({"high_freq_factor": 1.0})), "high_freq_factor is 1", "above low_freq_factor, 1"),
        (json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\"", "\"gelu_pytorch_tanh\""),
        (json!({"mlp_bias": true}), "mlp_bias is true", "false"),
        (json!({"quantization_config": {"quant_method": "quip"}}), "quant_method is quip", "gptq"),
        (json!({"eos_token_id": "2"}), "eos_token_id is \"2\"", "a token id"),
        (json!({"rms_norm_eps": "NaN"}), "rms_norm_eps is \"NaN\"", "a number"),
        (json!({"hidden_size": 576.5}), "hidden_size is 576.5", "a whole number"),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings is \"yes\"", "true or false"),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor is 0.5", "1"),
        (
            json!({"architectures": ["MistralForCausalLM"], "sliding_window": 0}),
            "sliding_window is 0",
            "at least 1",
        ),
        (
            json!({"architectures": ["Qwen3ForCausalLM"], "sliding_window": 8, "use_sliding_window": true,
                "layer_types": ["full_attention"]}),
            "layer_types is 1 entries",
            "30 entries",
        ),
    ];
    for (changes, value, expected) in cases {
        let error = parse(&with(changes.clone())).expect_err(&changes.to_string()).to_string();
        assert!(error.starts_with("config.json: "), "{error}");
        assert!(error.contains(value) && error.contains(expected), "{changes}: {error}");
    }
}

#[test]
fn what_is_no_configuration_is_refused() {
    let llama = |field| format!(r#"{{"model_type": "llama", "hidden_size": {field}}}"#);
    for broken in ["", "[]", "{}", &llama("-1"), &llama("1e99"), &llama("NaN")] {
        let error = DecoderConfig::parse(broken, None).expect_err(broken).to_string();
        assert!(error.starts_with("config.json: "), "{error}");
    }
}

#[test]
fn missing_and_oversized_files_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let error = DecoderConfig::read(folder.path()).expect_err("missing").to_string();
    assert!(error.contains("config.json"), "{error}");
    let file = std::fs::File::create(folder.path().join("config.json")).expect("created");
    file.set_len(FILE_BYTES_MAX + 1).expect("sized");
    let error = DecoderConfig::read(folder.path()).expect_err("too large").to_string();
    assert!(error.contains("1048577 bytes; the limit is 1048576"), "{error}");
}

#[test]
fn two_spellings_of_a_key_are_read_and_the_newer_wins() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024});
    let both = changed(&llama3, json!({"type": "linear"}));
    let of = |changes: Value| parse(&with(changes)).expect("valid");
    let right = of(json!({"rope_scaling": llama3})).ropes;
    assert_eq!(of(json!({"rope_scaling": both})).ropes, right);
    let older = json!({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": llama3});
    assert_eq!(of(older).ropes[0].scaling, right[0].scaling);
    // What holds nothing gives way.
    for empty in [json!(null), json!({})] {
        assert_eq!(of(json!({"rope_scaling": llama3, "rope_parameters": empty})).ropes, right);
    }
    let typeless = changed(&llama3, json!({"rope_type": null, "type": "llama3"}));
    assert_eq!(of(json!({"rope_scaling": typeless})).ropes, right);
    let dtypes = |newer: Value, older: Value| of(json!({"dtype": newer, "torch_dtype": older})).stored;
    assert_eq!(dtypes(json!("float32"), json!("bfloat16")), Some(StoredDtype::F32));
    assert_eq!(dtypes(json!(null), json!("bfloat16")), Some(StoredDtype::Bf16));
    assert_eq!(dtypes(json!("torch.float16"), json!("bfloat16")), Some(StoredDtype::F16));
    let theta = json!({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}});
    assert_eq!(of(theta).ropes[0].theta, 7.0);
}

#[test]
fn fields_that_nobody_needs_refuse_nothing() {
    for changes in [
        json!({"torch_dtype": "int8"}),
        json!({"torch_dtype": 7}),
        json!({"eos_token_id": [2, 49152, -1]}),
        json!({"sliding_window": "wide", "layer_types": 3, "max_window_layers": null}),
        json!({"quantization_config": null}),
        json!({"quantization_config": {}}),
        json!({"attention_bias": null, "mlp_bias": null, "tie_word_embeddings": true}),
        json!({"attention_bias": 0, "hidden_size": 576.0}),
        json!({"rope_scaling": {}}),
        json!({"rope_scaling": {"rope_type": null}}),
        json!({"num_experts": "none", "pad_token_id": -1}),
    ] {
        let config = parse(&with(changes.clone())).unwrap_or_else(|error| panic!("{changes}: {error}"));
        assert_eq!((config.eos, config.hidden), (vec![2], 576), "{changes}");
    }
    let python =
        smollm2().to_string().replacen('{', r#"{"softcaps": [0.0, Infinity, -Infinity], "probe": NaN, "#, 1);
    DecoderConfig::parse(&format!("\u{feff}{python}"), Some("\u{feff}{\"x\": NaN}")).expect("valid");
}

#[test]
fn a_model_type_alone_names_the_family() {
    let of = |architectures: Value, model_type: &str| {
        parse(&with(json!({"architectures": architectures, "model_type": model_type})))
            .map(|c| c.architecture)
    };
    assert_eq!(of(json!(null), "qwen3").expect("valid"), Architecture::Qwen3);
    assert_eq!(of(json!([]), "mistral").expect("valid"), Architecture::Mistral);
    assert_eq!(of(json!(["LLaMAForCausalLM"]), "llama").expect("valid"), Architecture::Llama);
    assert_eq!(of(json!(["Qwen2Model"]), "qwen2").expect("valid"), Architecture::Qwen2);
    for (architectures, model_type) in [
        (json!(["LlamaForCausalLMEagle3"]), "llama"),
        (json!(["Qwen2ForSequenceClassification"]), "qwen2"),
        (json!([]), "gpt2"),
    ] {
        let error = of(architectures, model_type).expect_err("refused").to_string();
        assert!(error.contains("architectures is ["), "{error}");
    }
}

/// Every default, as `LlamaConfig()` and the others of transformers 5.24.0 print them.
#[test]
fn an_absent_key_has_its_classs_default() {
    let of = |model_type: &str, changes: Value| {
        let mut config = changes;
        config["model_type"] = json!(model_type);
        parse(&config).unwrap_or_else(|error| panic!("{model_type}: {error}"))
    };
    let sizes = |c: &DecoderConfig| {
        (c.hidden, c.intermediate, c.layers(), c.heads, c.kv_heads, c.head_dim, c.vocabulary, c.positions_max)
    };
    let llama = of("llama", json!({}));
    assert_eq!(sizes(&llama), (4096, 11_008, 32, 32, 32, 128, 32_000, 2048));
    assert_eq!(
        (llama.rms_norm_eps, llama.ropes[0].theta, llama.tied, llama.eos.as_slice()),
        (1e-6, 1e4, false, &[2][..])
    );
    let mistral = of("mistral", json!({}));
    assert_eq!(sizes(&mistral), (4096, 14_336, 32, 32, 8, 128, 32_000, 131_072));
    assert_eq!((mistral.windows[0], mistral.eos.as_slice()), (Some(4096), &[2][..]));
    let qwen2 = of("qwen2", json!({}));
    assert_eq!(sizes(&qwen2), (4096, 22_016, 32, 32, 32, 128, 151_936, 32_768));
    assert_eq!((qwen2.windows[0], qwen2.eos.len()), (None, 0));
    let qwen3 = of("qwen3", json!({"hidden_size": 1024, "num_attention_heads": 32}));
    assert_eq!(qwen3.head_dim, 128, "not hidden size over heads");
    // Null is said, not absent.
    assert_eq!(of("mistral", json!({"sliding_window": null})).windows[0], None);
    assert_eq!(of("mistral", json!({"num_key_value_heads": null})).kv_heads, 32);
    assert_eq!(of("llama", json!({"eos_token_id": null})).eos.len(), 0);
    let late = of("qwen2", json!({"use_sliding_window": true}));
    assert_eq!((late.windows[27], late.windows[28]), (None, Some(4096)), "max_window_layers is 28");
}

/// As `Gemma3TextConfig()` and the others print them.
#[test]
fn the_wider_families_have_their_classes_defaults() {
    let of = |model_type: &str| parse(&json!({"model_type": model_type})).expect(model_type);
    let sizes = |c: &DecoderConfig| {
        (c.hidden, c.intermediate, c.layers(), c.heads, c.kv_heads, c.head_dim, c.vocabulary, c.positions_max)
    };
    let gemma = of("gemma3_text");
    assert_eq!(sizes(&gemma), (2304, 9216, 26, 8, 4, 256, 262_208, 131_072));
    assert_eq!((gemma.windows[4], gemma.windows[5], gemma.windows[6]), (Some(4096), None, Some(4096)));
    assert_eq!((gemma.ropes[0].theta, gemma.ropes[1].theta), (1e6, 1e4));
    assert_eq!((gemma.rope_of[5], gemma.rope_of[6]), (Some(0), Some(1)));
    assert_eq!((gemma.attention_scale, gemma.embedding_scale), (1.0 / 16.0, 48.0));
    assert!(gemma.tied && gemma.eos == [1] && gemma.activation == GateActivation::GeluTanh);
    assert_eq!((gemma.score_cap, gemma.logits_cap), (None, None));
    let gemma2 = of("gemma2");
    assert_eq!(sizes(&gemma2), (2304, 9216, 26, 8, 4, 256, 256_000, 8192));
    assert_eq!((gemma2.windows[0], gemma2.windows[1], gemma2.ropes.len()), (Some(4096), None, 1));
    assert_eq!((gemma2.score_cap, gemma2.logits_cap, gemma2.norm_offset), (Some(50.0), Some(30.0), 1.0));
    let uncapped = parse(&json!({"model_type": "gemma2", "attn_logit_softcapping": null})).expect("valid");
    assert_eq!((uncapped.score_cap, uncapped.logits_cap), (None, Some(30.0)));
    let phi3 = of("phi3");
    assert_eq!(sizes(&phi3), (3072, 8192, 32, 32, 32, 96, 32_064, 4096));
    assert!(phi3.fused && phi3.eos == [32_000] && phi3.windows[0].is_none());
    let smollm3 = of("smollm3");
    assert_eq!(sizes(&smollm3), (2048, 11_008, 36, 16, 4, 128, 128_256, 32_768));
    assert_eq!((smollm3.rope_of[2], smollm3.rope_of[3], smollm3.ropes[0].theta), (Some(0), None, 2e6));
    assert!(smollm3.tied && smollm3.eos == [128_001]);
    let olmo2 = of("olmo2");
    assert_eq!(sizes(&olmo2), (4096, 11_008, 32, 32, 32, 128, 50_304, 2048));
    assert_eq!(
        (olmo2.norms, olmo2.qk_norm, olmo2.eos.as_slice()),
        (NormPlaces::Behind, QkNorms::Whole, &[50_279][..])
    );
    let granite = of("granite");
    assert_eq!(sizes(&granite), (4096, 11_008, 32, 32, 32, 128, 32_000, 2048));
    assert_eq!((granite.attention_scale, granite.branch_scale), (1.0, 1.0), "the class's factors are 1");
}

#[test]
fn rope_parameters_by_kind_of_layer_and_the_older_spelling_are_one() {
    let gemma = |changes: Value| {
        let config = changed(&json!({"model_type": "gemma3_text", "num_hidden_layers": 6}), changes);
        parse(&config).expect("valid").ropes
    };
    let older = gemma(json!({"rope_theta": 5e5, "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}));
    let newer = gemma(json!({"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}}));
    assert_eq!(older, newer);
    assert_eq!(newer[0].scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!((newer[1].theta, &newer[1].scaling), (2e4, &RopeScaling::None));
}

#[test]
fn a_decoder_inside_of_another_model_is_read() {
    let text = json!({"model_type": "gemma3_text", "num_hidden_layers": 2});
    let whole = json!({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "eos_token_id": [1, 106], "text_config": text, "vision_config": {"hidden_size": "any"}});
    let config = parse(&whole).expect("valid");
    assert_eq!((config.architecture, config.layers()), (Architecture::Gemma3, 2));
    assert_eq!(config.eos, [1, 106]);
    let other = json!({"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}});
    assert!(parse(&other).expect_err("refused").to_string().contains("qwen2_vl_text"));
}
