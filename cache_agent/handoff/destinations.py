"""Owns which workers of this node wait to take requests over, and gives each that drains one of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)


class WaitingWorker(NamedTuple):
    """`within` is the namespace that the worker proved, or ""."""

    within: str
    siblings: str
    owner: str


class Destinations(Generic[T]):
    """Any thread. `T` is whatever a worker that waits is known by."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: OrderedDict[T, WaitingWorker] = OrderedDict()

    def wait(self, destination: T, waiting: WaitingWorker) -> None:
        with self._lock:
            self._waiting.pop(destination, None)
            self._waiting[destination] = waiting

    def gone(self, destination: T) -> None:
        with self._lock:
            self._waiting.pop(destination, None)

    def match(self, wanted: WaitingWorker) -> tuple[T, WaitingWorker] | None:
        """The one that has waited longest, who waits no more; never the worker that asks."""
        with self._lock:
            for destination, waiting in self._waiting.items():
                if waiting._replace(owner="") == wanted._replace(owner="") and waiting.owner != wanted.owner:
                    del self._waiting[destination]
                    return destination, waiting
        return None
