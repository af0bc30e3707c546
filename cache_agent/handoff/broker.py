"""Owns an agent's part in running requests: it stores snapshots of them, and matches workers that hand them over."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from cache_agent.cluster.key import nonce
from cache_agent.errors import NoDestination, ProtocolError
from cache_agent.handoff.destinations import Destinations, WaitingWorker
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
    DestinationRequest,
    HandedReply,
    HandedReport,
    HandoffRequest,
    Matched,
    TransferReply,
    TransferRequest,
)

WorkerRequest = Checkpoint | ClaimRequest | TransferRequest | DestinationRequest | HandoffRequest | HandedReport


class WorkerConnection(Protocol):
    """A worker's connection."""

    def __hash__(self) -> int: ...

    caller: Caller

    def deliver(self, message: Message, fds: list[int]) -> None:
        """Queue a message for the connection's own thread to send. Takes over `fds`."""
        ...


# Sends an answer, with fds that stay the caller's, to the asking worker at once.
Reply = Callable[[Message, Sequence[int]], None]


class Broker:
    """Answers workers' messages about running requests. Any thread."""

    def __init__(self, index: SnapshotIndex, journal: Journal, node: str) -> None:
        self.targets: Targets | None = None  # set where other nodes' workers are candidates, too
        self._index, self._journal, self._node = index, journal, node
        self._destinations: Destinations[WorkerConnection] = Destinations()

    def answer(self, worker: WorkerConnection, message: WorkerRequest, fds: Sequence[int], reply: Reply) -> None:
        """Answer one message of a worker through `reply`. Closes `fds`. Raises any `AgentError`."""
        within = worker.caller.namespace
        match message:
            case Checkpoint():
                self._keep(message, fds, within, reply)
            case ClaimRequest():
                self._claim(message, within, reply)
            case TransferRequest():
                reply(TransferReply(self._index.transfer(message, within)), ())
            case DestinationRequest(siblings, owner):
                self._destinations.add(worker, _worker(within, siblings, owner))
            case HandoffRequest(siblings, owner):
                self._match(_worker(within, siblings, owner), reply)
            case HandedReport(items):
                self._journal.handed(self._node, items)
                reply(HandedReply(), ())

    def forget(self, worker: WorkerConnection) -> None:
        """Forget a worker whose connection has ended."""
        self._destinations.remove(worker)

    def match_for_node(self, asked: HandoffRequest) -> tuple[socket.socket, Matched]:
        """Return one end of a socket to a worker of this node, for another node's agent. Raises `NoDestination`."""
        mine, waiting = self._take_destination(_worker(asked.within, asked.siblings, asked.owner))
        return mine, Matched(self._node, waiting.owner, nonce())

    def _keep(self, message: Checkpoint, fds: Sequence[int], within: str, reply: Reply) -> None:
        try:
            lengths = [length for item in message.items for length in item.lengths]
            pieces = blobs.unpack(lengths, message.data, fds)
        finally:
            for fd in fds:
                os.close(fd)
        reply(self._index.keep(message, pieces, within), ())

    def _claim(self, message: ClaimRequest, within: str, reply: Reply) -> None:
        found = self._index.claim(message, within)
        lengths, data, fds = blobs.pack(found.pieces)
        try:
            reply(ClaimReply(found.outcome, found.epoch, found.wait, lengths, data, len(fds)), fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _match(self, wanted: WaitingWorker, reply: Reply) -> None:
        """Send each of two workers one end of a socket.

        The hand-off does not pass through this agent, and outlives the agent.
        """
        try:
            mine, waiting = self._take_destination(wanted)
            found = Matched(self._node, waiting.owner, fds=1)
        except NoDestination:
            elsewhere = self.targets.find(wanted) if self.targets is not None else None
            if elsewhere is None:
                raise
            mine, other = elsewhere
            found = Matched(other.node, other.owner, fds=1)
        with mine:
            reply(found, [mine.fileno()])

    def _take_destination(self, wanted: WaitingWorker) -> tuple[socket.socket, WaitingWorker]:
        """Send a waiting sibling one end of a socket, and return the other end and the sibling."""
        if (found := self._destinations.take(wanted)) is None:
            raise NoDestination(f"no other worker of {wanted.siblings.partition(':')[0]} waits to take requests over")
        destination, waiting = found
        mine, theirs = socket.socketpair()
        destination.deliver(Matched(self._node, wanted.owner, fds=1), [theirs.detach()])
        return mine, waiting


def _worker(within: str, siblings: str, owner: str) -> WaitingWorker:
    if not siblings or not owner:
        raise ProtocolError("a worker that hands requests over, or takes them, has siblings and a name")
    return WaitingWorker(within, siblings, owner)
