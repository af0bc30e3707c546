"""Owns the ledgers of this node's last starts, as the functions reported them."""

from __future__ import annotations

import time
from collections import OrderedDict
from threading import Lock

from cache_agent.wire.operations import Start, Started

KEPT = 64


class Starts:
    """The last `KEPT` starts. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._starts: OrderedDict[str, Start] = OrderedDict()

    def add(self, told: Started) -> tuple[Start, bool]:
        """Keeps a start, or what is known of it by now; a function reports again when its first token is out.

        Also whether it is a new one.
        """
        now, now_ns = time.time(), time.monotonic_ns()
        began = min((span.start for span in told.spans), default=now_ns)
        fields = {name: getattr(told, name) for name in told.__struct_fields__}
        start = Start(began=now - (now_ns - began) / 1e9, **fields)
        with self._lock:
            new = start.start_id not in self._starts
            self._starts[start.start_id] = start  # a known one keeps its place
            if len(self._starts) > KEPT:
                self._starts.popitem(last=False)
        return start, new

    def recent(self) -> list[Start]:
        """The newest first."""
        with self._lock:
            return list(reversed(self._starts.values()))
