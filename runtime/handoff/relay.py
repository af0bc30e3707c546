"""The draining worker's end of a hand-off: requests that were sent to the destination, and their tokens coming back.

Every event has its index, and only the next one is accepted: a repeated or missing token never reaches a client. The
tokens are remembered with their request. So when the pipe ends, or the destination gives a request up, this end has
all that the request needs to continue elsewhere, and passes it to `Orphans`.
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
_EMBED = 300.0  # seconds for vectors
_LOOK = 5.0  # seconds of one wait for a message; waits repeat
_PROBE = 256 << 10  # bytes
_ERRORS: dict[str, type[FunctionError]] = {
    kind.code: kind for kind in (BadRequest, EngineBusy, EngineFailed, Moved, SnapshotRefused)
}


class SentRequest:
    """A request at the destination: the last answer about it, its tokens so far, and the streams that still run."""

    def __init__(self, relay: Relay, number: int, snapshots: Sequence[Snapshot] = (), live: Sequence[int] = ()) -> None:
        """`snapshots` are those of all its choices, of which those in `live` run."""
        self.number = number
        self.answer: AnyMessage | None = None
        self.snapshots = [replace(each, state=replace(each.state, kv=())) for each in snapshots]
        self.tokens = [list(each.state.generated) for each in snapshots]
        self.emitted = [each.state.emitted for each in snapshots]
        self.streams = {
            choice: Stream(snapshots[choice].state.request.id, lambda choice=choice: relay.leave(number, choice))  # type: ignore[misc]
            for choice in live
        }
        self.all_streams = dict(self.streams)  # ended ones included
        self.settled = False  # its client reads these streams
        self.owner = relay.owner
        self.session: Session | None = None  # the session of this worker that was handed over, of a kept request
        self.epoch = 0  # under which `owner` owns a kept request
        self.rescues = 0  # destinations that the request has outlived

    def add(self, choice: int, event: TokenEvent) -> None:
        """Remember an event of a choice."""
        if event.token is not None:
            self.tokens[choice].append(event.token)
        self.emitted[choice] += len(event.text)

    def state(self, choice: int) -> GenerationState:
        """Return the state of a choice after the last event."""
        state = self.snapshots[choice].state
        return replace(state, generated=tuple(self.tokens[choice]), emitted=self.emitted[choice])


class Relay:
    """A destination, as a `runtime.handoff.live.RemoteEngine`. Any thread; `run` is for a thread of its own."""

    def __init__(self, pipe: Pipe, greeting: Greeting, identity: ReplicaIdentity) -> None:
        self.owner = greeting.owner
        self.speed = 0.0  # bytes per second, as measured last
        self.broken = ""
        self._pipe, self._greeting, self._identity = pipe, greeting, identity
        self._numbers = count(1)
        self._changed = threading.Condition()
        self._sent: dict[int, SentRequest] = {}
        self._probed = False

    def run(self, orphaned: Callable[[Sequence[SentRequest], str], None]) -> None:
        """Receive until the pipe ends. `orphaned` takes the requests that run nowhere any more, and the reason."""
        why = ""
        self._orphaned = orphaned
        try:
            with self._pipe:
                while True:
                    if (message := self._pipe.receive(_LOOK)) is not None:
                        self._handle(message)
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

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case RelayedEvent(number, choice):
                self._receive_event(number, choice, event_of(message))
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
                raise Broken(f"{message.__struct_config__.tag} is not for the worker that drains")

    def _receive_event(self, number: int, choice: int, event: TokenEvent) -> None:
        with self._changed:
            sent = self._sent.get(number)
            if sent is None or choice not in sent.streams:  # dropped, or its client has left
                return
            if event.index != len(sent.tokens[choice]):
                raise Broken(f"token {event.index} came where token {len(sent.tokens[choice])} follows")
            given_up = event.finish == "moved" and sent.settled
            if not given_up:
                sent.add(choice, event)
                stream = sent.streams[choice]
                if event.finish is not None:
                    self._ended(number, choice)
        if given_up:
            self.drop(sent)
            self._orphaned([sent], event.error or "the other side gave it up")
        else:
            stream.put(event)

    def _ended(self, number: int, choice: int) -> None:
        """Forget a stream. The lock is held."""
        sent = self._sent[number]
        del sent.streams[choice]
        if not sent.streams:
            del self._sent[number]

    # --- for `Migration` --------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Measure the pipe's speed. Raises `Broken`."""
        begun = time.monotonic()
        self._pipe.send(Probe(bytes(_PROBE)))
        with self._changed:
            self._changed.wait_for(lambda: self._probed or self.broken, ANSWER)
            if not self._probed:
                raise Broken(self.broken or "the other side does not answer")
        self.speed = _PROBE / max(time.monotonic() - begun, 1e-6)

    def offer(
        self, snapshots: Sequence[Snapshot], live: Sequence[int], kept: KeptRequest | None, *, now: bool = False
    ) -> SentRequest:
        """Send a request, of whose choices those in `live` run. Raises `Broken`."""
        number = next(self._numbers)
        sent = SentRequest(self, number, snapshots, live)
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

    def answer(self, sent: SentRequest, kind: type[M], seconds: float) -> M | OfferRefused:
        """Wait for an answer of this kind, or a refusal. Raises `Broken` when neither comes within `seconds`."""

        def there() -> bool:
            return bool(self.broken) or isinstance(sent.answer, (kind, OfferRefused))

        with self._changed:
            self._changed.wait_for(there, seconds)
            if not isinstance(sent.answer, (kind, OfferRefused)):
                raise Broken(self.broken or f"no answer came within {seconds:.0f} s")
            return sent.answer

    def go(self, sent: SentRequest, epoch: int) -> None:
        """Let the destination send the request's tokens. Raises `Broken`."""
        self._pipe.send(Go(sent.number, epoch))

    def settle(self, sent: SentRequest) -> bool:
        """Note that the client reads the streams from now on, so that the request becomes an orphan when the pipe ends.

        Returns False when the pipe has ended already.
        """
        with self._changed:
            sent.settled = True
            return not self.broken

    def drop(self, sent: SentRequest) -> None:
        """Forget a request here and at the destination. A broken pipe is no error: the request is dropped with it."""
        with self._changed:
            self._sent.pop(sent.number, None)
        try:
            self._pipe.send(Drop(sent.number))
        except Broken as error:
            log.debug("nothing to drop: %s", error)

    # --- for answers: `RemoteEngine` --------------------------------------------------------------------------------

    def begin(self, request: GenerationRequest) -> TokenStream:
        return self.admit(self._identity.state(request))

    def admit(self, state: GenerationState) -> TokenStream:
        try:
            sent = self.offer([self._identity.snapshot(state)], (0,), None, now=True)
            stream = sent.all_streams[0]
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
        """Cancel a stream without a reader."""
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
        sent = SentRequest(self, number)
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
