#!/usr/bin/env bash
# Runs the GPU tests and the benchmarks of this folder on a CUDA host, and prints a short table last.
#
# usage: run.sh [OUTPUT FOLDER]      Each step has a log there, benchmarks also a JSON file. A failed step does not stop
# the others; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")"
out=$(realpath -m "${1:-results}")
mkdir -p "$out"
export MILLRACE_REQUIRE_CUDA=1
failed=0
table=""

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 status=passed
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || { status="FAILED ($?)"; failed=1; }
    table+="$(printf '%-28s %s' "$name" "$status")"$'\n'
}

bench() { # NAME SECONDS ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    if timeout "$limit" ./millrace-worker bench --device cuda --load-format dummy --json "$@" >"$out/$name.json" 2>"$out/$name.log"; then
        table+="$(python3 - "$name" "$out/$name.json" <<'P'
import json, sys
r = json.load(open(sys.argv[2]))
print(f"{sys.argv[1]:28} {r['output_tokens_per_s']:10.0f} tokens/s  {100 * r['bound_share']:5.1f} % of the bound at "
      f"{r['read_gb_per_s']:.0f} GB/s  {r['host_us_per_step']:4.0f} us host  {100 * r['device_idle_share']:4.1f} % idle  "
      f"{r['run']['load_s']:5.1f} s load")
P
)"$'\n'
    else
        table+="$(printf '%-28s FAILED' "$name")"$'\n'
        failed=1
    fi
}

step kernels 180 ./kernels-tests cuda:: --test-threads=1
step engine 240 ./gpu-tests --test-threads=1 --nocapture
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 240 compute-sanitizer --tool "$tool" --error-exitcode 9 ./kernels-tests cuda::tests::small --test-threads=1
    done
fi
small="--config bench/qwen3-0.6b.json" large="--config bench/llama-3.1-8b.json"
list="--requests bench/nano-vllm-256.jsonl --concurrency 256 --max-batch-tokens 8192 --temperature 0.6"
one="--synthetic 1,128,256 --concurrency 1 --temperature 0.6 --repeat 3"
bench qwen3-0.6b-list 120 $small $list --repeat 3
bench qwen3-0.6b-list-eager 60 $small $list --eager
bench qwen3-0.6b-list-fp8-kv 120 $small $list --kv-cache-dtype fp8_e4m3 --repeat 3
bench qwen3-0.6b-one 60 $small $one
bench llama-3.1-8b-list 180 $large $list
bench llama-3.1-8b-one 90 $large $one
printf '%s' "$table"
exit $failed
