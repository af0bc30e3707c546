"""A worker's side of hand-offs at its agent: to wait as a destination, to find one, and to report the outcomes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence

from cache_agent.client.cache_client import CacheClient
from cache_agent.client.lease import expect
from cache_agent.errors import AgentTimeout, ProtocolError, from_wire
from cache_agent.wire.channel import Channel
from cache_agent.wire.message import Message, tag_of
from cache_agent.wire.messages import ErrorReply
from cache_agent.wire.requests import (
    MAX_ITEMS,
    DestinationRequest,
    HandedReply,
    HandedReport,
    HandoffOutcome,
    HandoffRequest,
    Matched,
)

_FIND_SECONDS = 8.0  # seconds: other nodes may be asked
_REPORT_SECONDS = 3.0
_POLL_SECONDS = 1.0


def offer_as_destination(channel: Channel, siblings: str, owner: str) -> None:
    """Offer the worker on this channel as a destination of its siblings' requests. Raises `Disconnected`."""
    channel.send(DestinationRequest(siblings, owner))


def await_match(channel: Channel, unwilling: Callable[[], bool]) -> socket.socket | None:
    """Wait until a sibling drains, and return the end of a socket to it.

    None once this worker is `unwilling`; the caller closes the channel then. Raises `AgentError`, `Disconnected`.
    """
    while not unwilling():
        try:
            message, fds = channel.receive(time.monotonic() + _POLL_SECONDS)
        except AgentTimeout:
            continue
        if isinstance(message, ErrorReply):
            raise from_wire(message.code, message.text)
        return _end(message, fds)
    return None


def find_destination(client: CacheClient, siblings: str, owner: str) -> socket.socket:
    """Return the end of a socket to a sibling that takes requests over. Raises `NoDestination`, or any `AgentError`."""
    with client.channel() as channel:
        channel.send(HandoffRequest(siblings, owner))
        return _end(*expect(channel, Matched, time.monotonic() + _FIND_SECONDS))


def report(client: CacheClient, items: Sequence[HandoffOutcome]) -> None:
    """Report how hand-offs went, for the agent's journal and metrics. Raises any `AgentError`."""
    with client.channel() as channel:
        for at in range(0, len(items), MAX_ITEMS):
            channel.send(HandedReport(list(items[at : at + MAX_ITEMS])))
            expect(channel, HandedReply, time.monotonic() + _REPORT_SECONDS)


def _end(message: Message, fds: list[int]) -> socket.socket:
    if not isinstance(message, Matched) or len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise ProtocolError(f"the agent answered {tag_of(type(message))} without the end of a pipe")
    return socket.socket(fileno=fds[0])
