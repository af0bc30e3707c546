"""Owns what a worker tells of itself: spans and size to its shim, and how its start went to the agent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cache_agent.client.cache_client import CacheClient
from cache_agent.client.lease import Lease
from cache_agent.errors import AgentError
from cache_agent.ledger import Ledger
from cache_agent.wire.message import TEXT_LIMIT
from cache_agent.wire.operations import Started
from runtime.config import FunctionConfig
from runtime.errors import FunctionError
from runtime.http.lifecycle import Lifecycle
from runtime.process.children import private_bytes
from runtime.process.control import WorkerEnd

_SECONDS = 2.0
_AGAIN = (1.0, 30.0)  # seconds between two attempts to report a start: first, and at most
_LOOK = 0.1
_MOST_SPANS = 256  # of a start that is reported; more are no start


class Reporting:
    """One worker's; any thread. `kind` is the layer that the start began at, `lease` what it got."""

    def __init__(
        self,
        config: FunctionConfig,
        ledger: Ledger,
        line: WorkerEnd,
        lifecycle: Lifecycle,
        client: Callable[[float], CacheClient],
    ) -> None:
        """`client(timeout)` speaks to the agent."""
        self._config, self._ledger, self._line, self._lifecycle, self._client = config, ledger, line, lifecycle, client
        self.kind = "cold"
        self.lease: Lease | None = None
        self._lock = threading.Lock()
        self._told = 0  # spans
        self._seen_turns = self._sized_turns = -1
        self._sending = threading.Lock()  # one report after the other: the fullest is the last
        self._reported: tuple[int, str] | None = None  # spans and error of the start, as the agent has them
        self._pause, self._again_at = _AGAIN[0], 0.0

    def beat(self) -> None:
        """Now and then, while the worker lives."""
        self._line.send(beat=1)
        self._size()
        self.spans()
        due = self._lifecycle.state != "starting" and time.monotonic() >= self._again_at
        if due and not self._sending.locked() and self._news() is not None:
            threading.Thread(target=self.start, name="report", daemon=True).start()  # no beat waits for it

    def spans(self) -> None:
        """Tell the shim those that are new."""
        with self._lock:
            fresh = self._ledger.since(self._told)
            self._told += len(fresh)
            if rows := [(span.owner, span.name, span.start, span.end) for span in fresh if span.owner != "shim"]:
                self._line.spans(rows)

    def start(self, seconds: float = 2 * _SECONDS) -> None:
        """Report the start, for the agent's status page; beats and `close` repeat what the agent did not hear.

        `seconds` is how long another report may be waited for, and then how long the agent may take.
        """
        if not self._sending.acquire(timeout=seconds):
            return
        try:
            if (news := self._news()) is None:
                return
            try:
                self._client(min(_SECONDS, seconds / 2)).report_start(self._started(news[1]))
            except (AgentError, FunctionError, OSError) as error:
                self._again_at = time.monotonic() + self._pause
                self._pause = min(_AGAIN[1], 2 * self._pause)
                if not isinstance(error, AgentError) or error.retryable:
                    return
            self._reported, self._pause = news, _AGAIN[0]
        finally:
            self._sending.release()

    def close(self, deadline: float) -> None:
        """Tell shim and agent what they have not heard of the start, until `deadline` on time.monotonic.

        Nothing is reported of a start that has neither succeeded nor failed.
        """
        self.spans()
        if self._lifecycle.phase != "serving" and self._lifecycle.error is None:
            return
        while self._news() is not None and (left := deadline - time.monotonic()) > 0:
            self.start(left)
            if self._news() is not None:
                time.sleep(_LOOK)

    def _news(self) -> tuple[int, str] | None:
        """Spans and error of the start, where the agent has others."""
        error = self._lifecycle.error
        now = len(self._ledger.since(0)), f"{error.text} [{error.code}]"[:TEXT_LIMIT] if error else ""
        return now if now != self._reported else None

    def _started(self, failed: str) -> Started:
        uri, name = self._config.model_uri, self._config.served_name[:256]
        spans = self._ledger.spans()[:_MOST_SPANS]
        tier, size = (self.lease.tier, self.lease.manifest.nbytes) if self.lease else ("", 0)
        return Started(self._ledger.start_id, name, uri, self.kind, spans, failed, tier, size)

    def _size(self) -> None:
        """What the shim would get back without this worker, once after each time of work."""
        turns = self._lifecycle.turns
        if turns == self._seen_turns != self._sized_turns and not self._lifecycle.inside:
            self._sized_turns = turns
            self._line.send(bytes=private_bytes())
        self._seen_turns = turns
