"""Owns a worker's HTTP server, on a port that the shim has open, too, and how a worker leaves it and loses no request.

The shim is gunicorn's arbiter here: the shim watches the heartbeat and replaces the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cache_agent.web.wsgi import Settings, ThreadedServer

_PROBES = 4
_SO_ATTACH_FILTER = 26
_CONNECTIONS = 1024
_GRACE = 5  # seconds for the requests that run when the server is stopped
_LOOK_AGAIN = 0.02
_HANDSHAKE = 0.05  # seconds for connections that were half made
_SILENT = 1.0  # seconds that a connection without a request may hold up the end


class HttpServer(ThreadedServer):
    """A threaded HTTP server.

    `run_until_stopped` serves in the calling (main) thread until `stop`, then lets running requests end. After that
    `retired` says whether the server ended by `retire`.
    """

    def __init__(
        self,
        sock: socket.socket,
        wsgi: Callable[..., Any],
        *,
        capacity: int,
        parent: int = 0,
        on_beat: Callable[[], None],
        accepted: Sequence[socket.socket] = (),
        settings: Settings | None = None,
    ) -> None:
        """`capacity` requests are served at once, and a few threads more answer probes and refusals.

        `on_beat` is called about every second. The server ends with the process `parent`, if given. `accepted` are
        connections that wait already. `settings` may serve only one server.
        """
        super().__init__(
            sock,
            wsgi,
            threads=capacity + _PROBES,
            connections=max(_CONNECTIONS, 2 * capacity),
            grace=_GRACE,
            parent=parent,
            settings=settings,
        )
        self._on_beat = on_beat
        self._beat_at = 0.0
        self._turning = threading.Event()
        self.retired = False
        self._accepted = accepted

    def run_until_stopped(self) -> None:
        """Serve until `stop`, `retire` or `finish`, and return once requests have ended or their grace is over."""
        self.init_process()

    def run(self) -> None:
        for client in self._accepted:
            with contextlib.suppress(OSError):  # the client may have gone meanwhile
                self.take(client, client.getpeername(), client.getsockname())
        super().run()

    def wait_idle(self, deadline: float) -> bool:
        """Return True once no connection waits in the backlog and every request is answered; False at `deadline`.

        `deadline` is on time.monotonic. For any thread but the serving one.
        """
        self._turning.wait(max(0.0, deadline - time.monotonic()))
        idle = threading.Event()
        while self._turning.is_set() and not idle.is_set() and time.monotonic() < deadline:
            self.method_queue.defer(self._report_idle, idle)
            idle.wait(_LOOK_AGAIN)
        return idle.is_set()

    def _report_idle(self, idle: threading.Event) -> None:
        waiting, _, _ = select.select(self.sockets, [], [], 0)
        if not waiting and not self.in_hand:
            idle.set()

    def stop(self, *, at_once: bool = False) -> None:
        """Stop serving; `at_once` cuts the requests that still run. For any thread, also before the server runs."""
        if at_once:
            self.cfg.set("graceful_timeout", 0)
        super().stop()

    def retire(self, done: Callable[[bool], None]) -> None:
        """Stop if there is no connection at all, and call `done` with whether there was none.

        Connections that are kept alive count: their clients may be sending a request just now. Those that have not been
        accepted stay in the backlog. For any thread.
        """
        self._turning.wait()
        with contextlib.suppress(AttributeError, TypeError, OSError):
            self.method_queue.defer(self._retire, done)

    def _retire(self, done: Callable[[bool], None]) -> None:
        if self.alive and not self.nr_conns:
            self.retired, self.alive = True, False
            self.set_accept_enabled(False)
        done(self.retired)

    def accept(self, listener: Any) -> None:
        if self._accepting:  # else the connection is the next worker's, or the port is closed
            super().accept(listener)

    def finish(self, deadline: float) -> None:
        """Close the port: accept the connections that wait, refuse later ones, let requests run until `deadline`.

        `deadline` is on time.monotonic. Afterwards `in_hand` is the number of requests that were cut. For any thread
        but the serving one.
        """
        for listener in self.sockets:
            _ignore_strangers(listener)
        time.sleep(_HANDSHAKE)
        try:
            self.method_queue.defer(self._close_port, deadline)
        except (AttributeError, TypeError):  # the server never ran
            self.stop()

    def _close_port(self, deadline: float) -> None:
        if self.retired:
            return
        for listener in self.sockets:
            while select.select([listener], [], [], 0)[0]:
                super().accept(listener)
        self.set_accept_enabled(False)
        for listener in self.sockets:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # for the shim, too, which has the same socket
        now = time.monotonic()
        for conn in self.pending_conns:  # their clients have sent nothing, so nothing is lost
            conn.timeout = min(conn.timeout, now + _SILENT)
        self.cfg.set("graceful_timeout", math.ceil(max(0.0, deadline - now)))
        self.alive = False

    def notify(self) -> None:
        self._turning.set()
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat_at = now + 1.0
            self._on_beat()


def _ignore_strangers(listener: socket.socket) -> None:
    """Drop the first packet of each further connection; clients send it again a second later, and are refused then.

    Without this, a connection made between the last `accept` and the port's end would be reset, and its request lost. A
    socket filter (linux/filter.h) sees a packet from the TCP header on: byte 13 has the flags, and in the first packet
    of a connection SYN is set and ACK is not.
    """
    load, mask, equal, end = 0x30, 0x54, 0x15, 0x06  # LD|B|ABS, ALU|AND|K, JMP|JEQ|K, RET|K
    syn, syn_ack, whole = 0x02, 0x12, 0xFFFFFFFF
    code = ((load, 0, 0, 13), (mask, 0, 0, syn_ack), (equal, 0, 1, syn), (end, 0, 0, 0), (end, 0, 0, whole))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
    with contextlib.suppress(OSError):  # other kernels have no socket filters: there such a rare request is lost
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(code), ctypes.addressof(program))
        )
