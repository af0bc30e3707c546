"""The Flask application of a function: reserved routes, the OpenAI routes, and everything else for the handler.

    prepare() ──► Prepared: the routes, the same for all functions     made once in a layer, before it is forked
                     └── Application: config, lifecycle and ledger     made in each worker

Making the routes is a third of the computing in a worker's start, so a layer does that for its workers. An application
writes nothing into the routes: it puts itself into the WSGI environment of each request.
"""

from __future__ import annotations

import hmac
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Concatenate, NewType, ParamSpec, TypeVar, cast

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException
from werkzeug.wsgi import ClosingIterator

from cache_agent.ledger import Ledger
from runtime.config import FunctionConfig
from runtime.errors import FunctionError, NotReady, NotResumable
from runtime.function import transcript
from runtime.function.handler import Context, Event, Events, error_json, to_response
from runtime.http import routes
from runtime.http.body import read_body
from runtime.http.lifecycle import Lifecycle
from runtime.resume.position import parse
from runtime.resume.resumption import handler_query

log = logging.getLogger("glowplug.app")

_RESERVED = "/_/"
_APPLICATION = "glowplug.application"  # in the WSGI environment: the application that the request is for
_AT_END = "glowplug.at_end"  # likewise: calls to make once the response is out, or was broken off
_ENTERED = "glowplug.entered"  # likewise: when the request came, on time.monotonic
_NO_TOKEN = re.compile(r"[^A-Za-z0-9_-]")  # characters that a name in Server-Timing must not have
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

Prepared = NewType("Prepared", Flask)
P = ParamSpec("P")
R = TypeVar("R")


