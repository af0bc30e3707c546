"""An HTTP server for callers inside the cluster, whose responses are functions of a request's body.

All bodies are JSON, refusals and replies to malformed requests included.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Any, NamedTuple

from gunicorn.http.errors import (
    ExpectationFailed,
    InvalidHeader,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)

from cache_agent.errors import AgentUnreachable
from cache_agent.kube.certificate import Certificate
from cache_agent.web.wsgi import WsgiServer, listen

log = logging.getLogger("glowplug.web")

MAX_BODY = 16 << 20
_THREADS = 64
_CONNECTIONS = 128
_IDLE_SECONDS = 60
_CHECK_SECONDS = 5.0
_STATUS = {LimitRequestLine: 414, LimitRequestHeaders: 431, ExpectationFailed: 417, UnsupportedTransferCoding: 411}


class JsonAnswer(NamedTuple):
    """A response: HTTP status and a body of JSON."""

    status: int
    body: bytes


class RequestRefused(Exception):
    """The refusal of a request: HTTP status and a sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


Routes = Mapping[tuple[str, str], Callable[[bytes], JsonAnswer]]


class RoutesServer(WsgiServer):
    """A server of `routes`, from (method, path) to a function of the body, and of GET /healthz."""

    def __init__(self, host: str, port: int, routes: Routes, certificate: Certificate | None = None) -> None:
        """Listen. Raises `BadSetting`."""
        self._routes = {("GET", "/healthz"): lambda _: JsonAnswer(200, b'{"status": "ok"}'), **routes}
        sock = listen(host, port, "--port")
        self.port: int = sock.getsockname()[1]
        super().__init__(
            sock,
            self._respond,
            threads=_THREADS,
            connections=_CONNECTIONS,
            kept=_IDLE_SECONDS,
            patience=_IDLE_SECONDS,
            secure=None if certificate is None else certificate.secure,
        )

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Handle a request whose body can be read; any other ends the connection."""
        _require_length(req.headers)
        return super().handle_request(req, conn)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:  # noqa: ARG002  gunicorn's
        """Send the refusal of a malformed request."""
        if isinstance(exc, OSError):  # the connection is broken, and takes no response
            return
        refused = _refusal(exc)
        log.debug("refused a request from %s: %s", addr, refused.text)
        body = _error(refused.text)
        head = (
            f"HTTP/1.1 {refused.status} {HTTPStatus(refused.status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            client.sendall(head.encode("ascii") + body)

    def _respond(self, environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            answer = self._answer(environ)
        except RequestRefused as error:
            answer = JsonAnswer(error.status, _error(error.text))
        except Exception:
            log.exception("answering %s failed", environ["PATH_INFO"])
            answer = JsonAnswer(500, _error("the server failed; its log has the traceback"))
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(answer.body)))]
        start_response(f"{answer.status} {HTTPStatus(answer.status).phrase}", headers)
        return [answer.body]

    def _answer(self, environ: Mapping[str, Any]) -> JsonAnswer:
        length = int(environ.get("CONTENT_LENGTH", 0))
        body = environ["wsgi.input"].read(length)
        if len(body) < length:
            raise RequestRefused(400, "the body ended early")
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        route = self._routes.get((method, path))
        if route is None:
            known = any(path == place for _, place in self._routes)
            raise RequestRefused(405 if known else 404, f"there is no {method} {path}")
        return route(body)


def _require_length(headers: Iterable[tuple[str, str]]) -> None:
    """Raise `RequestRefused` unless the headers give the body's length, within the bound."""
    found = dict(headers)
    length = found.get("CONTENT-LENGTH", "0")
    if "TRANSFER-ENCODING" in found or not (length.isascii() and length.isdecimal()):
        raise RequestRefused(411, "send a body with its Content-Length")
    if len(length) > len(str(MAX_BODY)) or int(length) > MAX_BODY:
        raise RequestRefused(413, f"a body has {MAX_BODY} bytes at most")


def _refusal(error: BaseException) -> RequestRefused:
    if isinstance(error, RequestRefused):
        return error
    if isinstance(error, InvalidHeader) and error.req is not None:  # gunicorn's error for a malformed length
        try:
            _require_length(error.req.headers)
        except RequestRefused as refused:
            return refused
    if isinstance(error, ParseException):
        return RequestRefused(_STATUS.get(type(error), 400), str(error))
    log.error("a request failed", exc_info=error)
    return RequestRefused(500, "the server failed; its log has the traceback")


def _error(text: str) -> bytes:
    return json.dumps({"error": text}).encode()


def check(host: str, port: int) -> None:
    """Raise `AgentUnreachable` unless a server there answers its health check."""
    connection = HTTPConnection(host, port, timeout=_CHECK_SECONDS)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        raise AgentUnreachable(f"nobody answers on {host}:{port}: {error}") from error
    finally:
        connection.close()
    if status != HTTPStatus.OK:
        raise AgentUnreachable(f"{host}:{port} answers {status}")


def serve_until_stopped(server: RoutesServer) -> None:
    """Serve until SIGTERM or SIGINT comes; running requests then have a second to end."""
    stopping = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    server.start()
    signal.sigwait(stopping)
    server.stop()
