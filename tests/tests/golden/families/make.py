"""Logits of tiny models of each family, by transformers, for `right.rs`: python make.py > expected.json

Needs torch==2.15.0, transformers==5.24.0 and numpy. Weights are a hash of the tensor's name and the element's number, so
that the test makes the same ones; they are exact in bfloat16.
"""
import json
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = [(i * i * 7 + i * 13 + 5) % 64 for i in range(40)]
POSITIONS = [0, 6, 17, 39]
SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
        "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 8.0]}
PARTIAL = {"partial_rotary_factor": 0.75, "hidden_size": 64}
GEMMA = {"model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 9,
         "query_pre_attn_scalar": 20, "tie_word_embeddings": True, "max_position_embeddings": 128}

# Name, changes of SIZES, and the longest context that the engine serves.
CASES = [
    ("gemma3", GEMMA, 128),
    ("gemma3, scaled full layers", {**GEMMA, "rope_theta": 5000.0, "rope_local_base_freq": 300.0,
                                    "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 128),
    ("gemma3, rope_parameters, pattern, biases", {
        **GEMMA, "attention_bias": True, "layer_types": ["sliding_attention", "full_attention"] * 3 + ["full_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 900.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}}, 128),
    ("gemma3, capped logits", {**GEMMA, "final_logit_softcapping": 1.5}, 128),
    ("gemma2", {**GEMMA, "model_type": "gemma2", "num_hidden_layers": 4}, 128),
    ("gemma2, low caps, biases", {**GEMMA, "model_type": "gemma2", "num_hidden_layers": 4, "attention_bias": True,
                                  "attn_logit_softcapping": 0.7, "final_logit_softcapping": 1.5}, 128),
    ("phi3, window", {"model_type": "phi3", "sliding_window": 11}, 128),
    ("phi3, a part of each head", {"model_type": "phi3", **PARTIAL, "tie_word_embeddings": True}, 128),
    ("phi3, short contexts", {"model_type": "phi3", **PARTIAL, "rope_scaling": LONG,
                              "original_max_position_embeddings": 64}, 64),
    ("phi3, long contexts", {"model_type": "phi3", **PARTIAL, "rope_scaling": LONG,
                             "original_max_position_embeddings": 16}, 128),
    ("smollm3", {"model_type": "smollm3", "num_hidden_layers": 5, "rope_theta": 2000.0}, 128),
    ("smollm3, most layers without RoPE", {"model_type": "smollm3", "num_hidden_layers": 5,
                                           "no_rope_layers": [0, 1, 0, 0, 0], "rope_theta": 50.0}, 128),
    ("smollm3, layers without RoPE have windows", {
        "model_type": "smollm3", "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7,
        "tie_word_embeddings": False}, 128),
    ("olmo2", {"model_type": "olmo2"}, 128),
    ("granite", {"model_type": "granite", "embedding_multiplier": 12.0, "logits_scaling": 8.0,
                 "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "tie_word_embeddings": True}, 128),
    ("llama, yarn", {"model_type": "llama", "rope_scaling": YARN, "rope_theta": 500.0}, 128),
    ("llama, yarn with every choice", {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {
        **YARN, "mscale": 0.9, "mscale_all_dim": 0.4, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}}, 128),
    ("qwen2, yarn with an attention factor", {"model_type": "qwen2", "rope_theta": 500.0, "rope_scaling": {
        **YARN, "attention_factor": 1.3}}, 128),
    ("qwen3, yarn", {"model_type": "qwen3", "head_dim": 24, "rope_scaling": YARN, "rope_theta": 500.0}, 128),
    ("qwen2, dynamic", {"model_type": "qwen2", "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 128),
    ("mistral, linear", {"model_type": "mistral", "rope_scaling": {"type": "linear", "factor": 3.0}}, 128),
]


def mixed(number):
    """SplitMix64's finalizer (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return number ^ (number >> np.uint64(31))


def weights(name, shape, offset):
    """Numbers of mean 0 (norms: 1 less their offset), exact in bfloat16."""
    start = 0xCBF29CE484222325
    for byte in name.encode():  # FNV-1a
        start = ((start ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    with np.errstate(over="ignore"):
        state = np.uint64(start) + np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    unit = (mixed(state) >> np.uint64(40)).astype(np.float64) / (1 << 23) - 1.0
    if name.endswith("norm.weight"):
        values = offset + 0.3 * unit
    elif len(shape) == 1:
        values = 0.3 * unit
    else:
        values = unit * np.sqrt(3.0 / shape[-1])
    return torch.tensor(values.astype(np.float32)).reshape(shape).to(torch.bfloat16).to(torch.float32)


results = []
for name, changes, served in CASES:
    saved = json.dumps({**SIZES, **changes})
    # A copy: transformers moves some of it about in place.
    fields = json.loads(saved)
    kind = fields.pop("model_type")
    config = AutoConfig.for_model(kind, **fields)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    offset = 0.0 if kind.startswith("gemma") else 1.0
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            parameter.copy_(weights(tensor, tuple(parameter.shape), offset))
        logits = model(torch.tensor([TOKENS]), use_cache=False).logits[0]
    if not torch.isfinite(logits).all():
        sys.exit(f"{name}: logits are not finite")
    picked = [[round(float(logit), 6) for logit in logits[position]] for position in POSITIONS]
    results.append({"name": name, "config": json.loads(saved), "served": served, "logits": picked})
print(json.dumps({"tokens": TOKENS, "positions": POSITIONS, "cases": results}))
