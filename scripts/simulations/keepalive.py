"""The comparison of keep-alive rules on traces: each on the mechanism that it was made for, and on the other one.

A variant's cost at an exchange rate ρ is ρ · (seconds of start) + (GB·s of idle memory). Rules with a ρ run at each
ρ of the sweep, the others once.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from benchmarks import harness
from report import Report, Row

from simulations import functions
from simulations.functions import Call, Workload
from simulations.rules import Clairvoyant, FaasCache, Fixed, Histogram, Pagurus, Priced, RainbowCake, Seuss
from simulations.worlds import Containers, Result, Rule, World, Zygotes

NAME = "keepalive"
RHOS = (0.06, 0.25, 1.0, 4.0, 16.0, 64.0)
OURS = "glowplug"
RAINBOW = "rainbowcake"
BOUND = "clairvoyant, zygotes"
_AT = " at "
_QUANTILES = (50, 99)
_WRITTEN = ("idle_gb_s", "mean_start_s", "p50_start_s", "p99_start_s", "calls")
_PUBLISHED = ("pagurus", "faascache", "histogram", "openwhisk", "seuss", RAINBOW)  # by waste, the most first

Sample: TypeAlias = dict[str, float]
Make: TypeAlias = Callable[[float, Workload, Sequence[Call]], Rule]


@dataclass(frozen=True, slots=True)
class Variant:
    """A rule in a world; `rhos` are the exchange rates at which it runs, none for a rule without ρ."""

    name: str
    world: type[World]
    make: Make
    rhos: tuple[float, ...] = ()


def _cached(size: int, _rho: float, _work: Workload, _calls: Sequence[Call]) -> Rule:
    return FaasCache(size * 1e9)


VARIANTS = (
    Variant("openwhisk", Containers, lambda _rho, _work, _calls: Fixed()),
    Variant("histogram", Containers, lambda _rho, _work, _calls: Histogram()),
    Variant("faascache", Containers, partial(_cached, 64)),
    *(Variant(f"faascache, {size} GB", Containers, partial(_cached, size)) for size in (2, 4, 8)),
    Variant("seuss", Containers, lambda _rho, _work, _calls: Seuss()),
    Variant("pagurus", Containers, lambda _rho, _work, _calls: Pagurus()),
    Variant(RAINBOW, Containers, lambda _rho, _work, _calls: RainbowCake()),
    Variant(f"{RAINBOW}, its code", Containers, lambda _rho, _work, _calls: RainbowCake(code=True)),
    Variant(f"{RAINBOW}, zygotes", Zygotes, lambda _rho, _work, _calls: RainbowCake()),
    Variant(f"{RAINBOW} by ρ", Containers, lambda rho, _work, _calls: RainbowCake(rho), RHOS),
    Variant(f"{RAINBOW} by ρ, zygotes", Zygotes, lambda rho, _work, _calls: RainbowCake(rho), RHOS),
    Variant(f"{OURS}, containers", Containers, lambda rho, _work, _calls: Priced(rho), (0.06, 0.25, 1.0)),
    Variant(OURS, Zygotes, lambda rho, _work, _calls: Priced(rho), RHOS),
    Variant(BOUND, Zygotes, lambda rho, work, calls: Clairvoyant(rho, work.functions, calls), RHOS),
)
_BY_NAME = {variant.name: variant for variant in VARIANTS}
# Whose idle memory is compared at whose mean start.
_PAIRS = {
    "idle_memory_vs_rainbowcake": (OURS, RAINBOW),
    "idle_memory_vs_rainbowcakes_code": (OURS, f"{RAINBOW}, its code"),
    "idle_memory_both_on_zygotes": (OURS, f"{RAINBOW}, zygotes"),
    "idle_memory_both_on_containers": (f"{OURS}, containers", RAINBOW),
}


def key(name: str, rho: float | None) -> str:
    return name if rho is None else f"{name}{_AT}{rho:g}"


def measure(workload: Workload, variant: Variant, rho: float, calls: Sequence[Call]) -> Sample:
    return _sample(variant.world(workload.functions, variant.make(rho, workload, calls)).run(calls))


def _sample(result: Result) -> Sample:
    starts, count = sorted(result.starts), len(result.starts)
    found = {"user": 0.0, "lang": 0.0, "bare": 0.0, "cold": 0.0, **result.found}
    return {
        "mean_start_s": sum(starts) / count,
        **{f"p{q}_start_s": starts[min(count - 1, count * q // 100)] for q in _QUANTILES},
        "idle_gb_s": result.idle,
        "calls": float(count),
        **{f"{name}_share": number / count for name, number in found.items()},
    }


def cost(sample: Sample, rho: float) -> float:
    """Return the cost of a sample at `rho`, in GB·s."""
    return rho * sample["mean_start_s"] * sample["calls"] + sample["idle_gb_s"]


def seeded(workload: str | None, part: float, rhos: Sequence[float], seed: int) -> list[dict[str, Sample]]:
    """Run all variants on one seed's calls, for each workload; samples by `key`, ratios of `_PAIRS` as `(ratio)`."""
    found = []
    for each in functions.load(Path(workload) if workload else None):
        work = functions.shortened(each, part) if part < 1 else each
        calls = work.calls(seed)
        samples = {
            key(variant.name, rho): measure(work, variant, rho or rhos[0], calls)
            for variant in VARIANTS
            for rho in ([rho for rho in variant.rhos if rho in rhos] if variant.rhos else [None])
        }
        samples["(ratio)"] = {
            name: _at_equal_start(partial(_measured, samples, work, calls, ours), rhos, samples[theirs])
            for name, (ours, theirs) in _PAIRS.items()
        }
        found.append(samples)
    return found


