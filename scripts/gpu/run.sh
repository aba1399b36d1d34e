#!/usr/bin/env bash
# Runs the GPU tests and the benchmarks of this folder on a CUDA host, and prints a short table last.
#
# usage: run.sh [OUTPUT FOLDER [STEP...]]      Each step has a log and a status there, benchmarks also a JSON file. A
# failed step does not stop the others; the exit status says whether all passed. Without STEP all are run. SmolLM2's real
# weights are compared too where its GGUF lies in `models` beside this script, and a start with 16 GB of weights where
# /dev/shm has room for them. figures.json, written last, holds all steps of the folder, also those of earlier calls.
set -uo pipefail
cd "$(dirname "$0")" || exit 1
out=$(realpath -m "${1:-results}")
mkdir -p "$out"
commit=$(cat commit) || exit 1
if [ -e "$out/commit" ] && [ "$(cat "$out/commit")" != "$commit" ]; then
    echo "run.sh: $out has results of commit $(cat "$out/commit"), and this kit is of $commit: give another folder" >&2
    exit 1
fi
echo "$commit" >"$out/commit"
echo "run.sh OUTPUT${2:+ ${*:2}}" >>"$out/commands"
wanted=" ${*:2} "
export MILLRACE_REQUIRE_CUDA=1
failed=0
table=""

chosen() { # NAME
    [ "$wanted" = "  " ] || [[ $wanted == *" $1 "* ]]
}

note() { # NAME RESULT
    table+="$(printf '%-28s %s' "$1" "$2")"$'\n'
}

ended() { # NAME STATUS      `passed`, or what went wrong
    echo "$2" >"$out/$1.status"
    case $2 in FAILED*) failed=1 ;; esac
}

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 status=passed
    chosen "$name" || return 0
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status="FAILED ($?)"
    ended "$name" "$status"
    note "$name" "$status"
}

bench() { # NAME SECONDS ARGUMENTS...
    local name=$1 limit=$2
    chosen "$name" || return 0
    shift 2
    rm -f "$out/$name.json"
    if timeout "$limit" ./millrace-worker bench --device cuda --load-format dummy --json "$@" >"$out/$name.json" 2>"$out/$name.log"; then
        ended "$name" passed
        note "$name" "$(python3 - "$out/$name.json" <<'P'
import json, sys
r = json.load(open(sys.argv[1]))
print(f"{r['output_tokens_per_s']:10.0f} tokens/s  {100 * r['bound_share']:5.1f} % of the bound at "
      f"{r['read_gb_per_s']:.0f} GB/s  {r['host_us_per_step']:4.0f} us host  {100 * r['device_idle_share']:4.1f} % idle  "
      f"{r['run']['load_s']:5.1f} s load")
P
)"
    else
        ended "$name" "FAILED ($?)"
        note "$name" FAILED
    fi
}

# The time of a whole process that reads the 8B model from memory and makes one token.
start() {
    local folder=/dev/shm/millrace-start began seconds status=passed
    chosen start || return 0
    rm -f "$out/start.seconds"
    if [ "$(df --output=avail -B1 /dev/shm | tail -1)" -lt $((20 << 30)) ]; then
        ended start "not run: /dev/shm has less than 20 GiB"
        note start "not run: /dev/shm has less than 20 GiB"
        return
    fi
    rm -rf "$folder"
    if python3 checkpoint.py bench/llama-3.1-8b.json "$folder" >"$out/start.log" 2>&1; then
        for _ in 1 2 3; do
            began=$(date +%s.%N)
            timeout 60 ./millrace-worker bench --device cuda --model "$folder" --synthetic 1,16,1 --concurrency 1 >>"$out/start.log" 2>&1 ||
                { status="FAILED ($?)"; break; }
            seconds=$(python3 -c "import time; print(f'{time.time() - $began:.2f}')")
            echo "$seconds" >>"$out/start.seconds"
            note start "$seconds s from start to end"
        done
    else
        status="FAILED ($?): checkpoint.py"
    fi
    ended start "$status"
    [ "$status" = passed ] || note start "$status"
    rm -rf "$folder"
}

step kernels 180 ./kernels-tests cuda:: --test-threads=1
step engine 480 ./gpu-tests --test-threads=1 --nocapture no_circumstance a_gpu_answers
if [ -d models ]; then
    step smollm2 120 env MILLRACE_CACHE="$PWD" MILLRACE_REQUIRE_TOOLS=1 ./gpu-tests --nocapture smollm2
fi
step attention 240 ./attention check
step attention-time 120 ./attention time
step products 120 ./products check
# The driver compiles the PTX of sm_80 at each start, which takes it some 13 s, so the kernels for chips before Hopper run,
# and those for chips whose blocks have 99 KiB of shared memory.
step kernels-sm_80 600 env CUDA_FORCE_PTX_JIT=1 ./kernels-tests --test-threads=1 cuda::tests::small cuda::tests::sampling
step engine-sm_80 480 env CUDA_FORCE_PTX_JIT=1 ./gpu-tests --test-threads=1 --nocapture a_gpu_answers
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 240 compute-sanitizer --tool "$tool" --error-exitcode 9 ./kernels-tests cuda::tests::small --test-threads=1
        step "$tool-attention" 240 compute-sanitizer --tool "$tool" --error-exitcode 9 ./attention small
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
start
printf '%s' "$table"
python3 figures.py "$out" || failed=1
exit $failed
