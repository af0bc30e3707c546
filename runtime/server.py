"""Owns the HTTP side of a worker: gunicorn's threaded worker on an inherited socket, without gunicorn's arbiter.

The shim is the arbiter here: it holds the socket, watches the heartbeat and replaces the process. gunicorn's own
control socket, pid files and privilege changes stay out of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import TConn, ThreadWorker

_PROBES = 4
_CONNECTIONS = 1024
_LOOK_AGAIN = 0.02


class _App:
    """What gunicorn asks of an application object."""

    def __init__(self, wsgi: Callable[..., Any]) -> None:
        self._wsgi = wsgi

    def wsgi(self) -> Callable[..., Any]:
        return self._wsgi


class HttpServer(ThreadWorker):  # type: ignore[misc]
    """`run_until_stopped` serves in the calling (main) thread until `stop`, then lets running requests end."""

    nr_conns: int  # gunicorn's: open connections

    def __init__(
        self,
        sock: socket.socket,
        wsgi: Callable[..., Any],
        *,
        capacity: int,
        parent: int = 0,
        on_beat: Callable[[], None],
        accepted: Sequence[socket.socket] = (),
    ) -> None:
        """`capacity` requests at once, and a few threads more for probes and refusals; `on_beat` about every second.

        It ends with the process `parent`, if one is given. `accepted` are connections that wait for it already.
        """
        config = Config()
        config.set("threads", capacity + _PROBES)
        config.set("worker_connections", max(_CONNECTIONS, 2 * capacity))
        config.set("keepalive", 15)
        # gunicorn took these from whoever imported it, which in a forked worker was somebody else.
        config.set("user", os.geteuid())
        config.set("group", os.getegid())
        config.set("graceful_timeout", 5)
        logger = Logger(config)
        logger.error_log.handlers = logging.getLogger().handlers
        self._on_beat = on_beat
        self._beat_at = 0.0
        self._turning = threading.Event()
        self._in_hand = 0  # connections with a thread; only the serving thread counts
        super().__init__(0, parent, [sock], _App(wsgi), 0, config, logger)
        self.retired = False
        self._accepted = accepted

    def run_until_stopped(self) -> None:
        self.init_process()

    def run(self) -> None:
        for client in self._accepted:
            with contextlib.suppress(OSError):  # it has gone away meanwhile
                connection = TConn(self.cfg, client, client.getpeername(), client.getsockname())
                self.nr_conns += 1
                self.enqueue_req(connection)
        super().run()

    def wait_idle(self, deadline: float) -> bool:
        """True once no connection waits in the backlog and every request is answered; False at `deadline`.

        `deadline` on time.monotonic. For any thread but the serving one.
        """
        self._turning.wait(max(0.0, deadline - time.monotonic()))
        idle = threading.Event()
        while self._turning.is_set() and not idle.is_set() and time.monotonic() < deadline:
            self.method_queue.defer(self._report_idle, idle)
            idle.wait(_LOOK_AGAIN)
        return idle.is_set()

    def _report_idle(self, idle: threading.Event) -> None:
        waiting, _, _ = select.select(self.sockets, [], [], 0)
        if not waiting and not self._in_hand:
            idle.set()

    def enqueue_req(self, conn: Any) -> None:
        self._in_hand += 1
        super().enqueue_req(conn)

    def finish_request(self, conn: Any, fs: Any) -> None:
        self._in_hand -= 1
        connections = self.nr_conns
        super().finish_request(conn, fs)
        # gunicorn 27 counts a connection that was cut in the middle of its answer twice when it closes it.
        self.nr_conns = max(self.nr_conns, connections - 1)

    def stop(self, *, at_once: bool = False) -> None:
        """May be called from any thread, also before it runs. `at_once` cuts the requests that still run."""
        if at_once:
            self.cfg.set("graceful_timeout", 0)
        self.alive = False
        with contextlib.suppress(AttributeError, TypeError):  # gunicorn's wake-up pipe exists only once it runs
            self.method_queue.defer(lambda: None)

    def retire(self, done: Callable[[bool], None]) -> None:
        """Stops if there is no connection at all; `done` hears whether. What has not been accepted stays waiting.

        From any thread. Connections that are kept alive count: their clients may be sending a request just now.
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
        if not self.retired:  # it was noticed in the same instant: it stays for the next worker
            super().accept(listener)

    def is_parent_alive(self) -> bool:
        return not self.ppid or bool(super().is_parent_alive())

    def notify(self) -> None:
        self._turning.set()
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat_at = now + 1.0
            self._on_beat()

    def init_signals(self) -> None:
        """Signals are the worker's, which took them before anything else."""
