"""Owns the list of this node's workers that wait to take requests over, and matches draining workers with them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)


class WaitingWorker(NamedTuple):
    """A worker as hand-offs know it: the namespace that it proved (`within`, or ""), its siblings, its own name.

    A draining worker describes by the same fields which worker it is looking for.
    """

    within: str
    siblings: str
    owner: str


class Destinations(Generic[T]):
    """The waiting workers, in the order in which they came. `T` is a worker's connection. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: OrderedDict[T, WaitingWorker] = OrderedDict()

    def add(self, destination: T, waiting: WaitingWorker) -> None:
        """Add a waiting worker, at the end of the line."""
        with self._lock:
            self._waiting.pop(destination, None)
            self._waiting[destination] = waiting

    def remove(self, destination: T) -> None:
        """Remove a worker that waits no more."""
        with self._lock:
            self._waiting.pop(destination, None)

    def take(self, wanted: WaitingWorker) -> tuple[T, WaitingWorker] | None:
        """Remove and return the sibling that has waited longest, never the asking worker; None where none waits."""
        with self._lock:
            for destination, waiting in self._waiting.items():
                if waiting._replace(owner="") == wanted._replace(owner="") and waiting.owner != wanted.owner:
                    del self._waiting[destination]
                    return destination, waiting
        return None
