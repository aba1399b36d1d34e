"""Prints the race's table from the files that run.sh left.

usage: table.py OUTPUT "SHAPE..." "PEER..."

The bound is that of the list, the shape and the cache's type at the bandwidth and arithmetic speed that our bench
measured on this card, so that it is the same for every engine of a row's shape and cache. A peer is compared with the
slower of our two turns, the one before it and the one after.
"""

import json
import math
import pathlib
import sys

OURS = {"bf16": "bf16", "fp8": "fp8_e4m3"}
ROW = "{:12} {:15} {:5} {:>9} {:>16} {:>9} {:>6} {:>9} {:>6} {:>6}"
HEADS = ("shape", "engine", "cache", "tokens/s", "runs", "of bound", "ratio", "one alone", "ratio", "up s")


def read(path: pathlib.Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def speed(result: dict | None) -> float:
    return result["output_tokens_per_s"] if result else math.nan


def number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def row(head: tuple[str, str, str], result: dict, bound: float, against: tuple[float, float]) -> str:
    runs = result.get("runs") or result["run"]["runs"]
    one = result.get("one_sequence_tokens_per_s", math.nan)
    return ROW.format(
        *head,
        number(speed(result), "{:.0f}"),
        f"{min(runs):.0f} to {max(runs):.0f}",
        number(100 * speed(result) / bound, "{:.1f} %"),
        number(against[0] / speed(result), "{:.2f}"),
        number(one, "{:.0f}"),
        number(against[1] / one, "{:.2f}"),
        number(result.get("up_s", math.nan), "{:.1f}"),
    )


def shape_rows(out: pathlib.Path, shape: str, peers: list[str]) -> list[str]:
    rows, bounds, slower, alone = [], {}, {}, {}
    for cache, kind in OURS.items():
        turns = {when: read(out / f"{shape}-millrace-{kind}-{when}.json") for when in ("before", "after")}
        alone[cache] = speed(read(out / f"{shape}-millrace-{kind}-one.json"))
        slower[cache] = min((speed(result) for result in turns.values() if result), default=math.nan)
        for when, result in turns.items():
            if result is None:
                rows.append(f"{shape} Millrace {when}, {cache}: failed: see {shape}-millrace-{kind}-{when}.log")
                continue
            bounds[cache] = speed(result) / result["bound_share"]
            result = result | {"one_sequence_tokens_per_s": alone[cache], "up_s": result["run"]["load_s"]}
            rows.append(row((shape, f"Millrace {when}", cache), result, bounds[cache], (math.nan, math.nan)))
    for peer in peers:
        name, _, cache = peer.partition(":")
        file = f"{shape}-{peer.replace(':', '-')}"
        cache = cache or "bf16"
        result = read(out / f"{file}.json")
        if result is None:
            rows.append(f"{shape} {name}, {cache}: not run: see {file}.log")
            continue
        against = (slower.get(cache, math.nan), alone.get(cache, math.nan))
        rows.append(row((shape, name, cache), result, bounds.get(cache, math.nan), against))
    return rows


def main() -> None:
    out, shapes, peers = pathlib.Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split()
    for shape in shapes:
        ours = read(out / f"{shape}-millrace-bf16-before.json")
        if ours:
            print(f"{ours['hardware']}: reads {ours['read_gb_per_s']:.0f} GB/s, computes "
                  f"{ours['compute_gop_per_s'] / 1000:.0f} TFLOP/s; {ours['prompt_tokens']} tokens in, "
                  f"{ours['output_tokens']} out")
        print(ROW.format(*HEADS))
        print("\n".join(shape_rows(out, shape, peers)))
    print("ratio: our tokens/s over the peer's; one alone: tokens/s of one sequence, 128 tokens in and 256 out")


if __name__ == "__main__":
    main()
