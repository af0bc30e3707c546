"""Runs a handler's iterator on a thread of its own, so that the server can keep the stream alive and end it in time.

All pieces are made on that thread, the first one, too: an iterator may use objects that belong to one thread. A piece
is made when the server asks for it, and no sooner.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Final

log = logging.getLogger("glowplug.handler")

END: Final = object()  # there are no more pieces
NOTHING: Final = object()  # no piece came within the time


class Pump:
    """A handler's iterator and its thread. `next` is for one thread at a time, `leave` and `on_end` are for any.

    `position` is the id of an event that ends with the last piece, if the source has positions.
    """

    def __init__(self, source: Iterable[object], scope: Callable[[], AbstractContextManager[None]]) -> None:
        """`scope` is entered around each step of the iterator."""
        self._source = source
        self._scope = scope
        self._wanted = threading.Semaphore(0)
        self._asked = False
        self.position: str | None = None
        self._out: queue.SimpleQueue[tuple[object, str | None, BaseException | None]] = queue.SimpleQueue()
        self._left = False
        self._lock = threading.Lock()  # guards `_over` and `_at_end`
        self._over = False
        self._at_end: list[Callable[[], object]] = []
        threading.Thread(target=self._run, name="handler stream", daemon=True).start()

    def next(self, timeout: float) -> object:
        """Return a piece, `END`, or `NOTHING` after `timeout` seconds. Raise the iterator's exception."""
        if not self._asked:
            self._asked = True
            self._wanted.release()
        try:
            piece, position, error = self._out.get(timeout=max(0.0, timeout))
        except queue.Empty:
            return NOTHING
        if error is not None:
            raise error
        self._asked, self.position = False, position
        return piece

    def leave(self) -> None:
        """Take no further pieces, and close the iterator as soon as the piece in the making is finished."""
        self._left = True
        self._wanted.release()

    def on_end(self, call: Callable[[], object]) -> None:
        """Make `call` once no code of the iterator runs any more, which may be at once."""
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
                self._out.put((piece, getattr(self._source, "position", None), None))
                if piece is END:
                    return
        except BaseException as error:  # a SystemExit in the handler's code, too, only ends its stream
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
