"""Reports of hand-offs to the agent: each is sent until the agent has it.

The agent may be busy or away for a moment, and a worker may end right after its last request: the thread that migrates
requests does not wait for the agent; the end of the worker does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from cache_agent.errors import AgentError
from cache_agent.wire.requests import MAX_ITEMS, HandoffOutcome
from runtime.errors import FunctionError

log = logging.getLogger("glowplug.handoff")

_AGAIN = (0.1, 5.0)  # seconds between two attempts: first, and at most
_MOST = 1024  # reports that are kept for an agent that is away; the oldest are dropped first


class Reporter:
    """The reports of one worker. Any thread."""

    def __init__(self, send: Callable[[Sequence[HandoffOutcome]], None]) -> None:
        """`send` raises any `AgentError`, `FunctionError` or `OSError` while the agent does not have the reports."""
        self._send = send
        self._changed = threading.Condition()
        self._waiting: deque[HandoffOutcome] = deque(maxlen=_MOST)
        self._hurried = self._closed = False
        self._thread: threading.Thread | None = None

    def report(self, item: HandoffOutcome) -> None:
        """Queue a report for the reporter's thread, and return at once."""
        with self._changed:
            self._waiting.append(item)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="handoff reports", daemon=True)
                self._thread.start()

    def close(self, deadline: float) -> None:
        """Return once the agent has all reports, or at `deadline` (of time.monotonic)."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            self._changed.wait_for(self._idle, max(0.0, deadline - time.monotonic()))
            if not self._idle():
                log.warning("the agent does not hear of %d hand-offs", len(self._waiting))
            self._closed = True
            self._changed.notify_all()

    def _idle(self) -> bool:
        return self._closed or not self._waiting

    def _run(self) -> None:
        pause = _AGAIN[0]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                batch = list(islice(self._waiting, MAX_ITEMS))
            if self._sent(batch):
                self._forget(batch)
                pause = _AGAIN[0]
                continue
            with self._changed:
                self._changed.wait(_AGAIN[0] if self._hurried else pause)
            pause = min(_AGAIN[1], 2 * pause)

    def _sent(self, batch: Sequence[HandoffOutcome]) -> bool:
        """Send a batch; False where another attempt can help."""
        try:
            self._send(batch)
        except (AgentError, FunctionError, OSError) as error:
            if isinstance(error, AgentError) and not error.retryable:
                log.warning("the agent does not hear of %d hand-offs: %s", len(batch), error)
                return True
            log.info("the agent has not heard of %d hand-offs yet: %s", len(batch), error)
            return False
        return True

    def _forget(self, batch: Sequence[HandoffOutcome]) -> None:
        with self._changed:
            for item in batch:
                if self._waiting and self._waiting[0] is item:  # or it was dropped meanwhile
                    self._waiting.popleft()
            self._changed.notify_all()
