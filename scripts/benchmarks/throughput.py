"""Throughput: tokens per second of a warm function's engine and of transformers' own ways, 1 to 16 requests at once.

`generate_batch` is transformers' continuous batching, `padded` its static `generate` over equally long prompts (which
no server can choose), `sequential` one request after the other. Each run is a fresh process that decodes on a
thread, after a first batch that warms it up. `http` is the engine behind the function's own server, its
clients another process whose time is not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from report import ROOT, Report, Row
from rich.console import Console

from benchmarks import models
from benchmarks.harness import Result, Sample, Unavailable, Variant, judged, measure, ratio_rows

NAME = "throughput"

_PROMPT = 64
_SEQUENTIAL = (1, 8)  # takes as long as all the others together, and is no different at 4 and 16
_HTTP_PAIRS = 9  # differences of a few per cent are looked for, and single runs differ by ten
_WAYS = ("glowplug", "deterministic", "generate_batch", "padded", "sequential")


def run(quick: bool, console: Console) -> Report:
    place = models.checkpoint("125m", console, shards=1)
    threads = min(2, len(os.sched_getaffinity(0)))
    dtypes = ("bfloat16",) if quick else ("bfloat16", "float32")
    counts = (1, 8) if quick else (1, 4, 8, 16)
    new, rounds = (16, 1) if quick else (64, 3)
    rows: list[Row] = []
    ratios: dict[str, list[float]] = {}
    headline: dict[str, float | None] = {}
    eight: list[float] = []
    results: list[Result] = []
    for dtype in dtypes:
        for concurrent in counts:
            ways = [way for way in _WAYS if way != "sequential" or concurrent in _SEQUENTIAL]
            variants = [Variant(way, _way(way, place, dtype, concurrent, new, threads)) for way in ways]
            title = f"{NAME}, {dtype}, {concurrent} at once"
            result = measure(variants, rounds, title=title, console=console)
            case = _case(f"{dtype}, {concurrent} at once", threads, new)
            results.append(result)
            pairs = {
                f"vs_{other}_{dtype}_{concurrent}": result.ratio("glowplug", other, "tokens_s") for other in _WAYS[1:]
            }
            for other, pair in zip(_WAYS[1:], pairs.values(), strict=True):
                if pair is not None:
                    ratios.setdefault(other, []).append(pair.median)
            if concurrent == _SEQUENTIAL[-1] and (pair := pairs[f"vs_sequential_{dtype}_{concurrent}"]) is not None:
                eight.append(pair.median)
            rows += [*result.rows(**case), *ratio_rows(pairs, **case)]
        ways = ["glowplug", "http"]
        variants = [Variant(way, _way(way, place, dtype, counts[-1], new, threads)) for way in ways]
        title = f"{NAME}, {dtype}, over HTTP"
        result = measure(variants, rounds if quick else _HTTP_PAIRS, title=title, console=console)
        case = _case(f"{dtype}, {counts[-1]} at once, over HTTP", threads, new)
        results.append(result)
        cost = {f"http_cost_{dtype}": result.ratio("http", "glowplug", "cpu_ms_per_token")}
        rows += [*result.rows(**case), *ratio_rows(cost, **case)]
        headline |= {f"http_overhead_{dtype}": found.median - 1 for found in cost.values() if found is not None}
    for other in ("generate_batch", "padded"):
        headline[f"throughput_vs_{other}"] = statistics.median(ratios[other]) if other in ratios else None
    headline["throughput_vs_sequential"] = min(eight, default=None)
    if "deterministic" in ratios:
        headline["deterministic_cost"] = statistics.median(ratios["deterministic"])
    costs = [value for key, value in headline.items() if key.startswith("http_overhead_") and value is not None]
    headline["http_overhead"] = max(costs, default=None)
    return judged(NAME, headline, rows, results, quick)


def _case(case: str, threads: int, new: int) -> dict[str, str | float]:
    return {"case": case, "threads": threads, "prompt": _PROMPT, "new": new}


def _way(way: str, place: Path, dtype: str, concurrent: int, new: int, threads: int) -> Callable[[], Sample]:
    def once() -> Sample:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}",
        }
        numbers = map(str, (concurrent, _PROMPT, new, threads))
        command = [sys.executable, "-m", "benchmarks.throughput_child", way, str(place), dtype, *numbers]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        except subprocess.TimeoutExpired as error:
            raise Unavailable("it took more than 600 s") from error
        if done.returncode:
            raise Unavailable(f"it failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}")
        sample: Sample = json.loads(done.stdout.strip().splitlines()[-1])
        return sample

    return once
