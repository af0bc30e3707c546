"""Owns a worker's way to its agent: finding the agent, leasing the model, and joining the agent again later.

If the node's agent does not answer, or speaks another version of the protocol than this image, the worker asks the shim
for a private agent, and the ledger says why. The refusal of a model is no reason for a private agent.
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
from cache_agent.client.lease import KnownManifest, Lease
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
_PATIENCE = 30.0  # seconds to wait for an agent that does not answer: longer than an update of the agent takes
_PATIENCE_SHARE = 20  # but at most this fraction (1/n) of the time for a start
_SHIM_SECONDS = 10.0  # for the shim to start a private agent


class Leasing:
    """The leases of one worker. `private_agent` is for the thread that obeys the shim, `client` for any."""

    def __init__(
        self,
        config: FunctionConfig,
        ledger: Ledger,
        line: WorkerEnd,
        lifecycle: Lifecycle,
        known: KnownManifest | None = None,
    ) -> None:
        """`known` is the manifest of the layer that this worker was forked from."""
        self._config, self._ledger, self._line, self._lifecycle = config, ledger, line, lifecycle
        self._known = known
        self._socket = config.socket
        self._fell_back = False
        self._private: queue.SimpleQueue[str] = queue.SimpleQueue()
        # Weights that the worker before this one got over TCP.
        self._leftover_fds = line.stored() if config.socket.startswith("tcp:") else []

    def client(self, timeout: float = 10.0) -> CacheClient:
        """Return a client of the agent; `timeout` in seconds. Raise `BadConfig`."""
        config = self._config
        config.token()  # raises the function's own error if the file cannot be read
        name, identity = f"worker-{os.getpid()}", credentials.shown(config.token_file, config.identity_file)
        return CacheClient(self._socket, name=name, identity=identity, pod=config.pod, timeout=timeout)

    def leased(self, use: Callable[[Lease, float], T]) -> T:
        """Lease the model and return the result of `use(lease, deadline)`; the lease stays open.

        Errors that may pass are tried again until the deadline. Raises any `AgentError`, `NotReady`, and the exceptions
        of `use`.
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
                        leftover=self._leftover(),
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
        """Give a lease whose bytes are all there to the shim, for the next worker, if the bytes came over TCP."""
        if lease.fetched:
            self._line.store([lease.manifest_fd, *lease.segments])
        self._close_leftover()

    def rejoin(self, lease: Lease) -> None:
        """Wait for an agent and offer the weights to it, so that the node needs no second copy of them."""
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
        """Take the shim's answer: the path of the socket of the agent that it has started."""
        self._private.put(path)

    def _leftover(self) -> Leftover | None:
        if not self._leftover_fds:
            return None
        from cache_agent.client.streamed import Leftover

        return Leftover.of(self._leftover_fds, self._drop_leftover)

    def _drop_leftover(self) -> None:
        """Give up the previous worker's memory: it has another model, and there may not be room for both."""
        self._close_leftover()
        self._line.store([])

    def _close_leftover(self) -> None:
        while self._leftover_fds:
            os.close(self._leftover_fds.pop())

    def _fall_back(self, error: AgentError) -> None:
        """Change to a private agent, once. Raise `error` if there is none, or if this is the second time."""
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
