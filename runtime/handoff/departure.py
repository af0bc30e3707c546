"""Owns a worker's leaving: finds who goes on, moves what runs to it, and lets go of the model.

    seek ──► relay ──► each request: `move` decides, this carries it out ──► release ──► relaying until the process ends
     ▲         │
     └─────────┴── the destination is gone: what was not moved runs on here, another one is looked for, and what was
                   moved goes on there, or here while the model is here (`orphans`)

One request after the other: each stands still only for as long as its own state travels, the others run on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from cache_agent.errors import AgentError
from runtime.engine.base import STATE_VERSION, GenerationRequest, GenerationState, TokenStream
from runtime.errors import FunctionError
from runtime.handoff.checkpoint import Checkpoints
from runtime.handoff.hold import Hold
from runtime.handoff.live import LiveEngine, LiveStream
from runtime.handoff.move import Action, Event, Move, travels
from runtime.handoff.orphans import Orphan, Orphans
from runtime.handoff.pipe import Broken
from runtime.handoff.relay import ANSWER, Relay, Sent
from runtime.handoff.snapshot import Place, Snapshot
from runtime.handoff.talk import Kept, Ready, Refused, Running

log = logging.getLogger("glowplug.handoff")

_AGAIN = 0.5  # seconds between two attempts to find a destination
_SOON = 0.05  # … to move what was just ending
_NO_ROOM = 2.0  # … to move what the destination had no room for
_FREEZE = 10.0  # seconds in which the store must have answered what it is being told
_COMMIT = 5.0  # seconds in which the store must say whose a request is
_SLOWEST = 4 << 20  # bytes per second that a state may take to be ready
_LOOK = 0.1


@dataclass(slots=True)
class Told:
    """How one request fared. `how` is "kv", "recompute" or "relay"; `outcome` "moved", "back" or "lost"."""

    id: str
    to: str
    tokens: int
    pause: float
    how: str
    outcome: str
    reason: str = ""


@dataclass(slots=True)
class _Unit:
    """What moves together: the choices of a kept request, or one generation."""

    streams: dict[int, LiveStream]  # by choice
    hold: Hold | None
    orphan: Orphan | None = None
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
        return self.hold.key.id if self.hold else next(iter(self.streams.values())).request_id


class Seek(Protocol):
    """Finds a destination and greets it; None where there is none now. Raises `Broken`, `AgentError`."""

    def __call__(self) -> Relay | None: ...


class Departure:
    """One worker's. `begin` starts its thread; `close` ends it, and all that is relayed."""

    def __init__(
        self,
        live: LiveEngine,
        book: Checkpoints | None,
        place: Callable[[], Place],
        seek: Seek,
        releasable: Callable[[], bool],
        released: Callable[[], None],
        report: Callable[[Sequence[Told]], None],
    ) -> None:
        """`releasable` says whether the own engine may go once it runs nothing; then `released` is called.

        `report` hears what became of requests.
        """
        self._live, self._book, self._place = live, book, place
        self._seek, self._report = seek, report
        self._releasable, self._released = releasable, released
        self._beginning = threading.Lock()
        self._begun = False
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._orphans = Orphans(live, self._wake.set)
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
        told: list[Told] = []
        for unit in self._units():
            if relay.broken or self._closing.is_set() or (told and told[-1].outcome == "back"):
                break
            if (outcome := self._move(unit, relay)) is not None:
                told.append(outcome)
        if told:
            self._report(told)
        return not told or told[-1].outcome != "back"

    # --- what lost its destination ----------------------------------------------------------------------------------

    def _adopted(self) -> list[_Unit]:
        """Orphans that are this worker's again, as the store has it, and whose clients wait."""
        units = []
        for orphan in self._orphans.waiting():
            if (streams := self._orphans.streams(orphan)) is not None:
                sent = orphan.sent
                unit = _Unit(streams, sent.hold, orphan, frozen_at=orphan.since, epoch=sent.epoch, why=orphan.why)
                match self._recover(unit, sent):
                    case Event.YES:
                        units.append(unit)
                    case Event.NO:
                        self._orphans.give_up(orphan, unit.why)
        return units

    def _recover(self, unit: _Unit, sent: Sent) -> Event:
        if unit.hold is None or self._book is None or sent.owner == self._book.owner:
            return Event.YES
        event = self._transfer(unit, sent.owner, sent.epoch, self._book.owner)
        if event is Event.YES:
            sent.owner, sent.epoch = self._book.owner, sent.epoch + 1
            unit.epoch = sent.epoch
        return event

    def _rescue(self, relay: Relay) -> None:
        told: list[Told] = []
        for unit in self._adopted():
            if relay.broken or self._closing.is_set():
                break
            if (outcome := self._move(unit, relay)) is not None:
                told.append(outcome)
        if told:
            self._report(told)

    def _take_back(self) -> None:
        """Into the own engine, while there is one: what goes on here can be moved again, as all the others."""
        for unit in [] if self._live.released else self._adopted():
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
            if unit.hold is not None and self._book is not None:
                running = set(sent.streams)
                ended = [n for n in range(len(sent.tokens)) if n not in running]
                self._book.retake(unit.hold, unit.epoch, sent.tokens, ended)
            for choice, stream in unit.streams.items():
                stream.attach(begun[choice], here=True)
            self._orphans.found_a_place(unit.orphan)
            log.info("%s goes on here again: %s", unit.id, unit.why)

    # --- what is here -----------------------------------------------------------------------------------------------

    def _units(self) -> list[_Unit]:
        units: dict[str, _Unit] = {}
        for stream in self._live.here():
            hold = self._book.find(stream.request_id) if self._book is not None else None
            if hold is None:
                units[stream.request_id] = _Unit({0: stream}, None)
                continue
            choice = next(n for n, request in enumerate(hold.requests) if request.id == stream.request_id)
            units.setdefault(hold.key.id, _Unit({}, hold)).streams[choice] = stream
        return list(units.values())

    def _move(self, unit: _Unit, relay: Relay) -> Told | None:
        """None where nothing was to be moved after all."""
        move, event = Move(), Event.BEGIN
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
        return Told(unit.id, relay.owner, tokens, pause, unit.how, move.state, unit.why)

    # --- what `move` decided ----------------------------------------------------------------------------------------

    def _act(self, action: Action, unit: _Unit, relay: Relay) -> Event | None:
        match action:
            case Action.FREEZE:
                return self._freeze(unit, relay)
            case Action.OFFER:
                return self._offer(unit, relay)
            case Action.COMMIT:
                return self._commit(unit, relay)
            case Action.GO:
                return self._go(unit, relay)
            case Action.RECLAIM:
                return self._reclaim(unit, relay)
            case Action.ATTACH:
                self._attach(unit, relay)
            case Action.DROP:
                if unit.sent is not None:
                    relay.drop(unit.sent)
            case Action.RESUME:
                self._resume(unit)
            case Action.LOSE:
                self._lose(unit)
        return None

    def _freeze(self, unit: _Unit, relay: Relay) -> Event:
        if unit.orphan is not None:
            return self._still(unit, unit.orphan.sent)
        hold = unit.hold
        if hold is not None:
            assert self._book is not None, "it holds it"
            if not self._book.freeze(hold, time.monotonic() + _FREEZE):
                return Event.UNFIT
            if set(unit.streams) != set(range(len(hold.requests))) - hold.ended:
                return Event.UNFIT  # one of its choices has just ended, and its last tokens are not told yet
            unit.epoch, unit.ended = hold.epoch, sorted(hold.ended)
        try:
            states = {choice: self._export(stream, unit, relay) for choice, stream in unit.streams.items()}
        except (KeyError, FunctionError) as error:  # it ended in this moment, or its step takes for ever
            log.debug("%s is not moved now: %r", unit.id, error)
            return Event.UNFIT
        place = self._place()
        whole = list(states.values())
        if hold is not None:
            told = zip(hold.requests, hold.tokens, strict=True)
            whole = [states.get(n) or _complete(request, ids, place) for n, (request, ids) in enumerate(told)]
        unit.snapshots = [Snapshot(state, place.tokenizer, place.adapter, unit.epoch) for state in whole]
        return Event.FROZEN

    def _still(self, unit: _Unit, sent: Sent) -> Event:
        """It runs nowhere: its state is what came of it."""
        running = set(sent.streams)
        unit.ended = [n for n in range(len(sent.tokens)) if n not in running]
        unit.snapshots = [replace(each, state=sent.state(n), epoch=unit.epoch) for n, each in enumerate(sent.snapshots)]
        unit.how = "recompute" if any(sent.tokens) else "relay"
        return Event.FROZEN

    def _export(self, stream: LiveStream, unit: _Unit, relay: Relay) -> GenerationState:
        size, again = self._live.recompute(stream.request_id)
        kv = travels(size, relay.speed, again, exact=stream.request.deterministic)
        state = self._live.export(stream.request_id, kv=kv)
        unit.frozen_at = unit.frozen_at or time.monotonic()
        if state.kv or (state.generated and unit.how == "relay"):
            unit.how = "kv" if state.kv else "recompute"
        return state

    def _offer(self, unit: _Unit, relay: Relay) -> Event:
        kept = Kept(unit.hold.context, unit.ended) if unit.hold else None
        live = list(unit.streams) if unit.hold else [0]
        size = sum(len(row.data) for each in unit.snapshots for row in each.state.kv)
        try:
            unit.sent = relay.offer(unit.snapshots, live, kept)
            unit.sent.rescues = unit.orphan.sent.rescues + 1 if unit.orphan else 0
            answer = relay.answer(unit.sent, Ready, ANSWER + size / _SLOWEST)
        except Broken as error:
            return self._broken(unit, relay, error)
        if isinstance(answer, Refused):
            unit.why = f"{answer.text} [{answer.code}]"
            return Event.REFUSED
        return Event.READY

    def _commit(self, unit: _Unit, relay: Relay) -> Event:
        if unit.hold is None:
            return Event.YES  # nobody else can claim it
        assert self._book is not None, "it holds it"
        return self._transfer(unit, self._book.owner, unit.epoch, relay.owner)

    def _go(self, unit: _Unit, relay: Relay) -> Event:
        assert unit.sent is not None, "it was offered"
        try:
            relay.go(unit.sent, unit.epoch + 1 if unit.hold else 0)
            relay.answer(unit.sent, Running, ANSWER)
        except Broken as error:
            return self._broken(unit, relay, error)
        unit.running_at = time.monotonic()
        return Event.RUNNING

    def _reclaim(self, unit: _Unit, relay: Relay) -> Event:
        if unit.hold is None:
            return Event.YES
        assert self._book is not None, "it holds it"
        unit.epoch += 1
        event = self._transfer(unit, relay.owner, unit.epoch, self._book.owner)
        unit.epoch += event is Event.YES
        return event

    def _transfer(self, unit: _Unit, owner: str, epoch: int, heir: str) -> Event:
        """Asked again until the store has said something: saying it twice is saying it once."""
        assert unit.hold is not None, "only what is kept has an owner"
        assert self._book is not None, "it holds it"
        deadline = time.monotonic() + _COMMIT
        while True:
            try:
                if self._book.transfer(unit.hold, owner, epoch, heir):
                    return Event.YES
                unit.why = "another replica took it over"
                return Event.NO
            except AgentError as error:
                unit.why = f"whose it is cannot be known now: {error.text} [{error.code}]"
            if time.monotonic() >= deadline:
                return Event.UNKNOWN
            self._closing.wait(_LOOK)

    def _attach(self, unit: _Unit, relay: Relay) -> None:
        sent = unit.sent
        assert sent is not None, "it was offered"
        if unit.hold is not None and self._book is not None:
            self._book.handed(unit.hold, relay.owner, unit.epoch + 1)
            sent.hold, sent.epoch = unit.hold, unit.epoch + 1
        for choice, stream in unit.streams.items():
            stream.attach(sent.all[choice])
            if unit.orphan is None:
                self._live.forget(stream.request_id)
        if unit.orphan is not None:
            self._orphans.found_a_place(unit.orphan)
        if not relay.settle(sent):
            self._orphans.take([sent], relay.broken)

    def _resume(self, unit: _Unit) -> None:
        if unit.orphan is not None:  # it waits for the next destination
            unit.orphan.sent.epoch = unit.epoch
            return
        if unit.hold is not None and self._book is not None:
            self._book.thaw(unit.hold, unit.epoch if unit.epoch != unit.hold.epoch else 0)
        for stream in unit.streams.values():
            self._live.resume(stream.request_id)

    def _lose(self, unit: _Unit) -> None:
        if unit.orphan is not None:
            self._orphans.give_up(unit.orphan, unit.why)
            return
        if unit.hold is not None and self._book is not None:
            self._book.lost(unit.hold, unit.why)
        for stream in unit.streams.values():
            self._live.cancel(stream.request_id)

    def _broken(self, unit: _Unit, relay: Relay, error: Broken) -> Event:
        """One that answers too late is not offered anything more: each time something would stand still for it."""
        unit.why = str(error)
        relay.close(unit.why)
        return Event.BROKEN


def _complete(request: GenerationRequest, tokens: Sequence[int], place: Place) -> GenerationState:
    """Of a choice that has ended."""
    arithmetic = place.arithmetic if request.deterministic else ""
    return GenerationState(STATE_VERSION, place.engine, place.revision, request, tuple(tokens), 0, (), arithmetic)
