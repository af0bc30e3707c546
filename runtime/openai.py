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
import secrets
import select
import socket
import time
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

import msgspec
from flask import Blueprint, Response, request
from werkzeug.exceptions import HTTPException

from runtime import sse
from runtime.body import read_body
from runtime.engine.base import TokenEvent, TokenStream
from runtime.errors import BadRequest, EngineFailed, FunctionError, NotReady
from runtime.model import Model
from runtime.openai_logprobs import logprobs
from runtime.openai_request import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Job,
    chat_job,
    completion_job,
    decode,
    several,
)

_log = logging.getLogger("glowplug.openai")

MAX_BODY = 4 << 20

W = TypeVar("W", ChatRequest, CompletionRequest, EmbeddingRequest)

_TICK = 0.25  # seconds between two looks at whether the client is still there
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


class Run:
    """The token streams of a job; owns them from `start` to `close`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.id = f"{'chatcmpl' if job.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model: Model | None = None
        self.streams: list[TokenStream] = []
        self.said: list[int] = []  # characters of each choice that a stream has sent
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def start(self, model: Model) -> None:
        """Submits every choice, or none: raises `BadRequest`, `EngineBusy`."""
        job, stats = self.job, model.engine.stats()
        if len(job.prompts) * job.n > stats.slots + stats.queue:
            raise BadRequest(
                f"{len(job.prompts)} prompts with n={job.n} are more than this function ever takes at once "
                f"({stats.slots + stats.queue})",
                "n",
            )
        self.model = model
        try:
            for prompt in job.prompts:
                ids = model.encode(**{"messages" if job.chat else "prompt": prompt}, tools=job.tools)  # type: ignore[arg-type]
                self.prompt_tokens += len(ids)
                for parameters in job.choice_parameters():
                    self.streams.append(model.submit(ids, parameters, f"{self.id}-{len(self.streams)}"))
                    self.said.append(0)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    def events(self) -> Iterator[tuple[int, TokenEvent] | None]:
        """(choice, event) as they come, and None every quarter of a second. Raises `EngineFailed`."""
        live, ticked = dict(enumerate(self.streams)), time.monotonic()
        while live:
            for index, stream in tuple(live.items()):
                timeout = _TICK if len(live) == 1 else 0.01
                while index in live and (event := stream.next(timeout)) is not None:
                    timeout = 0.0
                    if event.finish in ("cancelled", "moved", "error"):
                        raise EngineFailed(event.error or f"the generation was {event.finish}")
                    self.completion_tokens += event.token is not None
                    if event.finish:
                        del live[index]
                    yield index, event
                if time.monotonic() - ticked >= _TICK:
                    yield None
                    ticked = time.monotonic()

    def logprobs(self, events: list[TokenEvent], offset: int = 0) -> dict[str, object] | None:
        """Of a choice, or of a piece of it that begins `offset` characters after its beginning."""
        if self.job.parameters.logprobs is None or self.model is None:
            return None
        return logprobs(self.model.codec, events, chat=self.job.chat, offset=offset)

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


def blueprint(
    gate: ModelGate, *, max_body: int = MAX_BODY, keep_alive: float = 5.0, start_limit: float = 600.0
) -> Blueprint:
    """The routes under /v1. `max_body` in bytes; `keep_alive` is the time between comments while nothing else is sent,
    `start_limit` how long a request waits for the model, both in seconds."""
    routes = Blueprint("openai", __name__)
    born = int(time.time())

    @routes.errorhandler(Exception)
    def failed(error: Exception) -> Response:
        return Refusal.of(error).response()

    @routes.post("/v1/chat/completions")
    def chat_completions() -> Response:
        return answer(chat_job(parse(ChatRequest)))

    @routes.post("/v1/completions")
    def completions() -> Response:
        return answer(completion_job(parse(CompletionRequest)))

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
        if name not in (None, gate.name):
            text = f"there is no model {name!r} here; this function serves {gate.name!r}"
            raise Refusal(404, text, "model", "model_not_found")

    def parse(kind: type[W]) -> W:
        wanted = decode(read_body(request.environ, max_body), kind)
        require(wanted.model)
        return wanted

    def card() -> dict[str, object]:
        return {"id": gate.name, "object": "model", "created": born, "owned_by": "glowplug"}

    def wait() -> Model | None:
        """The model, however long its start takes; None once the client is gone."""
        deadline = time.monotonic() + start_limit
        while (model := gate.wait(_TICK)) is None and not _client_gone(request.environ):
            if time.monotonic() > deadline:
                raise _too_slow(start_limit)
        return model

    def answer(job: Job) -> Response:
        run = Run(job)
        if not job.stream:
            if (model := wait()) is None:
                return _nobody()
            run.start(model)
            return _whole(run, request.environ)
        if (model := gate.wait(_COMMIT_AFTER)) is not None:
            run.start(model)
        response = Response(pieces(run, request.environ), mimetype="text/event-stream")
        response.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "X-Request-Id": run.id})
        response.call_on_close(run.close)  # a generator that was never begun does not run its `finally`
        return response

    def pieces(run: Run, environ: Mapping[str, Any]) -> Iterator[bytes]:
        try:
            deadline, sent = time.monotonic() + start_limit, time.monotonic()
            while run.model is None:
                if (model := gate.wait(_TICK)) is not None:
                    run.start(model)
                elif _client_gone(environ):
                    return
                elif time.monotonic() > deadline:
                    raise _too_slow(start_limit)
                elif time.monotonic() - sent >= keep_alive:
                    yield sse.KEEP_ALIVE
                    sent = time.monotonic()
            yield from _opening(run)
            for item in run.events():
                if item is not None:
                    yield from _chunks(run, *item)
                elif _client_gone(environ):
                    return
                elif time.monotonic() - sent < keep_alive:
                    continue
                else:
                    yield sse.KEEP_ALIVE
                sent = time.monotonic()
            if run.job.include_usage:
                yield _event(run, [], run.usage())
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
    response = _json(_frame(run, choices, chunk=False) | {"usage": run.usage()})
    response.headers["X-Request-Id"] = run.id
    return response


def _opening(run: Run) -> Iterator[bytes]:
    if run.job.chat:
        for index in range(len(run.streams)):
            yield _event(run, [_choice(run, index, {"role": "assistant", "content": ""})])


def _chunks(run: Run, index: int, event: TokenEvent) -> Iterator[bytes]:
    if event.text or event.logprobs is not None:
        chances = run.logprobs([event], run.said[index])
        run.said[index] += len(event.text)
        yield _event(run, [_choice(run, index, {"content": event.text}, chances=chances)])
    if event.finish:
        yield _event(run, [_choice(run, index, {}, event.finish)])


def _choice(
    run: Run, index: int, delta: dict[str, str], finish: str | None = None, chances: dict[str, object] | None = None
) -> dict[str, object]:
    said: dict[str, object] = {"delta": delta} if run.job.chat else {"text": delta.get("content", "")}
    return {"index": index, **said, "logprobs": chances, "finish_reason": finish}


def _event(run: Run, choices: list[dict[str, object]], usage: dict[str, int] | None = None) -> bytes:
    frame = _frame(run, choices, chunk=True)
    if run.job.include_usage:
        frame["usage"] = usage
    return sse.event(msgspec.json.encode(frame))


def _frame(run: Run, choices: list[dict[str, object]], *, chunk: bool) -> dict[str, object]:
    assert run.model is not None
    kind = "text_completion"
    if run.job.chat:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
    return {
        "id": run.id,
        "object": kind,
        "created": run.created,
        "model": run.model.name,
        "system_fingerprint": run.model.revision,
        "choices": choices,
    }


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
