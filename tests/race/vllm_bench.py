"""Output tokens per second of vLLM on a request list, with random weights of a given shape.

usage: vllm_bench.py [--kv-cache-dtype auto|fp8] [--repeat N] CONFIG.json REQUESTS.jsonl RESULT.json

Prefixes are not reused: the list is run again and again, and every run has to do all of its work, as ours has.
"""

import pathlib
import shutil
import tempfile
import time

from vllm import LLM, SamplingParams

import peer


def main() -> None:
    arguments = peer.arguments(kv_cache_dtypes=("auto", "fp8"))
    items = peer.requests(arguments.requests)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(arguments.config, pathlib.Path(folder) / "config.json")
        begun = time.perf_counter()
        engine = LLM(
            model=folder,
            load_format="dummy",
            dtype="bfloat16",
            kv_cache_dtype=arguments.kv_cache_dtype,
            skip_tokenizer_init=True,
            max_model_len=4096,
            gpu_memory_utilization=0.9,
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
        )
        up_s = time.perf_counter() - begun

        def run(items: list[dict]) -> float:
            prompts = [{"prompt_token_ids": item["prompt_token_ids"]} for item in items]
            sampling = [
                SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=item["max_tokens"], detokenize=False)
                for item in items
            ]
            begun = time.perf_counter()
            answers = engine.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - begun
            return peer.speed(items, [len(answer.outputs[0].token_ids) for answer in answers], seconds)

        peer.measure(run, items, arguments, up_s)


if __name__ == "__main__":
    main()
