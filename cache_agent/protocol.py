"""The wire protocol between a function and its node's agent: bytes in, messages out. No sockets here.

    frame   := length (4 bytes, big endian, 1 … MAX_REQUEST to the agent, … MAX_REPLY from it) body
    body    := one JSON object, UTF-8, with "type" naming the message
    fds     := ride (SCM_RIGHTS) on the first byte of the frame whose "fds" says how many

    client                                agent
      │  hello(version, client, identity)   │   state: new
      │ ───────────────────────────────────►│
      │            welcome(version, node)   │
      │ ◄───────────────────────────────────│   open
      │  lease(model, start_id)             │
      │ ───────────────────────────────────►│   leasing
      │   granted(sizes, page) + fds        │   manifest, then one fd per segment, read-only
      │ ◄───────────────────────────────────│   loading
      │   progress(ready: bytes/segment) …  │   contiguous verified bytes from the start of each segment
      │ ◄───────────────────────────────────│
      │   ready(tier, revision?, spans)     │
      │ ◄───────────────────────────────────│   leased: until this connection closes, for whatever reason
      │   admitted(revision)                │   once the content digest is known
      │   drain(reason, grace)              │   the replica should hand its work over
      │ ◄───────────────────────────────────│
      │  offer(model, source) + fds         │   open, after an agent's restart: the segments that are mapped
      │ ───────────────────────────────────►│   offering
      │   adopted(revision, shared, why)    │   leased; shared: they are lent to others again, without a copy
      │ ◄───────────────────────────────────│
      │   status | manifest | evict | pin | prefetch | estimate | push_drain   (open: one reply each, stays open)

`error(code, text)` may take the place of any reply; from `new`, `leasing`, `offering` and `loading` the agent
then closes. One
lease per connection: the connection *is* the lease. A higher minor feature is a new message or a new optional field;
VERSION changes only when an old peer could misread a frame.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any

import msgspec

from cache_agent.errors import ProtocolError
from cache_agent.ledger import Span

VERSION = 1
HEADER = struct.Struct("!I")
MAX_REQUEST = 64 << 10
MAX_REPLY = 8 << 20
TEXT_LIMIT = 4096
MAX_FDS = 250  # the kernel's SCM_MAX_FD is 253

Short = Annotated[str, msgspec.Meta(max_length=256)]
Uri = Annotated[str, msgspec.Meta(max_length=2048)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_LIMIT)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Message(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=False):
    """Root of all messages; the class's tag is its "type"."""


class Identity(msgspec.Struct, frozen=True):
    """Who asks: `none` on a developer's machine, `token` for a secret both sides were given."""

    kind: Short = "none"
    token: Annotated[str, msgspec.Meta(max_length=8192)] = ""


class Hello(Message, frozen=True, tag="hello"):
    version: int
    client: Short
    identity: Identity = Identity()
    pod: Short = ""  # the UID of the client's pod: whose removal it wants to hear of. Nothing is granted for it


class Welcome(Message, frozen=True, tag="welcome"):
    version: int
    node: Short
    agent: Short


class LeaseRequest(Message, frozen=True, tag="lease"):
    model: Uri
    start_id: Short = ""


class Granted(Message, frozen=True, tag="granted"):
    """Fds: the manifest (JSON in a sealed memfd), then the segments in order. `page` is their page size in bytes."""

    source: Short
    manifest_bytes: Count
    segments: list[Count]
    page: Count
    fds: Annotated[int, msgspec.Meta(ge=1, le=MAX_FDS)]


class Progress(Message, frozen=True, tag="progress"):
    """Verified bytes counted from the start of each segment without a hole; `done` counts all, in any order."""

    ready: list[Count]
    done: Count
    total: Count


class Ready(Message, frozen=True, tag="ready"):
    """All bytes are there. `tier` is where they came from; `revision` is empty until the digest is known."""

    tier: Short
    revision: Short
    spans: list[Span]


class Admitted(Message, frozen=True, tag="admitted"):
    revision: Short


