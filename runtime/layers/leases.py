"""Leases for a supervisor's model layers, asked for in threads, since an agent may take its time."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from runtime.config import FunctionConfig

if TYPE_CHECKING:
    from cache_agent.client.cache_client import CacheClient
    from cache_agent.client.lease import Lease
    from cache_agent.client.streamed import Leftover

_SECONDS = 10.0  # seconds that a lease may take, bytes included


class LayerLeases:
    """Requests for leases: `ask` begins one, `fileno` becomes readable, `take` returns the results."""

    def __init__(self, config: FunctionConfig, agent: Callable[[], str], name: str) -> None:
        """`agent()` is the agent's socket; the agent shows the leases as those of `name`."""
        self._config, self._agent, self._name = config, agent, f"{name}-{os.getpid()}"
        self._came: queue.SimpleQueue[tuple[str, Lease | str]] = queue.SimpleQueue()
        self._wake, self._waker = socket.socketpair()
        for end in (self._wake, self._waker):
            end.setblocking(False)

    def ask(self, uri: str, memory: Sequence[int] = ()) -> None:
        """Begin a request. `memory` are fds of weights that came over TCP earlier; they are closed."""
        threading.Thread(target=self._find, args=(uri, memory), name="lease", daemon=True).start()

    def fileno(self) -> int:
        return self._wake.fileno()

    def client(self) -> CacheClient:
        """Return a client that speaks to the agent as this supervisor."""
        from cache_agent.client import credentials
        from cache_agent.client.cache_client import CacheClient

        config = self._config
        identity = credentials.shown(config.token_file, config.identity_file)
        return CacheClient(self._agent(), name=self._name, identity=identity, pod=config.pod)

    def take(self) -> list[tuple[str, Lease | str]]:
        """Return URIs, each with a lease whose bytes are there, for the caller to close, or why there is none."""
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(4096)
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._came.get_nowait())
        return found

    def _find(self, uri: str, memory: Sequence[int]) -> None:
        from cache_agent.errors import AgentError

        found: Lease | str
        try:
            deadline = time.monotonic() + _SECONDS
            lease = self.client().lease(uri, deadline=deadline, kept=_leftover(memory))
            try:
                lease.wait_ready(deadline)
            except BaseException:
                lease.close()
                raise
            found = lease
        except AgentError as error:
            found = error.text
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        for fd in memory:
            os.close(fd)
        self._came.put((uri, found))
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")


def _leftover(memory: Sequence[int]) -> Leftover | None:
    if not memory:
        return None
    from cache_agent.client.streamed import Leftover

    return Leftover.of(memory)


def lost(lease: Lease) -> str:
    """Return why a lease is to be given up: its agent went, or wants it back; else "". Does not wait."""
    from cache_agent.errors import AgentError
    from cache_agent.wire.messages import Drain

    try:
        while (event := lease.next_event(0.0)) is not None:
            if isinstance(event, Drain):
                return f"the agent says: {event.reason}"
    except AgentError as error:
        return error.text
    return ""
