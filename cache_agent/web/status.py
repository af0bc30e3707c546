"""Owns what the agent says of itself over HTTP: metrics, state and events. Made only where the settings ask for it.

    GET /              what there is
    GET /healthz       200 while the agent's lock can be had
    GET /metrics       for Prometheus
    GET /status.json   as `glowplug-agent status --json` shows it
    GET /events        ?since=NUMBER&limit=COUNT: what happened lately, and why
    GET /events/stream server-sent events, from `Last-Event-ID` or `since` on
    GET /dashboard     a page that shows all this, and what is behind it (see `dashboard`)

Everything but the paths in `open_paths`, and the empty page, takes an operator's token. Where nobody is asked who he
is, only this machine can connect; a page of another origin in somebody's browser cannot ask under a name of its own.
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
from cache_agent.agent import Agent
from cache_agent.errors import AccessDenied, AgentError, BadConfig
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


class Status:
    """The server, from `start` to `close`."""

    def __init__(self, agent: Agent, access: Access, address: str, open_paths: tuple[str, ...]) -> None:
        """`address` is host:port. Raises `BadConfig`."""
        host, port = parse_address(address)
        if access.open and not _is_local(host):
            raise BadConfig(
                f"GLOWPLUG_STATUS={address} would show others what this node holds, and nobody is asked who he is: "
                "listen on 127.0.0.1, or set GLOWPLUG_IDENTITY or GLOWPLUG_TOKEN_FILE"
            )
        self._ending = threading.Event()
        self._agent = agent
        self._sock = listen(host, port)
        self.port: int = self._sock.getsockname()[1]
        self._server = WsgiServer(self._sock, create_app(agent, access, open_paths, self._ending), threads=_THREADS)

    def start(self) -> None:
        self._server.start()

    def close(self) -> None:
        self._ending.set()
        self._agent.journal.end()
        self._server.stop()
        self._sock.close()


def create_app(agent: Agent, access: Access, open_paths: tuple[str, ...], ending: threading.Event) -> Flask:
    app = Flask("glowplug-status", static_folder=None)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(agent))
    streams = threading.BoundedSemaphore(_STREAMS)

    @app.before_request
    def admit() -> Response | None:
        if request.path in open_paths or request.path in dashboard.OPEN:
            return None
        if access.open:
            if not _is_local(request.host.rpartition(":")[0] or request.host):
                return _error(403, "denied", "ask for this machine by its own name, like 127.0.0.1")
            return None
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            response = _error(401, "denied", "this takes an operator's token as a bearer token")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        kind = "kubernetes" if token.count(".") == _JWT_PARTS - 1 else "token"
        caller = access.identify(Identity(kind, token[:8192]), f"http {request.remote_addr}")
        access.require_admin(caller, f"'{request.path}'")
        return None

    app.register_blueprint(dashboard.blueprint(agent))

    @app.get("/")
    def index() -> Response:
        return _json({"node": agent.node, "paths": PATHS})

    @app.get("/healthz")
    def healthz() -> Response:
        if not agent.answers(_LOCK_SECONDS):
            return _error(503, "internal", f"the agent's lock could not be had for {_LOCK_SECONDS:.0f} s")
        return _json({"status": "ok"})

    @app.get("/metrics")
    def metrics() -> Response:
        encode, kind = choose_encoder(request.headers.get("Accept", ""))
        return Response(encode(registry), content_type=kind)

    @app.get("/status.json")
    def status() -> Response:
        return _json(agent.full_status())

    @app.get("/events")
    def events() -> Response:
        return _json(agent.journal.since(_number("since", 0), _number("limit", 1000)))

    @app.get("/events/stream")
    def stream() -> Response:
        last = request.headers.get("Last-Event-ID", "")
        since = int(last) if last.isascii() and last.isdecimal() and len(last) < 16 else _number("since", 0)
        if not streams.acquire(blocking=False):
            return _error(503, "busy", f"{_STREAMS} streams are open; close one, or ask /events")
        body = ClosingIterator(_stream(agent, since, ending), streams.release)
        return Response(body, content_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.errorhandler(AgentError)
    def refused(error: AgentError) -> Response:
        status = 403 if isinstance(error, AccessDenied) else 503 if error.retryable else 400
        response = _error(status, error.code, error.text)
        if error.retryable:
            response.headers["Retry-After"] = "5"
        return response

    @app.errorhandler(HTTPException)
    def failed(error: HTTPException) -> Response:
        return _error(error.code or 500, error.name.lower().replace(" ", "_"), error.description or error.name)

    return app


def _stream(agent: Agent, since: int, ending: threading.Event) -> Iterator[bytes]:
    """Events as they happen, the last one included; now and then a comment, which finds out clients that are gone."""
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
    """(host, port) from "127.0.0.1:9480" or "[::1]:9480". Raises `BadConfig`."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise BadConfig(f"GLOWPLUG_STATUS={text!r} is no address; use one like 127.0.0.1:9480")
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
        raise BadConfig(f"?{name}={text[:50]} is no number")
    return int(text)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), mimetype="application/json")


def _error(status: int, code: str, text: str) -> Response:
    return Response(
        msgspec.json.encode({"error": {"code": code, "message": text}}), status, mimetype="application/json"
    )
