"""Owns a worker's leaving: finds who goes on, moves what runs to it, and lets go of the model.

    seek ──► relay ──► each request: `mover` ──► release ──► relaying until the process ends
     ▲         │
     └─────────┴── the destination is gone: what was not moved runs on here, another one is looked for, and what was
                   moved goes on there, or here while the model is here (`orphans`)

One request after the other: each stands still only for as long as its own state travels, the others run on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from cache_agent.errors import AgentError
from runtime.engine.base import TokenStream
from runtime.errors import FunctionError
from runtime.handoff.live import LiveEngine
from runtime.handoff.migration import Migration, MigrationReport, Unit
from runtime.handoff.migration_table import MigrationEvent
from runtime.handoff.orphans import Orphans
from runtime.handoff.pipe import Broken
from runtime.handoff.relay import Relay, Sent
from runtime.resume.sessions import Sessions
from runtime.resume.snapshot import ReplicaIdentity

log = logging.getLogger("glowplug.handoff")

_AGAIN = 0.5  # seconds between two attempts to find a destination
_SOON = 0.05  # … to move what was just ending
_NO_ROOM = 2.0  # … to move what the destination had no room for


class Seek(Protocol):
    """Finds a destination and greets it; None where there is none now. Raises `Broken`, `AgentError`."""

    def __call__(self) -> Relay | None: ...


class Departure:
    """One worker's. `begin` starts its thread; `close` ends it, and all that is relayed."""

    def __init__(
        self,
        live: LiveEngine,
        sessions: Sessions | None,
        place: Callable[[], ReplicaIdentity],
        seek: Seek,
        releasable: Callable[[], bool],
        released: Callable[[], None],
        report: Callable[[MigrationReport], None],
    ) -> None:
        """`releasable` says whether the own engine may go once it runs nothing; then `released` is called.

        `report` hears what became of each request, at once, and does not block.
        """
        self._live, self._sessions = live, sessions
        self._seek, self._report = seek, report
        self._releasable, self._released = releasable, released
        self._beginning = threading.Lock()
        self._begun = False
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._orphans = Orphans(live, self._wake.set)
        self._mover = Migration(live, sessions, place, self._orphans, self._closing)
        self._relay: Relay | None = None
        self._thread = threading.Thread(target=self._run, name="handoff", daemon=True)

    def begin(self) -> None:
        with self._beginning:
            if not self._begun:
                self._begun = True
                self._thread.start()

    def close(self, why: str, deadline: float) -> None:
        """Streams that are relayed end with "moved"."""
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
            except Exception:  # a fault of ours must not end what still runs
                log.exception("handing over failed")
            self._pause(_AGAIN)

    def _pause(self, seconds: float) -> None:
        """Less, when there is something to do sooner."""
        self._wake.wait(seconds)
        self._wake.clear()

    def _hand_over(self, relay: Relay) -> None:
        """Returns when the destination is gone."""
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
        """False where the destination had no room for one: asked again, that one would stand still again."""
        for unit in self._units():
            if relay.broken or self._closing.is_set():
                break
            if self._move(unit, relay) == "back":
                return False
        return True

    def _move(self, unit: Unit, relay: Relay) -> str:
        """Return the outcome, "" where nothing was to be moved after all."""
        if (told := self._mover.move(unit, relay)) is None:
            return ""
        self._report(told)
        return told.outcome

    # --- what lost its destination ----------------------------------------------------------------------------------

    def _adopted(self) -> list[Unit]:
        """Orphans that are this worker's again, as the store has it, and whose clients wait."""
        units = []
        for orphan in self._orphans.waiting():
            if (streams := self._orphans.streams(orphan)) is not None:
                sent = orphan.sent
                unit = Unit(streams, sent.session, orphan, frozen_at=orphan.since, epoch=sent.epoch, why=orphan.why)
                match self._recover(unit, sent):
                    case MigrationEvent.YES:
                        units.append(unit)
                    case MigrationEvent.NO:
                        self._orphans.give_up(orphan, unit.why)
        return units

    def _recover(self, unit: Unit, sent: Sent) -> MigrationEvent:
        if unit.session is None or self._sessions is None or sent.owner == self._sessions.owner:
            return MigrationEvent.YES
        event = self._mover.transfer(unit, sent.owner, sent.epoch, self._sessions.owner)
        if event is MigrationEvent.YES:
            sent.owner, sent.epoch = self._sessions.owner, sent.epoch + 1
            unit.epoch = sent.epoch
        return event

    def _rescue(self, relay: Relay) -> None:
        for unit in self._adopted():
            if relay.broken or self._closing.is_set():
                break
            self._move(unit, relay)

    def _take_back(self) -> None:
        """Into the own engine, while there is one: what goes on here can be moved again, as all the others."""
        if self._live.released:
            self._orphans.waiting()  # their patience may be over
            return
        for unit in self._adopted():
            assert unit.orphan is not None, "it was adopted"
            sent, begun = unit.orphan.sent, dict[int, TokenStream]()
            try:
                for choice in unit.streams:
                    begun[choice] = self._live.readmit(sent.state(choice))
            except FunctionError as error:  # no room; or it has just been released
                log.info("%s is not taken back: %s", unit.id, error.text)
                for stream in begun.values():
                    stream.close()
                continue
            if unit.session is not None and self._sessions is not None:
                running = set(sent.streams)
                ended = [n for n in range(len(sent.tokens)) if n not in running]
                self._sessions.retake(unit.session, unit.epoch, sent.tokens, ended)
            for choice, stream in unit.streams.items():
                stream.attach(begun[choice], here=True)
            self._orphans.found_a_place(unit.orphan)
            log.info("%s goes on here again: %s", unit.id, unit.why)

    # --- what is here -----------------------------------------------------------------------------------------------

    def _units(self) -> list[Unit]:
        units: dict[str, Unit] = {}
        for stream in self._live.here():
            session = self._sessions.find(stream.request_id) if self._sessions is not None else None
            if session is None:
                units[stream.request_id] = Unit({0: stream}, None)
                continue
            choice = next(n for n, request in enumerate(session.requests) if request.id == stream.request_id)
            units.setdefault(session.key.id, Unit({}, session)).streams[choice] = stream
        return list(units.values())
