"""Output tokens per second of Hugging Face's continuous batching on a request list, with random weights.

usage: transformers_bench.py [--repeat N] CONFIG.json REQUESTS.jsonl RESULT.json

All requests of one call share their generation settings, so that each gets the longest output; only the tokens that
the list asks for are counted, and the result says how many were made.
"""

import json
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import peer


def main() -> None:
    arguments = peer.arguments()
    items = peer.requests(arguments.requests)
    begun = time.perf_counter()
    shape = AutoConfig.for_model(**json.loads(arguments.config.read_text()))
    shape._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    up_s = time.perf_counter() - begun
    longest = max(item["max_tokens"] for item in items)
    generation = GenerationConfig(
        do_sample=True, temperature=0.6, max_new_tokens=longest, eos_token_id=-1, pad_token_id=0
    )

    def run() -> tuple[float, int]:
        begun = time.perf_counter()
        answers = model.generate_batch([item["prompt_token_ids"] for item in items], generation_config=generation)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        made = sum(len(answer.generated_tokens) for answer in answers.values())
        return sum(item["max_tokens"] for item in items) / seconds, made

    runs = [run() for _ in range(arguments.repeat)]
    peer.write(arguments.result, {
        "output_tokens_per_s": statistics.median(speed for speed, _ in runs),
        "runs": [speed for speed, _ in runs],
        "tokens_made": runs[-1][1],
        "up_s": up_s,
    })


if __name__ == "__main__":
    main()
