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
from cache_agent.wire import layers, messages, operations, peers, requests
from cache_agent.wire.message import Message

VERSION = 1
HEADER = struct.Struct("!I")
MAX_REQUEST = 64 << 10
MAX_REPLY = 8 << 20

_TRANSITIONS: dict[tuple[str, type[Message]], str] = {
    ("new", messages.Hello): "greeting",
    ("greeting", messages.Welcome): "open",
    ("open", messages.LeaseRequest): "leasing",
    ("leasing", messages.Granted): "loading",
    ("loading", messages.Progress): "loading",
    ("loading", messages.LeaseReady): "leased",
    ("open", messages.Offer): "offering",
    ("offering", messages.Adopted): "leased",
    ("offering", messages.Drain): "offering",
    ("offering", messages.ErrorReply): "closed",
    ("greeting", messages.Challenge): "challenged",
    ("challenged", messages.ChallengeAnswer): "answering",
    ("answering", messages.Welcome): "peer",
    ("leasing", messages.Streaming): "streaming",
    ("streaming", messages.StreamedPiece): "streaming",
    ("streaming", messages.LeaseReady): "leased",
    ("streaming", messages.Drain): "streaming",
    ("asking", messages.ManifestInline): "open",
    ("peer", peers.FetchRequest): "fetching",
    ("fetching", peers.Chunk): "peer",
    ("peer", peers.DescribeRequest): "fetching",
    ("fetching", peers.Described): "peer",
    ("fetching", messages.ErrorReply): "peer",
    ("peer", peers.FollowRequest): "following",
    ("following", peers.Holds): "following",
    ("challenged", messages.ErrorReply): "closed",
    ("answering", messages.ErrorReply): "closed",
    ("streaming", messages.ErrorReply): "closed",
    ("peer", messages.ErrorReply): "closed",
    ("following", messages.ErrorReply): "closed",
    ("leased", messages.RevisionNotice): "leased",
    ("leased", messages.Drain): "leased",
    ("loading", messages.Drain): "loading",
    ("leasing", messages.Drain): "leasing",
    ("open", operations.StatusRequest): "asking",
    ("asking", operations.StatusReply): "open",
    ("open", messages.ManifestRequest): "asking",
    ("asking", messages.ManifestReply): "open",
    ("open", operations.EvictRequest): "asking",
    ("asking", operations.EvictReply): "open",
    ("open", operations.PinRequest): "asking",
    ("asking", operations.PinReply): "open",
    ("open", operations.PrefetchRequest): "asking",
    ("asking", operations.PrefetchReply): "open",
    ("open", operations.EstimateRequest): "asking",
    ("asking", operations.EstimateReply): "open",
    ("open", operations.PushDrain): "asking",
    ("asking", operations.PushDrainReply): "open",
    ("open", operations.Started): "asking",
    ("open", layers.LayersReport): "asking",
    ("asking", operations.StartedReply): "open",
    ("open", operations.StartsRequest): "asking",
    ("asking", operations.StartsReply): "open",
    ("open", operations.ClusterRequest): "asking",
    ("asking", operations.ClusterReply): "open",
    ("open", operations.EventsRequest): "asking",
    ("asking", operations.EventsReply): "open",
    ("open", requests.Checkpoint): "asking",
    ("asking", requests.Checkpointed): "open",
    ("open", requests.ClaimRequest): "asking",
    ("asking", requests.ClaimReply): "open",
    ("open", requests.TransferRequest): "asking",
    ("asking", requests.TransferReply): "open",
    ("open", requests.DestinationRequest): "hosting",
    ("hosting", requests.Matched): "open",
    ("hosting", messages.ErrorReply): "closed",
    ("open", requests.HandoffRequest): "asking",
    ("asking", requests.Matched): "open",
    ("open", requests.HandedReport): "asking",
    ("asking", requests.HandedReply): "open",
    ("peer", requests.HandoffRequest): "fetching",
    ("fetching", requests.Matched): "relaying",
    ("relaying", requests.RelayedBytes): "relaying",
    ("relaying", messages.ErrorReply): "closed",
    ("asking", messages.ErrorReply): "open",
    ("new", messages.ErrorReply): "closed",
    ("greeting", messages.ErrorReply): "closed",
    ("open", messages.ErrorReply): "closed",
    ("leasing", messages.ErrorReply): "closed",
    ("loading", messages.ErrorReply): "closed",
    ("leased", messages.ErrorReply): "closed",
}

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(messages.AnyMessage)


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

    def feed(self, data: bytes) -> list[messages.AnyMessage]:
        """Take in bytes, and return the messages that they complete. Raises `ProtocolError`."""
        self._buffer += data
        found: list[messages.AnyMessage] = []
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
            found.append(decode_body(body))
        return found

    @property
    def wanted(self) -> int:
        """Bytes up to the end of the frame's header, or of the frame; what follows a frame is left in the socket."""
        have = len(self._buffer)
        return (HEADER.unpack_from(self._buffer)[0] if have >= HEADER.size else 0) + HEADER.size - have

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._buffer)


def decode_body(body: bytes) -> messages.AnyMessage:
    """Return the message in a frame's body. Raises `ProtocolError` unless it is one message of this version."""
    try:
        message: messages.AnyMessage = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message of protocol version {VERSION}: {error}") from error
    return message
