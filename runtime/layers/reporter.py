"""Reports of a supervisor's layers to its agent: the last state, sent by a thread of its own.

Nothing waits for a report or depends on it: an agent that is away, busy, or older than the message is left alone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache_agent.client.cache_client import CacheClient

_SETTLED = 3.0  # seconds before the first report: a start needs the processor more
_AGAIN = 30.0  # seconds after which a report is repeated, so that the agent knows that the supervisor lives
_APART = 2.0  # seconds between two reports
_LAST = 1.0  # seconds for the report that there are no layers any more


class LayerReporter:
    """The reports of one supervisor, whose thread calls `report` and `close`; `close` takes a second at most."""

    def __init__(self, client: Callable[[], CacheClient], head: Mapping[str, Any]) -> None:
        """`client()` speaks to the agent; `head` has the supervisor's `mode`, `name` and `rho`."""
        self._client, self._head = client, head
        self._id = os.urandom(8).hex()
        self._lock = threading.Lock()
        self._layers: Sequence[Mapping[str, Any]] = ()
        self._news = threading.Event()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def report(self, layers: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            self._layers = layers
        self._news.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="layer reporter", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Report that there are no layers any more, and end the thread."""
        self._ending.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(_LAST)

    def _run(self) -> None:
        if self._ending.wait(_SETTLED):
            return
        while True:
            self._news.wait(_AGAIN)
            self._news.clear()
            if self._ending.is_set():
                self._say(())
                return
            with self._lock:
                layers = self._layers
            self._say(layers)
            self._ending.wait(_APART)

    def _say(self, layers: Sequence[Mapping[str, Any]]) -> None:
        from cache_agent.errors import AgentError
        from cache_agent.wire.layers import MOST, Layer, LayersReport
        from runtime.errors import FunctionError

        known = Layer.__struct_fields__
        told = [Layer(**{name: each[name] for name in known if name in each}) for each in layers[:MOST]]
        head = self._head
        with contextlib.suppress(AgentError, FunctionError, OSError):
            self._client().tell_layers(LayersReport(self._id, head["name"][:256], head["mode"], head["rho"], told))
