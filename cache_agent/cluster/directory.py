"""The directory of nodes, holdings and revisions: the interface, and the implementation in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple, Protocol

TTL = 12.0  # seconds after its last sign of life in which a node counts as alive
CLOCKS_APART = 60.0  # seconds by which nodes' clocks may differ; a date further ahead is not believed


class Holding(NamedTuple):
    """`node` has `done` of `total` bytes of a revision or source in `tier`."""

    node: str
    tier: str
    done: int
    total: int


class Node(NamedTuple):
    """A live node: its agent's address ("" if other nodes cannot reach it), and its budget of memory in bytes."""

    name: str
    address: str = ""
    capacity: int = 0
    used: int = 0


class Directory(Protocol):
    """The knowledge that nodes share. Its loss costs locality, never correctness. Any thread.

    No call raises. `claim` and `release` may take about a second; the others answer from memory at once.
    """

    def heartbeat(self, node: Node) -> None:
        """Say that this node lives, now and from here on. Publishing for a node is a sign of its life, too."""
        ...

    def nodes(self) -> list[Node]:
        """Return the nodes that gave a sign of life lately, ordered by name."""
        ...

    def remember(self, source: str, revision: str, node: str = "") -> None:
        """Share that this node admitted the source with this id as this revision."""
        ...

    def revision(self, source: str) -> str:
        """Return the revision of a source that some node admitted before, or ""."""
        ...

    def stated(self, source: str) -> dict[str, str]:
        """Return the revision that each node, by name, found the source to be; where they differ, some node lies."""
        ...

    def validated(self, uri: str, source: str, when: float) -> None:
        """Share that the origin said at `when` (Unix time) that the URI names this source."""
        ...

    def validation(self, uri: str, now: float = math.inf) -> tuple[str, float]:
        """Return the source that a URI was last seen to name, by any node, and when; ("", 0) where that is unknown.

        With `now` (Unix time) dates far in the future are ignored: a node whose clock is ahead would prevail for ever.
        """
        ...

    def lost(self) -> str:
        """Return why the knowledge of other nodes is missing now, or ""."""
        ...

    def publish(self, model: str, holding: Holding) -> None:
        """Share a holding; `model` is a revision, or a source id while the revision is not known."""
        ...

    def withdraw(self, model: str, node: str, tier: str) -> None:
        """Take a holding back."""
        ...

    def holders(self, model: str) -> list[Holding]:
        """Return the holdings of live nodes, ordered by node, then tier."""
        ...

    def holdings(self) -> dict[str, list[Holding]]:
        """Return all holdings of live nodes by model, each list as `holders` gives it."""
        ...

    def measured(self, node: str, tier: str, rate: float) -> None:
        """Share the rate, in bytes per second, at which a tier gave this node its last load."""
        ...

    def bandwidth(self, node: str, tier: str) -> float:
        """Return the rate measured last, in bytes per second; 0 without one, or when the node is gone."""
        ...

    def claim(self, name: str, owner: str, seconds: float) -> str:
        """Claim a name for `seconds`, and return its owner: `owner`, or another node that was first.

        "" while the directory cannot be asked: the caller decides whether it goes on without a claim.
        """
        ...

    def release(self, name: str, owner: str) -> bool:
        """Give a claim back; False when it was not the owner's any more, or the directory cannot be asked."""
        ...

    def close(self) -> None:
        """Withdraw the nodes that this process has published for."""
        ...


class InProcessDirectory:
    """The directory of one node, or of several agents inside one process."""

    def __init__(self, ttl: float = TTL, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = Lock()
        self._ttl = ttl
        self._clock = clock
        self._nodes: dict[str, tuple[Node, float]] = {}
        self._revisions: dict[str, dict[str, str]] = {}  # by source and node
        self._validations: dict[str, tuple[str, float]] = {}
        self._holdings: dict[str, dict[tuple[str, str], Holding]] = {}
        self._rates: dict[tuple[str, str], float] = {}
        self._claims: dict[str, tuple[str, float]] = {}

    def heartbeat(self, node: Node) -> None:
        with self._lock:
            self._nodes[node.name] = node, self._clock()

    def nodes(self) -> list[Node]:
        with self._lock:
            return sorted(node for node, _ in self._nodes.values() if self._lives(node.name))

    def remember(self, source: str, revision: str, node: str = "") -> None:
        with self._lock:
            stated = self._revisions.setdefault(source, {})
            stated.pop(node, None)
            stated[node] = revision

    def revision(self, source: str) -> str:
        with self._lock:
            return next(reversed(self._revisions.get(source, {"": ""}).values()))

    def stated(self, source: str) -> dict[str, str]:
        with self._lock:
            return dict(self._revisions.get(source, {}))

    def validated(self, uri: str, source: str, when: float) -> None:
        with self._lock:
            self._validations[uri] = source, when

    def validation(self, uri: str, now: float = math.inf) -> tuple[str, float]:
        with self._lock:
            source, when = self._validations.get(uri, ("", 0.0))
        return (source, when) if when <= now + CLOCKS_APART else ("", 0.0)

    def lost(self) -> str:
        return ""

    def publish(self, model: str, holding: Holding) -> None:
        with self._lock:
            self._sign_of_life(holding.node)
            self._holdings.setdefault(model, {})[holding.node, holding.tier] = holding

    def withdraw(self, model: str, node: str, tier: str) -> None:
        with self._lock:
            holdings = self._holdings.get(model, {})
            holdings.pop((node, tier), None)
            if not holdings:
                self._holdings.pop(model, None)

    def holders(self, model: str) -> list[Holding]:
        with self._lock:
            return sorted(held for held in self._holdings.get(model, {}).values() if self._lives(held.node))

    def holdings(self) -> dict[str, list[Holding]]:
        with self._lock:
            models = sorted(self._holdings)
        return {model: held for model in models if (held := self.holders(model))}

    def measured(self, node: str, tier: str, rate: float) -> None:
        with self._lock:
            self._sign_of_life(node)
            self._rates[node, tier] = rate

    def bandwidth(self, node: str, tier: str) -> float:
        with self._lock:
            return self._rates.get((node, tier), 0.0) if self._lives(node) else 0.0

    def claim(self, name: str, owner: str, seconds: float) -> str:
        now = self._clock()
        with self._lock:
            other, until = self._claims.get(name, ("", now))
            if other not in ("", owner) and until > now:
                return other
            self._claims[name] = owner, now + seconds
            return owner

    def release(self, name: str, owner: str) -> bool:
        now = self._clock()
        with self._lock:
            other, until = self._claims.get(name, ("", now))
            if other != owner or until <= now:
                return False
            del self._claims[name]
            return True

    def close(self) -> None:
        with self._lock:
            self._nodes.clear()
            self._holdings.clear()
            self._rates.clear()

    def _sign_of_life(self, name: str) -> None:
        node = self._nodes[name][0] if name in self._nodes else Node(name)
        self._nodes[name] = node, self._clock()

    def _lives(self, name: str) -> bool:
        return name in self._nodes and self._clock() - self._nodes[name][1] < self._ttl
