"""What a function's supervisor tells the node's agent of the layers that it keeps warm. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cache_agent.wire.message import Count, Message, Short, Text, Uri

MOST = 32  # layers that one supervisor tells of
Amount = Annotated[float, msgspec.Meta(ge=0)]


class Layer(msgspec.Struct, frozen=True):
    """One layer: idle `since` then, in s of CLOCK_MONOTONIC, to be held for `hold` s of idleness; None: for ever.

    Functions of an older image send `rebuild` and `until`, too; both are passed over.
    """

    level: Short
    state: Short
    model: Uri = ""
    since: float | None = None
    seconds: Amount = 0.0
    bytes: Count = 0
    hold: Amount | None = None
    why: Text = ""


class LayersTold(Message, frozen=True, tag="layers"):
    """All layers of one supervisor, known by `id`; none: it has ended. Its own word, from which nothing follows.

    `price` is in GB·s of idle memory per second of start. The answer is `started_reply`, as to every such word.
    """

    id: Short
    function: Short
    mode: Short
    price: Amount
    layers: Annotated[list[Layer], msgspec.Meta(max_length=MOST)]


class LayerStatus(msgspec.Struct, frozen=True):
    """`worth_seconds` is how long holding it costs less than one start; None: for ever.

    While it lies idle it is dropped in `left_seconds`, if ever.
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
    function: Short
    mode: Short
    price: float
    layers: list[LayerStatus]
