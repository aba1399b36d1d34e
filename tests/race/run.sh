#!/usr/bin/env bash
# Races this engine against the peers that are installed, on the same list; see README.md. usage: run.sh KIT OUTPUT
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kit=$(realpath "$1") out=$(realpath -m "$2")
mkdir -p "$out"
list=$kit/bench/nano-vllm-256.jsonl
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1

for shape in qwen3-0.6b llama-3.1-8b; do
    config=$kit/bench/$shape.json
    "$kit/millrace-worker" bench --device cuda --load-format dummy --json --config "$config" --requests "$list" \
        --concurrency 256 --max-batch-tokens 8192 --temperature 0.6 --repeat 4 >"$out/$shape-millrace.json" 2>"$out/$shape-millrace.log"
    for peer in vllm transformers; do
        if python3 -c "import $peer" 2>"$out/$shape-$peer.log"; then
            timeout 600 python3 "$here/${peer}_bench.py" "$config" "$list" 2>>"$out/$shape-$peer.log" | tail -1 >"$out/$shape-$peer.json"
        fi
    done
done
python3 - "$out" <<'P'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
for shape in ("qwen3-0.6b", "llama-3.1-8b"):
    def read(engine):
        path = out / f"{shape}-{engine}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None
    ours = read("millrace")
    for engine in ("millrace", "vllm", "transformers"):
        found = read(engine)
        if found is None:
            print(f"{shape:14} {engine:14} not run: see {shape}-{engine}.log")
            continue
        speed = found["output_tokens_per_s"]
        # The bound in tokens per second is the same for every engine: the list, the shape and this card's bandwidth.
        bound = ours["output_tokens_per_s"] / ours["bound_share"] if ours else float("nan")
        print(f"{shape:14} {engine:14} {speed:10.0f} output tokens/s {100 * speed / bound:6.1f} % of the bound")
P
