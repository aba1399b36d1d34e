"""Prints the race's table from the files that run.sh left, and writes OUTPUT/race.json for docs/figures.md.

usage: table.py KIT OUTPUT "SHAPE..." "PEER..."

The bound is that of the list, the shape and the cache's type at the bandwidth and arithmetic speed that our bench
measured on this card, so that it is the same for every engine of a row's shape and cache. A peer is compared with the
slower of our two turns, the one before it and the one after.
"""

import importlib.metadata
import json
import math
import os
import pathlib
import sys

sys.path.append(sys.argv[1])  # the kit's own script of figures

import figures

# Of each peer: how it is called, and the name of its distribution.
PEERS = {
    "vllm": ("vLLM", "vllm"),
    "nanovllm": ("nano-vLLM", "nano-vllm"),
    "transformers": ("transformers generate_batch", "transformers"),
}
# The least ratio of the list, by shape and cache.
RATIOS = {("qwen3-0.6b", "bf16"): 1.15}
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


def peer_name(package: str) -> str:
    name, distribution = PEERS.get(package, (package, package))
    try:
        return f"{name} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def ours(out: pathlib.Path, shape: str, cache: str) -> tuple[list[float], float]:
    """The speeds of our turns with the list, and of one sequence."""
    turns = (read(out / f"{shape}-millrace-{OURS[cache]}-{when}.json") for when in ("before", "after"))
    return [speed(turn) for turn in turns if turn], speed(read(out / f"{shape}-millrace-{OURS[cache]}-one.json"))


def known(name: str, value: float, unit: str, bar: dict | None = None, **more: object) -> list[dict]:
    return [] if math.isnan(value) else [figures.figure(name, value, unit, bar, **more)]


def shape_figures(out: pathlib.Path, shape: str, peers: list[str]) -> list[dict]:
    found, slower, alone = [], {}, {}
    for cache in OURS:
        turns, alone[cache] = ours(out, shape, cache)
        slower[cache] = min(turns, default=math.nan)
        if turns:
            found += known(f"{shape}, the list, {cache} cache: Millrace", slower[cache], "tokens/s", values=turns)
        else:
            found.append(figures.figure(f"{shape}, the list, {cache} cache: Millrace", None, "tokens/s"))
        found += known(f"{shape}, one sequence, {cache} cache: Millrace", alone[cache], "tokens/s")
    for peer in peers:
        package, _, cache = peer.partition(":")
        cache, name = cache or "bf16", peer_name(package)
        result = read(out / f"{shape}-{peer.replace(':', '-')}.json")
        if result is None:
            continue
        bar = figures.least(RATIOS.get((shape, cache)) if package == "vllm" else None)
        one = result.get("one_sequence_tokens_per_s", math.nan)
        listed, single = f"{shape}, the list, {cache} cache", f"{shape}, one sequence, {cache} cache"
        found += known(f"{listed}: {name}", speed(result), "tokens/s", values=result["runs"])
        found += known(f"{listed}: Millrace over {name}", slower.get(cache, math.nan) / speed(result), "x", bar)
        found += known(f"{single}: {name}", one, "tokens/s")
        found += known(f"{single}: Millrace over {name}", alone.get(cache, math.nan) / one, "x")
    return found


def main() -> None:
    kit, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    shapes, peers = sys.argv[3].split(), sys.argv[4].split()
    for shape in shapes:
        first = read(out / f"{shape}-millrace-bf16-before.json")
        if first:
            print(f"{first['hardware']}: reads {first['read_gb_per_s']:.0f} GB/s, computes "
                  f"{first['compute_gop_per_s'] / 1000:.0f} TFLOP/s; {first['prompt_tokens']} tokens in, "
                  f"{first['output_tokens']} out")
        print(ROW.format(*HEADS))
        print("\n".join(shape_rows(out, shape, peers)))
    print("ratio: our tokens/s over the peer's; one alone: tokens/s of one sequence, 128 tokens in and 256 out")
    found = [row for shape in shapes for row in shape_figures(out, shape, peers)]
    if found:
        asked = [f'{name}="{value}"' for name, value in sorted(os.environ.items()) if name.startswith("RACE_")]
        command = " ".join([*asked, "tests/race/run.sh KIT OUTPUT"])
        figures.write(out / "race.json", (kit / "commit").read_text().strip(), command, found)


if __name__ == "__main__":
    main()
