"""The socket between a supervisor and a zygote: one message per packet (see messages.py), with fds.

    supervisor → zygote
        {"fork": id, "kind": "worker" | "zygote", "environment": {…}, …}                     fds: see forkserver.py
        {"fork": id, "kind": "spare", "place": JSON, "asked": ns}                           fds: see placed.py
    zygote → supervisor
        {"ready": level, "key": …, "seconds": …, "bytes": …}         it is built, and may be forked from now on
        {"failed": text}                                            it could not be built, and ends
        {"beat": 1}                                                 its loop turns
        {"forked": id, "pid": pid}                                  fd: a pidfd of the child
        {"refused": id, "why": text}                                nothing was forked
        {"ended": pid, "status": status}                            as waitpid gave it
    shim → pool
        {"wants": version, "machine": …, "python": …, "base": …, "environment": {…}, "cwd": …}
                                                                    the function's needs; first of all, once
        {"fork": id, "environment": {…}, "cwd": …, "start_id": …, "spans": […]}             fds: a worker's, and stdio
        {"serves": seconds}                                         its worker is ready, seconds after the request
        {"load": n}, {"bytes": n}                                   what its worker says, see control.py
        {"parked": 1}                                               its worker has gone on purpose
    pool → shim: as zygote → supervisor, and
        {"wish": "retire"}                                          its idle worker may go
    pool → spare
        {"environment": {…}, "cwd": …, "start_id": …, "spans": […], "why": …}                fds: the same
    spare → pool
        {"parked": bytes, "seconds": …}                             it is in the container, and what that took
        {"failed": text}                                            it could not enter the container, and ends

A packet is whole or not there at all, so that neither side ever waits for the rest of one. Standard library only.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import stat
from collections import deque
from collections.abc import Sequence
from typing import Any

from runtime.process import messages

MAX_PACKET = 256 << 10  # an environment may be large
MAX_FDS = 64
_BACKLOG = 256


class Gone(Exception):
    """The other end is closed, or this one is."""


class Unreadable(Gone):
    """The other end has sent something that is no message; nothing more is read from it."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new wire."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def receive_fds(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int], int]:
    """Return at most `size` bytes, at most `most` fds that came with them, and recvmsg's flags. Raises `OSError`.

    The fds are close-on-exec and the caller's; `socket.recv_fds` of Python 3.11 would leave them inheritable.
    """
    fds = array.array("i")
    space = socket.CMSG_SPACE(most * fds.itemsize)
    data, ancillary, flags, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds), flags


def listen(path: str) -> socket.socket:
    """Listen on a path to which every process of the node may connect; the pool decides which ones it serves."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    os.chmod(path, 0o666)  # noqa: S103  functions have users of their own
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


class Wire:
    """One end of a wire. Never blocks: a message that cannot be sent now waits for `flush`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_PACKET)
        self._waiting: deque[tuple[bytes, list[int]]] = deque()

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def waiting(self) -> bool:
        """Whether a message could not be sent yet."""
        return bool(self._waiting)

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a message; the fds stay the caller's. Raises `Gone`, and `ValueError` for one that is too large."""
        data = messages.pack(message)
        if len(data) > MAX_PACKET or len(fds) > MAX_FDS:
            raise ValueError(f"a message of {len(data)} bytes and {len(fds)} fds; {MAX_PACKET} and {MAX_FDS} may be")
        self._waiting.append((data, [os.dup(fd) for fd in fds]))
        self.flush()

    def flush(self) -> None:
        """Send messages that wait, as far as possible now. Raises `Gone`."""
        while self._waiting:
            data, fds = self._waiting[0]
            try:
                if fds:
                    socket.send_fds(self.sock, [data], fds)
                else:
                    self.sock.send(data)
            except BlockingIOError:
                return
            except OSError as error:
                raise Gone(error.strerror or str(error)) from error
            self._waiting.popleft()
            for fd in fds:
                os.close(fd)

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """Return the next message and its fds, close-on-exec and the caller's; None if none is there.

        Raises `Gone`, and `Unreadable`.
        """
        try:
            data, fds, flags = receive_fds(self.sock, MAX_PACKET + 1, MAX_FDS)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Gone(error.strerror or str(error)) from error
        try:
            if not data:
                raise Gone("closed")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError
            message = messages.unpack(data)
        except (Gone, ValueError) as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, Gone):
                raise
            raise Unreadable("it sent something that is no message") from None
        return message, fds

    def dismiss(self, message: dict[str, Any]) -> None:
        """Send a last message, which arrives whatever the other end has sent meanwhile, and close."""
        with contextlib.suppress(Gone, OSError):
            self.send(message)
            self.sock.shutdown(socket.SHUT_RD)
            while (received := self.receive()) is not None:  # closing on unread data would be a reset
                for fd in received[1]:
                    os.close(fd)
        self.close()

    def close(self) -> None:
        while self._waiting:
            for fd in self._waiting.popleft()[1]:
                os.close(fd)
        self.sock.close()
