"""Owns the OpenAI-compatible routes: requests checked and refused by name, answers whole or as an event stream.

    body ──► Struct ──► Job ──► AnswerRequest ──► (wait for the model) ──► Run ──► JSON or events

The routes are the same for all functions. The application puts a `Served` into each request's WSGI environment, from
which a route knows its model and limits.

A request that can be refused without the model is refused before anything is sent. A stream that has begun reports an
error in a `data: {"error": …}` event, which OpenAI's clients raise, and ends with `[DONE]` in any case. A client that
goes away cancels its generations.
"""

from __future__ import annotations

import base64
import logging
import math
import select
import socket
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import msgspec
from flask import Blueprint, Response, request
from werkzeug.exceptions import HTTPException

from runtime import sse
from runtime.engine.base import TokenEvent
from runtime.errors import AnswerTooLong, BadRequest, FunctionError, NotReady
from runtime.function.model import Model
from runtime.http.body import read_body
from runtime.http.run import TICK, AnswerRequest, Run, chunks, event_of, frame, opening, prefix
from runtime.protocol.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Job,
    chat_job,
    completion_job,
    decode,
    several,
)
from runtime.resume.resumption import request_query

_log = logging.getLogger("glowplug.openai")

SERVED = "glowplug.openai"  # in the WSGI environment: the `Served` of a request
MAX_BODY = 4 << 20

W = TypeVar("W", ChatRequest, CompletionRequest, EmbeddingRequest)

_COMMIT_AFTER = 1.0  # seconds in which a streamed answer can still be refused with a 4xx or 5xx status
_OTHER_METHODS = ["PUT", "PATCH", "DELETE"]


class ModelGate(Protocol):
    """A gate at which requests wait for the model; see `Lifecycle`."""

    @property
    def name(self) -> str:
        """The name by which requests ask for the model; known before the model is there."""
        ...

    def wait(self, timeout: float) -> Model | None:
        """Return the model, or None if it is not there within `timeout` seconds. Raise `FunctionError` if the start has
        failed."""
        ...


@dataclass(frozen=True, slots=True)
class Served:
    """The model that the routes serve, and their limits.

    `max_body` is in bytes. `keep_alive` is the time between comments while nothing else is sent, `start_limit` the time
    that a request waits for the model, `answer_limit` the time that it may take in all, in seconds. `since` is in Unix
    time.
    """

    gate: ModelGate
    max_body: int = MAX_BODY
    keep_alive: float = 5.0
    start_limit: float = 600.0
    answer_limit: float = math.inf
    since: int = field(default_factory=lambda: int(time.time()))

    def require(self, name: str | None) -> None:
        """Raise `Refusal` for the name of another model."""
        if name not in (None, self.gate.name):
            text = f"there is no model {name!r} here; this function serves {self.gate.name!r}"
            raise Refusal(404, text, "model", "model_not_found")

    def wait(self, environ: Mapping[str, Any]) -> Model | None:
        """Return the model once it is there, or None once the client is gone. Raise `NotReady` after `start_limit`."""
        deadline = time.monotonic() + self.start_limit
        while (model := self.gate.wait(TICK)) is None and not _client_gone(environ):
            if time.monotonic() > deadline:
                raise _too_slow(self.start_limit)
        return model

    def card(self) -> dict[str, object]:
        return {"id": self.gate.name, "object": "model", "created": self.since, "owned_by": "glowplug"}


