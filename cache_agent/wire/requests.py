"""What is said of requests that run: kept, claimed, made over, and moved from one worker to another. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cache_agent.wire.message import Body, Count, Message, Short, Text

MAX_ITEMS = 256


class KeepItem(msgspec.Struct, frozen=True):
    """Pieces of one request, from number `at` on, by its owner under `epoch`; see `snapshots.Keep`."""

    space: Short
    id: Short
    owner: Short
    epoch: Count
    at: Count
    lengths: Annotated[list[Count], msgspec.Meta(max_length=4096)]
    lease: float
    done: bool = False


class Checkpoint(Message, frozen=True, tag="checkpoint"):
    """The pieces of all items follow one another in `data`, or in the fd that comes with it."""

    items: Annotated[list[KeepItem], msgspec.Meta(max_length=256)]
    data: bytes = b""
    fds: Annotated[int, msgspec.Meta(ge=0, le=1)] = 0


class KeptStatus(msgspec.Struct, frozen=True):
    """`kept`, `fenced`, `gap` (see `snapshots.Kept`), or `too_large` and `why`."""

    outcome: Short
    wanted: bool = False
    why: Text = ""


class Checkpointed(Message, frozen=True, tag="checkpointed"):
    """One for each item, in their order."""

    results: list[KeptStatus]


class ClaimRequest(Message, frozen=True, tag="claim"):
    """Asks to own what is kept of a request, and for all of it."""

    space: Short
    id: Short
    owner: Short
    lease: float


class ClaimReply(Message, frozen=True, tag="claim_reply"):
    """See `snapshots.Claimed`; the pieces are in `data`, or in the fd that comes with it."""

    outcome: Short
    epoch: Count = 0
    wait: float = 0.0
    lengths: list[Count] = msgspec.field(default_factory=list)
    data: bytes = b""
    fds: Annotated[int, msgspec.Meta(ge=0, le=1)] = 0


class TransferRequest(Message, frozen=True, tag="transfer"):
    """Makes `successor` the owner of a request under the next epoch, if it is `owner`'s under `epoch`."""

    space: Short
    id: Short
    owner: Short
    epoch: Count
    successor: Short = msgspec.field(name="heir")
    lease: float


class TransferReply(Message, frozen=True, tag="transfer_reply"):
    done: bool


class HostRequest(Message, frozen=True, tag="host"):
    """A worker that can go on with the requests of its `siblings`, and waits for one that wants to hand them over.

    `siblings` is the same for workers that can go on with each other's requests; to an agent it is a name.
    """

    siblings: Short = msgspec.field(name="kin")
    owner: Short


class HandoffRequest(Message, frozen=True, tag="handoff"):
    """A worker that wants to hand its requests over to one of its `siblings`.

    Between agents with a fresh `nonce`, and the namespace `within` that the worker has proved.
    """

    siblings: Short = msgspec.field(name="kin")
    owner: Short
    nonce: Short = ""
    within: Short = ""


class Matched(Message, frozen=True, tag="matched"):
    """Who is at the other end, and that end: a socket as an fd, or, between agents, this connection."""

    node: Short
    owner: Short
    nonce: Short = ""
    fds: Annotated[int, msgspec.Meta(ge=0, le=1)] = 0


class RelayedBytes(Message, frozen=True, tag="relay"):
    """Between agents: `body` bytes follow, a piece of what two workers say to each other, signed by the agent."""

    body: Body


class HandoffOutcome(msgspec.Struct, frozen=True):
    """How one request fared when its worker drained, as that worker tells it.

    `pause` in seconds; `how` is `kv` (its rows travelled), `recompute` (they were made anew) or `relay` (it had no
    token yet); `outcome` is `moved`, `back` (it went on where it was) or `lost` (it ended, and can be asked for again).
    """

    function: Short
    id: Short
    source: Short
    destination: Short
    tokens: Count
    pause: float
    how: Short
    outcome: Short
    reason: Text = ""


class HandoffRecord(HandoffOutcome, frozen=True, kw_only=True):
    """As it is shown: `node` is that of the worker that drained, `time` in seconds since 1970."""

    node: Short
    time: float


class HandedReport(Message, frozen=True, tag="handed"):
    items: Annotated[list[HandoffOutcome], msgspec.Meta(max_length=MAX_ITEMS)]


class HandedReply(Message, frozen=True, tag="handed_reply"):
    pass
