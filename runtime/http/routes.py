"""Owns the OpenAI-compatible routes: requests checked and refused by name, answers whole or as an event stream.

    body ──► Struct ──► Job ──► (wait for the model) ──► Run: one token stream per choice ──► JSON or events

What can be refused without the model is refused before anything is sent. A stream that has begun says what went wrong
in a `data: {"error": …}` event, which OpenAI's clients raise, and ends with `[DONE]` in any case. A client that goes
away cancels its generations.
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
from typing import Any, Protocol, TypeVar

import msgspec
from flask import Blueprint, Response, request
from werkzeug.exceptions import HTTPException

from runtime import sse
from runtime.engine.base import TokenEvent
from runtime.errors import AnswerTooLong, BadRequest, FunctionError, NotReady
from runtime.function.model import Model
from runtime.http.answer import TICK, Run, chunks, event_of, frame, opening, prefix
from runtime.http.body import read_body
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
from runtime.resume.resume import Asked, asked

_log = logging.getLogger("glowplug.openai")

MAX_BODY = 4 << 20

W = TypeVar("W", ChatRequest, CompletionRequest, EmbeddingRequest)

_COMMIT_AFTER = 1.0  # a start that takes longer answers 200 and keep-alive comments; until then it can be a 4xx or 5xx


class ModelGate(Protocol):
    """Where requests wait for the model."""

    @property
    def name(self) -> str:
        """The name that requests give the model; known before the model is there."""
        ...

    def wait(self, timeout: float) -> Model | None:
        """The model, or None if it is not there within `timeout` seconds. Raises `FunctionError` if it won't come."""
        ...


class Served:
    """What the routes serve, and within which limits. Routes may be made before that is known."""

    def __init__(self, gate: ModelGate | None = None, **limits: Any) -> None:
        """Without a `gate`, `by` has to name it before the first request; `limits` are those of `by`."""
        if gate is not None:
            self.by(gate, **limits)

    def by(
        self,
        gate: ModelGate,
        *,
        max_body: int = MAX_BODY,
        keep_alive: float = 5.0,
        start_limit: float = 600.0,
        answer_limit: float = math.inf,
    ) -> None:
        """`max_body` in bytes; `keep_alive` is the time between comments while nothing else is sent, `start_limit` how
        long a request waits for the model, `answer_limit` how long it may take in all, in seconds."""
        self.gate, self.since = gate, int(time.time())
        self.max_body, self.keep_alive = max_body, keep_alive
        self.start_limit, self.answer_limit = start_limit, answer_limit


class OpenGate:
    """The gate of a model that is there already."""

    def __init__(self, model: Model) -> None:
        self.name = model.name
        self._model = model

    def wait(self, timeout: float) -> Model:  # noqa: ARG002  the protocol's
        return self._model


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
        """What to tell a client about `error`; one that nobody foresaw goes to the log and is told without details."""
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


