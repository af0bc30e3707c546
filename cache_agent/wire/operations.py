"""The messages of operating a node: status, events, starts, evicting, pinning, prefetching, estimates. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cache_agent.ledger import Span
from cache_agent.wire.layers import FunctionLayers
from cache_agent.wire.message import Count, Message, Short, Text, Uri
from cache_agent.wire.requests import HandoffRecord


class StatusRequest(Message, frozen=True, tag="status"):
    """Asks for the node's state."""


class ModelStatus(msgspec.Struct, frozen=True):
    """A model in memory; `done` of its `bytes` are there, in pages of `page` bytes."""

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
    age_seconds: float = 0.0  # since the load or the adoption began


class ImageStatus(msgspec.Struct, frozen=True):
    """A model on SSD; `users` is the number of loads that read it now."""

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
    """The SSD tier; `capacity` and `used` in bytes."""

    directory: Uri
    capacity: Count
    used: Count
    images: list[ImageStatus]
    quarantined: list[QuarantineStatus]


class TierStatus(msgspec.Struct, frozen=True):
    """The measurements of a tier: bytes per second, the estimates' mean relative error, the last load in seconds."""

    tier: Short
    loads: Count
    rate: float
    error: float
    predicted: float
    took: float


class StatusReply(Message, frozen=True, tag="status_reply"):
    """The node's state; `orphaned` bytes are mapped by functions and cannot be lent to others."""

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
    """Asks to evict a model from memory, and with `ssd` from SSD as well."""

    model: Uri
    ssd: bool = False


class EvictReply(Message, frozen=True, tag="evict_reply"):
    """Bytes of memory and of SSD that became free; `stays` names the copies that go once their leases end."""

    bytes: Count
    ssd: Count = 0
    stays: Text = ""


class PinRequest(Message, frozen=True, tag="pin"):
    """Asks to keep a resident model, in memory and on SSD, until a request with `pinned` false or the agent's end."""

    model: Uri
    pinned: bool = True


class PinReply(Message, frozen=True, tag="pin_reply"):
    """The pin is set or taken away; `bytes` of memory are concerned."""

    bytes: Count


class PrefetchRequest(Message, frozen=True, tag="prefetch"):
    """Asks to bring a model into memory in the background, without a lease."""

    model: Uri


class PrefetchReply(Message, frozen=True, tag="prefetch_reply"):
    """The load has begun; `status` and the agent's log show how it goes."""


class EstimateRequest(Message, frozen=True, tag="estimate"):
    """Asks how long a lease on the model would take to be ready; nothing is loaded."""

    model: Uri


class EstimateReply(Message, frozen=True, tag="estimate_reply"):
    """The seconds until a lease would be ready, from `tier`; `confidence` from 0 (a guess) to 1 (in memory)."""

    seconds: float
    tier: Short
    confidence: float
    bytes: Count


class PushDrain(Message, frozen=True, tag="push_drain"):
    """Asks the agent to send `drain` to the holders of leases on `model` (of all models when empty)."""

    reason: Short
    grace: float
    model: Uri = ""


class PushDrainReply(Message, frozen=True, tag="push_drain_reply"):
    """The number of holders that `drain` was sent to."""

    holders: Count


class Started(Message, frozen=True, tag="started"):
    """Reports the ledger of a function's start: at `ready`, and again with the first token.

    `kind` is the layer that the start found, or "cold"; `tier` had its weights. The agent shows the report and decides
    nothing by it.
    """

    start_id: Short
    function: Short
    model: Uri
    kind: Short
    spans: Annotated[list[Span], msgspec.Meta(max_length=256)]
    error: Text = ""
    tier: Short = ""
    bytes: Count = 0


class StartedReply(Message, frozen=True, tag="started_reply"):
    """The report of a start, or of layers, has arrived."""


class StartsRequest(Message, frozen=True, tag="starts"):
    """Asks for the last starts of this node's functions."""


class Start(msgspec.Struct, frozen=True):
    """A function's start; `began` in seconds since 1970, spans in ns of CLOCK_MONOTONIC as in every ledger."""

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
    """The last starts, the newest first."""

    starts: list[Start]


class EventRecord(msgspec.Struct, frozen=True):
    """An event on the node; `time` in seconds since 1970, `number` counts from the agent's start."""

    number: Count
    time: float
    kind: Short
    model: Uri
    text: Text


class EventsRequest(Message, frozen=True, tag="events"):
    """Asks for the events after number `since`, as far as the agent still has them."""

    since: Count = 0


class EventsReply(Message, frozen=True, tag="events_reply"):
    """The events, in order."""

    events: list[EventRecord]


class ClusterRequest(Message, frozen=True, tag="cluster"):
    """Asks which nodes live and what they hold, by this node's directory."""


class NodeStatus(msgspec.Struct, frozen=True):
    """A node that lives; `rates` are bytes per second by tier, as last measured."""

    name: Short
    address: Short
    capacity: Count
    used: Count
    rates: dict[str, float]


class HoldingStatus(msgspec.Struct, frozen=True):
    """A model in a tier of a node; `model` is a revision, or a source's id while the revision is not known."""

    model: Short
    node: Short
    tier: Short
    done: Count
    total: Count


class ClusterReply(Message, frozen=True, tag="cluster_reply"):
    """The directory's content."""

    nodes: list[NodeStatus]
    holdings: list[HoldingStatus]
