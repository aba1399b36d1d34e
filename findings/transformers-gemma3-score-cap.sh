#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.15.0, eager attention, CPU), on valid configurations with random weights.
# Expected: `attn_logit_softcapping`, which the configuration of Gemma 3 documents as the soft cap of attention's scores,
#   changes what the model computes, as it does for Gemma 2.
# Seen: Gemma 2 applies it. Gemma 3 reads it, keeps it in each attention layer, and never passes it on: its logits are the
#   same, bit for bit, with and without it. `final_logit_softcapping` works in both.
# Rests on it: engine/src/model/config/reader.rs refuses the key for Gemma 3 instead of guessing what its author meant.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.15.0 transformers==5.24.0 numpy
cat > caps.py <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, vocab_size=64, max_position_embeddings=64, sliding_window=16, query_pre_attn_scalar=1)


def logits(kind, caps):
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **SIZES, **caps)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        return model(torch.arange(20)[None], use_cache=False).logits


NONE = dict(attn_logit_softcapping=None, final_logit_softcapping=None)
for kind in ["gemma2", "gemma3_text"]:
    plain = logits(kind, NONE)
    for key in NONE:
        same = torch.equal(plain, logits(kind, {**NONE, key: 0.5}))
        print(f"{kind} {key}: {'changes nothing' if same else 'is applied'}")
PYTHON
env/bin/python caps.py 2> /dev/null | tee found.txt
diff found.txt - <<'EXPECTED'
gemma2 attn_logit_softcapping: is applied
gemma2 final_logit_softcapping: is applied
gemma3_text attn_logit_softcapping: changes nothing
gemma3_text final_logit_softcapping: is applied
EXPECTED
echo "as stated"
