"""Owns the search for a destination on other nodes, by asking their agents."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time

from cache_agent.cluster.directory import Directory, Node
from cache_agent.cluster.key import nonce
from cache_agent.cluster.peer import Membership, dial_peer
from cache_agent.errors import AgentError
from cache_agent.handoff.destinations import WaitingWorker
from cache_agent.handoff.splice import Splice
from cache_agent.wire.channel import Disconnected
from cache_agent.wire.link import Link
from cache_agent.wire.requests import HandoffRequest, Matched

log = logging.getLogger("glowplug.handoff")

_ALL_SECONDS = 5.0  # for all nodes together
_NODE_SECONDS = 1.0


class Targets:
    """The agents of other nodes, asked in random order so that the load spreads. Any thread."""

    def __init__(self, me: Membership, directory: Directory) -> None:
        self._me, self._directory = me, directory

    def find(self, wanted: WaitingWorker) -> tuple[socket.socket, Matched] | None:
        """Return one end of a path to a worker of another node, with its name; None where no node has one in time."""
        deadline = time.monotonic() + _ALL_SECONDS
        nodes = [node for node in self._directory.nodes() if node.address and node.name != self._me.node]
        random.shuffle(nodes)
        for node in nodes:
            if time.monotonic() >= deadline:
                break
            try:
                if (found := self._ask(node, wanted)) is not None:
                    return found
            except (AgentError, Disconnected) as error:
                log.info("node %s was not to be asked for a worker: %s", node.name, error)
        return None

    def _ask(self, node: Node, wanted: WaitingWorker) -> tuple[socket.socket, Matched] | None:
        link = dial_peer(node.address, self._me.key, self._me.node, self._me.address, _NODE_SECONDS)
        try:
            mine = nonce()
            link.send(HandoffRequest(wanted.siblings, wanted.owner, mine, wanted.within))
            reply, _ = link.receive(time.monotonic() + _NODE_SECONDS)
            if not isinstance(reply, Matched):
                link.close()
                return None
            near, far = socket.socketpair()
        except BaseException:
            link.close()
            raise
        splice = Splice(link, near, self._me.key, (mine, reply.nonce), "caller")
        threading.Thread(target=_run_splice, args=(splice, link, near), name="splice", daemon=True).start()
        return far, reply


def _run_splice(splice: Splice, link: Link, sock: socket.socket) -> None:
    with contextlib.closing(link), sock:
        splice.run()
