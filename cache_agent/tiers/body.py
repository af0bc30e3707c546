"""Owns the way of an HTTP response's body into memory: no copy on the way, no patience with one that stalls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from cache_agent.errors import OriginUnavailable

SLOWEST = 64 << 10  # bytes that must arrive within `patience` seconds; a server below that is as good as dead


def fill(
    response: Any, views: Sequence[memoryview], arrived: Callable[[int], None], *, patience: float, what: str
) -> None:
    """Fills `views` in order and reports bytes as they come. Raises `OriginUnavailable`, or what the socket raises.

    `response` is an `http.client.HTTPResponse` whose socket has a timeout. What the server sends must be as long as
    `views` together: the caller has compared Content-Length.
    """
    total, done = sum(len(view) for view in views), 0
    since, mark = time.monotonic(), 0
    for view in views:
        position = 0
        while position < len(view):
            with view[position:] as rest:  # or a traceback that holds it would keep the segment mapped
                count = _receive(response, rest)
            if not count:
                raise OriginUnavailable(f"{what} broke off after {done} of {total} bytes")
            position += count
            done += count
            arrived(count)
            now = time.monotonic()
            if now - since >= patience:
                if done - mark < SLOWEST and done < total:
                    raise OriginUnavailable(f"{what} stalls: {done - mark} bytes came in {now - since:.0f} s")
                since, mark = now, done
    if response.length == 0:
        response.read()  # lets go of the socket, so that the connection serves the next range


def _receive(response: Any, view: memoryview) -> int:
    """One receive. `HTTPResponse.readinto` would wait for the whole view, byte by byte for ever if it came so."""
    stream = response.fp
    if stream is None or response.chunked or response.length is None:
        return int(response.readinto(view))
    with view[: min(len(view), response.length)] as wanted:
        count = int(stream.readinto1(wanted))
    response.length -= count
    return count
