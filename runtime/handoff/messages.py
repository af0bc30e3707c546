"""The messages of two workers during a hand-off, and their bytes. Pure.

    frame := length (4 bytes, big endian, 1 … MAX_FRAME) body
    body  := one message in MessagePack, sealed with the function's key, if it has one (`runtime.resume.seal`)

    draining worker                        destination
      │  greeting(nonce, kin, owner)        │
      │ ───────────────────────────────────►│
      │     greeting(nonce, kin, owner, …)  │   later bodies are sealed with their number, their side and both nonces:
      │ ◄───────────────────────────────────│   no foreign, repeated or omitted message is accepted
      │  probe(bytes) … ◄── probed          │   measures the pipe's speed
      │  offer(number, …), part …           │   a request: a snapshot of each choice, in parts
      │ ───────────────────────────────────►│
      │           ready | refused           │   ready: its engine has begun, and sends nothing yet
      │ ◄───────────────────────────────────│
      │  go(number, epoch) | drop(number)   │   after the fencing epoch has changed hands
      │ ───────────────────────────────────►│
      │        running(number), told …      │   every token with its index, until the end
      │ ◄───────────────────────────────────│
      │  cancel(number, choice)             │   the client has gone
      │ ───────────────────────────────────►│
      │  embed(number, prompts)             │
      │ ───────────────────────────────────►│
      │           vectors(number, …)        │
      │ ◄───────────────────────────────────│
      │  beat … beat                        │   after a second without another message; a silent side is given up

A request that comes to the draining worker is offered in the same way, with `now`: no other worker can own it, so its
tokens follow `ready` without a `go`.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from runtime.engine.base import Logprobs, TokenEvent
from runtime.errors import SnapshotRefused
from runtime.resume.record import MAX_CHOICES, AnswerContext

VERSION = 1
HEADER = struct.Struct("!I")
MAX_PART = 1 << 20
MAX_FRAME = MAX_PART + (64 << 10)
MAX_OFFER = 8 << 30  # bytes of all snapshots of a request

Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Name = Annotated[str, msgspec.Meta(max_length=512)]
Text = Annotated[str, msgspec.Meta(max_length=1 << 16)]


class PipeMessage(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base class of the messages."""


class Greeting(PipeMessage, frozen=True, tag="greeting"):
    """First message of each side; `owner` is the name under which a worker owns requests, `slots` and `queue` its
    engine's."""

    version: int
    nonce: Annotated[str, msgspec.Meta(min_length=32, max_length=32)]
    siblings: Name
    owner: Name
    slots: Number = 0
    queue: Number = 0


class Probe(PipeMessage, frozen=True, tag="probe"):
    data: bytes


class Probed(PipeMessage, frozen=True, tag="probed"):
    pass


class KeptRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kept request, as the store knows it; `ended` are its complete choices."""

    context: AnswerContext
    ended: list[Number]


class MigrationOffer(PipeMessage, frozen=True, tag="offer"):
    """A request; `sizes` are the bytes of its choices' snapshots, which follow in parts, one after the other."""

    number: Number
    sizes: Annotated[list[Number], msgspec.Meta(min_length=1, max_length=MAX_CHOICES)]
    kept: KeptRequest | None = None
    now: bool = False


class Part(PipeMessage, frozen=True, tag="part"):
    number: Number
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_PART)]


class OfferReady(PipeMessage, frozen=True, tag="ready"):
    number: Number


class OfferRefused(PipeMessage, frozen=True, tag="refused"):
    number: Number
    code: Name
    text: Text
    retry_after: float = 0.0


class Go(PipeMessage, frozen=True, tag="go"):
    """Transfer of the request to the destination, under `epoch`; 0 for a request that is not kept."""

    number: Number
    epoch: Number


class Drop(PipeMessage, frozen=True, tag="drop"):
    number: Number


class OfferRunning(PipeMessage, frozen=True, tag="running"):
    number: Number


class RelayedEvent(PipeMessage, frozen=True, tag="told"):
    """One event of a choice, as the destination's engine made it."""

    number: Number
    choice: Number
    index: Number
    token: int | None
    text: str
    finish: str | None = None
    error: str | None = None
    logprobs: tuple[float, list[tuple[int, float]]] | None = None


class Cancel(PipeMessage, frozen=True, tag="cancel"):
    number: Number
    choice: Number


class Embed(PipeMessage, frozen=True, tag="embed"):
    number: Number
    prompts: list[list[int]]


class Vectors(PipeMessage, frozen=True, tag="vectors"):
    number: Number
    vectors: list[list[float]]


class Beat(PipeMessage, frozen=True, tag="beat"):
    pass


AnyMessage = (
    Greeting
    | Probe
    | Probed
    | MigrationOffer
    | Part
    | OfferReady
    | OfferRefused
    | Go
    | Drop
    | OfferRunning
    | RelayedEvent
    | Cancel
    | Embed
    | Vectors
    | Beat
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: PipeMessage) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes) -> AnyMessage:
    """Return the message. Raises `SnapshotRefused` for anything but one well-formed message of this version."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SnapshotRefused(f"what came is no message of hand-off format {VERSION}: {error}") from error


def relayed(number: int, choice: int, event: TokenEvent) -> RelayedEvent:
    chances = (event.logprobs.token, list(event.logprobs.top)) if event.logprobs else None
    return RelayedEvent(number, choice, event.index, event.token, event.text, event.finish, event.error, chances)


def event_of(message: RelayedEvent) -> TokenEvent:
    chances = Logprobs(message.logprobs[0], tuple(message.logprobs[1])) if message.logprobs else None
    finish = message.finish
    return TokenEvent(message.index, message.token, message.text, finish, message.error, chances)  # type: ignore[arg-type]
