"""Who holds what, and which source is which revision: the interface, and the one for a single node, in memory."""

from __future__ import annotations

from threading import Lock
from typing import NamedTuple, Protocol


class Holding(NamedTuple):
    """`node` has `done` of `total` bytes of a revision or source in `tier`."""

    node: str
    tier: str
    done: int
    total: int


class Directory(Protocol):
    """What nodes tell each other. Losing it costs locality, never correctness: no call of it raises."""

    def remember(self, source: str, revision: str) -> None:
        """The source with this id was admitted as this revision."""
        ...

    def revision(self, source: str) -> str:
        """The revision of a source that some node admitted before, or ""."""
        ...

    def publish(self, model: str, holding: Holding) -> None:
        """`model` is a revision, or a source id while the revision is not known."""
        ...

    def withdraw(self, model: str, node: str, tier: str) -> None: ...

    def holders(self, model: str) -> list[Holding]:
        """Ordered by node, then tier."""
        ...


class InProcessDirectory:
    """A directory of one node, or of several agents inside one test."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._revisions: dict[str, str] = {}
        self._holdings: dict[str, dict[tuple[str, str], Holding]] = {}

    def remember(self, source: str, revision: str) -> None:
        with self._lock:
            self._revisions[source] = revision

    def revision(self, source: str) -> str:
        with self._lock:
            return self._revisions.get(source, "")

    def publish(self, model: str, holding: Holding) -> None:
        with self._lock:
            self._holdings.setdefault(model, {})[holding.node, holding.tier] = holding

    def withdraw(self, model: str, node: str, tier: str) -> None:
        with self._lock:
            holdings = self._holdings.get(model, {})
            holdings.pop((node, tier), None)
            if not holdings:
                self._holdings.pop(model, None)

    def holders(self, model: str) -> list[Holding]:
        with self._lock:
            return sorted(self._holdings.get(model, {}).values())
