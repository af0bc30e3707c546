"""What those who look after a node ask its agent: what it has, what happened there, and what it shall keep. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cache_agent.ledger import Span
from cache_agent.wire.layers import FunctionLayers
from cache_agent.wire.message import Count, Message, Short, Text, Uri
from cache_agent.wire.requests import HandoffRecord


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
