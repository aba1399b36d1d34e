#!/usr/bin/env python3
"""One chat over Millrace's HTTP API, printed as it is made: chat.py URL MODEL TEXT. Needs the package `openai`."""

import os
import sys

from openai import OpenAI

url, model, text = sys.argv[1:]
client = OpenAI(base_url=url, api_key=os.environ.get("MILLRACE_API_KEY", "none"))
messages = [{"role": "user", "content": text}]
for chunk in client.chat.completions.create(model=model, messages=messages, max_tokens=200, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
