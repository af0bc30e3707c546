"""A worker as a destination of hand-offs: it waits at its agent for draining workers, and serves each on a pipe.

    agent ◄── DestinationRequest(siblings) ── this worker
          ── Matched, with one end of a pipe ──► `AdoptedRequests`, on a thread of its own; then it waits again

The worker waits only while it has a free slot, so that none is sent here in vain.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from cache_agent.client.cache_client import CacheClient
from cache_agent.client.handoff import await_match, offer_as_destination
from cache_agent.errors import AgentError
from cache_agent.wire.channel import Channel, Disconnected
from runtime.handoff.adopted import AdoptedRequests, ReceivingModel, WorkCounter
from runtime.handoff.pipe import Broken, Pipe
from runtime.resume.seal import Seal
from runtime.resume.snapshot import ReplicaIdentity

log = logging.getLogger("glowplug.handoff")

_AGAIN = (0.2, 10.0)  # seconds between attempts to reach the agent: first, and at most
_LOOK = 0.2  # seconds between two looks for a free slot


class Destination:
    """A worker's offer to adopt requests. `begin` starts it; `leave` ends it, and adopted requests run on."""

    def __init__(
        self,
        client: Callable[[], CacheClient],
        model: ReceivingModel,
        identity: Callable[[], ReplicaIdentity],
        siblings: Callable[[], str],
        owner: str,
        seal: Seal,
        work: WorkCounter,
    ) -> None:
        """`siblings` returns the name that both sides of a hand-off have in common, "" while it is not known."""
        self._client, self._model, self._identity, self._siblings = client, model, identity, siblings
        self._owner, self._seal, self._work = owner, seal, work
        self._leaving = threading.Event()
        self._lock = threading.Lock()
        self._channel: Channel | None = None

    def begin(self) -> None:
        threading.Thread(target=self._run, name="destination", daemon=True).start()

    def leave(self) -> None:
        self._leaving.set()
        with self._lock:
            if self._channel is not None:
                with contextlib.suppress(OSError):
                    self._channel.sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        pause = _AGAIN[0]
        while not self._leaving.is_set():
            if not (siblings := self._siblings()) or self._unwilling():
                self._leaving.wait(_LOOK)
                continue
            begun = time.monotonic()
            try:
                self._wait_at_agent(siblings)
                continue
            except (AgentError, Disconnected, OSError) as error:
                log.debug("not waiting for hand-offs: %s", error)
            if time.monotonic() > begun + _AGAIN[1]:
                pause = _AGAIN[0]
            self._leaving.wait(pause)
            pause = min(_AGAIN[1], 2 * pause)

    def _unwilling(self) -> bool:
        stats = self._model.engine.stats()
        return self._leaving.is_set() or stats.running + stats.waiting >= stats.slots

    def _wait_at_agent(self, siblings: str) -> None:
        with self._client().connect() as channel:
            with self._lock:
                self._channel = channel
            try:
                while not self._unwilling():
                    offer_as_destination(channel, siblings, self._owner)
                    self._welcome(await_match(channel, self._unwilling), siblings)
            finally:
                with self._lock:
                    self._channel = None

    def _welcome(self, sock: socket.socket | None, siblings: str) -> None:
        if sock is not None:
            threading.Thread(target=self._serve, args=(sock, siblings), name="adopted", daemon=True).start()

    def _serve(self, sock: socket.socket, siblings: str) -> None:
        pipe = Pipe(sock, self._seal, source=False)
        try:
            stats = self._model.engine.stats()
            greeting = pipe.greet(siblings, self._owner, stats.slots, stats.queue)
        except Broken as error:
            log.warning("a hand-off did not begin: %s", error)
            with pipe:
                return
        log.info("taking what %s hands over", greeting.owner)
        AdoptedRequests(pipe, self._model, self._identity, self._leaving.is_set, self._work).run()
