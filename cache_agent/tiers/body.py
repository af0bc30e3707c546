"""Owns the reading of an HTTP response's body into memory: without a copy, and not for long where the server stalls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from cache_agent.errors import OriginUnavailable

SLOWEST = 64 << 10  # bytes that must arrive within `patience` seconds, or the server is given up


def fill(
    response: Any, views: Sequence[memoryview], arrived: Callable[[int], None], *, patience: float, what: str
) -> None:
    """Fill `views` in order from a response's body. Raises `OriginUnavailable`, or the socket's error.

    `arrived(count)` is called whenever `count` more bytes are in place. `response` is an `http.client.HTTPResponse`
    whose socket has a timeout, and whose Content-Length the caller has found to be the length of all `views`. `what`
    names the body in errors.
    """
    total, done = sum(len(view) for view in views), 0
    since, mark = time.monotonic(), 0
    for view in views:
        position = 0
        while position < len(view):
            with view[position:] as rest:  # released even if a traceback holds it, which would keep the segment mapped
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
        response.read()  # gives the socket back, so that the connection serves the next range


def _receive(response: Any, view: memoryview) -> int:
    """Receive some bytes, and return how many; `HTTPResponse.readinto` would wait until the whole view is full."""
    stream = response.fp
    if stream is None or response.chunked or response.length is None:
        return int(response.readinto(view))
    with view[: min(len(view), response.length)] as wanted:
        count = int(stream.readinto1(wanted))
    response.length -= count
    return count
