"""What the peers' scripts share: arguments, the request list, the count of what was made, the runs, and the result's file."""

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable

# One sequence alone: 128 tokens in, 256 out, as `bench --synthetic 1,128,256` asks of our engine.
ONE = [{"prompt_token_ids": list(range(1, 129)), "max_tokens": 256}]


def arguments(kv_cache_dtypes: tuple[str, ...] = ("auto",)) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kv-cache-dtype", choices=kv_cache_dtypes, default=kv_cache_dtypes[0])
    parser.add_argument("--repeat", type=int, choices=range(1, 101), default=3, metavar="1..100")
    parser.add_argument("config", type=pathlib.Path, help="the model's config.json")
    parser.add_argument("requests", type=pathlib.Path, help='lines of {"prompt_token_ids": [...], "max_tokens": N}')
    parser.add_argument("result", type=pathlib.Path, help="the JSON file to write")
    return parser.parse_args()


def requests(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def speed(items: list[dict], made: list[int], seconds: float) -> float:
    """Output tokens per second; refuses a run that made fewer or more than the list asks for."""
    asked = [item["max_tokens"] for item in items]
    if made != asked:
        raise SystemExit(f"{sum(made)} tokens were made for {len(made)} requests; the list asks for {sum(asked)}")
    return sum(made) / seconds


def write(path: pathlib.Path, result: dict) -> None:
    path.write_text(json.dumps(result) + "\n")


def measure(run: Callable[[list[dict]], float], items: list[dict], options: argparse.Namespace, up_s: float) -> None:
    """Runs the list and then one sequence alone, each once to warm up, and writes the medians; `run` gives tokens/s."""
    run(items)
    runs = [run(items) for _ in range(options.repeat)]
    result = {"output_tokens_per_s": statistics.median(runs), "runs": runs, "up_s": up_s}
    write(options.result, result)  # kept if the time ends here
    run(ONE)
    alone = [run(ONE) for _ in range(options.repeat)]
    write(options.result, result | {"one_sequence_tokens_per_s": statistics.median(alone)})
