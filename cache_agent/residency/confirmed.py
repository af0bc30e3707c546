"""Owns the memory of when origins last said what a URI names, on a clock that does not jump.

What is remembered on disk, or told by other nodes, has only the time of day: a clock that was set meanwhile, or is
wrong elsewhere, makes it look older or younger than it is. It is never taken for younger than its own date allows.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from cache_agent.cluster.directory import CLOCKS_APART

_MOST = 4096  # URIs that are remembered; the oldest go


class Confirmed:
    """Any thread."""

    def __init__(self, clock: Callable[[], float] = time.time, ticks: Callable[[], float] = time.monotonic) -> None:
        """`clock` is the time of day, and may jump; `ticks` never does. Both in seconds."""
        self._clock, self._ticks = clock, ticks
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[str, float]] = {}

    def now(self) -> float:
        """The time of day, for those that have no other clock in common with us."""
        return self._clock()

    def say(self, uri: str, source: str) -> None:
        """The origin said just now that the URI names this source."""
        with self._lock:
            self._seen.pop(uri, None)
            self._seen[uri] = source, self._ticks()
            while len(self._seen) > _MOST:
                del self._seen[next(iter(self._seen))]

    def age(self, uri: str, source: str, when: float) -> float:
        """Seconds since an origin said so; `when` is the time of day of which somebody else remembers it.

        Infinite where that is yet to come: nobody knows how old it is.
        """
        with self._lock:
            seen = self._seen.get(uri)
        if seen is not None and seen[0] == source:
            return self._ticks() - seen[1]
        age = self._clock() - when
        return max(0.0, age) if age >= -CLOCKS_APART else math.inf
