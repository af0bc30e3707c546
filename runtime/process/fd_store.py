"""Owns weights that came over TCP between two workers: who fetched them gives them, the shim keeps them, the next maps

them. They are sealed memory of the container's own, so that no agent could lend them again. Standard library only.

    worker → shim    {"keep": n}    fds: the manifest's and the segments', once all bytes are there; 0 for none any more
    shim → worker    {"kept": n}    the same; before anything else on the line, and also where there are none

The fds ride on the first byte of their line. The shim lets go of the memory as soon as no worker and no zygote uses it.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Sequence

from runtime.process import messages

MOST_FDS = 250  # the kernel passes 253 at once
_READ = 64 << 10
_FD_SPACE = socket.CMSG_SPACE(MOST_FDS * array.array("i").itemsize)


def send(sock: socket.socket, word: str, fds: Sequence[int]) -> None:
    """The fds stay the caller's. Raises `OSError`."""
    data = messages.pack({word: len(fds)}) + b"\n"
    if fds:
        socket.send_fds(sock, [data], fds)
    else:
        sock.send(data)


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Some bytes, and fds that came with them, close-on-exec and the caller's. Raises `OSError`."""
    data, ancillary, _, _ = sock.recvmsg(_READ, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


class FdStore:
    """The shim's. Not thread-safe."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._arrived: list[int] = []  # with bytes of which the line is not read yet

    def receive(self, line: socket.socket) -> bytes:
        """What a worker's line has; fds in it wait for `take`. Raises `OSError`."""
        data, fds = receive(line)
        self._arrived += fds
        if len(self._arrived) > MOST_FDS:  # user code has got hold of the line
            _close(self._arrived)
        return data

    def take(self, count: int) -> None:
        """A worker gives the fds that came with its message, or none; they take the place of what is here."""
        if count == len(self._arrived):
            _close(self._fds)
            self._fds, self._arrived = self._arrived, []
        _close(self._arrived)

    def give(self, line: socket.socket) -> None:
        """To a new worker, before it is there."""
        _close(self._arrived)
        with contextlib.suppress(OSError):  # it goes without, then
            send(line, "kept", self._fds)

    def copies(self) -> list[int]:
        """What is here, for a thread that closes it."""
        return [os.dup(fd) for fd in self._fds]

    def drop(self) -> None:
        """Lets go of the memory: whoever maps it has it still."""
        _close(self._fds)

    def close(self) -> None:
        _close(self._fds)
        _close(self._arrived)


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
