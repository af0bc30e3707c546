"""Owns the carrying out of one move: a request stands still, is offered, made over, and goes on there, or here.

What is done after what is decided by `move`; this does it, with the engine, the store and the relay, and tells how it
went. What moves may run here, or may have lost its destination and run nowhere (`orphans`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cache_agent.errors import AgentError
from runtime.engine.base import GenerationState
from runtime.errors import FunctionError
from runtime.handoff.live import LiveEngine
from runtime.handoff.messages import KeptRequest, OfferReady, OfferRefused, OfferRunning
from runtime.handoff.migration_table import MigrationAction, MigrationEvent, MigrationState, travels
from runtime.handoff.orphans import OrphanedRequest, Orphans
from runtime.handoff.pipe import Broken
from runtime.handoff.relay import ANSWER, Relay, Sent
from runtime.resume.answer import Answer
from runtime.resume.session import Session
from runtime.resume.sessions import Sessions
from runtime.resume.snapshot import ReplicaIdentity, Snapshot

log = logging.getLogger("glowplug.handoff")

_FREEZE = 10.0  # seconds in which the store must have answered what it is being told
_COMMIT = 5.0  # seconds in which the store must say whose a request is
_SLOWEST = 4 << 20  # bytes per second that a state may take to be ready
_LOOK = 0.1


@dataclass(slots=True)
class MigrationReport:
    """How one request fared. `how` is "kv", "recompute" or "relay"; `outcome` "moved", "back" or "lost"."""

    id: str
    to: str
    tokens: int
    pause: float
    how: str
    outcome: str
    reason: str = ""


@dataclass(slots=True)
class Unit:
    """What moves together: the choices of a kept request, or one generation."""

    streams: dict[int, Answer]  # by choice
    session: Session | None
    orphan: OrphanedRequest | None = None
    snapshots: list[Snapshot] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    sent: Sent | None = None
    how: str = "relay"
    frozen_at: float = 0.0
    running_at: float = 0.0
    epoch: int = 0
    why: str = ""

    @property
    def id(self) -> str:
        return self.session.key.id if self.session else next(iter(self.streams.values())).request_id


class Migration:
    """One worker's; for the thread of its `Departure` alone."""

    def __init__(
        self,
        live: LiveEngine,
        sessions: Sessions | None,
        place: Callable[[], ReplicaIdentity],
        orphans: Orphans,
        closing: threading.Event,
    ) -> None:
        self._live, self._sessions, self._place = live, sessions, place
        self._orphans, self._closing = orphans, closing

    def move(self, unit: Unit, relay: Relay) -> MigrationReport | None:
        """None where nothing was to be moved after all."""
        move, event = MigrationState(), MigrationEvent.BEGIN
        try:
            while not move.over:
                for action in move.handle(event):
                    event = self._act(action, unit, relay) or event
        except Exception:  # a fault of ours: nothing may stand still for ever
            self._resume(unit) if move.state in ("freezing", "offered") else self._lose(unit)
            raise
        if not unit.snapshots:
            return None
        tokens = sum(len(unit.snapshots[choice].state.generated) for choice in unit.streams)
        pause = (unit.running_at or time.monotonic()) - unit.frozen_at
        how = f"{unit.how}: {unit.why}" if unit.why else unit.how
        log.info("%s: %s, to %s, in %.0f ms (%s)", unit.id, move.state, relay.owner, pause * 1e3, how)
        return MigrationReport(unit.id, relay.owner, tokens, pause, unit.how, move.state, unit.why)

    # --- what `move` decided ----------------------------------------------------------------------------------------

    def _act(self, action: MigrationAction, unit: Unit, relay: Relay) -> MigrationEvent | None:
        match action:
            case MigrationAction.FREEZE:
                return self._freeze(unit, relay)
            case MigrationAction.OFFER:
                return self._offer(unit, relay)
            case MigrationAction.COMMIT:
                return self._commit(unit, relay)
            case MigrationAction.GO:
                return self._go(unit, relay)
            case MigrationAction.RECLAIM:
                return self._reclaim(unit, relay)
            case MigrationAction.ATTACH:
                self._attach(unit, relay)
            case MigrationAction.DROP:
                if unit.sent is not None:
                    relay.drop(unit.sent)
            case MigrationAction.RESUME:
                self._resume(unit)
            case MigrationAction.LOSE:
                self._lose(unit)
        return None

    def _freeze(self, unit: Unit, relay: Relay) -> MigrationEvent:
        if unit.orphan is not None:
            return self._still(unit, unit.orphan.sent)
        session = unit.session
        if session is not None:
            assert self._sessions is not None, "it holds it"
            if not self._sessions.freeze(session, time.monotonic() + _FREEZE):
                return MigrationEvent.UNFIT
            if set(unit.streams) != set(range(len(session.requests))) - session.ended:
                return MigrationEvent.UNFIT  # one of its choices has just ended, and its last tokens are not told yet
            unit.epoch, unit.ended = session.epoch, sorted(session.ended)
        try:
            states = {choice: self._export(stream, unit, relay) for choice, stream in unit.streams.items()}
        except (KeyError, FunctionError) as error:  # it ended in this moment, or its step takes for ever
            log.debug("%s is not moved now: %r", unit.id, error)
            return MigrationEvent.UNFIT
        place = self._place()
        whole = list(states.values())
        if session is not None:
            told = zip(session.requests, session.tokens, strict=True)
            whole = [states.get(n) or place.state(request, ids) for n, (request, ids) in enumerate(told)]
        unit.snapshots = [place.snapshot(state, unit.epoch) for state in whole]
        return MigrationEvent.FROZEN

    def _still(self, unit: Unit, sent: Sent) -> MigrationEvent:
        """It runs nowhere: its state is what came of it."""
        running = set(sent.streams)
        unit.ended = [n for n in range(len(sent.tokens)) if n not in running]
        unit.snapshots = [replace(each, state=sent.state(n), epoch=unit.epoch) for n, each in enumerate(sent.snapshots)]
        unit.how = "recompute" if any(sent.tokens) else "relay"
        return MigrationEvent.FROZEN

    def _export(self, stream: Answer, unit: Unit, relay: Relay) -> GenerationState:
        size, again = self._live.recompute(stream.request_id)
        kv = travels(size, relay.speed, again, exact=stream.request.deterministic)
        state = self._live.export(stream.request_id, kv=kv)
        unit.frozen_at = unit.frozen_at or time.monotonic()
        if state.kv or (state.generated and unit.how == "relay"):
            unit.how = "kv" if state.kv else "recompute"
        return state

    def _offer(self, unit: Unit, relay: Relay) -> MigrationEvent:
        kept = KeptRequest(unit.session.context, unit.ended) if unit.session else None
        live = list(unit.streams) if unit.session else [0]
        size = sum(len(row.data) for each in unit.snapshots for row in each.state.kv)
        try:
            unit.sent = relay.offer(unit.snapshots, live, kept)
            unit.sent.rescues = unit.orphan.sent.rescues + 1 if unit.orphan else 0
            answer = relay.answer(unit.sent, OfferReady, ANSWER + size / _SLOWEST)
        except Broken as error:
            return self._broken(unit, relay, error)
        if isinstance(answer, OfferRefused):
            unit.why = f"{answer.text} [{answer.code}]"
            return MigrationEvent.REFUSED
        return MigrationEvent.READY

    def _commit(self, unit: Unit, relay: Relay) -> MigrationEvent:
        if unit.session is None:
            return MigrationEvent.YES  # nobody else can claim it
        assert self._sessions is not None, "it holds it"
        return self.transfer(unit, self._sessions.owner, unit.epoch, relay.owner)

    def _go(self, unit: Unit, relay: Relay) -> MigrationEvent:
        assert unit.sent is not None, "it was offered"
        try:
            relay.go(unit.sent, unit.epoch + 1 if unit.session else 0)
            relay.answer(unit.sent, OfferRunning, ANSWER)
        except Broken as error:
            return self._broken(unit, relay, error)
        unit.running_at = time.monotonic()
        return MigrationEvent.RUNNING

    def _reclaim(self, unit: Unit, relay: Relay) -> MigrationEvent:
        if unit.session is None:
            return MigrationEvent.YES
        assert self._sessions is not None, "it holds it"
        unit.epoch += 1
        event = self.transfer(unit, relay.owner, unit.epoch, self._sessions.owner)
        unit.epoch += event is MigrationEvent.YES
        return event

    def transfer(self, unit: Unit, owner: str, epoch: int, successor: str) -> MigrationEvent:
        """Asked again until the store has said something: saying it twice is saying it once."""
        assert unit.session is not None, "only what is kept has an owner"
        assert self._sessions is not None, "it holds it"
        deadline = time.monotonic() + _COMMIT
        while True:
            try:
                if self._sessions.transfer(unit.session, owner, epoch, successor):
                    return MigrationEvent.YES
                unit.why = "another replica took it over"
                return MigrationEvent.NO
            except AgentError as error:
                unit.why = f"whose it is cannot be known now: {error.text} [{error.code}]"
            if time.monotonic() >= deadline:
                return MigrationEvent.UNKNOWN
            self._closing.wait(_LOOK)

    def _attach(self, unit: Unit, relay: Relay) -> None:
        sent = unit.sent
        assert sent is not None, "it was offered"
        if unit.session is not None and self._sessions is not None:
            self._sessions.handed(unit.session, relay.owner, unit.epoch + 1)
            sent.session, sent.epoch = unit.session, unit.epoch + 1
        for choice, stream in unit.streams.items():
            stream.attach(sent.all[choice])
            if unit.orphan is None:
                self._live.forget(stream.request_id)
        if unit.orphan is not None:
            self._orphans.found_a_place(unit.orphan)
        if not relay.settle(sent):
            self._orphans.take([sent], relay.broken)

    def _resume(self, unit: Unit) -> None:
        if unit.orphan is not None:  # it waits for the next destination
            unit.orphan.sent.epoch = unit.epoch
            return
        if unit.session is not None and self._sessions is not None:
            self._sessions.thaw(unit.session, unit.epoch if unit.epoch != unit.session.epoch else 0)
        for stream in unit.streams.values():
            self._live.resume(stream.request_id)

    def _lose(self, unit: Unit) -> None:
        if unit.orphan is not None:
            self._orphans.give_up(unit.orphan, unit.why)
            return
        if unit.session is not None and self._sessions is not None:
            self._sessions.lost(unit.session, unit.why)
        for stream in unit.streams.values():
            self._live.cancel(stream.request_id)

    def _broken(self, unit: Unit, relay: Relay, error: Broken) -> MigrationEvent:
        """One that answers too late is not offered anything more: each time something would stand still for it."""
        unit.why = str(error)
        relay.close(unit.why)
        return MigrationEvent.BROKEN
