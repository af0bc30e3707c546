"""The migration of one request: freeze, offer, transfer, and continuation at the destination or here.

`migration_table` decides which action follows which event; this module carries the actions out, with the engine, the
store and the relay. The request runs here, or has lost its destination and runs nowhere (`orphans`).
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
from runtime.handoff.relay import ANSWER, Relay, SentRequest
from runtime.resume.answer import Answer
from runtime.resume.session import Session
from runtime.resume.sessions import Sessions
from runtime.resume.snapshot import ReplicaIdentity, Snapshot

log = logging.getLogger("glowplug.handoff")

_FREEZE = 10.0  # seconds that the store has for the exchange that is under way
_COMMIT = 5.0  # seconds that the store has to transfer a request
_SLOWEST = 4 << 20  # bytes per second of a state's transfer and decoding, at least
_LOOK = 0.1  # seconds between two attempts to transfer


@dataclass(slots=True)
class MigrationReport:
    """Outcome of one migration.

    `how` is "kv" (keys and values travelled), "recompute" (tokens only) or "relay" (nothing was generated yet);
    `outcome` is "moved", "back" or "lost"; `pause` is in seconds.
    """

    id: str
    to: str
    tokens: int
    pause: float
    how: str
    outcome: str
    reason: str = ""


@dataclass(slots=True)
class MigratingRequest:
    """The unit of migration: all choices of a kept request, or one generation."""

    streams: dict[int, Answer]  # by choice
    session: Session | None
    orphan: OrphanedRequest | None = None
    snapshots: list[Snapshot] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    sent: SentRequest | None = None
    how: str = "relay"
    frozen_at: float = 0.0
    running_at: float = 0.0
    epoch: int = 0
    why: str = ""

    @property
    def id(self) -> str:
        return self.session.key.id if self.session else next(iter(self.streams.values())).request_id


class Migration:
    """The migrations of one worker, carried out on the thread of its `Departure` alone."""

    def __init__(
        self,
        live: LiveEngine,
        sessions: Sessions | None,
        identity: Callable[[], ReplicaIdentity],
        orphans: Orphans,
        closing: threading.Event,
    ) -> None:
        self._live, self._sessions, self._identity = live, sessions, identity
        self._orphans, self._closing = orphans, closing

    def migrate(self, request: MigratingRequest, relay: Relay) -> MigrationReport | None:
        """Migrate a request and report the outcome; None where nothing was to be moved after all."""
        migration, event = MigrationState(), MigrationEvent.BEGIN
        try:
            while not migration.over:
                for action in migration.handle(event):
                    event = self._act(action, request, relay) or event
        except Exception:  # a defect must not leave the request frozen for ever
            self._resume(request) if migration.state in ("freezing", "offered") else self._lose(request)
            raise
        if not request.snapshots:
            return None
        tokens = sum(len(request.snapshots[choice].state.generated) for choice in request.streams)
        pause = (request.running_at or time.monotonic()) - request.frozen_at
        how = f"{request.how}: {request.why}" if request.why else request.how
        log.info("%s: %s, to %s, in %.0f ms (%s)", request.id, migration.state, relay.owner, pause * 1e3, how)
        return MigrationReport(request.id, relay.owner, tokens, pause, request.how, migration.state, request.why)

    # --- the table's actions ----------------------------------------------------------------------------------------

    def _act(self, action: MigrationAction, request: MigratingRequest, relay: Relay) -> MigrationEvent | None:
        match action:
            case MigrationAction.FREEZE:
                return self._freeze(request, relay)
            case MigrationAction.OFFER:
                return self._offer(request, relay)
            case MigrationAction.COMMIT:
                return self._commit(request, relay)
            case MigrationAction.GO:
                return self._go(request, relay)
            case MigrationAction.RECLAIM:
                return self._reclaim(request, relay)
            case MigrationAction.ATTACH:
                self._attach(request, relay)
            case MigrationAction.DROP:
                if request.sent is not None:
                    relay.drop(request.sent)
            case MigrationAction.RESUME:
                self._resume(request)
            case MigrationAction.LOSE:
                self._lose(request)
        return None

    def _freeze(self, request: MigratingRequest, relay: Relay) -> MigrationEvent:
        if request.orphan is not None:
            return self._freeze_orphan(request, request.orphan.sent)
        session = request.session
        if session is not None:
            assert self._sessions is not None, "the request has a session"
            if not self._sessions.freeze(session, time.monotonic() + _FREEZE):
                return MigrationEvent.UNFIT
            if set(request.streams) != set(range(len(session.requests))) - session.ended:
                return MigrationEvent.UNFIT  # a choice has just ended, and its last tokens are not recorded yet
            request.epoch, request.ended = session.epoch, sorted(session.ended)
        try:
            states = {choice: self._export(stream, request, relay) for choice, stream in request.streams.items()}
        except (KeyError, FunctionError) as error:  # the generation has just ended, or its step takes too long
            log.debug("%s is not moved now: %r", request.id, error)
            return MigrationEvent.UNFIT
        identity = self._identity()
        whole = list(states.values())
        if session is not None:
            choices = enumerate(zip(session.requests, session.tokens, strict=True))
            whole = [states.get(n) or identity.state(asked, tokens) for n, (asked, tokens) in choices]
        request.snapshots = [identity.snapshot(state, request.epoch) for state in whole]
        return MigrationEvent.FROZEN

    def _freeze_orphan(self, request: MigratingRequest, sent: SentRequest) -> MigrationEvent:
        """Take the state of an orphan, which runs nowhere, from its tokens."""
        running = set(sent.streams)
        request.ended = [n for n in range(len(sent.tokens)) if n not in running]
        request.snapshots = [
            replace(each, state=sent.state(n), epoch=request.epoch) for n, each in enumerate(sent.snapshots)
        ]
        request.how = "recompute" if any(sent.tokens) else "relay"
        return MigrationEvent.FROZEN

    def _export(self, stream: Answer, request: MigratingRequest, relay: Relay) -> GenerationState:
        size, again = self._live.recompute(stream.request_id)
        kv = travels(size, relay.speed, again, exact=stream.request.deterministic)
        state = self._live.export(stream.request_id, kv=kv)
        request.frozen_at = request.frozen_at or time.monotonic()
        if state.kv or (state.generated and request.how == "relay"):
            request.how = "kv" if state.kv else "recompute"
        return state

    def _offer(self, request: MigratingRequest, relay: Relay) -> MigrationEvent:
        kept = KeptRequest(request.session.context, request.ended) if request.session else None
        live = list(request.streams) if request.session else [0]
        size = sum(len(row.data) for each in request.snapshots for row in each.state.kv)
        try:
            request.sent = relay.offer(request.snapshots, live, kept)
            request.sent.rescues = request.orphan.sent.rescues + 1 if request.orphan else 0
            answer = relay.answer(request.sent, OfferReady, ANSWER + size / _SLOWEST)
        except Broken as error:
            return self._broken(request, relay, error)
        if isinstance(answer, OfferRefused):
            request.why = f"{answer.text} [{answer.code}]"
            return MigrationEvent.REFUSED
        return MigrationEvent.READY

    def _commit(self, request: MigratingRequest, relay: Relay) -> MigrationEvent:
        if request.session is None:
            return MigrationEvent.YES  # no other worker can claim it
        assert self._sessions is not None, "the request has a session"
        return self.transfer(request, self._sessions.owner, request.epoch, relay.owner)

    def _go(self, request: MigratingRequest, relay: Relay) -> MigrationEvent:
        assert request.sent is not None, "it was offered"
        try:
            relay.go(request.sent, request.epoch + 1 if request.session else 0)
            relay.answer(request.sent, OfferRunning, ANSWER)
        except Broken as error:
            return self._broken(request, relay, error)
        request.running_at = time.monotonic()
        return MigrationEvent.RUNNING

    def _reclaim(self, request: MigratingRequest, relay: Relay) -> MigrationEvent:
        if request.session is None:
            return MigrationEvent.YES
        assert self._sessions is not None, "the request has a session"
        request.epoch += 1
        event = self.transfer(request, relay.owner, request.epoch, self._sessions.owner)
        request.epoch += event is MigrationEvent.YES
        return event

    def transfer(self, request: MigratingRequest, owner: str, epoch: int, successor: str) -> MigrationEvent:
        """Transfer a kept request; ask again until the store answers, as the transfer is idempotent.

        Returns YES, NO or, after `_COMMIT` seconds without an answer, UNKNOWN.
        """
        assert request.session is not None, "only what is kept has an owner"
        assert self._sessions is not None, "the request has a session"
        deadline = time.monotonic() + _COMMIT
        while True:
            try:
                if self._sessions.transfer(request.session, owner, epoch, successor):
                    return MigrationEvent.YES
                request.why = "another replica took it over"
                return MigrationEvent.NO
            except AgentError as error:
                request.why = f"whose it is cannot be known now: {error.text} [{error.code}]"
            if time.monotonic() >= deadline:
                return MigrationEvent.UNKNOWN
            self._closing.wait(_LOOK)

    def _attach(self, request: MigratingRequest, relay: Relay) -> None:
        sent = request.sent
        assert sent is not None, "it was offered"
        if request.session is not None and self._sessions is not None:
            self._sessions.handed(request.session, relay.owner, request.epoch + 1)
            sent.session, sent.epoch = request.session, request.epoch + 1
        for choice, stream in request.streams.items():
            stream.attach(sent.all_streams[choice])
            if request.orphan is None:
                self._live.forget(stream.request_id)
        if request.orphan is not None:
            self._orphans.hand_over(request.orphan)
        if not relay.settle(sent):
            self._orphans.take([sent], relay.broken)

    def _resume(self, request: MigratingRequest) -> None:
        if request.orphan is not None:  # which waits for the next destination
            request.orphan.sent.epoch = request.epoch
            return
        if request.session is not None and self._sessions is not None:
            self._sessions.thaw(request.session, request.epoch if request.epoch != request.session.epoch else 0)
        for stream in request.streams.values():
            self._live.resume(stream.request_id)

    def _lose(self, request: MigratingRequest) -> None:
        if request.orphan is not None:
            self._orphans.give_up(request.orphan, request.why)
            return
        if request.session is not None and self._sessions is not None:
            self._sessions.lost(request.session, request.why)
        for stream in request.streams.values():
            self._live.cancel(stream.request_id)

    def _broken(self, request: MigratingRequest, relay: Relay, error: Broken) -> MigrationEvent:
        """Give a destination up that is gone or late: another offer would stand still for it, too."""
        request.why = str(error)
        relay.close(request.why)
        return MigrationEvent.BROKEN
