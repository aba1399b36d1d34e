#!/usr/bin/env bash
# Races this engine against the peers that are installed, on the same list and the same GPU; see README.md.
#
# usage: run.sh KIT OUTPUT
#   RACE_SHAPES   shapes, of KIT/bench                      (default: qwen3-0.6b llama-3.1-8b)
#   RACE_PEERS    peers, each with an optional cache type   (default: vllm vllm:fp8 nanovllm transformers)
#   RACE_REPEAT   counted runs of each                      (default: 3)
#   RACE_SECONDS  time for each shape, in which all must end (default: 1800)
# Each step has a log and a JSON file in OUTPUT. A peer that fails or is missing does not stop the others.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kit=$(realpath "$1") out=$(realpath -m "$2")
mkdir -p "$out"
list=$kit/bench/nano-vllm-256.jsonl
shapes=${RACE_SHAPES:-qwen3-0.6b llama-3.1-8b}
peers=${RACE_PEERS:-vllm vllm:fp8 nanovllm transformers}
repeat=${RACE_REPEAT:-3}
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

step() { # NAME SECONDS COMMAND...     runs a command for at most so long; its output goes to NAME.log
    local name=$1 limit=$2 begun=$SECONDS status=0
    shift 2
    rm -f "$out/$name.json"
    if [ "$limit" -lt 10 ]; then
        echo "$name: not started: no time was left" | tee "$out/$name.log"
        return
    fi
    timeout --kill-after 10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    echo "$name: exit status $status after $((SECONDS - begun)) s" | tee -a "$out/$name.log"
    free_memory
}

free_memory() { # waits until the last process has given its GPU memory back
    local used
    for _ in $(seq 20); do
        used=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits 2>/dev/null | sort -n | tail -1)
        [ "${used:-0}" -gt 4096 ] || return 0
        sleep 1
    done
    echo "$used MiB of GPU memory are still in use"
}

installed() { # PACKAGE     without importing it, which takes vLLM half a minute
    python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

least() { echo $(($1 < $2 ? $1 : $2)); }

ours() { # SHAPE NAME ARGUMENTS...
    local shape=$1 name=$1-millrace$2
    shift 2
    # shellcheck disable=SC2016
    step "$name" "$(least 240 $((deadline - SECONDS)))" \
        bash -c 'result=$1; shift; exec "$@" >"$result"' - "$out/$name.json" \
        "$kit/millrace-worker" bench --device cuda --load-format dummy --json --config "$kit/bench/$shape.json" \
        --temperature 0.6 --repeat "$repeat" "$@"
}

turn() { # SHAPE WHEN      our engine with either cache
    local all="--requests $list --concurrency 256 --max-batch-tokens 8192" cache
    for cache in bf16 fp8_e4m3; do
        # shellcheck disable=SC2086
        ours "$1" "-$cache-$2" $all --kv-cache-dtype $cache
    done
}

race() { # SHAPE
    local shape=$1 begun=$SECONDS cache entrant package file options
    local deadline=$((begun + ${RACE_SECONDS:-1800})) again_s
    turn "$shape" before
    again_s=$((SECONDS - begun + 15)) # kept free for our second turn
    for cache in bf16 fp8_e4m3; do
        ours "$shape" "-$cache-one" --synthetic 1,128,256 --concurrency 1 --kv-cache-dtype $cache
    done
    for entrant in $peers; do
        package=${entrant%%:*} file=$shape-${entrant/:/-} options=(--repeat "$repeat")
        [ "$package" = "$entrant" ] || options+=(--kv-cache-dtype "${entrant#*:}")
        if installed "$package"; then
            step "$file" "$(least 600 $((deadline - again_s - SECONDS)))" \
                python3 "$here/${package}_bench.py" "${options[@]}" "$kit/bench/$shape.json" "$list" "$out/$file.json"
        else
            rm -f "$out/$file.json"
            echo "the Python package $package is not installed" | tee "$out/$file.log"
        fi
    done
    turn "$shape" after
}

for shape in $shapes; do
    race "$shape"
done
# shellcheck disable=SC2086
python3 "$here/table.py" "$kit" "$out" "$shapes" "$peers"
