#!/bin/sh
# A job over Millrace's HTTP API that nobody waits for: jobs.sh URL MODEL TEXT. Needs curl and Python 3.
set -eu
url=$1 model=$2 text=$3
header="authorization: Bearer ${MILLRACE_API_KEY:-none}"
field() { printf %s "$answer" | python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
body=$(python3 -c 'import json, sys; print(json.dumps({"model": sys.argv[1], "prompt": sys.argv[2]}))' "$model" "$text")
answer=$(curl -fsS "$url/jobs" -H "$header" -H 'content-type: application/json' -H 'millrace-class: low' -d "$body")
job=$(field id)
echo "submitted $job" >&2
while answer=$(curl -fsS "$url/jobs/$job" -H "$header") && [ "$(field status)" = queued ]; do
    sleep 1
done
printf '%s\n' "$answer"
