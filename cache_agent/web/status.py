"""Owns the agent's status over HTTP: metrics, state and events. Only agents with `GLOWPLUG_STATUS` import this.

    GET /              the paths
    GET /healthz       200 while the agent's lock can be had
    GET /metrics       for Prometheus
    GET /status.json   like `glowplug agent status --json`
    GET /events        ?since=NUMBER&limit=COUNT: the last events, with their reasons
    GET /events/stream server-sent events, from `Last-Event-ID` or `since` on
    GET /dashboard     a page that shows all this, with its files and data (see `dashboard`)

All paths but `open_paths` and the dashboard's static files take an operator's token. An agent that asks for no identity
listens on this machine alone, and answers only requests whose Host is this machine's: a web page of another origin,
whose name resolves to 127.0.0.1, is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import msgspec
from flask import Flask, Response, request
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from werkzeug.exceptions import HTTPException
from werkzeug.wsgi import ClosingIterator

from cache_agent.access.control import Access
from cache_agent.errors import AccessDenied, AgentError, BadSetting
from cache_agent.serving.agent import Agent
from cache_agent.web import dashboard
from cache_agent.web.metrics import Collector
from cache_agent.web.wsgi import WsgiServer, listen
from cache_agent.wire.messages import Identity

PATHS = ("/", "/healthz", "/metrics", "/status.json", "/events", "/events/stream", *dashboard.PATHS)
_THREADS = 12
_STREAMS = 8  # of the threads
_KEEP_ALIVE_SECONDS = 15.0
_LOCK_SECONDS = 5.0
_JWT_PARTS = 3


class StatusServer:
    """The HTTP server of an agent's status, from `start` to `close`."""

    def __init__(self, agent: Agent, access: Access, address: str, open_paths: tuple[str, ...]) -> None:
        """Listen on `address`, host:port. Raises `BadSetting`."""
        host, port = parse_address(address)
        if access.open and not _is_local(host):
            raise BadSetting(
                f"GLOWPLUG_STATUS={address} would show others what this node holds, and nobody is asked who he is: "
                "listen on 127.0.0.1, or set GLOWPLUG_IDENTITY or GLOWPLUG_TOKEN_FILE"
            )
        self._ending = threading.Event()
        self._agent = agent
        self._sock = listen(host, port, "GLOWPLUG_STATUS")
        self.port: int = self._sock.getsockname()[1]
        pages = _Pages(agent, access, open_paths, self._ending)
        self._server = WsgiServer(self._sock, pages.app(), threads=_THREADS)

    def start(self) -> None:
        self._server.start()

    def close(self) -> None:
        self._ending.set()
        self._agent.journal.end()
        self._server.stop()
        self._sock.close()


class _Pages:
    """The responses, one method per path; `ending` ends the streams of events."""

    def __init__(self, agent: Agent, access: Access, open_paths: tuple[str, ...], ending: threading.Event) -> None:
        self._agent = agent
        self._access = access
        self._open_paths = {*open_paths, *dashboard.OPEN}
        self._ending = ending
        self._streams = threading.BoundedSemaphore(_STREAMS)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(Collector(agent))

    def app(self) -> Flask:
        """Return the application with the routes of this class and of the dashboard."""
        app = Flask("glowplug-status", static_folder=None)
        app.before_request(self.admit)
        app.register_blueprint(dashboard.blueprint(self._agent))
        app.get("/")(self.index)
        app.get("/healthz")(self.healthz)
        app.get("/metrics")(self.metrics)
        app.get("/status.json")(self.status)
        app.get("/events")(self.events)
        app.get("/events/stream")(self.stream)
        app.register_error_handler(AgentError, _refused)
        app.register_error_handler(HTTPException, _failed)
        return app

    def admit(self) -> Response | None:
        """Return the refusal of a request, or None. Raises `AgentError` for a token without the right."""
        if request.path in self._open_paths:
            return None
        if self._access.open:
            if not _is_local(request.host.rpartition(":")[0] or request.host):
                return _error(403, "denied", "ask for this machine by its own name, like 127.0.0.1")
            return None
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            response = _error(401, "denied", "this takes an operator's token as a bearer token")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        kind = "kubernetes" if token.count(".") == _JWT_PARTS - 1 else "token"
        caller = self._access.identify(Identity(kind, token[:8192]), f"http {request.remote_addr}")
        self._access.require_admin(caller, f"'{request.path}'")
        return None

    def index(self) -> Response:
        return _json({"node": self._agent.node, "paths": PATHS})

    def healthz(self) -> Response:
        if not self._agent.answers(_LOCK_SECONDS):
            return _error(503, "internal", f"the agent's lock could not be had for {_LOCK_SECONDS:.0f} s")
        return _json({"status": "ok"})

    def metrics(self) -> Response:
        encode, kind = choose_encoder(request.headers.get("Accept", ""))
        return Response(encode(self._registry), content_type=kind)

    def status(self) -> Response:
        return _json(self._agent.full_status())

    def events(self) -> Response:
        return _json(self._agent.journal.since(_number("since", 0), _number("limit", 1000)))

    def stream(self) -> Response:
        last = request.headers.get("Last-Event-ID", "")
        since = int(last) if last.isascii() and last.isdecimal() and len(last) < 16 else _number("since", 0)
        if not self._streams.acquire(blocking=False):
            return _error(503, "busy", f"{_STREAMS} streams are open; close one, or ask /events")
        body = ClosingIterator(_stream(self._agent, since, self._ending), self._streams.release)
        return Response(body, content_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _refused(error: AgentError) -> Response:
    status = 403 if isinstance(error, AccessDenied) else 503 if error.retryable else 400
    response = _error(status, error.code, error.text)
    if error.retryable:
        response.headers["Retry-After"] = "5"
    return response


def _failed(error: HTTPException) -> Response:
    return _error(error.code or 500, error.name.lower().replace(" ", "_"), error.description or error.name)


def _stream(agent: Agent, since: int, ending: threading.Event) -> Iterator[bytes]:
    """Yield events as they happen, until `ending` is set. Comments between them find out clients that have gone."""
    yield b": events\n\n"
    over = False
    while not over:
        over = ending.is_set()
        found = agent.journal.wait(since, _KEEP_ALIVE_SECONDS)
        for event in found:
            since = event.number
            yield b"id: %d\nevent: %s\ndata: %s\n\n" % (since, event.kind.encode(), msgspec.json.encode(event))
        if not found:
            yield b": \n\n"


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of "127.0.0.1:9480" or "[::1]:9480". Raises `BadSetting`."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise BadSetting(f"GLOWPLUG_STATUS={text!r} is no address; use one like 127.0.0.1:9480")
    return host, int(port)


def _is_local(host: str) -> bool:
    host = host.removeprefix("[").removesuffix("]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _number(name: str, default: int) -> int:
    text = request.args.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise BadSetting(f"?{name}={text[:50]} is no number")
    return int(text)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), mimetype="application/json")


def _error(status: int, code: str, text: str) -> Response:
    return Response(
        msgspec.json.encode({"error": {"code": code, "message": text}}), status, mimetype="application/json"
    )
