"""The messages between a function and its agent, and the union of all messages. Pure.

`protocol.py` has their order and their form as bytes.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from cache_agent.ledger import Span
from cache_agent.wire import layers, operations, peers, requests
from cache_agent.wire.message import MAX_FDS, Body, Count, Message, Short, Text, Uri


class Identity(msgspec.Struct, frozen=True):
    """The caller and its proof, by `kind`.

    `none` on a developer's machine; `token`: a secret that both sides were given; `kubernetes`: a ServiceAccount's
    token of audience `glowplug`; `cluster`: another node's agent, whose `token` is a fresh nonce and whose proof is the
    answer to a `challenge`.
    """

    kind: Short = "none"
    token: Annotated[str, msgspec.Meta(max_length=8192)] = ""


class Hello(Message, frozen=True, tag="hello"):
    """The first message of a connection; `pod` is the UID of the client's pod, whose removal becomes a `drain`.

    Nothing is granted for `pod`, which is not proved.
    """

    version: int
    client: Short
    identity: Identity = Identity()
    pod: Short = ""


class Welcome(Message, frozen=True, tag="welcome"):
    """The agent accepts the caller; `agent` is its version of the program."""

    version: int
    node: Short
    agent: Short


class Challenge(Message, frozen=True, tag="challenge"):
    """The agent proves that it knows the cluster's key, and asks the caller for the same; see cluster/key.py."""

    nonce: Short
    node: Short
    proof: Short


class ChallengeAnswer(Message, frozen=True, tag="answer"):
    """The caller's proof; its own agent listens at `address` (host:port), or "" where no node can reach it."""

    proof: Short
    address: Short = ""


class LeaseRequest(Message, frozen=True, tag="lease"):
    """Asks for a lease. `have` is the source whose bytes the client has already; over TCP those are not sent again."""

    model: Uri
    start_id: Short = ""
    have: Short = ""


class Granted(Message, frozen=True, tag="granted"):
    """The lease, while bytes may still come; `page` is the segments' page size in bytes.

    Fds: the manifest (JSON in a sealed memfd), then the segments in order.
    """

    source: Short
    manifest_bytes: Count
    segments: list[Count]
    page: Count
    fds: Annotated[int, msgspec.Meta(ge=1, le=MAX_FDS)]


class Progress(Message, frozen=True, tag="progress"):
    """Bytes that are verified: `ready` from the start of each segment without a hole, `done` in all, in any order."""

    ready: list[Count]
    done: Count
    total: Count


class LeaseReady(Message, frozen=True, tag="ready"):
    """All bytes are there, from `tier`; `revision` is empty until the digest is known."""

    tier: Short
    revision: Short
    spans: list[Span]


class Streaming(Message, frozen=True, tag="streaming"):
    """The lease over TCP, in place of `granted`: the manifest follows, `body` bytes, and then pieces of segments."""

    source: Short
    segments: list[Count]
    body: Annotated[int, msgspec.Meta(ge=1, lt=1 << 30)]


class StreamedPiece(Message, frozen=True, tag="piece"):
    """Announces `body` verified bytes for `offset` of a segment; each segment comes in order, once."""

    segment: Count
    offset: Count
    body: Body


class RevisionNotice(Message, frozen=True, tag="admitted"):
    """The digest of the leased model, once it is known."""

    revision: Short


class Offer(Message, frozen=True, tag="offer"):
    """Offers the memory of a model that a function maps since before the agent began. Fds: the segments in order."""

    model: Uri
    source: Short
    fds: Annotated[int, msgspec.Meta(ge=1, le=MAX_FDS)]


class Adopted(Message, frozen=True, tag="adopted"):
    """The offer was accepted as a lease; unless `shared`, the memory is lent to no other, for the reason `why`."""

    revision: Short
    shared: bool
    why: Text = ""


class Drain(Message, frozen=True, tag="drain"):
    """The replica will be removed: its running requests are to be handed over within `grace` seconds."""

    reason: Short
    grace: float


class ManifestRequest(Message, frozen=True, tag="manifest"):
    """Asks for a model's manifest; the agent reads headers and small files, and loads no weights."""

    model: Uri


class ManifestReply(Message, frozen=True, tag="manifest_reply"):
    """The manifest of a model. Fds: the manifest (JSON in a sealed memfd)."""

    manifest_bytes: Count
    fds: Annotated[int, msgspec.Meta(ge=1, le=1)]


class ManifestInline(Message, frozen=True, tag="manifest_inline"):
    """The manifest of a model over TCP, in place of `manifest_reply`: `body` bytes follow."""

    body: Annotated[int, msgspec.Meta(ge=1, lt=1 << 30)]


class ErrorReply(Message, frozen=True, tag="error"):
    """The error in place of a reply: a code of `errors.py`, and its sentence."""

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
    | operations.StatusRequest
    | operations.StatusReply
    | ManifestRequest
    | ManifestReply
    | operations.EvictRequest
    | operations.EvictReply
    | operations.PinRequest
    | operations.PinReply
    | operations.PrefetchRequest
    | operations.PrefetchReply
    | operations.EstimateRequest
    | operations.EstimateReply
    | operations.PushDrain
    | operations.PushDrainReply
    | operations.Started
    | layers.LayersReport
    | operations.StartedReply
    | operations.StartsRequest
    | operations.StartsReply
    | operations.ClusterRequest
    | operations.ClusterReply
    | operations.EventsRequest
    | operations.EventsReply
    | requests.Checkpoint
    | requests.Checkpointed
    | requests.ClaimRequest
    | requests.ClaimReply
    | requests.TransferRequest
    | requests.TransferReply
    | requests.DestinationRequest
    | requests.HandoffRequest
    | requests.Matched
    | requests.HandedReport
    | requests.HandedReply
    | requests.RelayedBytes
    | Challenge
    | ChallengeAnswer
    | Streaming
    | StreamedPiece
    | ManifestInline
    | peers.FollowRequest
    | peers.Holds
    | peers.FetchRequest
    | peers.Chunk
    | peers.DescribeRequest
    | peers.Described
    | ErrorReply
)
