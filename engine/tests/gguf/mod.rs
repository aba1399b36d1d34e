//! Small GGUF files of each family, written by candle, and the random numbers in them.

use std::io::Cursor;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

pub const HIDDEN: usize = 256;
pub const FEED_FORWARD: usize = 512;
pub const HEADS: usize = 8;
pub const KV_HEADS: usize = 4;
pub const HEAD_DIM: usize = HIDDEN / HEADS;
pub const LAYERS: usize = 2;

/// SplitMix64 (Steele, Lea, Flood 2014).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// A model in the making: its metadata, and its tensors under the names of GGUF and of Hugging Face.
pub struct Model {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<(String, String, QTensor)>,
}

impl Model {
    /// A model of `llama`, `qwen2`, `qwen3` or `gemma3`; matrices in `format`, vectors in f32.
    pub fn new(family: &str, format: GgmlDType, seed: u64) -> Self {
        let mut model = Self { metadata: metadata(family), tensors: Vec::new() };
        let mut random = Random(seed);
        let mut add = |gguf: String, name: String, shape: &[usize]| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.unit() / 8.0).collect();
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor");
            let format = if shape.len() == 1 { GgmlDType::F32 } else { format };
            model.tensors.push((gguf, name, QTensor::quantize(&tensor, format).expect("whole blocks")));
        };
        let tokens = tokens().len();
        add("token_embd.weight".into(), "model.embed_tokens.weight".into(), &[tokens, HIDDEN]);
        add("output_norm.weight".into(), "model.norm.weight".into(), &[HIDDEN]);
        let tied = ["qwen2", "gemma3"].contains(&family);
        if !tied {
            add("output.weight".into(), "lm_head.weight".into(), &[tokens, HIDDEN]);
        }
        let kv = KV_HEADS * HEAD_DIM;
        let mut parts: Vec<(&str, &str, Vec<usize>)> = vec![
            ("attn_norm.weight", "input_layernorm.weight", vec![HIDDEN]),
            ("ffn_norm.weight", "post_attention_layernorm.weight", vec![HIDDEN]),
            ("attn_q.weight", "self_attn.q_proj.weight", vec![HIDDEN, HIDDEN]),
            ("attn_k.weight", "self_attn.k_proj.weight", vec![kv, HIDDEN]),
            ("attn_v.weight", "self_attn.v_proj.weight", vec![kv, HIDDEN]),
            ("attn_output.weight", "self_attn.o_proj.weight", vec![HIDDEN, HIDDEN]),
            ("ffn_gate.weight", "mlp.gate_proj.weight", vec![FEED_FORWARD, HIDDEN]),
            ("ffn_up.weight", "mlp.up_proj.weight", vec![FEED_FORWARD, HIDDEN]),
            ("ffn_down.weight", "mlp.down_proj.weight", vec![HIDDEN, FEED_FORWARD]),
        ];
        if family == "qwen2" {
            parts.push(("attn_q.bias", "self_attn.q_proj.bias", vec![HIDDEN]));
            parts.push(("attn_k.bias", "self_attn.k_proj.bias", vec![kv]));
            parts.push(("attn_v.bias", "self_attn.v_proj.bias", vec![kv]));
        }
        if family == "gemma3" {
            parts[1] = ("ffn_norm.weight", "pre_feedforward_layernorm.weight", vec![HIDDEN]);
            parts.push(("post_attention_norm.weight", "post_attention_layernorm.weight", vec![HIDDEN]));
            parts.push(("post_ffw_norm.weight", "post_feedforward_layernorm.weight", vec![HIDDEN]));
        }
        if ["qwen3", "gemma3"].contains(&family) {
            parts.push(("attn_q_norm.weight", "self_attn.q_norm.weight", vec![HEAD_DIM]));
            parts.push(("attn_k_norm.weight", "self_attn.k_norm.weight", vec![HEAD_DIM]));
        }
        for layer in 0..LAYERS {
            for (gguf, name, shape) in &parts {
                add(format!("blk.{layer}.{gguf}"), format!("model.layers.{layer}.{name}"), shape);
            }
        }
        model
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let metadata: Vec<(&str, &Value)> =
            self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<(&str, &QTensor)> =
            self.tensors.iter().map(|(name, _, tensor)| (name.as_str(), tensor)).collect();
        let mut file = Cursor::new(Vec::new());
        gguf_file::write(&mut file, &metadata, &tensors).expect("written");
        file.into_inner()
    }
}

/// Two special tokens, one token for each byte in GPT-2's letters, and two merged ones.
pub fn tokens() -> Vec<String> {
    let itself = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut stand_in = 256..;
    let mut letter = |b: u32| if itself(b) { b } else { stand_in.next().expect("endless") };
    let letters = (0..256).map(|b| char::from_u32(letter(b)).expect("a letter").to_string());
    let special = ["<|begin|>", "<|end|>"].map(str::to_owned);
    special
        .into_iter()
        .chain(letters.collect::<Vec<_>>())
        .chain(["he".to_owned(), "hel".to_owned()])
        .collect()
}

fn metadata(family: &str) -> Vec<(String, Value)> {
    let number = |value: usize| Value::U32(value as u32);
    let text = |value: &str| Value::String(value.to_owned());
    let own = [
        ("block_count", number(LAYERS)),
        ("context_length", number(128)),
        ("embedding_length", number(HIDDEN)),
        ("feed_forward_length", number(FEED_FORWARD)),
        ("attention.head_count", number(HEADS)),
        ("attention.head_count_kv", number(KV_HEADS)),
        ("attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("rope.freq_base", Value::F32(10_000.0)),
        ("rope.dimension_count", number(HEAD_DIM)),
    ];
    let tokens = tokens();
    let kinds = (0..tokens.len()).map(|id| Value::I32(if id < 2 { 3 } else { 1 })).collect();
    let shared = [
        ("general.architecture", text(family)),
        ("general.alignment", Value::U32(32)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.tokens", Value::Array(tokens.into_iter().map(Value::String).collect())),
        ("tokenizer.ggml.token_type", Value::Array(kinds)),
        ("tokenizer.ggml.merges", Value::Array(vec![text("h e"), text("he l")])),
        ("tokenizer.ggml.bos_token_id", Value::U32(0)),
        ("tokenizer.ggml.eos_token_id", Value::U32(1)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ("tokenizer.chat_template", text("{% for m in messages %}{{ m.content }}{% endfor %}")),
    ];
    let window = (family == "gemma3").then(|| ("attention.sliding_window", number(32)));
    let own = own.into_iter().chain(window).map(|(key, value)| (format!("{family}.{key}"), value));
    shared.into_iter().map(|(key, value)| (key.to_owned(), value)).chain(own).collect()
}
