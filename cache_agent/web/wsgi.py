"""gunicorn's threaded worker without gunicorn's arbiter: the base of every HTTP server of the project.

`ThreadedServer` serves on the calling thread, as in a function's worker; `WsgiServer` serves on a thread of its own.
Neither has gunicorn's control socket, pid files, signal handlers and privilege changes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.http.errors import NoMoreData
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers.gthread import TConn, ThreadWorker

from cache_agent.errors import BadSetting

log = logging.getLogger("glowplug.web")

_BACKLOG = 128
_CONNECTIONS = 64
_IDLE_SECONDS = 15  # without a request, until a connection is closed
_STOP_SECONDS = 1  # for running requests; browsers also hold connections open on which they never ask
_TLS_RECORD = 16 << 10  # bytes at most; records are read whole, as a poller does not see decrypted bytes
_NO_CONNECTION = (errno.EAGAIN, errno.ECONNABORTED, errno.EWOULDBLOCK)  # the client went before it was accepted

Secure = Callable[[socket.socket], socket.socket]


class Settings:
    """gunicorn's settings and the logger that they make: 120 objects of 120 classes, for one server.

    A warm layer makes them ahead; each forked child changes its own copy.
    """

    def __init__(self) -> None:
        self.config = Config()
        self.logger = Logger(self.config)
        self.logger.error_log.handlers = logging.getLogger().handlers


class _App:
    """The part of a gunicorn application that a worker uses."""

    def __init__(self, wsgi: Callable[..., Any]) -> None:
        self._wsgi = wsgi

    def wsgi(self) -> Callable[..., Any]:
        return self._wsgi


class _Unreader(SocketUnreader):  # type: ignore[misc]
    """A reader that takes a client's silence beyond the timeout for the end of its stream."""

    _gone = False

    def chunk(self, size_hint: int | None = None) -> bytes:
        if not self._gone:
            with contextlib.suppress(TimeoutError):
                return bytes(super().chunk(size_hint))
            self._gone = True
        return b""


class _HttpConnection(TConn):  # type: ignore[misc]
    """One connection: its TLS handshake runs on the thread that reads the first request; `close` runs once."""

    sock: socket.socket

    def __init__(
        self, config: Config, sock: socket.socket, peer: Any, own: Any, *, patience: float | None, secure: Secure | None
    ) -> None:
        super().__init__(config, sock, peer, own)
        self._patience = patience
        self._secure = secure
        self.data_ready = secure is not None  # a handshake has a deadline of its own

    def init(self) -> None:
        """Prepare to read a request, on the request's thread."""
        first = not self.initialized
        if first and self._secure is not None:
            try:
                self.sock = self._secure(self.sock)
            except OSError as error:  # ssl.SSLError is one
                raise NoMoreData from error
        super().init()
        if self._patience is not None:
            self.sock.settimeout(self._patience)
            if first:
                self.parser.unreader = _Unreader(self.sock, _TLS_RECORD)

    def close(self, graceful: bool = False) -> None:
        if self.sock.fileno() >= 0:
            super().close(graceful)


