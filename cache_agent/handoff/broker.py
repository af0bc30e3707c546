"""Owns what an agent does about requests that run: it keeps them, and brings workers together that hand them over."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from cache_agent.cluster.key import nonce
from cache_agent.errors import NoDestination, ProtocolError
from cache_agent.handoff.destinations import Destinations, Waiting
from cache_agent.handoff.targets import Targets
from cache_agent.journal.journal import Journal
from cache_agent.policy.rights import Caller
from cache_agent.snapshots.index import SnapshotIndex
from cache_agent.wire import blobs
from cache_agent.wire.message import Message
from cache_agent.wire.requests import (
    Checkpoint,
    ClaimReply,
    ClaimRequest,
    HandedReply,
    HandedReport,
    HandoffRequest,
    HostRequest,
    Matched,
    TransferReply,
    TransferRequest,
)

Asked = Checkpoint | ClaimRequest | TransferRequest | HostRequest | HandoffRequest | HandedReport


class Visitor(Protocol):
    """A worker's connection."""

    def __hash__(self) -> int: ...

    caller: Caller

    def deliver(self, message: Message, fds: list[int]) -> None:
        """Later, from its own thread; takes over `fds`."""
        ...


Say = Callable[[Message, Sequence[int]], None]  # answers the worker that asks, at once


class Broker:
    """Any thread."""

    def __init__(self, index: SnapshotIndex, journal: Journal, node: str) -> None:
        self.neighbours: Targets | None = None  # where other nodes are to be asked, too
        self._index, self._journal, self._node = index, journal, node
        self._hosts: Destinations[Visitor] = Destinations()

    def answer(self, visitor: Visitor, message: Asked, fds: Sequence[int], say: Say) -> None:
        """Raises any `AgentError`; closes `fds`."""
        within = visitor.caller.namespace
        match message:
            case Checkpoint():
                self._keep(message, fds, within, say)
            case ClaimRequest():
                self._claim(message, within, say)
            case TransferRequest():
                say(TransferReply(self._index.transfer(message, within)), ())
            case HostRequest(siblings, owner):
                self._hosts.wait(visitor, _waiting(within, siblings, owner))
            case HandoffRequest(siblings, owner):
                self._match(_waiting(within, siblings, owner), say)
            case HandedReport(items):
                self._journal.handed(self._node, items)
                say(HandedReply(), ())

    def gone(self, visitor: Visitor) -> None:
        """Its connection has ended."""
        self._hosts.gone(visitor)

    def of_another_node(self, asked: HandoffRequest) -> tuple[socket.socket, Matched]:
        """One end of a socket to a worker here, for another node's agent. Raises `NoDestination`."""
        mine, waiting = self._here(_waiting(asked.within, asked.siblings, asked.owner))
        return mine, Matched(self._node, waiting.owner, nonce())

    def _keep(self, message: Checkpoint, fds: Sequence[int], within: str, say: Say) -> None:
        try:
            lengths = [length for item in message.items for length in item.lengths]
            pieces = blobs.unpack(lengths, message.data, fds)
        finally:
            for fd in fds:
                os.close(fd)
        say(self._index.keep(message, pieces, within), ())

    def _claim(self, message: ClaimRequest, within: str, say: Say) -> None:
        found = self._index.claim(message, within)
        lengths, data, fds = blobs.pack(found.pieces)
        try:
            say(ClaimReply(found.outcome, found.epoch, found.wait, lengths, data, len(fds)), fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _match(self, wanted: Waiting, say: Say) -> None:
        """Gives each of both one end of a socket: what they say does not come by here, nor end with this agent."""
        try:
            mine, waiting = self._here(wanted)
            found = Matched(self._node, waiting.owner, fds=1)
        except NoDestination:
            elsewhere = self.neighbours.match(wanted) if self.neighbours is not None else None
            if elsewhere is None:
                raise
            mine, other = elsewhere
            found = Matched(other.node, other.owner, fds=1)
        with mine:
            say(found, [mine.fileno()])

    def _here(self, wanted: Waiting) -> tuple[socket.socket, Waiting]:
        if (found := self._hosts.match(wanted)) is None:
            raise NoDestination(f"no other worker of {wanted.siblings.partition(':')[0]} waits to take requests over")
        host, waiting = found
        mine, theirs = socket.socketpair()
        host.deliver(Matched(self._node, wanted.owner, fds=1), [theirs.detach()])
        return mine, waiting


def _waiting(within: str, siblings: str, owner: str) -> Waiting:
    if not siblings or not owner:
        raise ProtocolError("a worker that hands requests over, or takes them, has siblings and a name")
    return Waiting(within, siblings, owner)
