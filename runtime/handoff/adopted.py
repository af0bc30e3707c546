"""Owns the requests that one draining worker has moved here, for as long as it can hear of them.

    offer, part … ──► check ──► the engine begins, in silence ──► ready
    go ──► this worker owns it ──► running, told …            drop, cancel, or the end of the pipe ──► it ends here

What the engine makes before `go` waits in its stream. A thread per stream sends on what it says, as the threads of the
HTTP server do for clients; the thread of the pipe takes in what comes.
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
    told,
)
from runtime.handoff.pipe import Broken, Pipe
from runtime.resume import snapshot
from runtime.resume.answer import Answer
from runtime.resume.sessions import Sessions
from runtime.resume.snapshot import ReplicaIdentity, Snapshot

log = logging.getLogger("glowplug.handoff")

_LOOK = 5.0
_ROOM = 64 << 20  # bytes of an offer besides the rows


class Taking(Protocol):
    """What of a worker is needed to take requests in."""

    engine: Engine

    @property
    def sessions(self) -> Sessions | None: ...


class Work(Protocol):
    """Where it is counted that this worker has something to do: an idle one may be ended."""

    def enter(self) -> None:
        """Raises `EngineBusy`, `NotReady` where there is enough of it."""
        ...

    def leave(self) -> None: ...


@dataclass
class _Adopted:
    """One request; its parts until all of it is there, then its streams."""

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
    """Those of one pipe. `run` is for a thread of its own."""

    def __init__(
        self, pipe: Pipe, here: Taking, place: Callable[[], ReplicaIdentity], left: Callable[[], bool], work: Work
    ) -> None:
        """`left` says whether this worker drains itself, and takes nothing new any more."""
        self._pipe, self._here, self._place, self._left, self._work = pipe, here, place, left, work
        self._guests: dict[int, _Adopted] = {}
        self._lock = threading.Lock()  # guards who is there, and how many streams of each still run

    def run(self) -> None:
        """Until the other side ends it, or is gone."""
        try:
            with self._pipe:
                while True:
                    if (message := self._pipe.receive(_LOOK)) is not None:
                        self._take(message)
        except Broken as error:
            log.info("a hand-off has ended: %s", error)
        finally:
            for number in list(self._guests):
                self._forget(number)

    def _take(self, message: AnyMessage) -> None:
        match message:
            case Probe():
                self._pipe.send(Probed())
            case MigrationOffer():
                self._offered(message)
            case Part(number, data):
                self._part(number, data)
            case Go(number, epoch):
                if (guest := self._guests.get(number)) is not None:
                    self._go(guest, epoch)
            case Drop(number):
                self._forget(number)
            case Cancel(number, choice):
                if (guest := self._guests.get(number)) is not None and choice in guest.answers:
                    guest.answers[choice].close()
            case Embed(number, prompts):
                threading.Thread(target=self._embed, args=(number, prompts), name="guest", daemon=True).start()
            case _:
                raise Broken(f"{type(message).__name__} is not for a destination")

    # --- taking in --------------------------------------------------------------------------------------------------

    def _offered(self, offer: MigrationOffer) -> None:
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
            self._guests[offer.number] = _Adopted(offer)

    def _forget(self, number: int) -> None:
        with self._lock:
            guest = self._guests.pop(number, None)
        if guest is not None:
            guest.close()
            self._work.leave()

    def _no_room(self, offer: MigrationOffer) -> FunctionError | None:
        """Before its bytes come."""
        stats = self._here.engine.stats()
        most = min(MAX_OFFER, _ROOM + 2 * stats.memory_limit) if stats.memory_limit else MAX_OFFER
        if sum(offer.sizes) > most:
            return SnapshotRefused(f"the request takes {sum(offer.sizes)} bytes; here is room for {most}")
        if self._left() and not offer.now:
            return EngineBusy("this replica drains itself")
        if not offer.now and stats.running + stats.waiting >= stats.slots:
            return EngineBusy("all slots are taken")
        return None

    def _part(self, number: int, data: bytes) -> None:
        guest = self._guests.get(number)
        if guest is None:  # it was refused, or dropped
            return
        guest.data += data
        if len(guest.data) < guest.size:
            return
        if len(guest.data) > guest.size or guest.snapshots:
            raise Broken("more came of a request than was announced")
        try:
            self._begin(guest)
        except FunctionError as error:
            self._forget(number)
            self._refuse(number, error)
            return
        guest.data = bytearray()
        guest.ready_at = time.monotonic()
        self._pipe.send(OfferReady(number))
        if guest.offer.now:
            self._tell(guest)

    def _begin(self, guest: _Adopted) -> None:
        """Raises `SnapshotRefused`, `EngineBusy`, `EngineFailed`, `BadRequest`, `Moved`."""
        at = 0
        with memoryview(guest.data) as view:
            for size in guest.offer.sizes:
                guest.snapshots.append(snapshot.decode(view[at : at + size]))
                at += size
        ended = set(guest.offer.kept.ended if guest.offer.kept else ())
        for choice, found in enumerate(guest.snapshots):
            snapshot.check(found, self._place())
            if choice not in ended:
                guest.answers[choice] = Answer.begun(self._here.engine, found.state)

    def _refuse(self, number: int, error: FunctionError) -> None:
        self._pipe.send(OfferRefused(number, error.code, error.text[:4096], getattr(error, "retry_after", 0.0)))

    # --- running ----------------------------------------------------------------------------------------------------

    def _go(self, guest: _Adopted, epoch: int) -> None:
        if guest.offer.kept is not None:
            self._inherit(guest, guest.offer.kept, epoch)
        self._pipe.send(OfferRunning(guest.offer.number))
        self._tell(guest)

    def _inherit(self, guest: _Adopted, kept: KeptRequest, epoch: int) -> None:
        """Puts the answers under this worker's own right to tell them."""
        sessions = self._here.sessions
        if sessions is None:
            raise Broken("the request is kept, and this worker keeps none")
        states = [found.state for found in guest.snapshots]
        session = sessions.inherit(
            kept.context,
            [state.request for state in states],
            [state.generated for state in states],
            kept.ended,
            epoch,
            guest.ready_at,
        )
        for choice, answer in guest.answers.items():
            answer.keep(session, choice)

    def _tell(self, guest: _Adopted) -> None:
        guest.running = len(guest.answers)
        for choice, answer in guest.answers.items():
            arguments = guest, choice, answer
            threading.Thread(target=self._send_on, args=arguments, name="guest", daemon=True).start()

    def _send_on(self, guest: _Adopted, choice: int, answer: Answer) -> None:
        number = guest.offer.number
        try:
            while True:
                if (event := answer.next(_LOOK)) is not None:
                    self._pipe.send(told(number, choice, event))
        except StopIteration:
            with self._lock:
                guest.running -= 1
                over = not guest.running
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
                self._pipe.send(Vectors(number, self._here.engine.embed(prompts)))
            except (BadRequest, EngineBusy, EngineFailed) as error:
                self._refuse(number, error)
        except Broken:
            pass
