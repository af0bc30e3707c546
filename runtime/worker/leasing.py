"""Owns a worker's way to its agent: whom it asks, and the lease that it asks for until it has it, and again later.

An agent that speaks another version of the protocol than this image is as good as none, and so is one that stays
away: the shim is asked for a private one, and the ledger says why. Nothing else is cured so: an agent that refuses a
model has its reasons.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from cache_agent.client import credentials
from cache_agent.client.cache_client import CacheClient
from cache_agent.client.lease import Known, Lease
from cache_agent.errors import AgentError, AgentTimeout, AgentUnreachable, VersionMismatch
from cache_agent.ledger import Ledger
from runtime.config import FunctionConfig
from runtime.errors import FunctionError, NotReady
from runtime.http.lifecycle import Lifecycle
from runtime.process.control import WorkerEnd

if TYPE_CHECKING:
    from cache_agent.client.streamed import Leftover

T = TypeVar("T")

log = logging.getLogger("glowplug.worker")

_REJOIN_SECONDS = 30.0  # between two attempts to find an agent again, at most
_PATIENCE = 30.0  # with an agent that does not answer at all: longer than it is away while it is updated
_PATIENCE_SHARE = 20  # of the time for a start, at least
_SHIM_SECONDS = 10.0  # what a shim may take to start a private agent


class Leasing:
    """One worker's. `private_agent` is for the thread that listens to the shim, `client` for any."""

    def __init__(
        self, config: FunctionConfig, ledger: Ledger, line: WorkerEnd, lifecycle: Lifecycle, known: Known | None = None
    ) -> None:
        """`known` is the manifest of the layer that this worker was forked from."""
        self._config, self._ledger, self._line, self._lifecycle = config, ledger, line, lifecycle
        self._known = known
        self._socket = config.socket
        self._fell_back = False
        self._private: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._kept = line.stored() if config.socket.startswith("tcp:") else []  # memory of the worker before this one

    def client(self, timeout: float = 10.0) -> CacheClient:
        config = self._config
        config.token()  # a file that cannot be read is this function's mistake, and named so
        name, identity = f"worker-{os.getpid()}", credentials.shown(config.token_file, config.identity_file)
        return CacheClient(self._socket, name=name, identity=identity, pod=config.pod, timeout=timeout)

    def leased(self, use: Callable[[Lease, float], T]) -> T:
        """What `use(lease, deadline)` makes of the model's lease, which stays open; retried where waiting can help.

        Raises any `AgentError`, `NotReady`, and what `use` raises.
        """
        uri = self._config.model_uri
        begun = time.monotonic()
        deadline = begun + self._config.start_timeout
        patience = begun + min(_PATIENCE, self._config.start_timeout / _PATIENCE_SHARE)
        pause = 0.1
        while True:
            try:
                self._lifecycle.phase = "lease"
                with self._ledger.span("lease"):
                    client = self.client()
                    lease = client.lease(
                        uri,
                        start_id=self._ledger.start_id,
                        deadline=deadline,
                        kept=self._memory(),
                        known=self._known,
                    )
                    self._ledger.node = client.node
                try:
                    return use(lease, deadline)
                except BaseException:
                    lease.close()
                    raise
            except VersionMismatch as error:
                self._fall_back(error)
            except AgentError as error:
                if isinstance(error, AgentUnreachable) and time.monotonic() >= patience and not self._fell_back:
                    self._fall_back(error)
                    continue
                if isinstance(error, AgentTimeout) and time.monotonic() >= deadline:
                    raise NotReady(f"{uri} did not arrive within {self._config.start_timeout:.0f} s") from error
                if not error.retryable or time.monotonic() + pause >= deadline:
                    raise
                log.warning("%s [%s]; trying again", error.text, error.code)
                self._lifecycle.phase = f"waiting to try again: {error.text} [{error.code}]"
                time.sleep(pause)
                pause = min(5.0, pause * 2)

    def arrived(self, lease: Lease) -> None:
        """All bytes are there: if they came over TCP, the shim keeps them for the worker after this one."""
        if lease.fetched:
            self._line.store([lease.manifest_fd, *lease.segments])
        self._close_memory()

    def rejoin(self, lease: Lease) -> None:
        """Waits for an agent and offers it the weights, so that it needs no second copy of them."""
        pause = 0.2
        while True:
            time.sleep(random.uniform(pause / 2, pause))  # noqa: S311  jitter, not a secret
            pause = min(_REJOIN_SECONDS, 2 * pause)
            try:
                adopted = self.client().offer(self._config.model_uri, lease)
            except (AgentError, FunctionError, OSError) as error:
                log.debug("no agent to join yet: %s", error)
                continue
            log.info("joined the agent again; weights %s", "shared" if adopted.shared else f"not: {adopted.why}")
            return

    def private_agent(self, path: str) -> None:
        """The shim's answer: the socket of the agent that it has started."""
        self._private.put(path)

    def _memory(self) -> Leftover | None:
        if not self._kept:
            return None
        from cache_agent.client.streamed import Leftover

        return Leftover.of(self._kept, self._drop_memory)

    def _drop_memory(self) -> None:
        """It is another model's by now, and there may not be room for both."""
        self._close_memory()
        self._line.store([])

    def _close_memory(self) -> None:
        while self._kept:
            os.close(self._kept.pop())

    def _fall_back(self, error: AgentError) -> None:
        """To a private agent, once. Raises `error` where there is none to be had."""
        if self._fell_back:
            raise error
        self._fell_back = True
        begun = time.monotonic_ns()
        why = f"{error.text} [{error.code}]"
        self._line.send(agent=why)
        try:
            self._socket = self._private.get(timeout=_SHIM_SECONDS)
        except queue.Empty:
            raise error from None
        self._ledger.add(f"private agent: {why}", begun)
        log.warning("%s; this function goes on with an agent of its own, and a copy of the weights of its own", why)
