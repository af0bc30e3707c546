"""The sources of placement's knowledge: one interface, and its implementations for Redis, a file and one agent."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from cache_agent.client.cache_client import CacheClient
from cache_agent.cluster.directory import Directory, Holding, Node
from cache_agent.errors import BadModelURI
from cache_agent.model.uri import parse_uri
from cache_agent.policy import placement
from cache_agent.policy.placement import PlacementNode, Tier, View
from cache_agent.stamp import Stamp, stamp


class Unavailable(Exception):
    """The failure of a source that cannot be read now; the text says why."""


class Outlook(Protocol):
    """A source of knowledge. Any thread; answers within milliseconds, or raises `Unavailable`."""

    def look(self, model: str) -> View | None:
        """Return what the nodes have of a model's URI; None where no node knows the model."""
        ...

    def alive(self) -> frozenset[str]:
        """Return the nodes whose agent lives."""
        ...


class NoOutlook:
    """No knowledge: the outlook of a cluster whose agents share no directory."""

    def look(self, model: str) -> View | None:  # noqa: ARG002
        return None

    def alive(self) -> frozenset[str]:
        raise Unavailable("no directory is configured: nobody knows which nodes have an agent")


class DirectoryOutlook:
    """The nodes' directory: live nodes, their share of each model in each tier, and the measured bandwidths."""

    def __init__(self, shared: Directory) -> None:
        self._directory = shared

    def look(self, model: str) -> View | None:
        alive = self._live_nodes()
        try:
            uri = parse_uri(model)
        except BadModelURI:  # an annotation may say anything
            return None
        source, _ = self._directory.validation(uri.text)
        if not source:
            return None
        revision = self._directory.revision(source)
        if uri.revision and revision and uri.revision != revision:
            return None  # the URI insists on a revision that the origin had earlier, and no node is known to have
        holders = {*self._directory.holders(source), *(self._directory.holders(revision) if revision else ())}
        if not holders:  # no node has any of the model, so that its size is unknown
            return None
        best: dict[tuple[str, str], Holding] = {}
        for holding in sorted(holders):  # source and revision name the same bytes: the larger holding counts
            best[holding.node, holding.tier] = holding
        holdings = [*best.values(), *self._from_peers(best.values(), alive)]
        ways = [(held.node, held.tier) for held in holdings if held.tier != "dram"] + [(n, "origin") for n in alive]
        rates = {way: self._directory.bandwidth(*way) for way in ways}
        room = {node.name: node.capacity for node in alive.values()}
        return placement.from_holdings(max(held.total for held in holders), holdings, alive, rates, room)

    def alive(self) -> frozenset[str]:
        return frozenset(self._live_nodes())

    def _live_nodes(self) -> dict[str, Node]:
        if why := self._directory.lost():
            raise Unavailable(why)
        return {node.name: node for node in self._directory.nodes()}

    def _from_peers(self, holdings: Collection[Holding], alive: Mapping[str, Node]) -> Iterator[Holding]:
        """Yield what each node could read from the other node that has most of the model."""
        offered = [held for held in holdings if held.done and held.node in alive and alive[held.node].address]
        first, second = (*heapq.nlargest(2, offered, key=lambda held: held.done), None, None)[:2]
        for name in alive:
            best = second if first and first.node == name else first
            if best and best.node != name:
                yield Holding(name, "peer", best.done, best.total)


@contextmanager
def shared(url: str, password_file: Path | None, patience: float = 0.0) -> Iterator[DirectoryOutlook]:
    """Open the directory in a Redis, and wait up to `patience` seconds for its first reading. Raises `BadSetting`."""
    from cache_agent.cluster.directory_redis import RedisDirectory  # redis-py takes a tenth of a second

    with closing(RedisDirectory(url, password_file=password_file)) as found:
        found.wait_looked(patience)
        yield DirectoryOutlook(found)


class _Estimates(msgspec.Struct, frozen=True):
    """The content of the file. Without `alive`, the nodes that are alive in any model's view are."""

    models: dict[str, View]
    alive: tuple[str, ...] | None = None


_decoder = msgspec.json.Decoder(_Estimates)


class FileOutlook:
    """A JSON file of estimates, read again when it changes. Its format:

    {"alive": ["node-1", …], "models": {URI: {"bytes": n, "nodes": [{"name": "node-1", "tiers": […], …}]}}}
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp: Stamp | None = None
        self._estimates = _Estimates({})

    def look(self, model: str) -> View | None:
        return self._read().models.get(model)

    def alive(self) -> frozenset[str]:
        estimates = self._read()
        if estimates.alive is not None:
            return frozenset(estimates.alive)
        return frozenset(node.name for view in estimates.models.values() for node in view.nodes if node.alive)

    def _read(self) -> _Estimates:
        try:
            now = stamp(self._path)
            with self._lock:
                if now != self._stamp:
                    self._estimates = _decoder.decode(self._path.read_bytes())
                    self._stamp = now
                return self._estimates
        except OSError as error:
            raise Unavailable(f"{self._path} cannot be read: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Unavailable(f"{self._path} holds no estimates: {error}") from error


class AgentOutlook:
    """One node's agent: the models in its memory, and the origin's sizes of all others."""

    def __init__(self, client: CacheClient) -> None:
        self._client = client

    def look(self, model: str) -> View | None:
        """Return the node's view of a model. Raises the errors of the agent and of the model's origin."""
        status = self._client.status()
        for entry in status.models:
            if entry.model == model:
                return View(entry.bytes, (PlacementNode(status.node, tiers=(Tier("dram", entry.done),)),))
        return View(self._client.manifest(model).nbytes, (PlacementNode(status.node),))

    def alive(self) -> frozenset[str]:
        return frozenset({self._client.status().node})
