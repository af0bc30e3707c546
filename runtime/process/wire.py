"""Owns a socket between a supervisor and a zygote: one message per packet (see messages.py), and its fds.

    supervisor → zygote
        {"fork": id, "kind": "worker" | "zygote", "environment": {…}, …}                     fds: see forkserver.py
        {"fork": id, "kind": "spare", "place": JSON, "asked": ns}                           fds: see placed.py
    zygote → supervisor
        {"beat": 1}                                                 it turns; also while it is being built
        {"ready": level, "key": …, "seconds": …, "bytes": …}         it may be forked from now on
        {"failed": text}                                            it could not be built, and ends
        {"forked": id, "pid": pid}                                  fd: a pidfd of the child
        {"refused": id, "why": text}                                nothing was forked
        {"ended": pid, "status": status}                            as waitpid gave it
    shim → pool
        {"wants": version, "machine": …, "python": …, "base": …, "environment": {…}, "cwd": …}
                                                                    what its function is made of; first of all, once
        {"fork": id, "environment": {…}, "cwd": …, "start_id": …, "spans": […]}             fds: a worker's, and stdio
        {"serves": seconds}                                         its worker is ready, so long after it was asked for
        {"load": n}, {"bytes": n}                                   of its worker; see control.py
        {"parked": 1}                                               its worker has gone on purpose
    pool → shim: what a zygote says to its supervisor, and
        {"wish": "retire"}                                          its idle worker may go
    pool → spare
        {"environment": {…}, "cwd": …, "start_id": …, "spans": […], "why": …}                fds: the same
    spare → pool
        {"parked": bytes, "seconds": …}                             it is where it should be, and what that took
        {"failed": text}                                            it could not go there, and ends

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
_FD_SPACE = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class Gone(Exception):
    """The other side has closed its end, or was closed."""


class Unreadable(Gone):
    """The other side has sent something that is no message; nothing more is read from it."""


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def listen(path: str) -> socket.socket:
    """Everybody on the node may connect; who is served is decided by who connects."""
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
    """One end. Never blocks: what cannot be sent now is kept until `flush`."""

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
        """Whether something is kept that could not be sent yet."""
        return bool(self._waiting)

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """The fds stay the caller's. Raises `Gone`, and `ValueError` for a message that is too large."""
        data = messages.pack(message)
        if len(data) > MAX_PACKET or len(fds) > MAX_FDS:
            raise ValueError(f"a message of {len(data)} bytes and {len(fds)} fds; {MAX_PACKET} and {MAX_FDS} may be")
        self._waiting.append((data, [os.dup(fd) for fd in fds]))
        self.flush()

    def flush(self) -> None:
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
        """The next message and its fds, close-on-exec and the caller's; None if none is there.

        Raises `Gone`, and `Unreadable`.
        """
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(MAX_PACKET + 1, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Gone(error.strerror or str(error)) from error
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
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
        return message, list(fds)

    def dismiss(self, message: dict[str, Any]) -> None:
        """Says a last thing, so that it is heard whatever the other side has said meanwhile, and closes."""
        with contextlib.suppress(Gone, OSError):
            self.send(message)
            self.sock.shutdown(socket.SHUT_RD)
            while (received := self.receive()) is not None:  # closing on unread data would be a reset there
                for fd in received[1]:
                    os.close(fd)
        self.close()

    def close(self) -> None:
        while self._waiting:
            for fd in self._waiting.popleft()[1]:
                os.close(fd)
        self.sock.close()
