"""Density: the copies of a model's weights that a node holds for 1, 2, 4, 8 replicas of one function.

Every plain replica reads checkpoint files of its own, as every container image has them; ours lease from the node's
agent. Each runs in a memory cgroup. The memory is counted after the page cache was dropped and every replica
has answered again: mapped pages of checkpoint files, segments of weights (huge pages included), and what the processes
own beyond the same function with a model of 0.2 million parameters. Then each replica is put under memory pressure, as
a node does to idle pods, and asked again.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from memory import weight_copies
from report import Report
from rich.console import Console

from benchmarks import functions, machine, models
from benchmarks.agents import Running, agent
from benchmarks.containers import MemoryCgroup
from benchmarks.functions import Function
from benchmarks.harness import Sample, Unavailable, Variant, judged, measure

NAME = "density"
_REPLICAS = (1, 2, 4, 8)
_OWN_BYTES = 1 << 30  # of a function beside its weights, rounded up
_KEY_AT = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """The parts of a run; `weightless` has the bytes of a replica of each kind without weights, from its first run."""

    place: Path
    copies: list[Path]
    threads: int
    running: Running
    weightless: dict[str, int]

    @property
    def size(self) -> int:
        return models.weight_bytes(self.place)

    def open(self, kind: str, number: int, cgroup: MemoryCgroup) -> contextlib.AbstractContextManager[Function]:
        if kind == "plain":
            return functions.plain(self.copies[number], threads=self.threads, cgroup=cgroup)
        uri = f"file://{self.place}"
        return functions.glowplug(uri, agent=self.running.socket, threads=self.threads, cgroup=cgroup)


def run(quick: bool, console: Console) -> Report:
    replicas = (1, 2, 4) if quick else _REPLICAS
    place = models.checkpoint("125m" if quick else "1.1b", console)
    tiny = models.checkpoint("tiny", console)
    copies = [models.copy(place, number, console) for number in range(_possible(place, replicas))]
    threads = len(os.sched_getaffinity(0))
    with machine.huge_pages(int(models.weight_bytes(place) * 1.02)) as pool:
        options = ["--huge-pages", "auto", "--dram", str(models.weight_bytes(place) * 2)]
        with agent(*options) as running:
            setting = Setting(place, copies, threads, running, {})
            variants = [
                Variant(f"{kind} x{count}", _run(setting, kind, count, tiny))
                for count in replicas
                for kind in ("plain", "glowplug")
            ]
            result = measure(variants, 1 if quick else 3, title="density", console=console)
    case: dict[str, str | float] = {"threads": threads, "pages": "2 MiB" if pool else "4 KiB", "model": place.name}
    headline: dict[str, float | None] = {}
    for kind, suffix in (("glowplug", ""), ("plain", "_plain")):
        name = f"{kind} x{_KEY_AT}"
        headline[f"copies_of_weights{suffix}"] = result.median(name, "copies")
        headline[f"copies_after_eviction{suffix}"] = result.median(name, "evicted_copies")
        headline[f"evicted_token_ms{suffix}"] = result.median(name, "evicted_token_ms")
        headline[f"warm_token_ms{suffix}"] = result.median(name, "warm_token_ms")
    return judged(NAME, headline, result.rows(**case), [result], quick)


def _possible(place: Path, replicas: Iterable[int]) -> int:
    """Return the largest number of plain replicas whose weights fit into memory and on the disk."""
    memory, size = _available(), models.weight_bytes(place)
    return max(count for count in replicas if count * (size + _OWN_BYTES // 2) + size < memory or count == 1)


def _run(setting: Setting, kind: str, count: int, tiny: Path) -> Callable[[], Sample]:
    def measured() -> Sample:
        if kind == "plain" and count > len(setting.copies):
            need, have = count * (setting.size + _OWN_BYTES // 2), _available()
            raise Unavailable(f"{count} copies need {need / 1e9:.0f} GB of memory, {have / 1e9:.0f} GB are available")
        if kind not in setting.weightless:
            light = Setting(tiny, [tiny], setting.threads, setting.running, {})
            with _replicas(light, kind, 1) as replicas:
                setting.weightless[kind] = _anonymous(
                    pid for function, _ in replicas for pid in function.container.pids()
                )
        with _replicas(setting, kind, count) as replicas:
            return _measure(setting, kind, replicas)

    return measured


@contextlib.contextmanager
def _replicas(setting: Setting, kind: str, count: int) -> Iterator[list[tuple[Function, MemoryCgroup]]]:
    with contextlib.ExitStack() as stack:
        found = []
        for number in range(count):
            cgroup = stack.enter_context(MemoryCgroup(f"{kind}-{number}", setting.size + 2 * _OWN_BYTES))
            found.append((stack.enter_context(setting.open(kind, number, cgroup)), cgroup))
        yield found


def _measure(setting: Setting, kind: str, replicas: list[tuple[Function, MemoryCgroup]]) -> Sample:
    sample = {"first_token_ms": statistics.median(function.first_token for function, _ in replicas)}
    if not machine.drop_everything():
        raise Unavailable("dropping the page cache takes root")
    _ask(replicas)
    sample["warm_token_ms"] = _ask(replicas)
    resident = _weights(setting, kind, replicas)
    sample |= {"weights_mb": resident / 1e6, "copies": resident / setting.size}
    for _, cgroup in replicas:
        cgroup.reclaim()
    evicted = _weights(setting, kind, replicas)
    sample |= {"evicted_weights_mb": evicted / 1e6, "evicted_copies": evicted / setting.size}
    sample["evicted_token_ms"] = _ask(replicas)
    return sample


def _ask(replicas: list[tuple[Function, MemoryCgroup]]) -> float:
    return statistics.median([function.ask() for function, _ in replicas])


def _weights(setting: Setting, kind: str, replicas: list[tuple[Function, MemoryCgroup]]) -> int:
    """Return the bytes of weights in memory, in segments and in the page cache."""
    pids = [pid for function, _ in replicas for pid in function.container.pids()]
    places = setting.copies[: len(replicas)] if kind == "plain" else [setting.place]
    mapped = sum(machine.cached(file) for place in places for file in models.weight_files(place))
    segments = weight_copies([*pids, setting.running.process.pid]) if kind == "glowplug" else {}
    own = _anonymous(pids) - setting.weightless[kind] * len(replicas)
    return mapped + sum(segments.values()) + max(0, own)


def _anonymous(pids: Iterable[int]) -> int:
    """Return the anonymous bytes of these processes, shared ones counted once."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total += int(line.split()[1]) * 1024
    return total


def _available() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024
