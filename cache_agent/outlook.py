"""Where the placer's knowledge comes from: one interface, and those who speak it today.

A shared directory is another implementation: it answers `look` by `placement.from_holdings`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Protocol

import msgspec

from cache_agent.client import CacheClient
from cache_agent.policy.placement import Node, Tier, View


class Unavailable(Exception):
    """What is known cannot be had now; the text says why."""


class Outlook(Protocol):
    """May be asked from any thread; answers within milliseconds or raises `Unavailable`."""

    def look(self, model: str) -> View | None:
        """The nodes' view of a model's URI; None when nobody knows the model."""
        ...

    def alive(self) -> frozenset[str]:
        """The nodes whose agent was heard of lately."""
        ...


class NoOutlook:
    """Knows nothing: where agents have no directory to share."""

    def look(self, model: str) -> View | None:  # noqa: ARG002
        return None

    def alive(self) -> frozenset[str]:
        raise Unavailable("no directory is configured: nobody knows which nodes have an agent")


class _Estimates(msgspec.Struct, frozen=True):
    """`alive` None: the nodes that are alive in any of the models' views."""

    models: dict[str, View]
    alive: tuple[str, ...] | None = None


class FileOutlook:
    """What a JSON file says, read again when it changes:

    {"alive": ["node-1", …], "models": {URI: {"bytes": n, "nodes": [{"name": "node-1", "tiers": […], …}]}}}
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
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
            status = os.stat(self._path)
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            with self._lock:
                if stamp != self._stamp:
                    self._estimates = msgspec.json.decode(self._path.read_bytes(), type=_Estimates)
                    self._stamp = stamp
                return self._estimates
        except OSError as error:
            raise Unavailable(f"{self._path} cannot be read: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Unavailable(f"{self._path} holds no estimates: {error}") from error


class AgentOutlook:
    """One node's own agent: what it has, and what it would have to read."""

    def __init__(self, client: CacheClient) -> None:
        self._client = client

    def look(self, model: str) -> View | None:
        """Raises what the agent or the model's origin does."""
        status = self._client.status()
        for entry in status.models:
            if entry.model == model:
                return View(entry.bytes, (Node(status.node, tiers=(Tier("dram", entry.done),)),))
        return View(self._client.manifest(model).nbytes, (Node(status.node),))

    def alive(self) -> frozenset[str]:
        return frozenset({self._client.status().node})
