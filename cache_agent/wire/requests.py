"""The messages about running requests: kept, claimed, transferred, and handed from one worker to another. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cache_agent.wire.message import Body, Count, Message, Short, Text

MAX_ITEMS = 256


class KeepItem(msgspec.Struct, frozen=True):
    """Pieces of one request, from number `at` on, from its owner under `epoch`; see `Keep` in snapshots/store.py."""

    space: Short
    id: Short
    owner: Short
    epoch: Count
    at: Count
    lengths: Annotated[list[Count], msgspec.Meta(max_length=4096)]
    lease: float
    done: bool = False


class Checkpoint(Message, frozen=True, tag="checkpoint"):
    """Asks to keep pieces of running requests; those of all items are in `data`, or in the fd beside it, in order."""

    items: Annotated[list[KeepItem], msgspec.Meta(max_length=256)]
    data: bytes = b""
    fds: Annotated[int, msgspec.Meta(ge=0, le=1)] = 0


class KeepStatus(msgspec.Struct, frozen=True):
    """The outcome of one item: `kept`, `fenced`, `gap` (see `KeepResult` in snapshots/store.py), or `too_large`."""

    outcome: Short
    wanted: bool = False
    why: Text = ""


class Checkpointed(Message, frozen=True, tag="checkpointed"):
    """The outcomes of all items, in their order."""

    results: list[KeepStatus]


class ClaimRequest(Message, frozen=True, tag="claim"):
    """Asks to become a request's owner, and for all of its pieces; `lease` in seconds."""

    space: Short
    id: Short
    owner: Short
    lease: float


class ClaimReply(Message, frozen=True, tag="claim_reply"):
    """The answer to a claim (see `Claimed` in snapshots/store.py); the pieces are in `data`, or in the fd beside it."""

    outcome: Short
    epoch: Count = 0
    wait: float = 0.0
    lengths: list[Count] = msgspec.field(default_factory=list)
    data: bytes = b""
    fds: Annotated[int, msgspec.Meta(ge=0, le=1)] = 0


class TransferRequest(Message, frozen=True, tag="transfer"):
    """Asks to make `successor` the owner of a request under the next epoch, if `owner` owns it under `epoch`."""

    space: Short
    id: Short
    owner: Short
    epoch: Count
    successor: Short = msgspec.field(name="heir")
    lease: float


class TransferReply(Message, frozen=True, tag="transfer_reply"):
    """The answer to a transfer: whether `successor` is the owner now."""

    done: bool


class DestinationRequest(Message, frozen=True, tag="host"):
    """Offers a worker, `owner`, as destination for the requests of its siblings; the answer comes once one drains.

    `siblings` is the same name for all workers that can go on with each other's requests.
    """

    siblings: Short = msgspec.field(name="kin")
    owner: Short


class HandoffRequest(Message, frozen=True, tag="handoff"):
    """Asks for a destination for the requests of a worker, `owner`, that drains: one of its `siblings`.

    Between agents the message has a fresh `nonce`, and the namespace `within` that the worker has proved.
    """

    siblings: Short = msgspec.field(name="kin")
    owner: Short
    nonce: Short = ""
    within: Short = ""


class Matched(Message, frozen=True, tag="matched"):
    """The other worker, `owner` on `node`, and the way to it: a socket as an fd, or `relay` messages between agents."""

    node: Short
    owner: Short
    nonce: Short = ""
    fds: Annotated[int, msgspec.Meta(ge=0, le=1)] = 0


class RelayedBytes(Message, frozen=True, tag="relay"):
    """Announces, between agents, `body` bytes of the conversation of two workers, signed by the sending agent."""

    body: Body


class HandoffOutcome(msgspec.Struct, frozen=True):
    """The result of handing over one request, as the worker that drained reports it.

    `pause` in seconds; `how` is `kv` (its rows travelled), `recompute` (the rows were made anew) or `relay` (no token
    existed yet); `outcome` is `moved`, `back` (the request went on where it was) or `lost` (it ended, and can be
    resumed).
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
    """A hand-off as status shows it: `node` is that of the worker that drained, `time` in seconds since 1970."""

    node: Short
    time: float


class HandedReport(Message, frozen=True, tag="handed"):
    """Reports the results of a worker's hand-offs."""

    items: Annotated[list[HandoffOutcome], msgspec.Meta(max_length=MAX_ITEMS)]


class HandedReply(Message, frozen=True, tag="handed_reply"):
    """The report of hand-offs has arrived."""
