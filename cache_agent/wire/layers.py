"""The report of a function's supervisor to the node's agent: which layers it keeps warm. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cache_agent.wire.message import Count, Message, Short, Text, Uri

MOST = 32  # layers in one report
Amount = Annotated[float, msgspec.Meta(ge=0)]


class Layer(msgspec.Struct, frozen=True):
    """One layer: idle since `since` (seconds of CLOCK_MONOTONIC, or None), held for `hold` seconds (None: for ever).

    Functions of an older image also send `rebuild` and `until`; both are ignored.
    """

    level: Short
    state: Short
    model: Uri = ""
    since: float | None = None
    seconds: Amount = 0.0
    bytes: Count = 0
    hold: Amount | None = None
    why: Text = ""


class LayersReport(Message, frozen=True, tag="layers"):
    """All layers of the supervisor with this `id`; an empty list when it has ended.

    `price` is in GB·s of idle memory per second of start. The agent shows the report and decides nothing by it. The
    answer is `started_reply`.
    """

    id: Short
    function: Short
    mode: Short
    price: Amount
    layers: Annotated[list[Layer], msgspec.Meta(max_length=MOST)]


class LayerStatus(msgspec.Struct, frozen=True):
    """A layer as status shows it; holding it for `worth_seconds` (None: for ever) costs as much as one start.

    An idle layer is dropped in `left_seconds`; None: never, or it is in use.
    """

    level: Short
    state: Short
    model: Uri
    bytes: Count
    build_seconds: float
    worth_seconds: float | None
    idle_seconds: float | None
    left_seconds: float | None
    why: Text


class FunctionLayers(msgspec.Struct, frozen=True):
    """The layers of one supervisor, as status shows them."""

    function: Short
    mode: Short
    price: float
    layers: list[LayerStatus]
