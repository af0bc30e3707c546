"""Carries a generation's events from the engine's thread to their one reader."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

from runtime.engine.base import TokenEvent

_IDLE_WAIT = 30.0  # seconds between two looks for an event; only the engine or the reader ends a stream


class Stream:
    """The events of one generation; see `TokenStream`. Never blocks the engine, and keeps no memory of the engine's."""

    def __init__(self, request_id: str, cancel: Callable[[], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self._over = False

    def put(self, event: TokenEvent) -> None:
        self._events.put(event)

    def next(self, timeout: float) -> TokenEvent | None:
        if self._over:
            raise StopIteration
        try:
            event = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        self._over = event.finish is not None
        return event

    def __iter__(self) -> Iterator[TokenEvent]:
        while not self._over:
            event = self.next(_IDLE_WAIT)
            if event is not None:
                yield event

    def close(self) -> None:
        if not self._over:
            self._over = True
            self._cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