def _measured(samples: Mapping[str, Sample], work: Workload, calls: Sequence[Call], name: str, rho: float) -> Sample:
    return samples.get(key(name, rho)) or measure(work, _BY_NAME[name], rho, calls)


def _at_equal_start(run: Callable[[float], Sample], rhos: Sequence[float], other: Sample) -> float:
    """Return our idle memory ÷ the other's, at a ρ at which our mean start is equal, or up to a hundredth shorter.

    Where we start sooner at the least ρ of the sweep, that ρ counts, and the true ratio is lower. Where no ρ of the
    sweep is high enough there is no ratio.
    """
    wanted = other["mean_start_s"]
    low, high = rhos[0], rhos[0]
    best = run(high)
    starts = {high: best["mean_start_s"]}
    for rho in rhos[1:]:
        if starts[high] <= wanted:
            break
        low, high, best = high, rho, run(rho)
        starts[high] = best["mean_start_s"]
    if starts[high] > wanted:
        return math.nan
    if low == high:
        return best["idle_gb_s"] / other["idle_gb_s"]
    for _ in range(6):
        if best["mean_start_s"] > 0.99 * wanted:
            break
        # Where a line between the two would meet it, a little to the quick side, and never too near an end.
        part = (starts[low] - 0.995 * wanted) / (starts[low] - starts[high])
        middle = low * (high / low) ** min(0.9, max(0.1, part))
        sample = run(middle)
        starts[middle] = sample["mean_start_s"]
        if sample["mean_start_s"] <= wanted:
            best, high = sample, middle
        else:
            low = middle
    return best["idle_gb_s"] / other["idle_gb_s"]


def run(path: Path | None, *, seeds: int, quick: bool = False) -> Report:
    """Compare all variants. Raises `OSError` or `ValueError` for a trace that cannot be read."""
    workloads = functions.load(path)
    part, rhos = (0.1, RHOS[1:4]) if quick else (1.0, RHOS)
    task = partial(seeded, str(path) if path else None, part, rhos)
    with ProcessPoolExecutor() as pool:
        by_seed = list(pool.map(task, range(seeds)))
    rows: list[Row] = []
    headline: dict[str, float] = {}
    for number, workload in enumerate(workloads):
        samples = [each[number] for each in by_seed]
        suffix = "" if number == 0 else f", {workload.source}"
        ratios = {name: [each["(ratio)"][name] for each in samples] for name in _PAIRS}
        figures = {name: harness.spread(found) for name, found in ratios.items() if not any(map(math.isnan, found))}
        figures["cost_vs_best_baseline"] = harness.spread([max(_against_best(each, rhos)) for each in samples])
        figures["cost_vs_clairvoyant"] = harness.spread([max(_against(BOUND, each, rhos)) for each in samples])
        figures["idle_memory_vs_rainbowcake_at_any_rho"] = harness.spread([max(_sweep(each, rhos)) for each in samples])
        if number == 0:
            figures |= _reproduced(samples)
        headline |= {f"{name}{suffix}": harness.short(found.median) for name, found in figures.items()}
        rows += harness.ratio_rows({f"{name}{suffix}": found for name, found in figures.items()})
        for name in samples[0]:
            if name != "(ratio)":
                rows += _rows(workload.source, name, [each[name] for each in samples])
        rows += [
            harness.row(
                [cost(each[name], rho) for each in samples],
                variant=name.partition(_AT)[0],
                metric="cost",
                trace=workload.source,
                rho=rho,
            )
            for rho in rhos
            for name in _at(rho)
        ]
    if quick:
        return Report(NAME, headline, rows, False, "a quick run")
    return Report(NAME, headline, rows)


def summary(report: Report) -> Report:
    """Return the report for a result file, without the rows that only the terminal shows (found layers, costs)."""
    return replace(
        report, rows=[row for row in report.rows if row["metric"] in _WRITTEN or row["variant"] == "(ratio)"]
    )


