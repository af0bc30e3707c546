"""The line between a worker and its shim: one message (see messages.py) per line. Standard library only.

A line feed inside a message is a vertical tab on the line.

worker → shim
    {"beat": 1}                                         the HTTP loop turns; silence means the worker hangs
    {"state": "http"}                                   the worker answers on the port
    {"state": "ready", "kind": name}                    the model, of this type, is loaded and the handler imported
    {"state": "draining"} … {"state": "drained"}        it finishes what runs; it has finished, and exits with 0
    {"state": "retired"}                                it was asked to, has no request, takes no more, and exits with 0
    {"state": "needed"}                                 it was asked to retire, and has connections: it goes on
    {"load": n, "turn": t}                              n requests are inside; turns count, as lines may overtake
    {"bytes": n}                                        memory that would be free without the worker; once it is idle
    {"spans": [(owner, name, start, end), …]}           new spans of the start's ledger (ns of CLOCK_MONOTONIC)
    {"agent": why}                                      its agent is of no use: it asks for a private one
    {"error": code, "text": text}                       why it is about to exit
    {"keep": n} + fds                                   weights that came over TCP, for the next worker: see kept.py
shim → worker
    {"kept": n} + fds                                   those of an earlier worker; first of all, and over TCP only
    {"agent": path}                                     the private agent's socket
    {"retire": 1}                                       end, if that costs nobody anything; its end says: end at once

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
    """The worker's end. Never blocks: a shim that does not read loses beats, not the worker."""

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
                # A line cut short would garble the next one; a worker that its shim does not hear ends with it.
                self._sock.close()
                self._sock = None

    def keep(self, fds: Sequence[int]) -> None:
        """Gives the shim what the next worker can use; see `kept`. The fds stay the caller's."""
        from runtime.process import fd_store as kept

        with self._lock, contextlib.suppress(OSError):  # the next worker fetches it all again, then
            if self._sock is not None and len(fds) <= kept.MOST_FDS:
                kept.send(self._sock, "keep", fds)

    def kept(self) -> list[int]:
        """What an earlier worker gave, the caller's from now on. Once, before `messages`, and if the shim keeps any."""
        from runtime.process import fd_store as kept

        with self._lock:
            try:
                return kept.receive(self._sock)[1] if self._sock is not None else []
            except OSError:  # nothing came: it is no shim of ours
                return []

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the shim says, until it is gone. For one thread of its own."""
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
        rows = list(spans)
        for start in range(0, len(rows), 100):
            self.send(spans=rows[start : start + 100])


class ShimEnd:
    """The shim's end of one worker's line. Never blocks. `ended` once the worker has closed its own."""

    def __init__(self, sock: socket.socket, kept: FdStore | None = None, unread: bytes = b"") -> None:
        """Memory that the worker gives goes to `kept`, and it gets what is there. `unread` came before."""
        sock.setblocking(False)
        self._sock = sock
        self._kept = kept
        self._lines = Lines()
        self._early = self._lines.feed(unread)
        if kept is not None:
            kept.give(sock)
        self.ended = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def messages(self) -> list[dict[str, Any]]:
        """All that have come."""
        found, self._early = self._early, []
        while not self.ended:
            try:
                data = self._sock.recv(64 << 10) if self._kept is None else self._kept.receive(self._sock)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.ended = not data
            found += self._lines.feed(data)
        return found

    def tell(self, **message: object) -> None:
        """A worker that does not read, or is gone, is told nothing."""
        with contextlib.suppress(OSError):
            self._sock.send(line(message))

    def close(self) -> None:
        self._sock.close()


class Lines:
    """Bytes in, messages out. Garbage is skipped: a worker's user code may have got hold of the fd."""

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
