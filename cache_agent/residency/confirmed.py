"""Owns the times at which origins last confirmed what a URI names, on a clock that does not jump.

A confirmation from disk or from another node has only a time of day, and either clock may have been wrong. Its age is
then counted from that date; a date in the future counts as infinitely old.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from cache_agent.cluster.directory import CLOCKS_APART

_MOST = 4096  # URIs that are remembered; the oldest go


class Confirmed:
    """The last confirmation of each URI's source. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.time, ticks: Callable[[], float] = time.monotonic) -> None:
        """`clock` is the time of day, which may jump; `ticks` never jumps. Both in seconds."""
        self._clock, self._ticks = clock, ticks
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[str, float]] = {}

    def now(self) -> float:
        """Return the time of day: the only clock that nodes have in common."""
        return self._clock()

    def say(self, uri: str, source: str) -> None:
        """Note that the origin has said just now that the URI names this source."""
        with self._lock:
            self._seen.pop(uri, None)
            self._seen[uri] = source, self._ticks()
            while len(self._seen) > _MOST:
                del self._seen[next(iter(self._seen))]

    def age(self, uri: str, source: str, when: float) -> float:
        """Return the seconds since an origin said that the URI names this source.

        `when` is the time of day of that answer as the disk or another node has it, used where this process has not
        heard the answer itself; infinite where `when` is in the future.
        """
        with self._lock:
            seen = self._seen.get(uri)
        if seen is not None and seen[0] == source:
            return self._ticks() - seen[1]
        age = self._clock() - when
        return max(0.0, age) if age >= -CLOCKS_APART else math.inf
