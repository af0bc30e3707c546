"""The harness of all benchmarks: interleaved rounds, noise watched, ratios pair by pair.

    round 1:  probe  A  B  C        A, B, C are variants of one benchmark; their order changes from round to round, so
    round 2:  probe  B  C  A        that drift of the machine hits all of them alike. A ratio is taken inside a round
    round 3:  probe  C  A  B        and reported as the median of the rounds' ratios, with their quartiles.

Before and after each round the harness times a fixed piece of arithmetic, and measures how busy the machine is while
the benchmark does nothing. When either shows that something else used the machine, the round is repeated, whatever it
measured. After as many repetitions as there are rounds, further disturbed rounds are kept; if the noise shows in the
whole result, the comparison is refused.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from report import Report, Row
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import machine

Sample: TypeAlias = Mapping[str, float]
"""Result of one run of a variant: metric → number; units are in the names (`_s`, `_ms`, `_mb`)."""

DRIFT_LIMIT = 1.35  # slow probes ÷ fast ones
BUSY_LIMIT = 0.25  # median share of the processors that others used


class Unavailable(Exception):
    """A variant cannot run on this machine; the text is the reason that its row will give."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of doing the job. `run` does it once; `prepare` comes before it and is not measured."""

    name: str
    run: Callable[[], Sample]
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles."""

    median: float
    q1: float
    q3: float


@dataclass(slots=True)
class Result:
    """All samples of a benchmark, by variant, one per round."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # variant → why it did not run
    probes: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    load_average: float = field(default_factory=lambda: os.getloadavg()[0])
    repeated: int = 0  # disturbed rounds, which are not in the samples

    @property
    def drift(self) -> float:
        """Return the slow probes' time ÷ the fast ones', without the outermost tenths; 1 on a quiet machine."""
        ordered = sorted(self.probes)
        cut = len(ordered) // 10
        return ordered[-1 - cut] / ordered[cut] if ordered else 1.0

    @property
    def noise(self) -> str:
        """Return why this result is not to be trusted, or ""."""
        if self.drift > DRIFT_LIMIT:
            return f"the same arithmetic took {self.drift:.2f} times as long in some rounds as in others"
        if self.busy and statistics.median(self.busy) > BUSY_LIMIT:
            return f"others kept {statistics.median(self.busy):.0%} of the processors busy"
        return ""

    def ratio(self, over: str, under: str, metric: str, under_metric: str = "") -> Spread | None:
        """Return `over` ÷ `under`, round by round; None if either did not run."""
        if over not in self.samples or under not in self.samples:
            return None
        pairs = [
            a[metric] / b[under_metric or metric]
            for a, b in zip(self.samples[over], self.samples[under], strict=True)
            if b[under_metric or metric] > 0
        ]
        return spread(pairs) if pairs else None

    def median(self, variant: str, metric: str) -> float | None:
        values = [sample[metric] for sample in self.samples.get(variant, []) if metric in sample]
        return statistics.median(values) if values else None

    def rows(self, **constant: str | float) -> list[Row]:
        """Return a flat row per variant and metric, one per variant that did not run, and the machine's noise."""
        found: list[Row] = []
        for variant, samples in self.samples.items():
            for metric in dict.fromkeys(name for sample in samples for name in sample):
                values = [sample[metric] for sample in samples if metric in sample]
                found.append(row(values, variant=variant, metric=metric, **constant))
        found += [{"variant": name, "reason": why, **constant} for name, why in self.missing.items()]
        for metric, values in (
            ("probe_s", self.probes),
            ("busy_share", self.busy),
            ("load_average", [self.load_average]),
            ("repeated_rounds", [float(self.repeated)] if self.repeated else []),
        ):
            if values:
                found.append(row(values, variant="(machine)", metric=metric, **constant))
        return found


def measure(variants: Sequence[Variant], rounds: int, *, title: str, console: Console) -> Result:
    """Run every variant once per round. A variant that raises `Unavailable` is left out from then on."""
    result = Result()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=rounds * len(variants))
        before = _Quiet()
        number = 0
        while number < rounds:
            shift = number % len(variants)
            found: dict[str, Sample] = {}
            for variant in [*variants[shift:], *variants[:shift]]:
                progress.update(task, description=f"{title}: {variant.name}")
                if variant.name not in result.missing:
                    try:
                        variant.prepare()
                        found[variant.name] = variant.run()
                    except Unavailable as error:
                        result.samples.pop(variant.name, None)
                        result.missing[variant.name] = str(error)
                progress.advance(task)
            after = _Quiet()
            if result.repeated < rounds and (before.disturbed(result.probes) or after.disturbed(result.probes)):
                result.repeated += 1
                progress.update(task, completed=number * len(variants))
                before = _Quiet()
                continue
            for name, sample in found.items():
                result.samples.setdefault(name, []).append(sample)
            for watched in (before, after) if number == 0 else (after,):
                result.probes.append(watched.probe)
                result.busy.append(watched.busy)
            before = after
            number += 1
    # A table lists variants in the order in which they were declared, whatever the first round's order was.
    result.samples = {v.name: result.samples[v.name] for v in variants if v.name in result.samples}
    return result


def judged(
    name: str, headline: Mapping[str, float | None], rows: Sequence[Row], results: Sequence[Result], quick: bool
) -> Report:
    """Return the report: without its headline on a machine that was too noisy, and not to be quoted after a quick run.

    Figures that are None could not be measured and are left out.
    """
    known = {key: short(value) for key, value in headline.items() if value is not None}
    noise = next((result.noise for result in results if result.noise), "")
    if quick:
        return Report(name, known, rows, False, "a quick run" + (f" on a noisy machine: {noise}" if noise else ""))
    if noise:
        return Report(name, {}, rows, False, f"too noisy to compare: {noise}")
    return Report(name, known, rows)


def spread(values: Sequence[float]) -> Spread:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return Spread(middle, low, high)


def row(values: Sequence[float], **constant: str | float) -> Row:
    """Return median, quartiles and number of these values."""
    middle = spread(values)
    figures = {
        "median": short(middle.median),
        "q1": short(middle.q1),
        "q3": short(middle.q3),
        "runs": len(values),
    }
    return {**constant, **figures}


def ratio_rows(pairs: Mapping[str, Spread | None], **constant: str | float) -> list[Row]:
    """Return the spread behind each ratio of a headline; none for a ratio that could not be measured."""
    return [
        {
            **constant,
            "variant": "(ratio)",
            "metric": key,
            "median": short(found.median),
            "q1": short(found.q1),
            "q3": short(found.q3),
        }
        for key, found in pairs.items()
        if found is not None
    ]


def middle(found: Spread | None) -> float | None:
    return None if found is None else found.median


def short(value: float) -> float:
    """Round to five significant digits: more would be noise in a file that people compare."""
    return float(f"{value:.5g}")


@dataclass(slots=True)
class _Quiet:
    """A look at the machine between two rounds."""

    busy: float = field(default_factory=lambda: machine.others())
    probe: float = field(default_factory=lambda: machine.probe())

    def disturbed(self, probes: Sequence[float]) -> bool:
        """Return whether others used the machine; `probes` are those of rounds that were kept."""
        return self.busy > BUSY_LIMIT or self.probe > DRIFT_LIMIT * min([*probes, self.probe])
