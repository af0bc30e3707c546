"""A small HTTP server for callers inside the cluster: bounded requests, and each answer in one send.

Flask under gunicorn writes headers and body apart, which cost a scheduler 40 ms per pod; and an answer here is a
function of a body, for which a framework has nothing to add.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

from cache_agent.errors import AgentUnreachable, BadSetting
from cache_agent.stamp import Stamp, stamp

log = logging.getLogger("glowplug.web")

MAX_BODY = 16 << 20
_CONNECTIONS = 64
_IDLE_SECONDS = 60.0
_HANDSHAKE_SECONDS = 5.0


class Answer(NamedTuple):
    """`body` is JSON."""

    status: int
    body: bytes


class Refused(Exception):
    """The request cannot be answered: HTTP status and a sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


Routes = Mapping[tuple[str, str], Callable[[bytes], Answer]]


class Certificate(NamedTuple):
    """Files in PEM. They are read again when they change: certificates are renewed under running servers."""

    chain: Path
    key: Path


class WebServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves `routes`, (method, path) → function of the body, until `shutdown`. Raises `BadSetting`."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, routes: Routes, certificate: Certificate | None = None) -> None:
        self.routes = {("GET", "/healthz"): lambda _: Answer(200, b'{"status": "ok"}'), **routes}
        self._places = threading.BoundedSemaphore(_CONNECTIONS)
        self._certificate = certificate
        self._context: ssl.SSLContext | None = None
        self._stamps: list[Stamp] = []
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._load(certificate)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise BadSetting(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            log.warning("refused a connection: %d are open", _CONNECTIONS)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # out of threads
            self._places.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context is None:
            super().finish_request(request, client_address)
            return
        assert self._certificate is not None, "there is a context for it"
        with contextlib.suppress(BadSetting):  # a pair that is just being renewed: the old one is good for this caller
            self._load(self._certificate)
        request.settimeout(_HANDSHAKE_SECONDS)
        with self._context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        log.debug("connection of %s ended", client_address, exc_info=True)

    def _load(self, certificate: Certificate) -> None:
        try:
            stamps = [stamp(path) for path in certificate]
            if stamps != self._stamps and self._context is not None:
                self._context.load_cert_chain(*certificate)
                self._stamps = stamps
        except OSError as error:  # ssl.SSLError is one
            raise BadSetting(
                f"{certificate.chain} and {certificate.key} are no certificate and key: {error}"
            ) from error


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    server: WebServer

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_GET  # noqa: N815  http.server's name

    def _answer(self) -> None:
        try:
            body = self._body()
            path = self.path.partition("?")[0]
            route = self.server.routes.get((self.command, path))
            if route is None:
                known = any(path == place for _, place in self.server.routes)
                raise Refused(405 if known else 404, f"there is no {self.command} {path}")
            answer = route(body)
        except Refused as error:
            answer = Answer(error.status, _error(error.text))
        except Exception:
            log.exception("answering %s failed", self.path)
            answer = Answer(500, _error("the server failed; its log has the traceback"))
        self._send(answer)

    def _body(self) -> bytes:
        """The body of a length that is said beforehand, or what is wrong with it; the connection then ends."""
        length = self.headers.get("Content-Length", "0")
        self.close_connection, keep = True, self.close_connection
        if self.headers.get("Transfer-Encoding") or not length.isdecimal():
            raise Refused(411, "send a body with its Content-Length")
        if len(length) > len(str(MAX_BODY)) or int(length) > MAX_BODY:
            raise Refused(413, f"a body has {MAX_BODY} bytes at most")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(400, "the body ended early")
        self.close_connection = keep
        return body

    def _send(self, answer: Answer) -> None:
        reason = HTTPStatus(answer.status).phrase
        close = "Connection: close\r\n" if self.close_connection else ""
        head = (
            f"HTTP/1.1 {answer.status} {reason}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(answer.body)}\r\n{close}\r\n"
        )
        self.connection.sendall(head.encode("ascii") + answer.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """http.server's own refusals, of requests that are none."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self._send(Answer(code, _error(message or HTTPStatus(code).phrase)))

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  http.server's name
        log.debug(format, *arguments)


def _error(text: str) -> bytes:
    return json.dumps({"error": text}).encode()


def check(host: str, port: int) -> None:
    """Raises `AgentUnreachable` unless a server there says that it lives."""
    connection = HTTPConnection(host, port, timeout=_HANDSHAKE_SECONDS)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        raise AgentUnreachable(f"nobody answers on {host}:{port}: {error}") from error
    finally:
        connection.close()
    if status != HTTPStatus.OK:
        raise AgentUnreachable(f"{host}:{port} answers {status}")


def serve_until_told(server: WebServer) -> None:
    """Serves until SIGTERM or SIGINT; running answers are finished by their threads or lost with the process."""
    stopping = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="web")
    with server:
        thread.start()
        signal.sigwait(stopping)
        server.shutdown()
        thread.join()
