"""The ledger of one start: spans of CLOCK_MONOTONIC, which every process of a node shares. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock


@dataclass(frozen=True, slots=True)
class Span:
    """What `owner` (`shim`, `worker`, `agent`) did between `start` and `end` (ns of CLOCK_MONOTONIC)."""

    owner: str
    name: str
    start: int
    end: int

    @property
    def ms(self) -> float:
        return (self.end - self.start) / 1e6


class Ledger:
    """Collects the spans of one start; safe to use from several threads. `node` is its node, "" until that is known."""

    def __init__(self, owner: str, start_id: str = "") -> None:
        self.owner = owner
        self.start_id = start_id
        self.node = ""
        self._spans: list[Span] = []
        self._lock = Lock()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Records the body's duration, also when it raises: a start that failed is the one people look at."""
        start = time.monotonic_ns()
        try:
            yield
        finally:
            self.add(name, start)

    def add(self, name: str, start: int, end: int | None = None) -> None:
        self.extend([Span(self.owner, name, start, time.monotonic_ns() if end is None else end)])

    def extend(self, spans: Iterable[Span]) -> None:
        with self._lock:
            self._spans.extend(spans)

    def since(self, count: int) -> list[Span]:
        """The spans after the first `count`, in the order in which they were added."""
        with self._lock:
            return self._spans[count:]

    def spans(self) -> list[Span]:
        """A copy, ordered by start."""
        with self._lock:
            return sorted(self._spans, key=lambda span: (span.start, span.end))
