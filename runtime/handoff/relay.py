"""Owns a draining worker's end of a pipe: what was moved or sent on, and the tokens that come back for it.

Every event has its index, and only the one that follows is taken: a token that came twice, or one that is missing, is
noticed here and never told. What came is remembered with its request: when the pipe ends, or the other side gives a
request up, all that is needed to go on with it elsewhere is here, and is made over to whoever finds it another place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import TypeVar

from runtime.engine.base import (
    EngineStats,
    GenerationRequest,
    GenerationState,
    TokenEvent,
    TokenStream,
)
from runtime.engine.stream import Stream
from runtime.errors import BadRequest, EngineBusy, EngineFailed, FunctionError, Moved, SnapshotRefused
from runtime.handoff.messages import (
    MAX_PART,
    AnyMessage,
    Cancel,
    Drop,
    Embed,
    Go,
    Greeting,
    KeptRequest,
    MigrationOffer,
    OfferReady,
    OfferRefused,
    OfferRunning,
    Part,
    PipeMessage,
    Probe,
    Probed,
    RelayedEvent,
    Vectors,
    event_of,
)
from runtime.handoff.pipe import Broken, Pipe
from runtime.resume import snapshot
from runtime.resume.session import Session
from runtime.resume.snapshot import ReplicaIdentity, Snapshot

log = logging.getLogger("glowplug.handoff")

M = TypeVar("M", bound=PipeMessage)

ANSWER = 5.0  # seconds for an answer, besides those that the bytes may take
_EMBED = 300.0
_LOOK = 5.0
_PROBE = 256 << 10
_ERRORS: dict[str, type[FunctionError]] = {
    kind.code: kind for kind in (BadRequest, EngineBusy, EngineFailed, Moved, SnapshotRefused)
}


class Sent:
    """A request on the other side: the last answer about it, what came for it, and the streams that still run."""

    def __init__(self, relay: Relay, number: int, snapshots: Sequence[Snapshot] = (), live: Sequence[int] = ()) -> None:
        """`snapshots` of all its choices, of which those in `live` run."""
        self.number = number
        self.answer: AnyMessage | None = None
        self.snapshots = [replace(each, state=replace(each.state, kv=())) for each in snapshots]
        self.tokens = [list(each.state.generated) for each in snapshots]
        self.emitted = [each.state.emitted for each in snapshots]
        self.streams = {
            choice: Stream(snapshots[choice].state.request.id, lambda choice=choice: relay.leave(number, choice))  # type: ignore[misc]
            for choice in live
        }
        self.all = dict(self.streams)  # those that have ended, too
        self.settled = False  # its client reads what comes here
        self.owner = relay.owner  # who has it,
        self.session: Session | None = None  # and where it is kept, the hold of this worker that it was made over from,
        self.epoch = 0  # to be that one's under this epoch
        self.rescues = 0  # destinations that it has outlived

    def came(self, choice: int, event: TokenEvent) -> None:
        if event.token is not None:
            self.tokens[choice].append(event.token)
        self.emitted[choice] += len(event.text)

    def state(self, choice: int) -> GenerationState:
        """After all that came."""
        state = self.snapshots[choice].state
        return replace(state, generated=tuple(self.tokens[choice]), emitted=self.emitted[choice])


class Relay:
    """See `runtime.handoff.live.Elsewhere`. Any thread; `run` is for one of its own."""

    def __init__(self, pipe: Pipe, greeting: Greeting, place: ReplicaIdentity) -> None:
        self.owner = greeting.owner
        self.speed = 0.0  # bytes per second, as last measured
        self.broken = ""
        self._pipe, self._greeting, self._place = pipe, greeting, place
        self._numbers = count(1)
        self._changed = threading.Condition()
        self._sent: dict[int, Sent] = {}
        self._probed = False

    def run(self, orphaned: Callable[[Sequence[Sent], str], None]) -> None:
        """Until the pipe ends. `orphaned` takes over requests that nobody goes on with any more, and hears why."""
        why = ""
        self._orphaned = orphaned
        try:
            with self._pipe:
                while True:
                    if (message := self._pipe.receive(_LOOK)) is not None:
                        self._heard(message)
        except Broken as error:
            why = str(error)
        except Exception:
            log.exception("a relay failed")
            why = "the relay failed; see the log"
        with self._changed:
            self.broken = why or "the other side is gone"
            left, self._sent = [sent for sent in self._sent.values() if sent.settled], {}
            self._changed.notify_all()
        orphaned(left, self.broken)

    def close(self, why: str) -> None:
        self._pipe.close(why)

    def _heard(self, message: AnyMessage) -> None:
        match message:
            case RelayedEvent(number, choice):
                self._told(number, choice, event_of(message))
            case OfferReady(number) | OfferRunning(number) | OfferRefused(number) | Vectors(number):
                with self._changed:
                    if (sent := self._sent.get(number)) is not None:
                        sent.answer = message
                        self._changed.notify_all()
            case Probed():
                with self._changed:
                    self._probed = True
                    self._changed.notify_all()
            case _:
                raise Broken(f"{type(message).__name__} is not for the worker that drains")

    def _told(self, number: int, choice: int, event: TokenEvent) -> None:
        with self._changed:
            sent = self._sent.get(number)
            if sent is None or choice not in sent.streams:  # dropped, or left by its client
                return
            if event.index != len(sent.tokens[choice]):
                raise Broken(f"token {event.index} came where token {len(sent.tokens[choice])} follows")
            given_up = event.finish == "moved" and sent.settled
            if not given_up:
                sent.came(choice, event)
                stream = sent.streams[choice]
                if event.finish is not None:
                    self._ended(number, choice)
        if given_up:
            self.drop(sent)
            self._orphaned([sent], event.error or "the other side gave it up")
        else:
            stream.put(event)

    def _ended(self, number: int, choice: int) -> None:
        """With the lock held."""
        sent = self._sent[number]
        del sent.streams[choice]
        if not sent.streams:
            del self._sent[number]

    # --- what the mover uses ----------------------------------------------------------------------------------------

    def measure(self) -> None:
        """How fast this pipe is. Raises `Broken`."""
        begun = time.monotonic()
        self._pipe.send(Probe(bytes(_PROBE)))
        with self._changed:
            self._changed.wait_for(lambda: self._probed or self.broken, ANSWER)
            if not self._probed:
                raise Broken(self.broken or "the other side does not answer")
        self.speed = _PROBE / max(time.monotonic() - begun, 1e-6)

    def offer(
        self, snapshots: Sequence[Snapshot], live: Sequence[int], kept: KeptRequest | None, *, now: bool = False
    ) -> Sent:
        """Sends a request, of whose choices these are `live`. Raises `Broken`."""
        number = next(self._numbers)
        sent = Sent(self, number, snapshots, live)
        with self._changed:
            if self.broken:
                raise Broken(self.broken)
            self._sent[number] = sent
        begun, size = time.monotonic(), 0
        encoded = [snapshot.encode(each) for each in snapshots]
        self._pipe.send(MigrationOffer(number, list(map(len, encoded)), kept, now))
        for data in encoded:
            view = memoryview(data)
            size += len(view)
            for at in range(0, len(view), MAX_PART):
                self._pipe.send(Part(number, bytes(view[at : at + MAX_PART])))
        if size > MAX_PART:
            self.speed = size / max(time.monotonic() - begun, 1e-6)
        return sent

    def answer(self, sent: Sent, kind: type[M], seconds: float) -> M | OfferRefused:
        """Raises `Broken` when neither comes."""

        def there() -> bool:
            return bool(self.broken) or isinstance(sent.answer, (kind, OfferRefused))

        with self._changed:
            self._changed.wait_for(there, seconds)
            if not isinstance(sent.answer, (kind, OfferRefused)):
                raise Broken(self.broken or f"no answer came within {seconds:.0f} s")
            return sent.answer

    def go(self, sent: Sent, epoch: int) -> None:
        """Raises `Broken`."""
        self._pipe.send(Go(sent.number, epoch))

    def settle(self, sent: Sent) -> bool:
        """From here on its client reads what comes for it, and it is an orphan when nothing more does; False: now."""
        with self._changed:
            sent.settled = True
            return not self.broken

    def drop(self, sent: Sent) -> None:
        """Nothing of it is heard any more. Raises nothing: a pipe that is broken has dropped it."""
        with self._changed:
            self._sent.pop(sent.number, None)
        try:
            self._pipe.send(Drop(sent.number))
        except Broken as error:
            log.debug("nothing to drop: %s", error)

    # --- what answers use: `Elsewhere` ------------------------------------------------------------------------------

    def begin(self, request: GenerationRequest) -> TokenStream:
        return self.admit(self._place.state(request))

    def admit(self, state: GenerationState) -> TokenStream:
        try:
            sent = self.offer([self._place.snapshot(state)], (0,), None, now=True)
            stream = sent.all[0]
            reply = self.answer(sent, OfferReady, ANSWER)
        except Broken as error:
            raise Moved(f"this replica is ending, and the one that takes its work is gone: {error}") from error
        if isinstance(reply, OfferRefused):
            self.drop(sent)
            raise _error(reply)
        if not self.settle(sent):
            raise Moved(f"this replica is ending, and the one that takes its work is gone: {self.broken}")
        return stream

    def cancel(self, request_id: str) -> None:
        with self._changed:
            found = [
                (number, choice, stream)
                for number, sent in self._sent.items()
                for choice, stream in sent.streams.items()
                if stream.request_id == request_id
            ]
        for number, choice, stream in found:
            self.leave(number, choice)
            stream.put(TokenEvent(0, None, "", "cancelled"))

    def leave(self, number: int, choice: int) -> None:
        """Nobody reads this stream any more."""
        with self._changed:
            sent = self._sent.get(number)
            if sent is None or choice not in sent.streams:
                return
            self._ended(number, choice)
        try:
            self._pipe.send(Cancel(number, choice))
        except Broken as error:
            log.debug("nothing to cancel: %s", error)

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        number = next(self._numbers)
        sent = Sent(self, number)
        with self._changed:
            self._sent[number] = sent
        try:
            self._pipe.send(Embed(number, [list(prompt) for prompt in prompts]))
            reply = self.answer(sent, Vectors, _EMBED)
        except Broken as error:
            raise Moved(f"this replica is ending, and the one that takes its work is gone: {error}") from error
        finally:
            with self._changed:
                self._sent.pop(number, None)
        if isinstance(reply, OfferRefused):
            raise _error(reply)
        return reply.vectors

    def stats(self) -> EngineStats:
        with self._changed:
            running = sum(len(sent.streams) for sent in self._sent.values())
        return EngineStats(running, 0, self._greeting.slots, self._greeting.queue)


def _error(refused: OfferRefused) -> FunctionError:
    kind = _ERRORS.get(refused.code, EngineFailed)
    if kind in (EngineBusy, Moved):
        return kind(refused.text, refused.retry_after or 1.0)
    return kind(refused.text)
