"""The destination's end of a hand-off: the requests that one draining worker has moved here.

    offer, part … ──► check ──► the engine begins, in silence ──► ready
    go ──► this worker owns the request ──► running, `RelayedEvent` …   drop, cancel, or the pipe's end ──► it ends here

Tokens made before `go` wait in their stream. One thread receives from the pipe; one thread per stream sends its events.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runtime.engine.base import Engine
from runtime.errors import BadRequest, EngineBusy, EngineFailed, FunctionError, SnapshotRefused
from runtime.handoff.messages import (
    MAX_OFFER,
    AnyMessage,
    Cancel,
    Drop,
    Embed,
    Go,
    KeptRequest,
    MigrationOffer,
    OfferReady,
    OfferRefused,
    OfferRunning,
    Part,
    Probe,
    Probed,
    Vectors,
    relayed,
)
from runtime.handoff.pipe import Broken, Pipe
from runtime.resume import snapshot
from runtime.resume.answer import Answer
from runtime.resume.sessions import Sessions
from runtime.resume.snapshot import ReplicaIdentity, Snapshot

log = logging.getLogger("glowplug.handoff")

_LOOK = 5.0  # seconds of one wait for a message or a token; waits repeat
_ROOM = 64 << 20  # bytes of an offer besides the rows


class ReceivingModel(Protocol):
    """The part of a model that adopted requests need."""

    engine: Engine

    @property
    def sessions(self) -> Sessions | None: ...


class WorkCounter(Protocol):
    """The count of requests inside this worker, which may be ended while it is idle."""

    def enter(self) -> None:
        """Count one request more. Raises `EngineBusy`, `NotReady` where the worker takes no more."""
        ...

    def leave(self) -> None: ...


@dataclass
class _AdoptedRequest:
    """One adopted request: its parts until all have come, then its answers by choice."""

    offer: MigrationOffer
    data: bytearray = field(default_factory=bytearray)
    snapshots: list[Snapshot] = field(default_factory=list)
    answers: dict[int, Answer] = field(default_factory=dict)
    ready_at: float = -math.inf  # not yet
    running: int = 0

    @property
    def size(self) -> int:
        return sum(self.offer.sizes)

    def close(self) -> None:
        for answer in self.answers.values():
            answer.close()


class AdoptedRequests:
    """The adopted requests of one pipe. `run` is for a thread of its own."""

    def __init__(
        self,
        pipe: Pipe,
        model: ReceivingModel,
        identity: Callable[[], ReplicaIdentity],
        draining: Callable[[], bool],
        work: WorkCounter,
    ) -> None:
        """`draining` returns whether this worker drains too, and adopts no new requests."""
        self._pipe, self._model, self._identity, self._draining, self._work = pipe, model, identity, draining, work
        self._adopted: dict[int, _AdoptedRequest] = {}
        self._lock = threading.Lock()  # guards `_adopted` and how many streams of each request run

    def run(self) -> None:
        """Serve the pipe until the other side closes it or is gone."""
        try:
            with self._pipe:
                while True:
                    if (message := self._pipe.receive(_LOOK)) is not None:
                        self._handle(message)
        except Broken as error:
            log.info("a hand-off has ended: %s", error)
        finally:
            for number in list(self._adopted):
                self._forget(number)

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case Probe():
                self._pipe.send(Probed())
            case MigrationOffer():
                self._accept(message)
            case Part(number, data):
                self._part(number, data)
            case Go(number, epoch):
                if (adopted := self._adopted.get(number)) is not None:
                    self._start_relaying(adopted, epoch)
            case Drop(number):
                self._forget(number)
            case Cancel(number, choice):
                if (adopted := self._adopted.get(number)) is not None and choice in adopted.answers:
                    adopted.answers[choice].close()
            case Embed(number, prompts):
                threading.Thread(target=self._embed, args=(number, prompts), name="adopted", daemon=True).start()
            case _:
                raise Broken(f"{message.__struct_config__.tag} is not for a destination")

    # --- adopting ---------------------------------------------------------------------------------------------------

    def _accept(self, offer: MigrationOffer) -> None:
        why = self._no_room(offer)
        if why is None:
            try:
                self._work.enter()
            except FunctionError as error:
                why = error
        if why is not None:
            self._refuse(offer.number, why)
            return
        with self._lock:
            self._adopted[offer.number] = _AdoptedRequest(offer)

    def _forget(self, number: int) -> None:
        with self._lock:
            adopted = self._adopted.pop(number, None)
        if adopted is not None:
            adopted.close()
            self._work.leave()

    def _no_room(self, offer: MigrationOffer) -> FunctionError | None:
        """Return why an offer is refused before its bytes come; None when there is room."""
        stats = self._model.engine.stats()
        most = min(MAX_OFFER, _ROOM + 2 * stats.memory_limit) if stats.memory_limit else MAX_OFFER
        if sum(offer.sizes) > most:
            return SnapshotRefused(f"the request takes {sum(offer.sizes)} bytes; here is room for {most}")
        if self._draining() and not offer.now:
            return EngineBusy("this replica drains itself")
        if not offer.now and stats.running + stats.waiting >= stats.slots:
            return EngineBusy("all slots are taken")
        return None

    def _part(self, number: int, data: bytes) -> None:
        adopted = self._adopted.get(number)
        if adopted is None:  # refused, or dropped
            return
        adopted.data += data
        if len(adopted.data) < adopted.size:
            return
        if len(adopted.data) > adopted.size or adopted.snapshots:
            raise Broken("more came of a request than was announced")
        try:
            self._begin(adopted)
        except FunctionError as error:
            self._forget(number)
            self._refuse(number, error)
            return
        adopted.data = bytearray()
        adopted.ready_at = time.monotonic()
        self._pipe.send(OfferReady(number))
        if adopted.offer.now:
            self._relay(adopted)

    def _begin(self, adopted: _AdoptedRequest) -> None:
        """Decode the snapshots and begin their generations.

        Raises `SnapshotRefused`, `EngineBusy`, `EngineFailed`, `BadRequest`, `Moved`.
        """
        at = 0
        with memoryview(adopted.data) as view:
            for size in adopted.offer.sizes:
                adopted.snapshots.append(snapshot.decode(view[at : at + size]))
                at += size
        ended = set(adopted.offer.kept.ended if adopted.offer.kept else ())
        for choice, found in enumerate(adopted.snapshots):
            snapshot.check(found, self._identity())
            if choice not in ended:
                adopted.answers[choice] = Answer.begun(self._model.engine, found.state)

    def _refuse(self, number: int, error: FunctionError) -> None:
        self._pipe.send(OfferRefused(number, error.code, error.text[:4096], getattr(error, "retry_after", 0.0)))

    # --- running ----------------------------------------------------------------------------------------------------

    def _start_relaying(self, adopted: _AdoptedRequest, epoch: int) -> None:
        if adopted.offer.kept is not None:
            self._inherit(adopted, adopted.offer.kept, epoch)
        self._pipe.send(OfferRunning(adopted.offer.number))
        self._relay(adopted)

    def _inherit(self, adopted: _AdoptedRequest, kept: KeptRequest, epoch: int) -> None:
        """Record the answers in a session of this worker, which owns the request now."""
        sessions = self._model.sessions
        if sessions is None:
            raise Broken("the request is kept, and this worker keeps none")
        states = [found.state for found in adopted.snapshots]
        session = sessions.inherit(
            kept.context,
            [state.request for state in states],
            [state.generated for state in states],
            kept.ended,
            epoch,
            adopted.ready_at,
        )
        for choice, answer in adopted.answers.items():
            answer.keep(session, choice)

    def _relay(self, adopted: _AdoptedRequest) -> None:
        adopted.running = len(adopted.answers)
        for choice, answer in adopted.answers.items():
            arguments = adopted, choice, answer
            threading.Thread(target=self._send_on, args=arguments, name="adopted", daemon=True).start()

    def _send_on(self, adopted: _AdoptedRequest, choice: int, answer: Answer) -> None:
        number = adopted.offer.number
        try:
            while True:
                if (event := answer.next(_LOOK)) is not None:
                    self._pipe.send(relayed(number, choice, event))
        except StopIteration:
            with self._lock:
                adopted.running -= 1
                over = not adopted.running
            if over:
                self._forget(number)
        except Broken:
            answer.close()
        except Exception:
            log.exception("a stream that was moved here failed")
            self._pipe.close("the destination failed")

    def _embed(self, number: int, prompts: Sequence[Sequence[int]]) -> None:
        try:
            try:
                self._pipe.send(Vectors(number, self._model.engine.embed(prompts)))
            except (BadRequest, EngineBusy, EngineFailed) as error:
                self._refuse(number, error)
        except Broken:
            pass
