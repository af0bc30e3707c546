"""Workloads of keep-alive: functions with their layers, and a trace of calls, split anew for each seed.

Three workloads: RainbowCake's 20 functions under its curve of arrivals per minute, whose split by function was not
published; Azure's trace of LLM requests over functions of this project's kind; and one made up in the likeness of the
first, for where the data is absent.
"""

from __future__ import annotations

import csv
import os
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cache_agent.policy.keepalive import LayerCost
from simulations import trace

_CURVE = "rainbowcake/arrivals-per-minute.csv"
_FUNCTIONS = "rainbowcake/functions.csv"
MB = 10**6


class Function(NamedTuple):
    """A function: its layers, the shallowest first, and the seconds that a call runs once they are there."""

    name: str
    layers: tuple[LayerCost, ...]
    seconds: float


class Call(NamedTuple):
    """A call of a function: when, which one, and the seconds that it runs."""

    at: float
    function: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Workload:
    """Functions and their calls; `calls(seed)` is in order of time."""

    source: str
    functions: tuple[Function, ...]
    calls: Callable[[int], list[Call]]


def load(path: Path | None) -> list[Workload]:
    """Read a workload from a file; without one, all traces of GLOWPLUG_TEST_DATA, or else a synthetic one.

    The heading of the file says of which kind it is.

    Raises `OSError`, and `ValueError` for a file of another kind.
    """
    if path is not None:
        return [_read(path)]
    data = Path(os.environ.get("GLOWPLUG_TEST_DATA") or "/nonexistent")
    found = [data / name for name in (_CURVE, trace.FILE) if (data / name).exists()]
    return [_read(each) for each in found] or [synthetic()]


def synthetic(minutes: int = 480, calls: int = 28_800) -> Workload:
    """Make a curve with RainbowCake's features: bursts every five minutes above a base that wanders."""
    source = random.Random(1)  # noqa: S311
    level, shape = 1.0, []
    for minute in range(minutes):
        level = max(0.2, level * source.lognormvariate(0.0, 0.15))
        shape.append(level * (6.0 if minute % 5 == 0 else source.lognormvariate(0.0, 0.8)))
    curve = [round(calls * part / sum(shape)) for part in shape]
    functions = _invented()
    return Workload("synthetic", functions, lambda seed: _split(curve, functions, seed))


def shortened(workload: Workload, part: float) -> Workload:
    """Return the first part of a workload; `part` is a share of its time."""

    def calls(seed: int) -> list[Call]:
        every = workload.calls(seed)
        return [call for call in every if call.at <= part * every[-1].at]

    return Workload(workload.source, workload.functions, calls)


def _read(path: Path) -> Workload:
    with path.open(newline="") as file:
        heading = file.readline().strip()
    if heading.startswith("TIMESTAMP"):
        return _llm(path)
    if not heading.startswith("minute"):
        raise ValueError(f"{path} has neither arrivals per minute nor Azure's LLM requests: it begins with {heading!r}")
    table = path.with_name(Path(_FUNCTIONS).name)
    with path.open(newline="") as file:
        curve = [int(row["arrivals"]) for row in csv.DictReader(file)]
    functions = _measured(table) if table.exists() else _invented()
    source = "rainbowcake" if table.exists() else path.stem
    return Workload(source, functions, lambda seed: _split(curve, functions, seed))


def _split(curve: Sequence[int], functions: Sequence[Function], seed: int) -> list[Call]:
    """Assign each arrival of a minute to a function.

    Popularity is log-normal, as in Azure's traces of functions; every fifth minute's surplus belongs to a few functions
    on timers.
    """
    source = random.Random(seed)  # noqa: S311
    count = len(functions)
    popular = [source.lognormvariate(0.0, 1.5) for _ in range(count)]
    timers = source.sample(range(count), max(1, count // 4))
    base = sorted(curve)[len(curve) // 2]
    calls = []
    for minute, arrivals in enumerate(curve):
        surplus = max(0, arrivals - 2 * base)
        chosen = source.choices(range(count), popular, k=arrivals - surplus)
        chosen += source.choices(timers, k=surplus)
        calls += [Call(60.0 * (minute + source.random()), each, functions[each].seconds) for each in chosen]
    return sorted(calls)


def _measured(path: Path) -> tuple[Function, ...]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    stages = [
        (
            row["function"],
            row["language"],
            [(float(row[f"{stage}_ms"]) / 1e3, float(row[f"{stage}_mb"])) for stage in ("bare", "lang", "user")],
            float(row["end_ms"]) / 1e3,
        )
        for row in rows
    ]
    return _assemble([(name, lang, parts, end - sum(s for s, _ in parts)) for name, lang, parts, end in stages])


def _invented() -> tuple[Function, ...]:
    source = random.Random(2)  # noqa: S311
    rows = []
    for number in range(20):
        language = ("js", "python", "java")[number * 3 // 20]
        lang_mb = {"js": 130.0, "python": 40.0, "java": 170.0}[language]
        parts = [
            (source.uniform(0.25, 0.4), source.uniform(22, 40)),
            (source.uniform(0.33, 0.45), lang_mb * source.uniform(0.9, 1.1)),
            (source.lognormvariate(-0.4, 0.9), source.lognormvariate(4.3, 0.6)),
        ]
        rows.append((f"F{number}", language, parts, source.lognormvariate(0.7, 0.5)))
    return _assemble(rows)


def _assemble(rows: Sequence[tuple[str, str, Sequence[tuple[float, float]], float]]) -> tuple[Function, ...]:
    """Give layers that functions share one size and one build time: the mean over these functions."""
    measured = defaultdict(list)
    paths = [("bare", f"lang:{language}", f"user:{name}") for name, language, _, _ in rows]
    for names, (_, _, parts, _) in zip(paths, rows, strict=True):
        for name, part in zip(names, parts, strict=True):
            measured[name].append(part)
    layers = {
        name: LayerCost(name, sum(s for s, _ in parts) / len(parts), int(sum(mb for _, mb in parts) / len(parts) * MB))
        for name, parts in measured.items()
    }
    return tuple(
        Function(row[0], tuple(layers[name] for name in names), row[3]) for names, row in zip(paths, rows, strict=True)
    )


_MODELS = {"125M": (0.06, 40), "1B": (0.25, 60), "3B": (0.6, 80), "8B": (1.5, 110)}  # attach in s, private MB
_PREFILL, _DECODE = 1 / 4000, 0.03  # seconds a token


def _llm(path: Path, count: int = 50) -> Workload:
    """Spread Azure's requests over 50 functions on four models, with this project's layers as measured on two cores."""
    requests, _ = trace.load(path)
    random_source = random.Random(3)  # noqa: S311
    functions = []
    for number in range(count):
        model = random_source.choice(list(_MODELS))
        seconds, mb = _MODELS[model]
        layers = (
            LayerCost("bare", 0.15, 30 * MB),
            LayerCost("lang", 2.9, 280 * MB),
            LayerCost(f"model:{model}", seconds, mb * MB),
            LayerCost(f"user:{number}", random_source.uniform(0.01, 0.5), int(random_source.uniform(10, 60)) * MB),
        )
        functions.append(Function(f"F{number}", layers, 1.0))

    def calls(seed: int) -> list[Call]:
        chance = random.Random(seed)  # noqa: S311
        weights = [chance.lognormvariate(0.0, 1.5) for _ in functions]
        chosen = chance.choices(range(count), weights, k=len(requests))
        return [
            Call(request.arrival, each, request.context * _PREFILL + request.generated * _DECODE)
            for request, each in zip(requests, chosen, strict=True)
        ]

    return Workload(path.stem, tuple(functions), calls)
