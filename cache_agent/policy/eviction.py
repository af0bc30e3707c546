"""Which idle models go when another needs room: GreedyDual-Size-Frequency, for memory and SSD alike. Pure.

    priority = clock + uses × seconds / bytes

`seconds` is what bringing the model back was measured to take: a small model that is dear to rebuild and often used
stays, a large cheap one goes. When a model goes, the clock rises to its priority, so that what was used long ago ages
without anybody touching it. L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching
Policy", HP Laboratories, HPL-98-69R1, 1998.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """A model that nobody holds: `bytes` it takes, its `priority`, `last_used` on the caller's clock in seconds."""

    key: int | str
    bytes: int
    priority: float
    last_used: float = 0.0


class Choice(NamedTuple):
    """The keys to evict, cheapest first, and the clock afterwards."""

    keys: list[int | str]
    clock: float


def priority(clock: float, uses: int, seconds: float, size: int) -> float:
    """What a model is worth from now on, having been used `uses` times; `seconds` to rebuild it, `size` in bytes."""
    return clock + uses * seconds / max(1, size)


def cheapest(candidates: Iterable[Candidate], needed: int, clock: float = 0.0) -> Choice | None:
    """Whom to evict so that at least `needed` bytes become free; None if all together are too few.

    Equal priorities go by age. A candidate that turns out to be superfluous once a later, larger one is taken is
    spared.
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
