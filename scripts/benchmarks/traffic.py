"""The traffic that benchmarks send to a function: requests with their times, and their results."""

from __future__ import annotations

import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from report import ROOT

Result = Mapping[str, float]

_TRACE = "traces/azure-llm-2023-code.csv"


def clients(port: int, requests: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Send each request {"at", "body"} at its time, from another process; return the results in the same order."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(requests, file)
        file.flush()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
        command = [sys.executable, "-m", "benchmarks.stream_clients", str(port), file.name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=1800, env=environment)
    found: list[Result] = json.loads(done.stdout)
    return found


def dice(seed: int) -> random.Random:
    """Return a source of randomness: the same seed gives the same requests."""
    return random.Random(seed)  # noqa: S311  nothing here is a secret


def request(at: float, prompt: int, new: int, chance: random.Random) -> dict[str, Any]:
    """Return a request to complete `prompt` random tokens by `new` ones."""
    ids = [chance.randrange(3, 30_000) for _ in range(prompt)]
    return {"at": at, "body": {"prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True}}


def steady(rate: float, seconds: float, prompt: int, new: int, seed: int) -> list[dict[str, Any]]:
    """Return Poisson arrivals of equal requests."""
    chance, at, found = dice(seed), 0.0, []
    while (at := at + chance.expovariate(rate)) < seconds:
        found.append(request(at, prompt, new, chance))
    return found


def azure(seconds: float, tokens_s: float, context: int, scale: float, seed: int) -> list[dict[str, Any]] | None:
    """Return the beginning of the Azure LLM trace (code, 2023); None where GLOWPLUG_TEST_DATA does not have it.

    Its lengths are multiplied by `scale`, and its clock runs such that it asks for `tokens_s` tokens, of prompts and
    answers, per second.
    """
    file = Path(os.environ.get("GLOWPLUG_TEST_DATA", "/nonexistent")) / _TRACE
    if not file.exists():
        return None
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    chance, asked = dice(seed), 0
    found: list[dict[str, Any]] = []
    begun = _time(rows[0])
    for row in rows:
        new = max(1, round(int(row["GeneratedTokens"]) * scale))
        prompt = max(1, min(round(int(row["ContextTokens"]) * scale), context - new))
        asked += prompt + new
        if asked > tokens_s * seconds and found:
            break
        found.append(request(_time(row) - begun, prompt, new, chance))
    stretch = seconds / max(1.0, found[-1]["at"])
    return [{**one, "at": one["at"] * stretch} for one in found]


def _time(row: Mapping[str, str]) -> float:
    return datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return P50, P95 and P99, linear between the two nearest values."""
    if len(values) < 2:
        return dict.fromkeys(("p50", "p95", "p99"), values[0] if values else 0.0)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}
