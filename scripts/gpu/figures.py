"""Makes figures.json of what run.sh left in a folder, in the form that docs/figures.md is made of.

usage: figures.py OUTPUT      OUTPUT/commit and OUTPUT/commands say of what, and by which calls

A step that was not run gives no figure; one that failed gives a figure without a value. The bars were set for an H100.
"""

import datetime
import json
import pathlib
import re
import statistics
import subprocess
import sys

# Each benchmark's step: its name, its bar in output tokens per second.
BENCHES = {
    "qwen3-0.6b-list": ("Qwen3-0.6B, the list", 21_500),
    "qwen3-0.6b-list-eager": ("Qwen3-0.6B, the list, op by op", None),
    "qwen3-0.6b-list-fp8-kv": ("Qwen3-0.6B, the list, FP8 cache", 30_000),
    "qwen3-0.6b-one": ("Qwen3-0.6B, one sequence", 1_200),
    "llama-3.1-8b-list": ("Llama-3.1-8B, the list", 9_000),
    "llama-3.1-8b-one": ("Llama-3.1-8B, one sequence", 185),
}
# Benchmarks whose steps of decodes are held against how long the GPU may rest.
IDLE_SHARE_MOST, IDLE_US_MOST, START_S_MOST = 2, 50, 6
IDLE_JUDGED = ("qwen3-0.6b-list", "qwen3-0.6b-list-fp8-kv", "llama-3.1-8b-list")
# Rows of `attention time`: sequences, shortest and longest context, head, heads of keys and values, group; the least
# share of the rate at which the GPU reads, in percent, and the most microseconds.
DECODES = {
    "256 800 800 128 8 2": ("256 x 800, 16 / 8", 88, None),
    "256 800 800 128 8 4": ("256 x 800, 32 / 8", 88, None),
    "256 4096 4096 128 8 4": ("256 x 4,096, 32 / 8", 99, None),
    "1 4096 4096 128 8 4": ("1 x 4,096, 32 / 8", None, 38),
}
# Rows of its prefills: sequences, context, rows, head, heads of keys and values, group; the least TFLOP/s.
PREFILLS = {
    "4 4096 4096 128 8 4": ("4 x 4,096, 32 / 8", 450),
    "16 1024 1024 128 8 2": ("16 x 1,024, 16 / 8", None),
}


def figure(name: str, value: float | None, unit: str, bar: dict | None = None, **more: object) -> dict:
    """One figure; `more` may have `values` and `note`. Without a value, and without a note, it failed."""
    if value is None:
        more.setdefault("note", "the step failed")
    else:
        value = rounded(value)
    if "values" in more:
        more["values"] = [rounded(run) for run in more["values"]]
    return {"name": name, "value": value, "unit": unit, "bar": bar} | more


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def least(value: float | None) -> dict | None:
    return None if value is None else {"least": value}


def most(value: float | None) -> dict | None:
    return None if value is None else {"most": value}


