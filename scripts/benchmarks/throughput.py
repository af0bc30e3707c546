"""Tokens per second of a warm function's engine, against transformers' own ways, one to sixteen requests at once.

`generate_batch` is transformers' continuous batching, `padded` its static `generate` over equally long prompts (which
no server can choose), `sequential` one request after the other. Each run is a process of its own that decodes on a
thread of its own, after a first batch that warms it. `http` is the engine behind the function's own server, its
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

from report import ROOT, Report
from rich.console import Console

from benchmarks import models
from benchmarks.harness import Sample, Unavailable, Variant, measure

NAME = "throughput"

_PROMPT = 64
_WAYS = ("glowplug", "deterministic", "generate_batch", "padded", "sequential")


def run(quick: bool, console: Console) -> Report:
    place = models.checkpoint("125m", console, shards=1)
    threads = min(2, len(os.sched_getaffinity(0)))
    dtypes = ("bfloat16",) if quick else ("bfloat16", "float32")
    counts = (1, 8) if quick else (1, 4, 8, 16)
    new, rounds = (16, 1) if quick else (64, 5)
    rows: list[dict[str, str | float | None]] = []
    ratios: dict[str, list[float]] = {}
    headline: dict[str, float] = {}
    trusted = True
    for dtype in dtypes:
        for concurrent in counts:
            ways = (*_WAYS, "http") if concurrent == counts[-1] else _WAYS
            variants = [Variant(way, _way(way, place, dtype, concurrent, new, threads)) for way in ways]
            title = f"{NAME}, {dtype}, {concurrent} at once"
            result = measure(variants, rounds, title=title, console=console)
            case: dict[str, str | float] = {
                "case": f"{dtype}, {concurrent} at once",
                "threads": threads,
                "prompt": _PROMPT,
                "new": new,
            }
            rows += result.rows(**case, noise=round(result.noise, 3))
            trusted = trusted and result.quiet
            for other in _WAYS[1:]:
                if (ratio := result.ratio("glowplug", other, "tokens_s")) is not None:
                    ratios.setdefault(other, []).append(ratio[0])
                    headline[f"vs_{other}_{dtype}_{concurrent}"] = round(ratio[0], 3)
            if (ratio := result.ratio("http", "glowplug", "cpu_ms_per_token")) is not None:
                headline[f"http_overhead_{dtype}"] = round(ratio[0] - 1, 3)
    if "generate_batch" in ratios:
        headline["throughput_vs_generate_batch"] = round(statistics.median(ratios["generate_batch"]), 3)
    if "padded" in ratios:
        headline["throughput_vs_padded"] = round(statistics.median(ratios["padded"]), 3)
    eight = [value for name, value in headline.items() if name.startswith("vs_sequential") and name.endswith("_8")]
    if eight:
        headline["throughput_vs_sequential"] = min(eight)
    costs = [value for name, value in headline.items() if name.startswith("http_overhead_")]
    if costs:
        headline["http_overhead"] = max(costs)
    return Report(NAME, headline if trusted else {}, rows, trusted)


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
