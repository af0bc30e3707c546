"""The orphans of a draining worker: moved requests whose destination is gone, until a worker continues them.

    relay ──► OrphanedRequest ──► its epoch is ours again ──► this engine, while it is there, or another destination
                 └── none within PATIENCE, more than MOST destinations, or this replica ends ──► "moved"

Their clients wait at their streams and notice a pause only: the new tokens begin after the last one that came. The
dead destination sent tokens through its relay alone, which is closed; so its epoch is taken at once, before its lease
ends. A replica that has claimed the request meanwhile keeps it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.engine.base import TokenEvent
from runtime.handoff.live import LiveEngine
from runtime.handoff.relay import SentRequest
from runtime.resume.answer import Answer

PATIENCE = 15.0  # seconds that a client waits for another destination
MOST = 3  # destinations that one request may outlive: the request may be the cause of their end


@dataclass(slots=True)
class OrphanedRequest:
    """A request without destination: the state that the last destination had (`sent`), when it was lost, and why."""

    sent: SentRequest
    since: float
    why: str


class Orphans:
    """The orphans of one worker. `take` and `end` are for any thread, the others for the thread of `Departure`."""

    def __init__(self, live: LiveEngine, on_new: Callable[[], None]) -> None:
        """`on_new` is called when there are new orphans."""
        self._live, self._on_new = live, on_new
        self._lock = threading.Lock()
        self._waiting: list[OrphanedRequest] = []
        self._over = ""  # the reason why no more orphans are taken

    def take(self, sents: Sequence[SentRequest], why: str) -> None:
        """Keep requests whose destination is gone; end those that have outlived too many destinations."""
        now = time.monotonic()
        with self._lock:
            over = self._over
            kept = [] if over else [sent for sent in sents if sent.rescues < MOST]
            self._waiting += [OrphanedRequest(sent, now, why) for sent in kept]
        for sent in sents:
            if sent not in kept:
                _end(sent, f"{why}; {over}" if over else why)
        if kept:
            self._on_new()

    def waiting(self) -> list[OrphanedRequest]:
        """Return the orphans whose clients are there and still wait; give the others up."""
        now = time.monotonic()
        with self._lock:
            waiting = list(self._waiting)
        for orphan in waiting:
            if self.streams(orphan) is None or now > orphan.since + PATIENCE:
                self.give_up(orphan, orphan.why)
        with self._lock:
            return list(self._waiting)

    def streams(self, orphan: OrphanedRequest) -> dict[int, Answer] | None:
        """Return the answers that its client reads, by choice; None when the client has left."""
        found = {n: self._live.reader(stream) for n, stream in orphan.sent.streams.items()}
        there = {n: stream for n, stream in found.items() if stream is not None}
        return there if len(there) == len(found) else None

    def hand_over(self, orphan: OrphanedRequest) -> None:
        """Turn the orphan's answers to the feeds that were attached to them."""
        self._remove(orphan)
        for choice, stream in orphan.sent.streams.items():
            stream.put(TokenEvent(len(orphan.sent.tokens[choice]), None, "", "moved"))

    def give_up(self, orphan: OrphanedRequest, why: str) -> None:
        """End an orphan with an error after which its client can resume."""
        self._remove(orphan)
        _end(orphan.sent, why)

    def end(self, why: str) -> None:
        """End all orphans, and those that are taken from here on."""
        with self._lock:
            self._over = why
            waiting, self._waiting = self._waiting, []
        for orphan in waiting:
            _end(orphan.sent, f"{orphan.why}; {why}")

    def _remove(self, orphan: OrphanedRequest) -> None:
        with self._lock:
            if orphan in self._waiting:
                self._waiting.remove(orphan)


def _end(sent: SentRequest, why: str) -> None:
    text = f"the replica that went on with this answer cannot be heard any more ({why}); ask for the rest"
    for choice, stream in sent.streams.items():
        stream.put(TokenEvent(len(sent.tokens[choice]), None, "", "moved", text))