def text(path: pathlib.Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def idle(name: str, result: dict, is_judged: bool) -> list[dict]:
    """How long the GPU rests in a step of decodes, as a share and in time."""
    share, steps = result.get("device_idle_share"), result["steps"].get("decode")
    if share is None or not steps:
        return []
    step_us = 1e6 * steps["total_s"] / steps["count"]
    shares, times = (most(bar) if is_judged else None for bar in (IDLE_SHARE_MOST, IDLE_US_MOST))
    return [
        figure(f"{name}: share of decode steps in which the GPU rests", 100 * share, "%", shares),
        figure(f"{name}: time of a decode step in which it rests", share * step_us, "us", times),
    ]


def benches(out: pathlib.Path) -> list[dict]:
    found = []
    for step, (name, bar) in BENCHES.items():
        status = text(out / f"{step}.status").strip()
        if not status:
            continue
        if status != "passed":
            found.append(figure(name, None, "tokens/s", least(bar), note=f"the step failed: {status}"))
            continue
        result = json.loads(text(out / f"{step}.json"))
        found += [
            figure(name, result["output_tokens_per_s"], "tokens/s", least(bar), values=result["run"]["runs"]),
            figure(f"{name}: of the limit", 100 * result["bound_share"], "%",
                   note=f"at {result['read_gb_per_s']:.0f} GB/s"),
            figure(f"{name}: work of the host in a step", result["host_us_per_step"], "us"),
            *idle(name, result, step in IDLE_JUDGED),
        ]
    return found


def start(out: pathlib.Path) -> list[dict]:
    status = text(out / "start.status").strip()
    name = "Llama-3.1-8B in bf16 from memory: process start to one token and its end"
    if not status or status.startswith("not run"):
        return []
    runs = [float(line) for line in text(out / "start.seconds").split()]
    if status != "passed" or not runs:
        return [figure(name, None, "s", most(START_S_MOST), note=f"the step failed: {status}")]
    return [figure(name, statistics.median(runs), "s", most(START_S_MOST), values=runs)]


def attention(out: pathlib.Path) -> list[dict]:
    """The times of attention; of the two kernels of each cache the faster one, as steps take it."""
    status = text(out / "attention-time.status").strip()
    if not status:
        return []
    if status != "passed":
        return [figure("attention's times", None, "us", note=f"the step failed: {status}")]
    found, part = [], ""
    for line in text(out / "attention-time.log").splitlines():
        if match := re.match(r"(decode alone|in a chain|prefill)", line):
            part = match[1]
            continue
        key, *cells = (cell.strip() for cell in line.split("|"))
        key = " ".join(key.replace(" to ", " ").split())
        numbers = [[float(number) for number in re.findall(r"[\d.]+", cell)] for cell in cells]
        if part == "decode alone" and key in DECODES and len(numbers) >= 4:
            found += decode(*DECODES[key], numbers)
        if part == "prefill" and key in PREFILLS and len(numbers) >= 3:
            name, bar = PREFILLS[key]
            found.append(figure(f"prefill attention, {name}", numbers[2][1], "TFLOP/s", least(bar)))
    if not found:
        found.append(figure("attention's times", None, "us", note="attention-time.log has none of its rows"))
    return found


def decode(name: str, share: float | None, us: float | None, numbers: list[list[float]]) -> list[dict]:
    whole, half = min(numbers[0:2]), min(numbers[2:4])
    return [
        figure(f"decode attention, {name}", whole[0], "us", most(us)),
        figure(f"decode attention, {name}: of the rate of reading", whole[1], "%", least(share)),
        figure(f"decode attention, {name}, FP8 cache", half[0], "us"),
    ]


def tests(out: pathlib.Path) -> list[dict]:
    """One figure a step that checks something: how many checks failed, at least one where it checked nothing."""
    found = []
    for path in sorted(out.glob("*.status")):
        name, status = path.stem, path.read_text().strip()
        if name in BENCHES or name in ("start", "attention-time"):
            continue
        log = text(out / f"{name}.log")
        counts = [(int(passed), int(failed)) for passed, failed in re.findall(r"(\d+) passed; (\d+) failed", log)]
        failed = sum(count[1] for count in counts)
        if status != "passed" or (counts and not any(passed for passed, _ in counts)):
            failed = max(failed, 1)
        more = {"note": f"{sum(count[0] for count in counts)} passed"} if counts else {}
        found.append(figure(f"checks of the step `{name}` that failed", failed, "", most(0), **more))
    return found


def machine() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown GPU"
    first = said.strip().splitlines()[0] if said.strip() else "unknown GPU"
    name, _, driver = (part.strip() for part in first.partition(","))
    return f"{name} (driver {driver})" if driver else name


def write(path: pathlib.Path, commit: str, command: str, figures: list[dict]) -> None:
    """Writes a result file, one figure a line."""
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    head = {"machine": machine(), "date": day, "commit": commit, "command": command}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    rows = ",\n    ".join(json.dumps(row, allow_nan=False) for row in figures)
    path.write_text("{\n" + ",\n".join(lines) + ',\n  "figures": [\n    ' + rows + "\n  ]\n}\n")
    kind = "gpu" if path.stem == "figures" else path.stem
    words = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)", "", head["machine"]).lower()).strip("-")
    print(f"{path}: keep it as docs/figures/{kind}-{words}.json")


def main() -> None:
    out = pathlib.Path(sys.argv[1])
    commit, command = text(out / "commit").strip(), "; ".join(dict.fromkeys(text(out / "commands").splitlines()))
    figures = benches(out) + start(out) + attention(out) + tests(out)
    if not figures:
        raise SystemExit(f"{out}: no step has left anything")
    write(out / "figures.json", commit, command, figures)


if __name__ == "__main__":
    main()
