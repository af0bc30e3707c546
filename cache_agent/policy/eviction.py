"""The choice of idle models to evict when another needs room: GreedyDual-Size-Frequency, for memory and SSD. Pure.

    priority = clock + uses × seconds / bytes

`seconds` is the measured time of loading the model: a small model that loads slowly and is used often stays, a large
one that loads fast goes. An eviction raises the clock to the evicted model's priority, so that models ages in which
nothing was used need no update. L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency
Caching Policy", HP Laboratories, HPL-98-69R1, 1998.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """A model without a lease: its size in bytes, its `priority`, `last_used` on the caller's clock in seconds."""

    key: int | str
    bytes: int
    priority: float
    last_used: float = 0.0


class Choice(NamedTuple):
    """The keys to evict, cheapest first, and the clock afterwards."""

    keys: list[int | str]
    clock: float


def priority(clock: float, uses: int, seconds: float, size: int) -> float:
    """Return the priority of a model that was used `uses` times, takes `seconds` to load and has `size` bytes."""
    return clock + uses * seconds / max(1, size)


def cheapest(candidates: Iterable[Candidate], needed: int, clock: float = 0.0) -> Choice | None:
    """Choose the models to evict so that at least `needed` bytes become free; None if all together are too few.

    Of equal priorities the least recently used goes first. A candidate stays if the others free enough without it.
    """
    chosen: list[Candidate] = []
    freed = 0
    for candidate in sorted(candidates, key=_order):
        if freed >= needed:
            break
        chosen.append(candidate)
        freed += candidate.bytes
    if freed < needed:
        return None
    for candidate in sorted(chosen, key=_order, reverse=True):
        if freed - candidate.bytes >= needed:
            chosen.remove(candidate)
            freed -= candidate.bytes
    return Choice([c.key for c in chosen], max([clock, *(c.priority for c in chosen)]))


def _order(candidate: Candidate) -> tuple[float, float, str]:
    return candidate.priority, candidate.last_used, str(candidate.key)
