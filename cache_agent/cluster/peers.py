"""Owns this node's dealings with other nodes' agents: which hold a source, which lied, and help for each load."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from cache_agent.cluster.directory import Directory
from cache_agent.cluster.peer import Membership, Peer, PeerFailed
from cache_agent.cluster.swarm import Liars, Swarm
from cache_agent.errors import AgentError
from cache_agent.loading.loader import ModelLoad
from cache_agent.model.checkpoint import Description
from cache_agent.policy.fanout import place

log = logging.getLogger("glowplug.peers")

_PLACES = 64  # further nodes begin at place 0
_CLAIM_SECONDS = 10.0


class Peers:
    """The other agents of the cluster. Any thread."""

    def __init__(self, me: Membership, directory: Directory, *, readers: int = 16, witnesses: int = 1) -> None:
        """`me` is this node; `readers` transfers at once for each load; `witnesses` as in `Swarm`."""
        self._me = me
        self._readers, self._witnesses = readers, witnesses
        self._directory = directory
        self._liars = Liars()

    def helper(self, load: ModelLoad, source: str, *, origin_answers: bool) -> LoadHelper:
        """Return the helper of a load of this source; without `origin_answers` all chunks come from peers."""
        return LoadHelper(self, load, source, origin_answers=origin_answers)

    def describe(self, source: str) -> Description | None:
        """Return a source's description from any holder, in place of an origin that does not answer, or None."""
        for peer in self._holders(source):
            with contextlib.closing(peer):
                try:
                    return peer.describe(source)
                except (PeerFailed, AgentError) as error:
                    log.warning("node %s does not describe %s: %s", peer.name, source, error)
        return None

    def size_elsewhere(self, uri: str) -> int:
        """Return the bytes of the model that a URI was last seen to name, if another node has all of it; else 0."""
        source, _ = self._directory.validation(uri)
        found = self._directory.holders(source) if source else []
        return max((held.total for held in found if held.done == held.total and held.node != self._me.node), default=0)

    def peer(self, node: str, address: str) -> Peer | None:
        """Return the peer; None for this node itself, a liar, and a node that cannot be reached."""
        return None if not address or node == self._me.node or node in self._liars else Peer(node, address, self._me)

    def _holders(self, source: str, others: tuple[str, ...] = ()) -> Iterator[Peer]:
        """Yield the nodes that hold the source or a part of it by the directory, and those named."""
        names = {holding.node for holding in self._directory.holders(source)} | set(others)
        for node in self._directory.nodes():
            if node.name in names and (peer := self.peer(node.name, node.address)) is not None:
                yield peer


class LoadHelper:
    """Fetches one load's chunks from other nodes, and holds a place among the nodes that load the source."""

    def __init__(self, peers: Peers, load: ModelLoad, source: str, *, origin_answers: bool) -> None:
        self._peers, self._load, self._source = peers, load, source
        self._origin_answers = origin_answers
        self._claim = ""
        self._renew_at = 0.0
        self._others: tuple[str, ...] = ()
        self._swarm: Swarm | None = None

    def run(self) -> None:
        if not self._load.missing():
            return
        try:
            swarm = Swarm(
                self._load,
                self._source,
                start=place(self._take_place()),
                scout=self._scout,
                liars=self._peers._liars,
                readers=self._peers._readers,
                proved=bool(self._load.known),
                witnesses=self._peers._witnesses,
                origin_answers=self._origin_answers,
            )
            self._swarm = swarm
            swarm.run()
        finally:
            if self._claim:
                self._peers._directory.release(self._claim, self._peers._me.node)

    def reading(self) -> list[int]:
        return self._swarm.reading() if self._swarm is not None else []

    def blame(self, peer: str, why: str) -> None:
        """Take nothing from a peer for an hour."""
        self._peers._liars.add(peer)
        log.warning("taking nothing from node %s for a while: %s", peer, why)

    def invite(self, node: str, address: str) -> None:
        """Take in a node that loads the same source."""
        if self._swarm is not None and (peer := self._peers.peer(node, address)) is not None:
            self._swarm.invite(peer)

    def _take_place(self) -> int:
        """Claim the first free number; the owners of lower numbers load the same source, so they are peers."""
        directory, node = self._peers._directory, self._peers._me.node
        for number in range(_PLACES):
            name = f"load:{self._source}:{number}"
            owner = directory.claim(name, node, _CLAIM_SECONDS)
            if owner == node:
                self._claim, self._renew_at = name, time.monotonic() + _CLAIM_SECONDS / 3
                return number
            if not owner:  # no directory to ask
                break
            self._others = (*self._others, owner)
        return 0

    def _scout(self) -> Iterator[Peer]:
        if self._claim and time.monotonic() >= self._renew_at:
            self._peers._directory.claim(self._claim, self._peers._me.node, _CLAIM_SECONDS)
            self._renew_at = time.monotonic() + _CLAIM_SECONDS / 3
        return self._peers._holders(self._source, self._others)
