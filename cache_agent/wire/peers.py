"""What agents say to each other of a model that they share: who has which chunk, and the chunks. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cache_agent.wire.message import Body, Count, Digest, Message, Short


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