def _rows(trace: str, name: str, samples: Sequence[Sample]) -> list[Row]:
    variant, _, rho = name.partition(_AT)
    constant: dict[str, str | float] = {"variant": variant, "trace": trace} | ({"rho": float(rho)} if rho else {})
    metrics = dict.fromkeys(metric for sample in samples for metric in sample)
    return [harness.row([s.get(metric, 0.0) for s in samples], metric=metric, **constant) for metric in metrics]


def _at(rho: float) -> list[str]:
    """Return the keys of the variants that run at `rho`, or without ρ."""
    return [key(variant.name, rho if variant.rhos else None) for variant in VARIANTS if rho in (variant.rhos or RHOS)]


def _against_best(samples: Mapping[str, Sample], rhos: Sequence[float]) -> list[float]:
    """Return, for each ρ, our cost ÷ the least cost of all baselines."""
    found = []
    for rho in rhos:
        others = [name for name in _at(rho) if not name.startswith((OURS, BOUND))]
        found.append(cost(samples[key(OURS, rho)], rho) / min(cost(samples[name], rho) for name in others))
    return found


def _against(name: str, samples: Mapping[str, Sample], rhos: Sequence[float]) -> list[float]:
    """Return, for each ρ, our cost ÷ that of another rule with ρ."""
    return [cost(samples[key(OURS, rho)], rho) / cost(samples[key(name, rho)], rho) for rho in rhos]


def _sweep(samples: Mapping[str, Sample], rhos: Sequence[float]) -> list[float]:
    """Return our idle memory ÷ RainbowCake's with α from ρ, interpolated between two of our runs at its mean start.

    Where all its starts are slower than ours, our least memory counts; where all are quicker, there is no ratio.
    """
    ours = sorted((samples[key(OURS, rho)]["mean_start_s"], samples[key(OURS, rho)]["idle_gb_s"]) for rho in rhos)
    found = []
    for rho in rhos:
        theirs = samples[key(f"{RAINBOW} by ρ", rho)]
        at = bisect_left(ours, (theirs["mean_start_s"], 0.0))
        if at == 0:
            continue
        (left, more), (right, less) = ours[at - 1], ours[min(at, len(ours) - 1)]
        part = (theirs["mean_start_s"] - left) / (right - left) if right > left else 0.0
        found.append(math.exp((1 - part) * math.log(more) + part * math.log(less)) / theirs["idle_gb_s"])
    return found


def _reproduced(samples: Sequence[Mapping[str, Sample]]) -> dict[str, harness.Spread]:
    """Return RainbowCake's claims as measured here; published are 0.32, 0.23, 0.03, 0.40, and the whole order."""

    def ratio(metric: str, other: str) -> harness.Spread:
        return harness.spread([each[RAINBOW][metric] / each[other][metric] for each in samples])

    waste = {name: statistics.median(each[name]["idle_gb_s"] for each in samples) for name in _PUBLISHED}
    pairs = [(a, b) for at, a in enumerate(_PUBLISHED) for b in _PUBLISHED[at + 1 :]]
    kept = statistics.mean(waste[a] >= waste[b] for a, b in pairs)
    return {
        "rainbowcake_start_vs_pagurus": ratio("mean_start_s", "pagurus"),
        "rainbowcake_waste_vs_pagurus": ratio("idle_gb_s", "pagurus"),
        "rainbowcake_start_vs_openwhisk": ratio("mean_start_s", "openwhisk"),
        "rainbowcake_waste_vs_openwhisk": ratio("idle_gb_s", "openwhisk"),
        "published_order_of_waste_kept": harness.Spread(kept, kept, kept),
    }


def text(report: Report) -> Iterator[str]:
    """Yield the report's lines for the terminal: a table for each trace, and the headline."""
    cells: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for row in report.rows:
        if "trace" in row and row["metric"] != "cost":
            where = f"{row['trace']}", f"{row['variant']}", f"{row['rho']:g}" if "rho" in row else ""
            cells[where][f"{row['metric']}"] = float(row["median"] or 0.0)
    last = ""
    for (trace, name, rho), found in cells.items():
        if trace != last:
            yield f"{trace}: {found['calls']:.0f} calls; medians of the seeds"
            heads = ("idle GB·s", "mean s", "P50 s", "P99 s", "user", "lang", "bare", "cold")
            yield f"  {'rule':32} {'ρ':>5}" + "".join(f"{head:>10}" for head in heads)
            last = trace
        shares = "".join(f"{found[f'{each}_share']:10.0%}" for each in ("user", "lang", "bare", "cold"))
        starts = "".join(f"{found[metric]:10.3f}" for metric in ("mean_start_s", "p50_start_s", "p99_start_s"))
        yield f"  {name:32} {rho:>5}{found['idle_gb_s']:10.0f}{starts}{shares}"
    yield ""
    for name, value in report.headline.items():
        yield f"{name:50} {value:8.3g}"
