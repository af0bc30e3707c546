"""Owns what a worker tells of itself: spans and size to its shim, and how its start went to the agent."""

from __future__ import annotations

import contextlib
import threading
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
from runtime.process.control import Line

_SECONDS = 2.0
_MOST_SPANS = 256  # of a start that is reported; more are no start


class Reporting:
    """One worker's; any thread. `kind` is the layer that the start began at, `lease` what it got."""

    def __init__(
        self,
        config: FunctionConfig,
        ledger: Ledger,
        line: Line,
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

    def beat(self) -> None:
        """Now and then, while the worker lives."""
        self._line.send(beat=1)
        self._size()
        if self.spans() and self._lifecycle.state != "starting":
            threading.Thread(target=self.start, name="report", daemon=True).start()  # no beat waits for it

    def spans(self) -> bool:
        """Those that are new, to the shim; whether there were any."""
        with self._lock:
            fresh = self._ledger.since(self._told)
            self._told += len(fresh)
            if rows := [(span.owner, span.name, span.start, span.end) for span in fresh if span.owner != "shim"]:
                self._line.spans(rows)
            return bool(rows)

    def start(self) -> None:
        """The agent keeps the ledgers of its node's starts, for those who look at it."""
        error = self._lifecycle.error
        failed = f"{error.text} [{error.code}]"[:TEXT_LIMIT] if error else ""
        uri, name = self._config.model_uri, self._config.served_name[:256]
        spans = self._ledger.spans()[:_MOST_SPANS]
        with contextlib.suppress(AgentError, FunctionError, OSError):
            lease = self.lease
            tier, size = (lease.tier, lease.manifest.nbytes) if lease else ("", 0)
            told = Started(self._ledger.start_id, name, uri, self.kind, spans, failed, tier, size)
            self._client(_SECONDS).report_start(told)

    def _size(self) -> None:
        """What the shim would get back without this worker, once after each time of work."""
        turns = self._lifecycle.turns
        if turns == self._seen_turns != self._sized_turns and not self._lifecycle.inside:
            self._sized_turns = turns
            self._line.send(bytes=private_bytes())
        self._seen_turns = turns
