"""The wire protocol between a function and its node's agent: bytes in, messages out. No sockets here.

    frame   := length (4 bytes, big endian, 1 … MAX_REQUEST to the agent, … MAX_REPLY from it) body
    body    := one JSON object, UTF-8, with "type" naming the message
    fds     := ride (SCM_RIGHTS) on the first byte of the frame whose "fds" says how many; unix sockets only
    bytes   := follow a frame whose "body" says how many; TCP only

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
      │   adopted(revision, shared, why)    │   leased; shared: the segments are lent to others again, without a copy
      │ ◄───────────────────────────────────│
      │   status | manifest | evict | pin | prefetch | estimate | push_drain | started | layers | starts | events
      │   cluster                           (open: one reply each, stays open)
      │   checkpoint + fd | claim | transfer   (the same, for requests that run: snapshots/store.py)
      │   handoff → matched + fd | handed      (the same, of a worker that drains: handoff/broker.py)
      │  host(siblings)                     │   open → hosting: the worker takes over requests of its siblings
      │ ───────────────────────────────────►│
      │   matched(node, owner) + fd         │   open: the worker asks again for the next one
      │ ◄───────────────────────────────────│

Over TCP the same frames carry a function's lease without fds, and what agents say to each other:

    client                                agent                 agent                                 agent
      │  lease                              │                     │  hello(identity: cluster, nonce)    │   new
      │ ───────────────────────────────────►│ leasing             │ ───────────────────────────────────►│   greeting
      │   streaming + manifest              │                     │   challenge(nonce, proof)           │
      │ ◄───────────────────────────────────│ streaming           │ ◄───────────────────────────────────│   challenged
      │   piece(segment, offset) + bytes …  │                     │  answer(proof, address)             │
      │ ◄───────────────────────────────────│                     │ ───────────────────────────────────►│   answering
      │   ready                             │                     │   welcome                           │
      │ ◄───────────────────────────────────│ leased              │ ◄───────────────────────────────────│   peer
      │                                                           │  fetch → chunk + bytes, or error    │   peer still
      │                                                           │  describe → described + bytes       │
      │                                                           │  follow → holds(said, reading) …    │   following
      │                                                           │  handoff → matched, or error        │
      │                                                           │  relay + bytes ⇄ relay + bytes      │   relaying

`error(code, text)` may take the place of any reply; from `new`, `leasing`, `offering` and `loading` the agent then
closes. One lease per connection: the connection *is* the lease. A new feature is a new message or a new optional field.
VERSION changes only when an old peer could misread a frame; `hello`, `welcome` and `error` stay readable in every
version.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from cache_agent.errors import ProtocolError
from cache_agent.wire.layers import LayersTold
from cache_agent.wire.message import Message
from cache_agent.wire.messages import (
    Adopted,
    AnyMessage,
    Challenge,
    ChallengeAnswer,
    Drain,
    ErrorReply,
    Granted,
    Hello,
    LeaseReady,
    LeaseRequest,
    ManifestInline,
    ManifestReply,
    ManifestRequest,
    Offer,
    Progress,
    RevisionNotice,
    StreamedPiece,
    Streaming,
    Welcome,
)
from cache_agent.wire.operations import (
    ClusterReply,
    ClusterRequest,
    EstimateReply,
    EstimateRequest,
    EventsReply,
    EventsRequest,
    EvictReply,
    EvictRequest,
    PinReply,
    PinRequest,
    PrefetchReply,
    PrefetchRequest,
    PushDrain,
    PushDrainReply,
    Started,
    StartedReply,
    StartsReply,
    StartsRequest,
    StatusReply,
    StatusRequest,
)
from cache_agent.wire.peers import Chunk, Described, DescribeRequest, FetchRequest, FollowRequest, Holds
from cache_agent.wire.requests import (
    Checkpoint,
    Checkpointed,
    ClaimReply,
    ClaimRequest,
    HandedReply,
    HandedReport,
    HandoffRequest,
    HostRequest,
    Matched,
    RelayedBytes,
    TransferReply,
    TransferRequest,
)

VERSION = 1
HEADER = struct.Struct("!I")
MAX_REQUEST = 64 << 10
MAX_REPLY = 8 << 20

_TRANSITIONS: dict[tuple[str, type[Message]], str] = {
    ("new", Hello): "greeting",
    ("greeting", Welcome): "open",
    ("open", LeaseRequest): "leasing",
    ("leasing", Granted): "loading",
    ("loading", Progress): "loading",
    ("loading", LeaseReady): "leased",
    ("open", Offer): "offering",
    ("offering", Adopted): "leased",
    ("offering", Drain): "offering",
    ("offering", ErrorReply): "closed",
    ("greeting", Challenge): "challenged",
    ("challenged", ChallengeAnswer): "answering",
    ("answering", Welcome): "peer",
    ("leasing", Streaming): "streaming",
    ("streaming", StreamedPiece): "streaming",
    ("streaming", LeaseReady): "leased",
    ("streaming", Drain): "streaming",
    ("asking", ManifestInline): "open",
    ("peer", FetchRequest): "fetching",
    ("fetching", Chunk): "peer",
    ("peer", DescribeRequest): "fetching",
    ("fetching", Described): "peer",
    ("fetching", ErrorReply): "peer",
    ("peer", FollowRequest): "following",
    ("following", Holds): "following",
    ("challenged", ErrorReply): "closed",
    ("answering", ErrorReply): "closed",
    ("streaming", ErrorReply): "closed",
    ("peer", ErrorReply): "closed",
    ("following", ErrorReply): "closed",
    ("leased", RevisionNotice): "leased",
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
    ("open", Started): "asking",
    ("open", LayersTold): "asking",
    ("asking", StartedReply): "open",
    ("open", StartsRequest): "asking",
    ("asking", StartsReply): "open",
    ("open", ClusterRequest): "asking",
    ("asking", ClusterReply): "open",
    ("open", EventsRequest): "asking",
    ("asking", EventsReply): "open",
    ("open", Checkpoint): "asking",
    ("asking", Checkpointed): "open",
    ("open", ClaimRequest): "asking",
    ("asking", ClaimReply): "open",
    ("open", TransferRequest): "asking",
    ("asking", TransferReply): "open",
    ("open", HostRequest): "hosting",
    ("hosting", Matched): "open",
    ("hosting", ErrorReply): "closed",
    ("open", HandoffRequest): "asking",
    ("asking", Matched): "open",
    ("open", HandedReport): "asking",
    ("asking", HandedReply): "open",
    ("peer", HandoffRequest): "fetching",
    ("fetching", Matched): "relaying",
    ("relaying", RelayedBytes): "relaying",
    ("relaying", ErrorReply): "closed",
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
    """Return the connection's next state, the same for both sides. Raises `ProtocolError` for a message out of turn."""
    try:
        return _TRANSITIONS[state, type(message)]
    except KeyError:
        kind = type(message).__struct_config__.tag
        raise ProtocolError(f"'{kind}' is not allowed in state '{state}'; see the diagram in protocol.py") from None


