"""Output tokens per second of vLLM on a request list, with random weights of a given shape.

usage: vllm_bench.py CONFIG.json REQUESTS.jsonl [REPEATS]      prints one JSON object
"""

import json
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

from vllm import LLM, SamplingParams


def main() -> None:
    config, requests = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    repeats = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    items = [json.loads(line) for line in requests.read_text().splitlines() if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(config, pathlib.Path(folder) / "config.json")
        begun = time.perf_counter()
        engine = LLM(
            model=folder,
            load_format="dummy",
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=4096,
            gpu_memory_utilization=0.9,
            enable_prefix_caching=False,
            seed=0,
        )
        up_s = time.perf_counter() - begun
        prompts = [{"prompt_token_ids": item["prompt_token_ids"]} for item in items]

        def sampling(tokens: int) -> SamplingParams:
            return SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=tokens, detokenize=False)

        parameters = [sampling(item["max_tokens"]) for item in items]

        def run(prompts: list, parameters: list) -> float:
            begun = time.perf_counter()
            answers = engine.generate(prompts, parameters, use_tqdm=False)
            seconds = time.perf_counter() - begun
            tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
            assert tokens == sum(parameter.max_tokens for parameter in parameters)
            return tokens / seconds

        run(prompts, parameters)  # warms up
        runs = [run(prompts, parameters) for _ in range(repeats)]
        single = [{"prompt_token_ids": list(range(1, 129))}]
        alone = [run(single, [sampling(256)]) for _ in range(repeats)]
    print(json.dumps({
        "engine": "vLLM",
        "output_tokens_per_s": statistics.median(runs),
        "runs": runs,
        "one_sequence_tokens_per_s": statistics.median(alone),
        "up_s": up_s,
    }))


if __name__ == "__main__":
    main()