def blueprint(served: Served) -> Blueprint:
    """The routes under /v1."""
    routes = Blueprint("openai", __name__)

    @routes.errorhandler(Exception)
    def failed(error: Exception) -> Response:
        return Refusal.of(error).response()

    @routes.post("/v1/chat/completions")
    def chat_completions() -> Response:
        return answer(*parsed(ChatRequest, chat_job))

    @routes.post("/v1/completions")
    def completions() -> Response:
        return answer(*parsed(CompletionRequest, completion_job))

    @routes.post("/v1/embeddings")
    def embeddings() -> Response:
        wanted = parse(EmbeddingRequest)
        if wanted.encoding_format not in (None, "float", "base64"):
            raise BadRequest("encoding_format must be float or base64", "encoding_format")
        texts = several(wanted.input, "input")
        if (model := wait()) is None:
            return _nobody()
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
        return _json({"object": "list", "data": [card()]})

    @routes.get("/v1/models/<path:name>")
    def one_model(name: str) -> Response:
        require(name)
        return _json(card())

    def wrong_method() -> Response:
        raise Refusal(405, f"{request.path} does not take {request.method}", None, "method_not_allowed")

    for path, other in (("chat/completions", "GET"), ("completions", "GET"), ("embeddings", "GET"), ("models", "POST")):
        methods = [other, "PUT", "PATCH", "DELETE"]
        routes.add_url_rule(f"/v1/{path}", "wrong_method", wrong_method, methods=methods)

    def require(name: str | None) -> None:
        if name not in (None, served.gate.name):
            text = f"there is no model {name!r} here; this function serves {served.gate.name!r}"
            raise Refusal(404, text, "model", "model_not_found")

    def parse(kind: type[W], body: bytes | None = None) -> W:
        wanted = decode(read_body(request.environ, served.max_body) if body is None else body, kind)
        require(wanted.model)
        return wanted

    def parsed(kind: type[W], job_of: Callable[[W], Job]) -> tuple[Job, Asked]:
        body = read_body(request.environ, served.max_body)
        job = job_of(parse(kind, body))
        return job, asked(request.headers, prefix(job.chat), request.path, body)  # type: ignore[arg-type]

    def card() -> dict[str, object]:
        return {"id": served.gate.name, "object": "model", "created": served.since, "owned_by": "glowplug"}

    def wait() -> Model | None:
        """The model, however long its start takes; None once the client is gone."""
        deadline = time.monotonic() + served.start_limit
        while (model := served.gate.wait(TICK)) is None and not _client_gone(request.environ):
            if time.monotonic() > deadline:
                raise _too_slow(served.start_limit)
        return model

    def answer(job: Job, wanted: Asked) -> Response:
        run = Run(job, wanted, time.monotonic() + served.answer_limit)
        if not job.stream:
            if (model := wait()) is None:
                return _nobody()
            run.start(model)
            return _whole(run, request.environ)
        if (model := served.gate.wait(_COMMIT_AFTER)) is not None:
            run.start(model)
        response = Response(pieces(run, request.environ), mimetype="text/event-stream")
        response.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "X-Request-Id": run.id})
        response.call_on_close(run.close)  # a generator that was never begun does not run its `finally`
        return response

    def pieces(run: Run, environ: Mapping[str, Any]) -> Iterator[bytes]:
        try:
            deadline, sent = time.monotonic() + served.start_limit, time.monotonic()
            while run.model is None:
                if (model := served.gate.wait(TICK)) is not None:
                    run.start(model)
                elif _client_gone(environ):
                    return
                elif time.monotonic() > deadline:
                    raise _too_slow(served.start_limit)
                elif time.monotonic() > run.ends:
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
            if run.job.include_usage and not run.usage_told:
                yield event_of(run, [], run.usage())
        except Exception as error:
            yield sse.event(msgspec.json.encode(Refusal.of(error).body))
        finally:
            run.close()
        yield sse.DONE

    return routes


def _whole(run: Run, environ: Mapping[str, Any]) -> Response:
    """The answer in one piece, once it is complete."""
    said: list[list[TokenEvent]] = [[] for _ in run.streams]
    reasons: list[str | None] = [None] * len(run.streams)
    try:
        for item in run.events():
            if item is not None:
                index, event = item
                said[index].append(event)
                reasons[index] = event.finish
            elif _client_gone(environ):
                return _nobody()
    finally:
        run.close()
    choices: list[dict[str, object]] = []
    for index, (events, reason) in enumerate(zip(said, reasons, strict=True)):
        text = "".join(event.text for event in events)
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if run.job.chat else {"text": text}
        choices.append({"index": index, **body, "logprobs": run.logprobs(events), "finish_reason": reason})
    response = _json(frame(run, choices, chunk=False) | {"usage": run.usage()})
    response.headers["X-Request-Id"] = run.id
    return response


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), mimetype="application/json")


def _nobody() -> Response:
    """What is answered to a client that is gone, for the access log's sake."""
    return Response(status=499)


def _too_slow(limit: float) -> NotReady:
    return NotReady(f"the model was not there within {limit:.0f} s; try again", retry_after=10.0)


def _client_gone(environ: Mapping[str, Any]) -> bool:
    """Whether the client has closed its connection; False where the server does not show it (`gunicorn.socket`)."""
    connection = environ.get("gunicorn.socket")
    if type(connection) is not socket.socket:  # none, or TLS, which cannot be peeked into
        return False
    poll = select.poll()
    try:
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(0)) and not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except (OSError, ValueError):
        return True
