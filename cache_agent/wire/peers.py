"""The messages between agents that share a model: which agent has which chunk, and the chunks. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cache_agent.wire.message import Body, Count, Digest, Message, Short


class FollowRequest(Message, frozen=True, tag="follow"):
    """Asks an agent to report its chunks of a source, now and until this connection closes."""

    source: Short


class ChunkStatement(msgspec.Struct, frozen=True, array_like=True):
    """A statement that an agent has a chunk; `digest` of its bytes or "", `own` where they came from the origin."""

    chunk: Count
    digest: Digest = ""
    own: bool = False


class Holds(Message, frozen=True, tag="holds"):
    """The chunks that came since the last message, and all that the agent is reading from the origin now."""

    said: list[ChunkStatement]
    reading: list[Count]


class FetchRequest(Message, frozen=True, tag="fetch"):
    """Asks for a chunk, by its number in the source's manifest of layout `layout`."""

    source: Short
    chunk: Count
    layout: int


class Chunk(Message, frozen=True, tag="chunk"):
    """Announces the bytes of a chunk, which follow."""

    digest: Digest
    body: Body


class DescribeRequest(Message, frozen=True, tag="describe"):
    """Asks for a source's description (no weights), for a node that cannot reach the origin."""

    source: Short


class Described(Message, frozen=True, tag="described"):
    """Announces the description (`checkpoint.encode_description`), which follows."""

    body: Annotated[int, msgspec.Meta(ge=1, lt=1 << 30)]
