"""Owns the HTTP side of a worker: gunicorn's threaded worker on an inherited socket, without gunicorn's arbiter.

The shim is the arbiter here: it holds the socket, watches the heartbeat and replaces the process. gunicorn's own
control socket, pid files and privilege changes stay out of it.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import ThreadWorker

_PROBES = 4
_CONNECTIONS = 1024


class _App:
    """What gunicorn asks of an application object."""

    def __init__(self, wsgi: Callable[..., Any]) -> None:
        self._wsgi = wsgi

    def wsgi(self) -> Callable[..., Any]:
        return self._wsgi


class HttpServer(ThreadWorker):  # type: ignore[misc]
    """`run_until_stopped` serves in the calling (main) thread until `stop`, then lets running requests end."""

    def __init__(
        self,
        sock: socket.socket,
        wsgi: Callable[..., Any],
        *,
        capacity: int,
        parent: int,
        on_beat: Callable[[], None],
        on_signal: Callable[[int], None],
    ) -> None:
        """`capacity` requests at once, and a few threads more for probes and refusals. `on_beat` about every second,
        `on_signal` from the signal handler: it may only record."""
        config = Config()
        config.set("threads", capacity + _PROBES)
        config.set("worker_connections", max(_CONNECTIONS, 2 * capacity))
        config.set("keepalive", 15)
        config.set("graceful_timeout", 5)
        logger = Logger(config)
        logger.error_log.handlers = logging.getLogger().handlers
        self._on_beat = on_beat
        self._on_signal = on_signal
        self._beat_at = 0.0
        super().__init__(0, parent, [sock], _App(wsgi), 0, config, logger)

    def run_until_stopped(self) -> None:
        self.init_process()

    def stop(self) -> None:
        """May be called from any thread, also before it runs."""
        self.alive = False
        with contextlib.suppress(AttributeError, TypeError):  # gunicorn's wake-up pipe exists only once it runs
            self.method_queue.defer(lambda: None)

    def notify(self) -> None:
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat_at = now + 1.0
            self._on_beat()

    def init_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, lambda number, _frame: self._on_signal(number))
            signal.siginterrupt(number, False)