class ThreadedServer(ThreadWorker):  # type: ignore[misc]
    """A server on the calling thread: `init_process` serves until `stop`, then lets running requests end."""

    nr_conns: int  # gunicorn's: open connections

    def __init__(
        self,
        sock: socket.socket,
        wsgi: Callable[..., Any],
        *,
        threads: int,
        connections: int,
        grace: int,
        kept: int = _IDLE_SECONDS,
        patience: float | None = None,
        secure: Secure | None = None,
        parent: int = 0,
        settings: Settings | None = None,
    ) -> None:
        """Serve `threads` requests at once, and keep up to `connections` - `threads` connections without one.

        In seconds: `grace` for running requests after `stop`, `kept` until a connection without a request is closed,
        `patience` with a client that neither sends nor reads (None: unlimited). `secure` shakes hands for TLS, and
        raises `OSError`. The server ends with the process `parent`, if one is given.
        """
        settings = settings or Settings()
        config = settings.config
        config.set("threads", threads)
        config.set("worker_connections", connections)
        config.set("keepalive", kept)
        config.set("graceful_timeout", grace)
        # gunicorn reads both at import, which in a forked worker ran as another user.
        config.set("user", os.geteuid())
        config.set("group", os.getegid())
        super().__init__(0, parent, [sock], _App(wsgi), 0, config, settings.logger)
        self._patience = patience
        self._secure = secure
        self._busy: set[_HttpConnection] = set()  # connections with a thread; only the serving thread changes the set

    @property
    def in_hand(self) -> int:
        """The number of connections with a thread. For the serving thread, or once the server has ended."""
        return len(self._busy)

    def accept(self, listener: Any) -> None:
        try:
            client, peer = listener.accept()
        except OSError as error:
            if error.errno not in _NO_CONNECTION:
                raise
            return
        self.take(client, peer, listener.getsockname())

    def take(self, client: socket.socket, peer: Any, own: Any) -> None:
        """Serve a connection that was accepted, with these addresses. For the serving thread."""
        send_at_once(client)  # a connection may have waited since before its listener had the option
        self.nr_conns += 1
        self.enqueue_req(_HttpConnection(self.cfg, client, peer, own, patience=self._patience, secure=self._secure))

    def enqueue_req(self, conn: Any) -> None:
        self._busy.add(conn)
        super().enqueue_req(conn)

    def handle(self, conn: Any) -> Any:
        keep = super().handle(conn)
        if not keep:  # gunicorn closes on the serving thread, where one slow client delays all others
            conn.close(graceful=True)
        return keep

    def finish_request(self, conn: Any, fs: Any) -> None:
        self._busy.discard(conn)
        super().finish_request(conn, fs)

    def stop(self) -> None:
        """End, with `grace` for running requests. From any thread, also before the server runs."""
        self.alive = False
        with contextlib.suppress(AttributeError, TypeError):  # gunicorn's wake-up pipe exists only once it runs
            self.method_queue.defer(lambda: None)

    def is_parent_alive(self) -> bool:
        return not self.ppid or bool(super().is_parent_alive())

    def notify(self) -> None:
        """Do nothing: gunicorn's heartbeat to an arbiter, which is absent here."""

    def init_signals(self) -> None:
        """Do nothing: the process has installed its own handlers before."""


class WsgiServer(ThreadedServer):
    """A server on a thread of its own, from `start` to `stop`, once. Any thread."""

    def __init__(self, sock: socket.socket, wsgi: Callable[..., Any], *, threads: int, **options: Any) -> None:
        """`options` are those of `ThreadedServer`."""
        options = {"connections": _CONNECTIONS, "grace": _STOP_SECONDS, **options}
        super().__init__(sock, wsgi, threads=threads, **options)
        self._thread = threading.Thread(target=self.init_process, name="web", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = _STOP_SECONDS + 3.0) -> None:
        """End within `seconds`, and cut the connections that still have a thread."""
        super().stop()
        if self._thread.ident is not None:
            self._thread.join(seconds)
            for conn in list(self._busy):
                with contextlib.suppress(OSError):
                    conn.sock.shutdown(socket.SHUT_RDWR)
            for fd in self.PIPE:
                os.close(fd)
        self.tmp.close()


def listen(host: str, port: int, setting: str) -> socket.socket:
    """Return a listening TCP socket. Raises `BadSetting`, whose text names the `setting` to change."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise BadSetting(f"cannot listen on {host}:{port}: {error}; choose another {setting}") from error
    send_at_once(listener)
    return listener


def send_at_once(sock: socket.socket) -> None:
    """Set TCP_NODELAY on a connection, or on a listener whose connections inherit it; other sockets stay as they are.

    gunicorn sends the headers and the body of a response apart. Without the option the body waits on a reused
    connection until the peer acknowledges the headers, 40 ms later.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
