"""The line between a worker and its shim: one message (see messages.py) per line. Standard library only.

A line feed inside a message is a vertical tab on the line.

worker → shim
    {"beat": 1}                                         the HTTP loop turns; silence means the worker hangs
    {"state": "http"}                                   the worker answers on the port
    {"state": "ready", "kind": name}                    the model, of this type, is loaded and the handler imported
    {"state": "draining"} … {"state": "drained"}        it finishes what runs; it has finished, and exits with 0
    {"state": "retired"}                                asked to retire, it has no request, takes no more, exits with 0
    {"state": "needed"}                                 asked to retire, it has connections, and goes on
    {"load": n, "turn": t}                              n requests are inside; turns count, as lines may overtake
    {"bytes": n}                                        memory that would be free without the worker; once it is idle
    {"spans": [(owner, name, start, end), …]}           new spans of the start's ledger (ns of CLOCK_MONOTONIC)
    {"agent": why}                                      its agent is of no use: it asks for a private one
    {"error": code, "text": text}                       why it is about to exit
    {"keep": n} + fds                                   weights that came over TCP, for the next worker: see fd_store.py
shim → worker
    {"kept": n} + fds                                   weights of an earlier worker; first of all, and over TCP only
    {"agent": path}                                     the private agent's socket
    {"retire": 1}                                       end, if no connection is open
    the end of the line                                 end at once

Process tree and fds of pod mode:

    shim ─┬─ worker         listening TCP socket, control socket; everything else is closed on exec, or by name
          ├─ zygote ─┬─ worker                     the next ones are forked; the listening socket is always the shim's
          │          └─ zygote of the model ── worker
          └─ private agent  listening unix socket in a directory that only this user can open; ends with the shim
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime.process.messages import Span, pack, unpack

if TYPE_CHECKING:
    from runtime.process.fd_store import FdStore

MAX_LINE = 64 << 10


def line(message: Mapping[str, Any]) -> bytes:
    """Return the bytes of a message on the line."""
    return pack(message).replace(b"\n", b"\v") + b"\n"


class WorkerEnd:
    """The worker's end of the line. Never blocks: a shim that does not read loses beats, not the worker."""

    def __init__(self, sock: socket.socket | None) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        if sock is not None:
            sock.settimeout(1.0)

    def send(self, **message: object) -> None:
        data = line(message)
        with self._lock:
            if self._sock is None:
                return
            try:
                self._sock.sendall(data)
            except OSError:
                # A message cut short would garble the next one. Without its line a worker ends.
                self._sock.close()
                self._sock = None

    def store(self, fds: Sequence[int]) -> None:
        """Put weights into the shim's fd store, for the next worker; `[]` empties it. The fds stay the caller's."""
        from runtime.process import fd_store

        with self._lock, contextlib.suppress(OSError):  # without stored weights the next worker fetches them again
            if self._sock is not None and len(fds) <= fd_store.MOST_FDS:
                fd_store.send(self._sock, "keep", fds)

    def stored(self) -> list[int]:
        """Return the fds of the shim's store, which the caller closes. Once, before `messages`, and over TCP only."""
        from runtime.process import fd_store

        with self._lock:
            try:
                return fd_store.receive(self._sock)[1] if self._sock is not None else []
            except OSError:  # nothing came: the other end is no shim
                return []

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what the shim says, until it is gone. For a thread of its own."""
        sock, lines = self._sock, Lines()
        if sock is None:
            return
        with sock.dup() as reading:
            reading.setblocking(False)
            poller = select.poll()
            poller.register(reading, select.POLLIN)
            while True:
                poller.poll()
                try:
                    data = reading.recv(4096)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    return
                yield from lines.feed(data)

    def spans(self, spans: Iterable[Span]) -> None:
        """Send new spans of the ledger, in messages that are short enough for the line."""
        rows = list(spans)
        for start in range(0, len(rows), 100):
            self.send(spans=rows[start : start + 100])


class ShimEnd:
    """The shim's end of one worker's line. Never blocks. `ended` is true once the worker has closed its end."""

    def __init__(self, sock: socket.socket, fd_store: FdStore | None = None, unread: bytes = b"") -> None:
        """Give the worker what `fd_store` has, and the store what the worker gives. `unread` was read earlier."""
        sock.setblocking(False)
        self._sock = sock
        self._fd_store = fd_store
        self._lines = Lines()
        self._early = self._lines.feed(unread)
        if fd_store is not None:
            fd_store.give(sock)
        self.ended = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def messages(self) -> list[dict[str, Any]]:
        """Return all messages that have come."""
        found, self._early = self._early, []
        while not self.ended:
            try:
                data = self._sock.recv(64 << 10) if self._fd_store is None else self._fd_store.receive(self._sock)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.ended = not data
            found += self._lines.feed(data)
        return found

    def tell(self, **message: object) -> None:
        """Send a message; it is lost where the worker does not read, or is gone."""
        with contextlib.suppress(OSError):
            self._sock.send(line(message))

    def close(self) -> None:
        self._sock.close()


class Lines:
    """A decoder of lines: bytes in, messages out. Garbage is skipped: user code may have got hold of the fd."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > MAX_LINE:
            self._buffer = b""
        found = []
        for each in lines:
            with contextlib.suppress(ValueError):
                found.append(unpack(each.replace(b"\v", b"\n")))
        return found
