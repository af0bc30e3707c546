"""What a function and its agent say to each other; `protocol` has the order, and how it becomes bytes. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cache_agent.ledger import Span
from cache_agent.wire.layers import LayersTold
from cache_agent.wire.message import MAX_FDS, Body, Count, Message, Short, Text, Uri
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


class ChallengeAnswer(Message, frozen=True, tag="answer"):
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


class LeaseReady(Message, frozen=True, tag="ready"):
    """All bytes are there. `tier` is where they came from; `revision` is empty until the digest is known."""

    tier: Short
    revision: Short
    spans: list[Span]


class Streaming(Message, frozen=True, tag="streaming"):
    """What `granted` is where no fd can be passed: the manifest follows, `body` bytes, and then the segments' bytes."""

    source: Short
    segments: list[Count]
    body: Annotated[int, msgspec.Meta(ge=1, lt=1 << 30)]


class StreamedPiece(Message, frozen=True, tag="piece"):
    """`body` verified bytes follow; they belong at `offset` of a segment. Each segment comes in order, once."""

    segment: Count
    offset: Count
    body: Body


class RevisionNotice(Message, frozen=True, tag="admitted"):
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


class ErrorReply(Message, frozen=True, tag="error"):
    code: Short
    text: Text


AnyMessage = (
    Hello
    | Welcome
    | LeaseRequest
    | Granted
    | Progress
    | LeaseReady
    | RevisionNotice
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
    | RelayedBytes
    | Challenge
    | ChallengeAnswer
    | Streaming
    | StreamedPiece
    | ManifestInline
    | FollowRequest
    | Holds
    | FetchRequest
    | Chunk
    | DescribeRequest
    | Described
    | ErrorReply
)
