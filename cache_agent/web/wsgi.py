"""Serves a WSGI application from a thread of this process: gunicorn's threaded worker, without its arbiter."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import ThreadWorker

from cache_agent.errors import BadConfig

_CONNECTIONS = 64
_STOP_SECONDS = 1  # for answers on their way; browsers hold connections open on which they never ask


class _App:
    """What gunicorn asks of an application object."""

    def __init__(self, wsgi: Callable[..., Any]) -> None:
        self._wsgi = wsgi

    def wsgi(self) -> Callable[..., Any]:
        return self._wsgi


class WsgiServer(ThreadWorker):  # type: ignore[misc]
    """`start` to `stop`, once; from any thread."""

    def __init__(self, sock: socket.socket, wsgi: Callable[..., Any], *, threads: int) -> None:
        config = Config()
        config.set("threads", threads)
        config.set("worker_connections", _CONNECTIONS)
        config.set("keepalive", 15)
        config.set("graceful_timeout", _STOP_SECONDS)
        logger = Logger(config)
        logger.error_log.handlers = logging.getLogger().handlers
        super().__init__(0, os.getppid(), [sock], _App(wsgi), 0, config, logger)
        self._thread = threading.Thread(target=self.init_process, name="status", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = _STOP_SECONDS + 3.0) -> None:
        self.alive = False
        with contextlib.suppress(AttributeError, TypeError):  # its wake-up pipe exists only once it runs
            self.method_queue.defer(lambda: None)
        if self._thread.ident is not None:
            self._thread.join(seconds)
            for fd in self.PIPE:
                os.close(fd)
        self.tmp.close()

    def notify(self) -> None:
        """Nobody watches this thread's heartbeat."""

    def is_parent_alive(self) -> bool:
        return True

    def init_signals(self) -> None:
        """Signals are the process's, and its main thread's."""


def listen(host: str, port: int) -> socket.socket:
    """Raises `BadConfig`."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise BadConfig(f"cannot listen on {host}:{port}: {error}; choose another GLOWPLUG_STATUS") from error
    send_at_once(listener)
    return listener


def send_at_once(sock: socket.socket) -> None:
    """Set TCP_NODELAY on a connection, or on a listener whose connections inherit it; other sockets stay as they are.

    gunicorn sends the headers of an answer and its body apart. Without the option the body waits on a kept connection
    until the peer acknowledges the headers, 40 ms later.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