class Offer(Message, frozen=True, tag="offer"):
    """A function that outlived its agent has the model mapped. Fds: its segments in order; all else is looked up."""

    model: Uri
    source: Short
    fds: Annotated[int, msgspec.Meta(ge=1, le=MAX_FDS)]


class Adopted(Message, frozen=True, tag="adopted"):
    """The connection is a lease again. Unless `shared`, the bytes stay the function's own; `why` is the reason."""

    revision: Short
    shared: bool
    why: Text = ""


class Drain(Message, frozen=True, tag="drain"):
    """The replica will go away: hand over what runs, within `grace` seconds."""

    reason: Short
    grace: float


class StatusRequest(Message, frozen=True, tag="status"):
    pass


class ModelStatus(msgspec.Struct, frozen=True):
    model: Uri
    source: Short
    revision: Short
    state: Short
    tier: Short
    bytes: Count
    done: Count
    page: Count
    leases: Count
    idle_seconds: float
    pinned: bool = False


class ImageStatus(msgspec.Struct, frozen=True):
    """A model on SSD; `users` loads read it now."""

    model: Uri
    source: Short
    revision: Short
    bytes: Count
    users: Count


class QuarantineStatus(msgspec.Struct, frozen=True):
    """Something damaged in the SSD's directory, set aside and never served."""

    name: Short
    reason: Short


class SsdStatus(msgspec.Struct, frozen=True):
    directory: Uri
    capacity: Count
    used: Count
    images: list[ImageStatus]
    quarantined: list[QuarantineStatus]


class TierStatus(msgspec.Struct, frozen=True):
    """What was measured of a tier: bytes per second, the estimates' mean relative error, the last load in seconds."""

    tier: Short
    loads: Count
    rate: float
    error: float
    predicted: float
    took: float


class StatusReply(Message, frozen=True, tag="status_reply"):
    node: Short
    pid: int
    capacity: Count
    used: Count
    models: list[ModelStatus]
    ssd: SsdStatus | None = None
    tiers: list[TierStatus] = []
    orphaned: Count = 0


class ManifestRequest(Message, frozen=True, tag="manifest"):
    """Reads headers and small files only; loads no weights."""

    model: Uri


class ManifestReply(Message, frozen=True, tag="manifest_reply"):
    """Fds: the manifest."""

    manifest_bytes: Count
    fds: Annotated[int, msgspec.Meta(ge=1, le=1)]


class EvictRequest(Message, frozen=True, tag="evict"):
    """From memory; with `ssd` from there, too."""

    model: Uri
    ssd: bool = False


class EvictReply(Message, frozen=True, tag="evict_reply"):
    """Bytes of memory, and of SSD, given back."""

    bytes: Count
    ssd: Count = 0


class PinRequest(Message, frozen=True, tag="pin"):
    """Keeps a resident model, in memory and on SSD, until it is asked for with `pinned` false or the agent ends."""

    model: Uri
    pinned: bool = True


class PinReply(Message, frozen=True, tag="pin_reply"):
    bytes: Count


class PrefetchRequest(Message, frozen=True, tag="prefetch"):
    """Brings a model into memory in the background, for whoever comes."""

    model: Uri


class PrefetchReply(Message, frozen=True, tag="prefetch_reply"):
    """It was begun; how it goes is in `status` and the agent's log."""


class EstimateRequest(Message, frozen=True, tag="estimate"):
    """How long a lease on the model would take to be ready; loads nothing."""

    model: Uri


class EstimateReply(Message, frozen=True, tag="estimate_reply"):
    """`tier` is where the bytes would come from; `confidence` from 0 (a guess) to 1 (they are there)."""

    seconds: float
    tier: Short
    confidence: float
    bytes: Count


class PushDrain(Message, frozen=True, tag="push_drain"):
    """Asks the agent to push `drain` to the holders of leases on `model` (of all models when empty)."""

    reason: Short
    grace: float
    model: Uri = ""


class PushDrainReply(Message, frozen=True, tag="push_drain_reply"):
    holders: Count


