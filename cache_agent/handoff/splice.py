"""Owns the path of one hand-off between two nodes: the workers' bytes, in pieces, over one connection of their agents.

    worker ── socket ── agent ══ relay + piece ⇄ relay + piece ══ agent ── socket ── worker

The cluster's key signs each piece as number n of one side of one hand-off, so that a foreign, repeated, changed or
missing piece ends the hand-off. The agents do not interpret the bytes, which are sealed where the function has a key.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable

from cache_agent.cluster.key import ClusterKey, Side
from cache_agent.errors import AgentError, AgentTimeout, ProtocolError
from cache_agent.wire.channel import Disconnected
from cache_agent.wire.link import Link
from cache_agent.wire.messages import ErrorReply
from cache_agent.wire.requests import RelayedBytes

log = logging.getLogger("glowplug.handoff")

_PIECE = 512 << 10
_MOST = _PIECE + 4096  # a piece with its signature
_POLL_SECONDS = 1.0
_STALL_SECONDS = 10.0  # seconds that a worker may take no byte


class Splice:
    """One hand-off on one of its two agents. The link and the socket stay the caller's to close."""

    def __init__(self, link: Link, sock: socket.socket, key: ClusterKey, nonces: tuple[str, str], side: Side) -> None:
        """`nonces` are the calling agent's and the called agent's, in this order; `side` is this agent's."""
        self._link, self._sock, self._key = link, sock, key
        self._name = f"hand-off {'/'.join(nonces)}"
        self._mine: Side = side
        self._theirs: Side = "called" if side == "caller" else "caller"
        self._over = threading.Event()
        sock.setblocking(False)

    def run(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Carry bytes in both directions until either side ends the hand-off, or `stopping` says so."""
        outward = threading.Thread(target=self._guarded, args=(self._outward,), name="splice", daemon=True)
        outward.start()
        self._guarded(lambda: self._inward(stopping))
        outward.join(_STALL_SECONDS)

    def _guarded(self, way: Callable[[], None]) -> None:
        try:
            way()
        except (AgentError, Disconnected, OSError) as error:
            log.log(logging.DEBUG if isinstance(error, Disconnected) else logging.WARNING, "%s: %s", self._name, error)
        except Exception:
            log.exception("%s failed", self._name)
        finally:
            self._over.set()
            self._link.interrupt()
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _outward(self) -> None:
        number = 0
        while not self._over.is_set():
            if not self._waits(select.POLLIN, _POLL_SECONDS):
                continue
            try:
                data = self._sock.recv(_PIECE)
            except BlockingIOError:
                continue
            if not data:
                return
            signed = self._key.sign(self._about(self._mine, number), data)
            number += 1
            self._link.send(RelayedBytes(len(signed)))
            self._link.send_bytes(signed)

    def _inward(self, stopping: Callable[[], bool]) -> None:
        number = 0
        while not self._over.is_set() and not stopping():
            try:
                message, _ = self._link.receive(time.monotonic() + _POLL_SECONDS)
            except AgentTimeout:
                continue
            if isinstance(message, ErrorReply):
                raise Disconnected(message.text)
            if not isinstance(message, RelayedBytes) or message.body > _MOST:
                raise ProtocolError("a hand-off goes on with pieces of a bounded size")
            signed = self._link.read(message.body, _STALL_SECONDS)
            self._hand_on(self._key.verified(self._about(self._theirs, number), signed))
            number += 1

    def _hand_on(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                if not self._waits(select.POLLOUT, _STALL_SECONDS):
                    raise Disconnected(f"the worker took no byte for {_STALL_SECONDS:.0f} s") from None

    def _about(self, side: Side, number: int) -> str:
        return f"piece {number} of the {side} in {self._name}"

    def _waits(self, events: int, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self._sock, events)
        return bool(poller.poll(seconds * 1000))