class Application:
    """The WSGI application of one worker."""

    def __init__(
        self,
        config: FunctionConfig,
        lifecycle: Lifecycle,
        ledger: Ledger,
        drain: Callable[[str], None],
        start_kind: Callable[[], str] = lambda: "cold",
        prepared: Prepared | None = None,
    ) -> None:
        """`drain(reason)` begins to drain; `start_kind()` is the layer that the worker was forked from, or "cold".

        Raises `BadConfig`.
        """
        self._config, self._lifecycle, self._ledger, self._start_kind = config, lifecycle, ledger, start_kind
        self._drain = drain
        self._token = config.token()
        self._turns = threading.Semaphore(config.concurrent_handlers)
        self._first = threading.Lock()
        self._flask = prepared or prepare()
        self._openai = routes.Served(
            lifecycle,
            max_body=config.max_body,
            start_limit=config.start_timeout,
            answer_limit=config.longest_answer,
        )

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Let a bounded number of requests in; probes are always answered."""
        environ[_APPLICATION], environ[routes.SERVED] = self, self._openai
        if environ.get("PATH_INFO", "").startswith(_RESERVED):
            return self._flask(environ, start_response)
        try:
            self._lifecycle.enter()
        except FunctionError as error:
            return _failed(error)(environ, start_response)
        entered = environ[_ENTERED] = time.monotonic()
        at_end = environ[_AT_END] = [lambda: self._lifecycle.leave(time.monotonic() - entered)]
        try:
            return ClosingIterator(self._flask(environ, start_response), at_end)
        except BaseException:
            for end in at_end:
                end()
            raise

    def health(self) -> Response:
        return jsonify(status="ok")

    def ready(self) -> tuple[Response, int]:
        lifecycle = self._lifecycle
        done, total = lifecycle.progress
        error = lifecycle.error
        return jsonify(
            state=lifecycle.state,
            phase=lifecycle.phase,
            loaded=done,
            total=total,
            error=error.text if error else None,
        ), 200 if lifecycle.state == "ready" else 503

    def ledger(self) -> Response:
        ledger = self._ledger
        spans = [
            {"owner": span.owner, "name": span.name, "start_ns": span.start, "end_ns": span.end}
            for span in ledger.spans()
        ]
        start = {"start_id": ledger.start_id, "node": ledger.node, "start": self._start_kind()}
        return jsonify(**start, state=self._lifecycle.state, spans=spans)

    def drain(self) -> tuple[Response, int]:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not self._token or not hmac.compare_digest(given.encode(), self._token.encode()):
            return jsonify(
                error={"code": "denied", "message": "draining takes the agent's token as a bearer token"}
            ), 403
        self._drain(f"asked for by {request.remote_addr}")
        return jsonify(state=self._lifecycle.state), 202

    def handle(self, path: str) -> Response:
        config, lifecycle, turns = self._config, self._lifecycle, self._turns
        if request.path.startswith(_RESERVED):
            return _error(404, "not_found", f"{request.path} is no route of glowplug's")
        body = read_body(request.environ, config.max_body)
        model = lifecycle.wait(config.start_timeout)
        if model is None:
            raise NotReady(f"the model did not arrive within {config.start_timeout:.0f} s", retry_after=5.0)
        if lifecycle.handler is None:
            return _error(
                404,
                "not_found",
                f"this function has no handler, and /{path} is none of the /v1/… routes that it serves",
            )
        accept, sink = request.headers.get("Accept", ""), None
        ends = request.environ[_ENTERED] + config.longest_answer
        at_end = request.environ[_AT_END]
        if model.sessions is not None:
            wanted = handler_query(cast(Mapping[str, str], request.headers), request.full_path, body)
            if (rest := transcript.resumed(model.sessions, model, wanted)) is not None:
                response = to_response(rest, accept, ends=ends)
                if isinstance(response, Events):
                    at_end.append(response.pump.leave)
                return response
            sink = transcript.sink(model.sessions, wanted)
        elif parse(request.headers.get("Last-Event-ID", "")) is not None:
            raise NotResumable("this function keeps no requests: set GLOWPLUG_CHECKPOINTS to keep them from now on")
        event = Event(body, cast(Mapping[str, str], request.headers), request.method, request.args, request.path)
        turns.acquire()
        try:
            response = lifecycle.handler(event, Context(model), accept, sink, ends)
        except BaseException:
            turns.release()
            raise
        if isinstance(response, Events):  # the handler's code runs until the stream's end
            at_end.append(response.pump.leave)
            response.pump.on_end(turns.release)
        else:
            at_end.append(turns.release)
        return response

    def announce(self, response: Response) -> Response:
        """Add the spans of the start to the worker's first answer, as headers."""
        starting = request.path.startswith(_RESERVED) or self._lifecycle.state == "starting"
        if not starting and self._first.acquire(blocking=False):
            response.headers["X-Glowplug-Start"] = self._start_kind()
            response.headers["Server-Timing"] = ", ".join(
                f"{span.owner}-{_NO_TOKEN.sub('-', span.name.partition(',')[0])};dur={span.ms:.1f}"
                for span in self._ledger.spans()
            )
        return response


def prepare() -> Prepared:
    """Make the routes, which are the same for every function."""
    app = Flask("glowplug", static_folder=None)
    app.get("/_/health")(_bound(Application.health))
    app.get("/_/ready")(_bound(Application.ready))
    app.get("/_/ledger")(_bound(Application.ledger))
    app.post("/_/drain")(_bound(Application.drain))
    app.register_blueprint(routes.routes)
    handle = _bound(Application.handle)
    app.route("/", defaults={"path": ""}, methods=_METHODS)(handle)
    app.route("/<path:path>", methods=_METHODS)(handle)
    app.errorhandler(FunctionError)(_failed)
    app.errorhandler(HTTPException)(_refused)
    app.after_request(_bound(Application.announce))
    return Prepared(app)


def _bound(method: Callable[Concatenate[Application, P], R]) -> Callable[P, R]:
    """Return a view that calls `method` of the application that the present request is for."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return method(cast(Application, request.environ[_APPLICATION]), *args, **kwargs)

    return call


def _failed(error: FunctionError) -> Response:
    response = Response(error_json(error), error.status, mimetype="application/json")
    if retry_after := getattr(error, "retry_after", None):
        response.headers["Retry-After"] = str(max(1, round(retry_after)))
    return response


def _refused(error: HTTPException) -> Response:
    return _error(error.code or 500, error.name.lower().replace(" ", "_"), error.description or error.name)


def _error(status: int, code: str, message: str) -> Response:
    error = FunctionError(message)
    error.code, error.status = code, status  # type: ignore[misc]
    return Response(error_json(error), status, mimetype="application/json")
