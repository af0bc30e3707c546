"""Owns requests that were moved away and whose destination is gone, until somebody goes on with them.

    relay ──► Orphan ──► the epoch is ours again ──► the own engine, while it is there, or another destination
                 └── nobody within PATIENCE, more than MOST destinations, or this replica ends ──► "moved"

Their clients wait at their streams and notice nothing: what is made anew begins after the last token that came. The
destination that is gone spoke through its relay alone, which is closed: so its epoch is taken at once, and its lease
need not run out. Somebody who has claimed the request meanwhile keeps it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.engine.base import TokenEvent
from runtime.handoff.live import LiveEngine
from runtime.handoff.relay import Sent
from runtime.resume.answer import Answer

PATIENCE = 15.0  # seconds that a client waits, in silence, for another destination
MOST = 3  # destinations that one request may outlive: it may be what they die of


@dataclass(slots=True)
class OrphanedRequest:
    """`sent` is what its last destination had; `since` when that one was gone, and `why`."""

    sent: Sent
    since: float
    why: str


class Orphans:
    """Those of one worker. Any thread may bring them, and `end` them; one looks after them."""

    def __init__(self, live: LiveEngine, brought: Callable[[], None]) -> None:
        """`brought` is called when there are new ones."""
        self._live, self._brought = live, brought
        self._lock = threading.Lock()
        self._waiting: list[OrphanedRequest] = []
        self._over = ""  # why nobody looks after them any more

    def take(self, sents: Sequence[Sent], why: str) -> None:
        now = time.monotonic()
        with self._lock:
            over = self._over
            kept = [] if over else [sent for sent in sents if sent.rescues < MOST]
            self._waiting += [OrphanedRequest(sent, now, why) for sent in kept]
        for sent in sents:
            if sent not in kept:
                _end(sent, f"{why}; {over}" if over else why)
        if kept:
            self._brought()

    def waiting(self) -> list[OrphanedRequest]:
        """Those whose clients are still there and have some patience left; the others are let go of."""
        now = time.monotonic()
        with self._lock:
            waiting = list(self._waiting)
        for orphan in waiting:
            if self.streams(orphan) is None or now > orphan.since + PATIENCE:
                self.give_up(orphan, orphan.why)
        with self._lock:
            return list(self._waiting)

    def streams(self, orphan: OrphanedRequest) -> dict[int, Answer] | None:
        """What its clients read, by choice; None when they have left."""
        found = {n: self._live.reader(stream) for n, stream in orphan.sent.streams.items()}
        there = {n: stream for n, stream in found.items() if stream is not None}
        return there if len(there) == len(found) else None

    def found_a_place(self, orphan: OrphanedRequest) -> None:
        """Its streams have their successors, and go on to them."""
        self._remove(orphan)
        for choice, stream in orphan.sent.streams.items():
            stream.put(TokenEvent(len(orphan.sent.tokens[choice]), None, "", "moved"))

    def give_up(self, orphan: OrphanedRequest, why: str) -> None:
        self._remove(orphan)
        _end(orphan.sent, why)

    def end(self, why: str) -> None:
        """All of them end, and so does whatever is brought from here on."""
        with self._lock:
            self._over = why
            waiting, self._waiting = self._waiting, []
        for orphan in waiting:
            _end(orphan.sent, f"{orphan.why}; {why}")

    def _remove(self, orphan: OrphanedRequest) -> None:
        with self._lock:
            if orphan in self._waiting:
                self._waiting.remove(orphan)


def _end(sent: Sent, why: str) -> None:
    text = f"the replica that went on with this answer cannot be heard any more ({why}); ask for the rest"
    for choice, stream in sent.streams.items():
        stream.put(TokenEvent(len(sent.tokens[choice]), None, "", "moved", text))