class Refusal(Exception):
    """An answer in the shape of OpenAI's errors."""

    def __init__(self, status: int, text: str, param: str | None, code: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.status, self.retry_after = status, retry_after
        kind = {429: "rate_limit_error", 503: "service_unavailable"}.get(status)
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": text, "type": kind, "param": param, "code": code}}

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """Return the refusal for `error`. An unforeseen error is logged, and the client gets only its type."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, FunctionError):
            param, retry_after = getattr(error, "param", None), getattr(error, "retry_after", None)
            return cls(error.status, error.text, param, error.code, retry_after)
        if isinstance(error, HTTPException):
            return cls(error.code or 500, error.description or error.name, None, "http")
        _log.error("a request failed", exc_info=error)
        return cls(500, f"the function failed ({type(error).__name__}); its log says where", None, "internal")

    def response(self) -> Response:
        response = Response(msgspec.json.encode(self.body), self.status, mimetype="application/json")
        if self.retry_after is not None:
            response.headers["Retry-After"] = str(math.ceil(self.retry_after))
        return response


# --- the routes -------------------------------------------------------------------------------------------------------

routes = Blueprint("openai", __name__)


def _served() -> Served:
    return cast(Served, request.environ[SERVED])


@routes.post("/v1/chat/completions")
def chat_completions() -> Response:
    return _completion(ChatRequest, chat_job)


@routes.post("/v1/completions")
def completions() -> Response:
    return _completion(CompletionRequest, completion_job)


@routes.post("/v1/embeddings")
def embeddings() -> Response:
    served = _served()
    wanted = _parsed(EmbeddingRequest, read_body(request.environ, served.max_body))
    if wanted.encoding_format not in (None, "float", "base64"):
        raise BadRequest("encoding_format must be float or base64", "encoding_format")
    texts = several(wanted.input, "input")
    if (model := served.wait(request.environ)) is None:
        return _client_left()
    prompts = [model.encode(text) for text in texts]
    vectors: list[Any] = list(model.embed(prompts))
    if wanted.encoding_format == "base64":
        vectors = [base64.b64encode(array("f", vector).tobytes()).decode() for vector in vectors]
    tokens = sum(map(len, prompts))
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _json({"object": "list", "data": data, "model": model.name, "usage": usage})


@routes.get("/v1/models")
def models() -> Response:
    return _json({"object": "list", "data": [_served().card()]})


@routes.get("/v1/models/<path:name>")
def one_model(name: str) -> Response:
    _served().require(name)
    return _json(_served().card())


@routes.route("/v1/chat/completions", methods=["GET", *_OTHER_METHODS])
@routes.route("/v1/completions", methods=["GET", *_OTHER_METHODS])
@routes.route("/v1/embeddings", methods=["GET", *_OTHER_METHODS])
@routes.route("/v1/models", methods=["POST", *_OTHER_METHODS])
def wrong_method() -> Response:
    raise Refusal(405, f"{request.path} does not take {request.method}", None, "method_not_allowed")


@routes.errorhandler(Exception)
def failed(error: Exception) -> Response:
    return Refusal.of(error).response()


# --- their answers ----------------------------------------------------------------------------------------------------


def _parsed(kind: type[W], body: bytes) -> W:
    wanted = decode(body, kind)
    _served().require(wanted.model)
    return wanted


def _completion(kind: type[W], job_of: Callable[[W], Job]) -> Response:
    served = _served()
    body = read_body(request.environ, served.max_body)
    job = job_of(_parsed(kind, body))
    wanted = request_query(request.headers, prefix(job.chat), request.path, body)  # type: ignore[arg-type]
    query = AnswerRequest(job, wanted, time.monotonic() + served.answer_limit)
    if not job.stream:
        if (model := served.wait(request.environ)) is None:
            return _client_left()
        return _whole(Run(query, model), request.environ)
    model = served.gate.wait(_COMMIT_AFTER)
    run = None if model is None else Run(query, model)
    response = Response(_pieces(served, query, run, request.environ), mimetype="text/event-stream")
    response.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "X-Request-Id": query.id})
    if run is not None:
        response.call_on_close(run.close)  # a generator that was never begun does not run its `finally`
    return response


def _pieces(served: Served, query: AnswerRequest, run: Run | None, environ: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the answer as an event stream. Without a `run`, wait for the model first, and send comments meanwhile."""
    try:
        deadline, sent = time.monotonic() + served.start_limit, time.monotonic()
        while run is None:
            if (model := served.gate.wait(TICK)) is not None:
                run = Run(query, model)
            elif _client_gone(environ):
                return
            elif time.monotonic() > deadline:
                raise _too_slow(served.start_limit)
            elif time.monotonic() > query.ends:
                raise AnswerTooLong.of_stream()
            elif time.monotonic() - sent >= served.keep_alive:
                yield sse.KEEP_ALIVE
                sent = time.monotonic()
        yield from opening(run)
        for item in run.events():
            if item is not None:
                yield from chunks(run, *item)
            elif _client_gone(environ):
                return
            elif time.monotonic() - sent < served.keep_alive:
                continue
            else:
                yield sse.KEEP_ALIVE
            sent = time.monotonic()
        if run.job.include_usage and not run.usage_sent:
            yield event_of(run, [], run.usage())
    except Exception as error:
        yield sse.event(msgspec.json.encode(Refusal.of(error).body))
    finally:
        if run is not None:
            run.close()
    yield sse.DONE


def _whole(run: Run, environ: Mapping[str, Any]) -> Response:
    """Return the answer in one piece, once it is complete."""
    received: list[list[TokenEvent]] = [[] for _ in run.streams]
    reasons: list[str | None] = [None] * len(run.streams)
    try:
        for item in run.events():
            if item is not None:
                index, event = item
                received[index].append(event)
                reasons[index] = event.finish
            elif _client_gone(environ):
                return _client_left()
    finally:
        run.close()
    choices: list[dict[str, object]] = []
    for index, (events, reason) in enumerate(zip(received, reasons, strict=True)):
        text = "".join(event.text for event in events)
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if run.job.chat else {"text": text}
        choices.append({"index": index, **body, "logprobs": run.logprobs(events), "finish_reason": reason})
    response = _json(frame(run, choices, chunk=False) | {"usage": run.usage()})
    response.headers["X-Request-Id"] = run.id
    return response


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), mimetype="application/json")


def _client_left() -> Response:
    """Return the response to a client that is gone; only the access log has it."""
    return Response(status=499)


def _too_slow(limit: float) -> NotReady:
    return NotReady(f"the model was not there within {limit:.0f} s; try again", retry_after=10.0)


def _client_gone(environ: Mapping[str, Any]) -> bool:
    """Return whether the client has closed its connection; False for a server that does not show the connection."""
    connection = environ.get("gunicorn.socket")
    if type(connection) is not socket.socket:  # no connection, or TLS, which cannot be peeked into
        return False
    poll = select.poll()
    try:
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(0)) and not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except (OSError, ValueError):
        return True
