"""What a function and its agent say to each other; `protocol` has the order, and how it becomes bytes. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cache_agent.ledger import Span
from cache_agent.wire.layers import FunctionLayers, LayersTold
from cache_agent.wire.message import MAX_FDS, Body, Count, Digest, Message, Short, Text, Uri
from cache_agent.wire.requests import (
    Checkpoint,
    Checkpointed,
    ClaimReply,
    ClaimRequest,
    HandedReply,
    HandedReport,
    HandoffRecord,
    HandoffRequest,
    HostRequest,
    Matched,
    Relay,
    TransferReply,
    TransferRequest,
)


class Identity(msgspec.Struct, frozen=True):
    """Who asks: `none` on a developer's machine, `token` for a secret both sides were given, `kubernetes` for a

    ServiceAccount's token of audience `glowplug`. `cluster` is another node's agent; its `token` is a fresh nonce, and
    what it knows of the key is asked next.
    """

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


class Challenge(Message, frozen=True, tag="challenge"):
    """The agent knows the cluster's key, and asks whether the caller does; see cluster/key.py."""

    nonce: Short
    node: Short
    proof: Short


class Answer(Message, frozen=True, tag="answer"):
    """`address` is where the caller's own agent listens, as host:port, or "" where nobody can reach it."""

    proof: Short
    address: Short = ""


class LeaseRequest(Message, frozen=True, tag="lease"):
    """With `have`, the source whose bytes the client has already, over TCP: none of them are sent again."""

    model: Uri
    start_id: Short = ""
    have: Short = ""


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


class Streaming(Message, frozen=True, tag="streaming"):
    """What `granted` is where no fd can be passed: the manifest follows, `body` bytes, and then the segments' bytes."""

    source: Short
    segments: list[Count]
    body: Annotated[int, msgspec.Meta(ge=1, lt=1 << 30)]


class Piece(Message, frozen=True, tag="piece"):
    """`body` verified bytes follow; they belong at `offset` of a segment. Each segment comes in order, once."""

    segment: Count
    offset: Count
    body: Body


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
    age_seconds: float = 0.0  # since its load began, or it was adopted


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
    tiers: list[TierStatus] = msgspec.field(default_factory=list)
    orphaned: Count = 0
    handoffs: list[HandoffRecord] = msgspec.field(default_factory=list)  # the last ones, the newest first
    layers: list[FunctionLayers] = msgspec.field(default_factory=list)


class ManifestRequest(Message, frozen=True, tag="manifest"):
    """Reads headers and small files only; loads no weights."""

    model: Uri


class ManifestReply(Message, frozen=True, tag="manifest_reply"):
    """Fds: the manifest."""

    manifest_bytes: Count
    fds: Annotated[int, msgspec.Meta(ge=1, le=1)]


class ManifestInline(Message, frozen=True, tag="manifest_inline"):
    """What `manifest_reply` is where no fd can be passed: the manifest follows."""

    body: Annotated[int, msgspec.Meta(ge=1, lt=1 << 30)]


class EvictRequest(Message, frozen=True, tag="evict"):
    """From memory; with `ssd` from there, too."""

    model: Uri
    ssd: bool = False


class EvictReply(Message, frozen=True, tag="evict_reply"):
    """Bytes of memory, and of SSD, given back. `stays` says which copies are held, and go once they are free."""

    bytes: Count
    ssd: Count = 0
    stays: Text = ""


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


class Started(Message, frozen=True, tag="started"):
    """The ledger of a function's start, for those who look at the node: at `ready`, and again with the first token.

    `kind` is the layer that the start found, or "cold". What it says is the function's word; nothing follows from it.
    """

    start_id: Short
    function: Short
    model: Uri
    kind: Short
    spans: Annotated[list[Span], msgspec.Meta(max_length=256)]
    error: Text = ""
    tier: Short = ""  # where its weights came from
    bytes: Count = 0


class StartedReply(Message, frozen=True, tag="started_reply"):
    pass


class StartsRequest(Message, frozen=True, tag="starts"):
    """The last starts of this node's functions."""


class Start(msgspec.Struct, frozen=True):
    """`began` in seconds since 1970; spans in ns of CLOCK_MONOTONIC, as in every ledger."""

    start_id: Short
    function: Short
    model: Uri
    kind: Short
    began: float
    spans: list[Span]
    error: Text = ""
    tier: Short = ""
    bytes: Count = 0


class StartsReply(Message, frozen=True, tag="starts_reply"):
    """The newest first."""

    starts: list[Start]


class EventRecord(msgspec.Struct, frozen=True):
    """What happened on the node; `time` in seconds since 1970, `number` counts from the agent's start."""

    number: Count
    time: float
    kind: Short
    model: Uri
    text: Text


class EventsRequest(Message, frozen=True, tag="events"):
    """What happened after the event with number `since`, as far as it is still known."""

    since: Count = 0


class EventsReply(Message, frozen=True, tag="events_reply"):
    events: list[EventRecord]


class FollowRequest(Message, frozen=True, tag="follow"):
    """Asks an agent to tell what it has of a source, now and until this connection closes."""

    source: Short


class Said(msgspec.Struct, frozen=True, array_like=True):
    """An agent has a chunk. `digest` of its bytes, "" where it was not computed; `own`: they came from the origin."""

    chunk: Count
    digest: Digest = ""
    own: bool = False


class Holds(Message, frozen=True, tag="holds"):
    """Chunks that came since the last message, and those that are being read from the origin now, all of them."""

    said: list[Said]
    reading: list[Count]


class FetchRequest(Message, frozen=True, tag="fetch"):
    """Chunk numbers are those of the source's manifest in layout `layout`."""

    source: Short
    chunk: Count
    layout: int


class Chunk(Message, frozen=True, tag="chunk"):
    """The chunk's bytes follow, whole."""

    digest: Digest
    body: Body


class DescribeRequest(Message, frozen=True, tag="describe"):
    """Asks for what an agent knows of a source besides its weights: for a node that cannot ask the origin."""

    source: Short


class Described(Message, frozen=True, tag="described"):
    """The description follows (checkpoint.encode)."""

    body: Annotated[int, msgspec.Meta(ge=1, lt=1 << 30)]


class ClusterRequest(Message, frozen=True, tag="cluster"):
    """Which nodes live and what they hold, as this node's directory has it."""


class NodeStatus(msgspec.Struct, frozen=True):
    """`rates` are bytes per second by tier, as last measured."""

    name: Short
    address: Short
    capacity: Count
    used: Count
    rates: dict[str, float]


class HoldingStatus(msgspec.Struct, frozen=True):
    """`model` is a revision, or a source's id while the revision is not known."""

    model: Short
    node: Short
    tier: Short
    done: Count
    total: Count


class ClusterReply(Message, frozen=True, tag="cluster_reply"):
    nodes: list[NodeStatus]
    holdings: list[HoldingStatus]


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
    | Started
    | LayersTold
    | StartedReply
    | StartsRequest
    | StartsReply
    | ClusterRequest
    | ClusterReply
    | EventsRequest
    | EventsReply
    | Checkpoint
    | Checkpointed
    | ClaimRequest
    | ClaimReply
    | TransferRequest
    | TransferReply
    | HostRequest
    | HandoffRequest
    | Matched
    | HandedReport
    | HandedReply
    | Relay
    | Challenge
    | Answer
    | Streaming
    | Piece
    | ManifestInline
    | FollowRequest
    | Holds
    | FetchRequest
    | Chunk
    | DescribeRequest
    | Described
    | ErrorReply
)
