"""Connections while a function has no worker: probes are answered here, anything else is left for a worker.

A platform probes an idle function every few seconds for as long as it runs. If a probe took a worker, there would
always be one. Standard library only.
"""

from __future__ import annotations

import contextlib
import select
import socket

PROBES = {
    b"GET /_/health": b'{"status":"ok"}\n',
    b"GET /_/ready": b'{"state":"parked"}\n',  # on standby counts as ready: a request has a worker started
}
PROBE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
PROBE_BYTES = 64  # bytes that tell a probe from everything else
PROBE_MS = 50  # ms that the first bytes of a connection may take


def take(listener: socket.socket) -> socket.socket | None:
    """Accept the connection that waits. Return it, with its bytes unread, if a worker has to serve it."""
    listener.setblocking(False)
    try:
        connection, _ = listener.accept()
    except OSError:
        return None  # the client has gone away again
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    poller.poll(PROBE_MS)
    connection.setblocking(False)
    try:
        begin = connection.recv(PROBE_BYTES, socket.MSG_PEEK)
    except BlockingIOError:
        return connection  # a slow client
    except OSError:
        begin = b""
    for request, body in PROBES.items():
        if begin.startswith((request + b" ", request + b"?")):
            _answer(connection, body)
            return None
    if not begin:  # the client only connected
        connection.close()
        return None
    return connection


def _answer(connection: socket.socket, body: bytes) -> None:
    with connection, contextlib.suppress(OSError):
        connection.recv(64 << 10)  # unread bytes would reset the connection, answer included
        connection.send(PROBE_HEAD % len(body) + body)
        connection.shutdown(socket.SHUT_WR)
