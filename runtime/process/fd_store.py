"""Owns weights that came over TCP, from the worker that fetched them to the next one. Standard library only.

The weights are sealed memory of the container's own, so that no agent could lend them again.

    worker → shim    {"keep": n}    fds: the manifest's and the segments', once all bytes are there; 0 empties the store
    shim → worker    {"kept": n}    the same fds; before anything else on the line, and also where there are none

The fds ride on the first byte of their line. The shim lets go of the memory as soon as no worker and no zygote uses it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

from runtime.process import messages, wire

MOST_FDS = 250  # the kernel passes 253 at once
_READ = 64 << 10


def send(sock: socket.socket, word: str, fds: Sequence[int]) -> None:
    """Send the message `word` with the fds, which stay the caller's. Raises `OSError`."""
    data = messages.pack({word: len(fds)}) + b"\n"
    if fds:
        socket.send_fds(sock, [data], fds)
    else:
        sock.send(data)


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Return some bytes, and fds that came with them, close-on-exec and the caller's. Raises `OSError`."""
    data, fds, _ = wire.receive_fds(sock, _READ, MOST_FDS)
    return data, fds


class FdStore:
    """The fds that the shim holds for the next worker. Not thread-safe."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._arrived: list[int] = []  # fds whose message is not read yet

    def receive(self, line: socket.socket) -> bytes:
        """Return bytes of a worker's line; fds that came with them wait for `take`. Raises `OSError`."""
        data, fds = receive(line)
        self._arrived += fds
        if len(self._arrived) > MOST_FDS:  # user code has got hold of the line
            _close(self._arrived)
        return data

    def take(self, count: int) -> None:
        """Put the `count` fds that came with a message, or none, in the place of those that are here."""
        if count == len(self._arrived):
            _close(self._fds)
            self._fds, self._arrived = self._arrived, []
        _close(self._arrived)

    def give(self, line: socket.socket) -> None:
        """Send the fds to a worker that is being started."""
        _close(self._arrived)
        with contextlib.suppress(OSError):  # the worker fetches the weights, then
            send(line, "kept", self._fds)

    def copies(self) -> list[int]:
        """Return copies of the fds, for a thread that closes them."""
        return [os.dup(fd) for fd in self._fds]

    def drop(self) -> None:
        """Close the fds; processes that map the memory still have it."""
        _close(self._fds)

    def close(self) -> None:
        _close(self._fds)
        _close(self._arrived)


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