class ErrorReply(Message, frozen=True, tag="error"):
    code: Short
    text: Text


AnyMessage = (
    Hello
    | Welcome
    | LeaseRequest
    | Granted
    | Progress
    | Ready
    | Admitted
    | Offer
    | Adopted
    | Drain
    | StatusRequest
    | StatusReply
    | ManifestRequest
    | ManifestReply
    | EvictRequest
    | EvictReply
    | PinRequest
    | PinReply
    | PrefetchRequest
    | PrefetchReply
    | EstimateRequest
    | EstimateReply
    | PushDrain
    | PushDrainReply
    | ErrorReply
)

_TRANSITIONS: dict[tuple[str, type[Message]], str] = {
    ("new", Hello): "greeting",
    ("greeting", Welcome): "open",
    ("open", LeaseRequest): "leasing",
    ("leasing", Granted): "loading",
    ("loading", Progress): "loading",
    ("loading", Ready): "leased",
    ("open", Offer): "offering",
    ("offering", Adopted): "leased",
    ("offering", Drain): "offering",
    ("offering", ErrorReply): "closed",
    ("leased", Admitted): "leased",
    ("leased", Drain): "leased",
    ("loading", Drain): "loading",
    ("leasing", Drain): "leasing",
    ("open", StatusRequest): "asking",
    ("asking", StatusReply): "open",
    ("open", ManifestRequest): "asking",
    ("asking", ManifestReply): "open",
    ("open", EvictRequest): "asking",
    ("asking", EvictReply): "open",
    ("open", PinRequest): "asking",
    ("asking", PinReply): "open",
    ("open", PrefetchRequest): "asking",
    ("asking", PrefetchReply): "open",
    ("open", EstimateRequest): "asking",
    ("asking", EstimateReply): "open",
    ("open", PushDrain): "asking",
    ("asking", PushDrainReply): "open",
    ("asking", ErrorReply): "open",
    ("new", ErrorReply): "closed",
    ("greeting", ErrorReply): "closed",
    ("open", ErrorReply): "closed",
    ("leasing", ErrorReply): "closed",
    ("loading", ErrorReply): "closed",
    ("leased", ErrorReply): "closed",
}

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(AnyMessage)


def advance(state: str, message: Message) -> str:
    """The connection's next state, for both sides alike. Raises `ProtocolError` for a message out of turn."""
    try:
        return _TRANSITIONS[state, type(message)]
    except KeyError:
        kind = type(message).__struct_config__.tag
        raise ProtocolError(f"'{kind}' is not allowed in state '{state}'; see the diagram in protocol.py") from None


def encode(message: Message) -> bytes:
    """The frame of a message. Raises `ProtocolError` when it would be longer than MAX_REPLY."""
    body = _encoder.encode(message)
    if len(body) > MAX_REPLY:
        raise ProtocolError(f"a frame of {len(body)} bytes exceeds the limit of {MAX_REPLY}")
    return HEADER.pack(len(body)) + body


class Decoder:
    """Cuts a byte stream into messages. After it raised `ProtocolError` the stream is lost: close the connection."""

    def __init__(self, limit: int) -> None:
        """`limit` is the longest body accepted, in bytes: MAX_REQUEST in the agent, MAX_REPLY in a client."""
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[AnyMessage]:
        self._buffer += data
        messages: list[AnyMessage] = []
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if not 1 <= length <= self._limit:
                raise ProtocolError(
                    f"a frame announces {length} bytes; 1 to {self._limit} are allowed: is this a glowplug client?"
                )
            if len(self._buffer) < HEADER.size + length:
                break
            body = bytes(self._buffer[HEADER.size : HEADER.size + length])
            del self._buffer[: HEADER.size + length]
            messages.append(decode_body(body))
        return messages

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._buffer)


def decode_body(body: bytes) -> AnyMessage:
    """Raises `ProtocolError` for anything that is not one well-formed message of this version."""
    try:
        message: AnyMessage = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message of protocol version {VERSION}: {error}") from error
    return message
