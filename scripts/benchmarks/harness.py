"""Owns how anything is measured here: interleaved rounds, page caches dropped, noise watched, ratios pair by pair.

    round 1:  probe  A  B  C        A, B, C are variants of one benchmark; their order changes from round to round, so
    round 2:  probe  B  C  A        that drift of the machine hits all of them alike. A ratio is taken inside a round
    round 3:  probe  C  A  B        and reported as the median of the rounds' ratios, with their quartiles.

The probe is a fixed piece of arithmetic. When its time differs too much between rounds, something else used the
machine: the comparison is refused, with the figures that led to it.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Sample = Mapping[str, float]
"""What one run of a variant measured: metric → number; units are in the names (`_s`, `_ms`, `_mb`)."""

NOISE_LIMIT = 1.35  # slowest probe ÷ fastest, the outermost tenth left out


class Unavailable(Exception):
    """A variant cannot run on this machine; the text is the reason that its row will give."""


@dataclass(frozen=True)
class Variant:
    """One way of doing the job. `run` does it once; `prepare` comes before it and is not measured."""

    name: str
    run: Callable[[], Sample]
    prepare: Callable[[], None] = lambda: None
    about: str = ""


@dataclass
class Result:
    """All samples of a benchmark, by variant and round."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # variant → why it did not run
    probes: list[float] = field(default_factory=list)

    @property
    def noise(self) -> float:
        """How much slower the slow probes were than the fast ones; 1 on a quiet machine."""
        ordered = sorted(self.probes)
        cut = len(ordered) // 10
        return ordered[-1 - cut] / ordered[cut] if ordered else 1.0

    @property
    def quiet(self) -> bool:
        return self.noise <= NOISE_LIMIT

    def median(self, variant: str, metric: str) -> float:
        return statistics.median(sample[metric] for sample in self.samples[variant])

    def ratio(self, over: str, under: str, metric: str) -> tuple[float, float, float] | None:
        """(median, lower and upper quartile) of `over` ÷ `under`, round by round; None if either did not run."""
        if over not in self.samples or under not in self.samples:
            return None
        pairs = [
            a[metric] / b[metric]
            for a, b in zip(self.samples[over], self.samples[under], strict=True)
            if metric in a and metric in b and b[metric] > 0
        ]
        if not pairs:
            return None
        low, middle, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else (pairs[0],) * 3
        return middle, low, high

    def rows(self, **constant: str | float) -> list[dict[str, str | float | None]]:
        """A flat row per variant and metric: median, quartiles, extremes, number of runs."""
        found: list[dict[str, str | float | None]] = []
        for variant, samples in self.samples.items():
            for metric in dict.fromkeys(name for sample in samples for name in sample):
                values = [sample[metric] for sample in samples if metric in sample]
                low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
                found.append(
                    {
                        "variant": variant,
                        "metric": metric,
                        "median": _short(middle),
                        "q1": _short(low),
                        "q3": _short(high),
                        "min": _short(min(values)),
                        "max": _short(max(values)),
                        "runs": len(values),
                        **constant,
                    }
                )
        found += [{"variant": name, "metric": None, "reason": why, **constant} for name, why in self.missing.items()]
        return found


def measure(variants: Sequence[Variant], rounds: int, *, title: str, console: Console | None = None) -> Result:
    """Runs every variant once per round. A variant that raises `Unavailable` is left out from then on."""
    result = Result()
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(title, total=rounds * len(variants))
        for number in range(rounds):
            result.probes.append(probe())
            shift = number % len(variants)
            for variant in [*variants[shift:], *variants[:shift]]:
                progress.update(task, description=f"{title}: {variant.name}")
                if variant.name not in result.missing:
                    try:
                        variant.prepare()
                        result.samples.setdefault(variant.name, []).append(variant.run())
                    except Unavailable as error:
                        result.samples.pop(variant.name, None)
                        result.missing[variant.name] = str(error)
                progress.advance(task)
        result.probes.append(probe())
    return result


def probe() -> float:
    """Seconds of a fixed piece of work, the best of five: what the processor gives us right now."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        total = 0
        for value in range(300_000):
            total += value * value
        times.append(time.perf_counter() - start)
    return min(times)


def drop_caches(paths: Iterable[Path]) -> None:
    """Drops files from the page cache, so that the next read is cold; all of it where we may."""
    os.sync()
    if os.geteuid() == 0:
        try:
            Path("/proc/sys/vm/drop_caches").write_text("1\n")
        except OSError:
            pass
        else:
            return
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


@contextmanager
def huge_pages(megabytes: int) -> Iterator[int]:
    """A pool of 2 MiB pages for the time of a benchmark; yields its size in bytes, 0 where it cannot be had."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text() if pool.exists() else ""
    wanted = -(-megabytes // 2) + 8
    try:
        if before and int(before) < wanted:
            Path("/proc/sys/vm/compact_memory").write_text("1\n")
            pool.write_text(f"{wanted}\n")
    except OSError:
        pass
    try:
        got = int(pool.read_text()) if before else 0
        yield got * (2 << 20) if got >= wanted else 0
    finally:
        if before:
            with suppress(OSError):
                pool.write_text(before)


def children_seconds() -> float:
    """Processor seconds of all children that have been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _short(value: float) -> float:
    return float(f"{value:.5g}")
