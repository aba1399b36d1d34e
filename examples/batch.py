#!/usr/bin/env python3
"""A file of OpenAI batch lines through Millrace's HTTP API, its answers to standard output in the order of the lines:
batch.py URL MODEL FILE. Needs the package `openai`."""

import json
import os
import sys
import time

from openai import OpenAI

url, model, path = sys.argv[1:]
client = OpenAI(base_url=url, api_key=os.environ.get("MILLRACE_API_KEY", "none"))
with open(path) as lines:
    requests = [json.loads(line) for line in lines if line.strip()]
for request in requests:
    request["body"]["model"] = model
content = "".join(json.dumps(request) + "\n" for request in requests).encode()
file = client.files.create(file=("batch.jsonl", content), purpose="batch")
batch = client.batches.create(input_file_id=file.id, endpoint=requests[0]["url"], completion_window="24h")
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(1)
    batch = client.batches.retrieve(batch.id)
    print(f"{batch.status}: {batch.request_counts}", file=sys.stderr)
for error in batch.errors.data if batch.errors else []:
    print(f"line {error.line}: {error.message}", file=sys.stderr)
for result in filter(None, (batch.output_file_id, batch.error_file_id)):
    sys.stdout.write(client.files.content(result).text)
sys.exit(batch.status != "completed")
