"""Which resident models go when another needs room. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """A model that nobody holds: `bytes` it takes, `last_used` on the caller's clock in seconds."""

    key: int
    bytes: int
    last_used: float


def least_recently_used(candidates: Iterable[Candidate], needed: int) -> list[int] | None:
    """The keys to evict, oldest first, so that at least `needed` bytes become free; None if all together are too few.

    A candidate that turns out to be superfluous once a later, larger one is taken is spared.
    """
    chosen: list[Candidate] = []
    freed = 0
    for candidate in sorted(candidates, key=lambda candidate: (candidate.last_used, candidate.key)):
        if freed >= needed:
            break
        chosen.append(candidate)
        freed += candidate.bytes
    if freed < needed:
        return None
    for candidate in sorted(chosen, key=lambda candidate: -candidate.last_used):
        if freed - candidate.bytes >= needed:
            chosen.remove(candidate)
            freed -= candidate.bytes
    return [candidate.key for candidate in chosen]
