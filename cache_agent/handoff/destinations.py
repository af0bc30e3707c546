"""Owns which workers of this node wait to take requests over, and gives each that drains one of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)


class Waiting(NamedTuple):
    """`within` is the namespace that the worker proved, or ""."""

    within: str
    siblings: str
    owner: str


class Destinations(Generic[T]):
    """Any thread. `T` is whatever a worker that waits is known by."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: OrderedDict[T, Waiting] = OrderedDict()

    def wait(self, host: T, waiting: Waiting) -> None:
        with self._lock:
            self._waiting.pop(host, None)
            self._waiting[host] = waiting

    def gone(self, host: T) -> None:
        with self._lock:
            self._waiting.pop(host, None)

    def match(self, wanted: Waiting) -> tuple[T, Waiting] | None:
        """The one that has waited longest, who waits no more; never the worker that asks."""
        with self._lock:
            for host, waiting in self._waiting.items():
                if waiting._replace(owner="") == wanted._replace(owner="") and waiting.owner != wanted.owner:
                    del self._waiting[host]
                    return host, waiting
        return None
