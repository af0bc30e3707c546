"""The ledger of one start: spans of CLOCK_MONOTONIC, which every process of a node shares. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock


@dataclass(frozen=True, slots=True)
class Span:
    """One activity of `owner` (`shim`, `worker`, `agent`) from `start` to `end`, in ns of CLOCK_MONOTONIC."""

    owner: str
    name: str
    start: int
    end: int

    @property
    def ms(self) -> float:
        return (self.end - self.start) / 1e6


class Ledger:
    """Collect the spans of one start, from any thread; `node` is the start's node, or "" until that is known."""

    def __init__(self, owner: str, start_id: str = "") -> None:
        self.owner = owner
        self.start_id = start_id
        self.node = ""
        self._spans: list[Span] = []
        self._lock = Lock()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the body's duration, also when the body raises: failed starts are the ones that people look at."""
        start = time.monotonic_ns()
        try:
            yield
        finally:
            self.add(name, start)

    def add(self, name: str, start: int, end: int | None = None) -> None:
        """Add a span of this ledger's owner; times in ns of CLOCK_MONOTONIC, `end` by default now."""
        self.extend([Span(self.owner, name, start, time.monotonic_ns() if end is None else end)])

    def extend(self, spans: Iterable[Span]) -> None:
        with self._lock:
            self._spans.extend(spans)

    def since(self, count: int) -> list[Span]:
        """Return the spans after the first `count`, in the order in which they were added."""
        with self._lock:
            return self._spans[count:]

    def spans(self) -> list[Span]:
        """Return a copy of all spans, ordered by start."""
        with self._lock:
            return sorted(self._spans, key=lambda span: (span.start, span.end))
