"""Runs a handler's iterator on a thread of its own, so that its stream is kept alive and ended in time.

The thread takes the first piece, too: an iterator may hold what belongs to one thread. A piece is made when it is asked
for, and no sooner.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Final

log = logging.getLogger("glowplug.handler")

END: Final = object()  # no more pieces
NOTHING: Final = object()  # none within the time


class Pump:
    """Owns the iterator. `next` is for one thread at a time; `leave` and `on_end` may be called from any."""

    def __init__(self, source: Iterable[object], scope: Callable[[], AbstractContextManager[None]]) -> None:
        """`scope` is entered around each step of the iterator."""
        self._source = source
        self._scope = scope
        self._wanted = threading.Semaphore(0)
        self._asked = False
        self.place: str | None = None  # where the piece that `next` gave last lies, if its source says so
        self._out: queue.SimpleQueue[tuple[object, str | None, BaseException | None]] = queue.SimpleQueue()
        self._left = False
        self._lock = threading.Lock()  # guards the two below
        self._over = False
        self._at_end: list[Callable[[], object]] = []
        threading.Thread(target=self._run, name="handler stream", daemon=True).start()

    def next(self, timeout: float) -> object:
        """A piece, `END`, or `NOTHING` after so many seconds. Raises what the iterator raised."""
        if not self._asked:
            self._asked = True
            self._wanted.release()
        try:
            piece, place, error = self._out.get(timeout=max(0.0, timeout))
        except queue.Empty:
            return NOTHING
        if error is not None:
            raise error
        self._asked, self.place = False, place
        return piece

    def leave(self) -> None:
        """Nobody takes further pieces: the iterator is closed as soon as it has made the one that it is at."""
        self._left = True
        self._wanted.release()

    def on_end(self, call: Callable[[], object]) -> None:
        """Calls it once no code of the iterator runs any more: now, or then."""
        with self._lock:
            if not self._over:
                self._at_end.append(call)
                return
        call()

    def _run(self) -> None:
        pieces: Iterator[object] | None = None
        try:
            while True:
                self._wanted.acquire()
                if self._left:
                    return
                with self._scope():
                    pieces = iter(self._source) if pieces is None else pieces
                    piece = next(pieces, END)
                self._out.put((piece, getattr(self._source, "place", None), None))
                if piece is END:
                    return
        except BaseException as error:  # a SystemExit of the handler's code, too, is its stream's end and no more
            self._out.put((NOTHING, None, error))
        finally:
            self._close(pieces)
            with self._lock:
                self._over, calls = True, self._at_end
            for call in calls:
                call()

    def _close(self, pieces: Iterator[object] | None) -> None:
        for closing in {id(each): each for each in (pieces, self._source)}.values():
            try:
                if (close := getattr(closing, "close", None)) is not None:
                    close()
            except BaseException:
                log.exception("closing the handler's stream failed")
