"""The departure of a draining worker: it seeks a destination, migrates its requests there, and releases its model.

    seek ──► relay ──► each request: `Migration` ──► release ──► relaying until the process ends
     ▲         │
     └─────────┴── the destination is gone: requests that were not moved run on here; moved ones become orphans, and
                   continue at the next destination, or here while the model is here (`orphans`)

Requests migrate one after the other: each stands still only while its own state travels, and the others run on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cache_agent.errors import AgentError
from runtime.engine.base import TokenStream
from runtime.errors import FunctionError
from runtime.handoff.live import LiveEngine
from runtime.handoff.migration import MigratingRequest, Migration, MigrationReport
from runtime.handoff.migration_table import MigrationEvent
from runtime.handoff.orphans import Orphans
from runtime.handoff.pipe import Broken
from runtime.handoff.relay import Relay, SentRequest
from runtime.resume.sessions import Sessions
from runtime.resume.snapshot import ReplicaIdentity

log = logging.getLogger("glowplug.handoff")

_AGAIN = 0.5  # seconds between two attempts to find a destination
_SOON = 0.05  # seconds before requests that were just ending are looked at again
_NO_ROOM = 2.0  # seconds before a destination without room is offered a request again


class Departure:
    """The departure of one worker. `begin` starts its thread; `close` ends it, and all relayed streams."""

    def __init__(
        self,
        live: LiveEngine,
        sessions: Sessions | None,
        identity: Callable[[], ReplicaIdentity],
        seek: Callable[[], Relay | None],
        releasable: Callable[[], bool],
        released: Callable[[], None],
        report: Callable[[MigrationReport], None],
    ) -> None:
        """`seek` asks the agent for a destination (cache_agent/client/handoff.py), greets it, and returns a relay
        to it; None where there is none. It raises `Broken` or `AgentError`.

        `releasable` returns whether the engine may be released once it runs nothing; `released` is called after that.
        `report` takes the outcome of each migration, and does not block.
        """
        self._live, self._sessions = live, sessions
        self._seek, self._report = seek, report
        self._releasable, self._released = releasable, released
        self._beginning = threading.Lock()
        self._begun = False
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._orphans = Orphans(live, self._wake.set)
        self._migration = Migration(live, sessions, identity, self._orphans, self._closing)
        self._relay: Relay | None = None
        self._thread = threading.Thread(target=self._run, name="handoff", daemon=True)

    def begin(self) -> None:
        with self._beginning:
            if not self._begun:
                self._begun = True
                self._thread.start()

    def close(self, why: str, deadline: float) -> None:
        """End the thread, at the latest at `deadline` (of time.monotonic); relayed streams end with "moved"."""
        self._closing.set()
        self._wake.set()
        self._orphans.end(why)
        if (relay := self._relay) is not None:
            relay.close(why)
        if self._thread.is_alive():
            self._thread.join(max(0.1, deadline - time.monotonic()))

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._take_back()
                if (relay := self._seek()) is not None:
                    self._hand_over(relay)
            except (Broken, AgentError, FunctionError) as error:
                log.info("no hand-off yet: %s", error)
            except Exception:  # a defect must not end the requests that still run
                log.exception("handing over failed")
            self._pause(_AGAIN)

    def _pause(self, seconds: float) -> None:
        """Wait so many seconds, or until there is something to do."""
        self._wake.wait(seconds)
        self._wake.clear()

    def _hand_over(self, relay: Relay) -> None:
        """Migrate and relay until the destination is gone."""
        self._relay = relay
        threading.Thread(target=relay.run, args=(self._orphans.take,), name="relay", daemon=True).start()
        try:
            relay.measure()
            self._live.redirect(relay)
            log.info("handing over to %s, at %.0f MB/s", relay.owner, relay.speed / 1e6)
            while not relay.broken and not self._closing.is_set():
                pause = _AGAIN
                self._rescue(relay)
                if not self._live.released:
                    had_room = self._move_all(relay)
                    pause = _NO_ROOM if not had_room else _SOON if self._live.here() else _AGAIN
                    if self._releasable() and self._live.release():
                        self._released()
                self._pause(pause)
        finally:
            self._live.redirect(None)
            relay.close("the replica that drains has given it up")

    def _move_all(self, relay: Relay) -> bool:
        """Migrate every request that runs here; False as soon as the destination has no room for one.

        A request that is offered again at once would stand still again, in vain.
        """
        for request in self._requests():
            if relay.broken or self._closing.is_set():
                break
            if self._move(request, relay) == "back":
                return False
        return True

    def _move(self, request: MigratingRequest, relay: Relay) -> str:
        """Migrate a request; return the outcome, "" where nothing was to be moved after all."""
        if (report := self._migration.migrate(request, relay)) is None:
            return ""
        self._report(report)
        return report.outcome

    # --- requests without destination -------------------------------------------------------------------------------

    def _reclaimed(self) -> list[MigratingRequest]:
        """Return the orphans that this worker owns again and whose clients wait."""
        requests = []
        for orphan in self._orphans.waiting():
            if (streams := self._orphans.streams(orphan)) is not None:
                sent = orphan.sent
                request = MigratingRequest(
                    streams, sent.session, orphan, frozen_at=orphan.since, epoch=sent.epoch, why=orphan.why
                )
                match self._recover(request, sent):
                    case MigrationEvent.YES:
                        requests.append(request)
                    case MigrationEvent.NO:
                        self._orphans.give_up(orphan, request.why)
        return requests

    def _recover(self, request: MigratingRequest, sent: SentRequest) -> MigrationEvent:
        if request.session is None or self._sessions is None or sent.owner == self._sessions.owner:
            return MigrationEvent.YES
        event = self._migration.transfer(request, sent.owner, sent.epoch, self._sessions.owner)
        if event is MigrationEvent.YES:
            sent.owner, sent.epoch = self._sessions.owner, sent.epoch + 1
            request.epoch = sent.epoch
        return event

    def _rescue(self, relay: Relay) -> None:
        for request in self._reclaimed():
            if relay.broken or self._closing.is_set():
                break
            self._move(request, relay)

    def _take_back(self) -> None:
        """Continue orphans in this worker's engine, if it has not been released; they can migrate again later."""
        if self._live.released:
            self._orphans.waiting()  # which ends those whose patience is over
            return
        for request in self._reclaimed():
            assert request.orphan is not None, "`_reclaimed` made it from an orphan"
            sent, begun = request.orphan.sent, dict[int, TokenStream]()
            try:
                for choice in request.streams:
                    begun[choice] = self._live.readmit(sent.state(choice))
            except FunctionError as error:  # no room, or the engine has just been released
                log.info("%s is not taken back: %s", request.id, error.text)
                for stream in begun.values():
                    stream.close()
                continue
            if request.session is not None and self._sessions is not None:
                running = set(sent.streams)
                ended = [n for n in range(len(sent.tokens)) if n not in running]
                self._sessions.retake(request.session, request.epoch, sent.tokens, ended)
            for choice, stream in request.streams.items():
                stream.attach(begun[choice], here=True)
            self._orphans.hand_over(request.orphan)
            log.info("%s goes on here again: %s", request.id, request.why)

    # --- requests here ----------------------------------------------------------------------------------------------

    def _requests(self) -> list[MigratingRequest]:
        requests: dict[str, MigratingRequest] = {}
        for stream in self._live.here():
            session = self._sessions.find(stream.request_id) if self._sessions is not None else None
            if session is None:
                requests[stream.request_id] = MigratingRequest({0: stream}, None)
                continue
            choice = next(n for n, request in enumerate(session.requests) if request.id == stream.request_id)
            requests.setdefault(session.key.id, MigratingRequest({}, session)).streams[choice] = stream
        return list(requests.values())