def encode(message: Message) -> bytes:
    """Return the frame of a message. Raises `ProtocolError` when its body would be longer than MAX_REPLY."""
    body = _encoder.encode(message)
    if len(body) > MAX_REPLY:
        raise ProtocolError(f"a frame of {len(body)} bytes exceeds the limit of {MAX_REPLY}")
    return HEADER.pack(len(body)) + body


class Decoder:
    """Cut a byte stream into messages. After a `ProtocolError` the stream is lost: close the connection."""

    def __init__(self, limit: int) -> None:
        """Accept bodies of at most `limit` bytes: MAX_REQUEST in the agent, MAX_REPLY in a client."""
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[AnyMessage]:
        """Take in bytes, and return the messages that they complete. Raises `ProtocolError`."""
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
    def wanted(self) -> int:
        """Bytes up to the end of the frame's header, or of the frame; what follows a frame is left in the socket."""
        have = len(self._buffer)
        return (HEADER.unpack_from(self._buffer)[0] if have >= HEADER.size else 0) + HEADER.size - have

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._buffer)


def decode_body(body: bytes) -> AnyMessage:
    """Return the message in a frame's body. Raises `ProtocolError` unless it is one message of this version."""
    try:
        message: AnyMessage = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message of protocol version {VERSION}: {error}") from error
    return message
