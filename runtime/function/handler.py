"""Loads the function developer's code and turns the results of `handle` into HTTP responses.

The convention is OpenFaaS' python3-http: `handle(event, context)` in `handler.py` of a folder that is imported as the
package `function`. Added are `context.model`; two hooks, `load(context)` and `after_fork(context)`, which run in this
order before the first request; and iterators as results, which are streamed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Response, current_app, jsonify

from runtime import sse
from runtime.errors import (
    AnswerTooLong,
    BadHandlerResult,
    FunctionError,
    HandlerFailed,
    HandlerImportFailed,
    HandlerNotFound,
)
from runtime.function.model import TextStream
from runtime.function.pump import END, NOTHING, Pump

if TYPE_CHECKING:
    from runtime.function.model import Model

log = logging.getLogger("glowplug.handler")

_EVENT_STREAM = "text/event-stream"
_COMMIT_AFTER = 1.0  # seconds in which a stream can still fail with a status of its own
_KEEP_ALIVE = 5.0  # seconds between comments while a handler has nothing to say


@dataclass(slots=True)
class Event:
    """The request, as python3-http presents it: `body` in bytes, `headers` and `query` as Flask's mappings."""

    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"
    query: Mapping[str, str] = field(default_factory=dict)
    path: str = "/"


@dataclass(slots=True)
class Context:
    """The second argument of `handle`. `model` is the loaded model, see `runtime.function.model.Model`."""

    model: Model
    hostname: str = field(default_factory=lambda: os.getenv("HOSTNAME", "localhost"))


Scope = Callable[[], AbstractContextManager[None]]


class Handler:
    """The developer's `handle`; `scope` is entered around every piece of their code (see `runtime.worker.guard`)."""

    def __init__(self, handle: Callable[[Event, Context], object], scope: Scope = nullcontext) -> None:
        self._handle = handle
        self._scope = scope

    def __call__(
        self,
        event: Event,
        context: Context,
        accept: str = "",
        sink: Callable[[TextStream], None] | None = None,
        ends: float = math.inf,
    ) -> Response:
        """Call `handle` and return its result as a response, which ends with an error if it is not over at `ends`.

        If `handle` returned a stream of `generate` as it is, `sink` gets the stream first. `ends` is on time.monotonic.
        Needs a Flask application context. Raises `HandlerFailed`, `BadHandlerResult`, or a `FunctionError` of the
        handler's code.
        """
        try:
            with self._scope():
                result = self._handle(event, context)
            if sink is not None and isinstance(result, TextStream):
                sink(result)
            return to_response(result, accept, self._scope, ends)
        except FunctionError:
            raise
        except (Exception, SystemExit) as error:
            log.exception("handle raised")
            raise HandlerFailed(
                f"the handler raised {type(error).__name__}: {error}; its log has the traceback"
            ) from error


def load(folder: str, packages: str, model: Model, scope: Scope = nullcontext) -> Handler:
    """Import `handler.py` of `folder` and run its hooks. Raise `HandlerNotFound`, `HandlerImportFailed`.

    `load` prepares objects that processes may share, `after_fork` objects of one process.

    `packages` is the directory of the function's requirements. `folder` and `packages` come last on `sys.path`, so that
    no module in them can take the place of one of the runtime's.
    """
    place = Path(folder).absolute()
    if not (place / "handler.py").is_file():
        raise HandlerNotFound(f"{place} has no handler.py; GLOWPLUG_HANDLER must name the function's folder")
    sys.path.extend(path for path in (packages, str(place)) if path and path not in sys.path)
    try:
        module = _import(place)
        handle = getattr(module, "handle", None)
        if not callable(handle):
            raise HandlerNotFound(f"{place}/handler.py defines no handle(event, context)")
        for hook in ("load", "after_fork"):
            if prepare := getattr(module, hook, None):
                with scope():
                    prepare(Context(model))
    except FunctionError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        log.exception("importing the handler failed")
        raise HandlerImportFailed(
            f"{place}/handler.py could not be prepared: {type(error).__name__}: {error}; if a module is missing, add "
            "its distribution to requirements.txt"
        ) from error
    return Handler(handle, scope)


def _import(place: Path) -> types.ModuleType:
    initial = place / "__init__.py"
    if initial.is_file():
        spec = importlib.util.spec_from_file_location("function", initial, submodule_search_locations=[str(place)])
        assert spec is not None, "a file with this suffix always has a spec"
        assert spec.loader is not None, "and a loader"
        package = importlib.util.module_from_spec(spec)
        sys.modules["function"] = package
        spec.loader.exec_module(package)
    else:
        package = types.ModuleType("function")
        package.__path__ = [str(place)]
        sys.modules["function"] = package
    return importlib.import_module("function.handler")


class Events(Response):
    """A stream of events, whose pieces come from the handler's code on a thread of its own."""

    pump: Pump


def to_response(result: object, accept: str = "", scope: Scope = nullcontext, ends: float = math.inf) -> Response:
    """Convert a handler's result as python3-http does, and iterators to streams.

    Raises `BadHandlerResult`, or the exception that an iterator raises at its first piece.
    """
    if isinstance(result, dict) and result.keys() & {"statusCode", "body", "headers"}:
        status, headers = result.get("statusCode", 200), result.get("headers", {})
        if isinstance(status, bool) or not isinstance(status, int) or not 100 <= status <= 599:
            raise BadHandlerResult(f"the handler's statusCode is {status!r}; use a number from 100 to 599")
        if not isinstance(headers, Mapping):
            raise BadHandlerResult(f"the handler's headers are a {type(headers).__name__}; use a dict")
        response = _body(result.get("body", ""), accept, scope, ends)
        response.status_code = status
        for name, value in headers.items():
            response.headers[str(name)] = str(value)
        return response
    return _body(result, accept, scope, ends)


def _body(result: object, accept: str, scope: Scope, ends: float) -> Response:
    match result:
        case None:
            return Response("", 200)
        case Response():
            return result
        case str():
            return Response(result, mimetype="text/html")
        case bytes() | bytearray() | memoryview():
            return Response(bytes(result), mimetype="application/octet-stream")
        case dict() | list():
            try:
                return jsonify(result)
            except (TypeError, ValueError) as error:
                raise BadHandlerResult(f"the handler returned something that is no JSON: {error}") from error
        case tuple():
            try:
                return current_app.make_response(result)
            except (TypeError, ValueError) as error:
                raise BadHandlerResult(f"the handler returned a tuple that is no response: {error}") from error
        case Iterable():
            if accept.lstrip().startswith(_EVENT_STREAM):
                return _events(result, scope, ends)
            return _text_stream(iter(result), result, scope, ends)
        case bool() | int() | float():
            return Response(str(result), mimetype="text/html")
        case _:
            raise BadHandlerResult(
                f"the handler returned a {type(result).__name__}; return text, bytes, a dict, a response dict with "
                "statusCode and body, a Flask response, or an iterator of text"
            )


def _events(source: Iterable[object], scope: Scope, ends: float) -> Response:
    """Stream the pieces as server-sent events, with comments as long as no piece comes.

    The response begins with the first piece, or after a moment. So a handler that fails at once is answered with the
    status of its error.
    """
    pump = Pump(source, scope)
    try:
        first = pump.next(min(_COMMIT_AFTER, ends - time.monotonic()))
        if first is not END and first is not NOTHING:
            _text(first)
    except BaseException:
        pump.leave()
        raise

    def body() -> Iterator[bytes]:
        piece = first
        try:
            while piece is not END:
                if time.monotonic() >= ends:
                    raise AnswerTooLong.of_stream()
                yield sse.KEEP_ALIVE if piece is NOTHING else sse.event(_text(piece), id=pump.position)
                piece = pump.next(min(_KEEP_ALIVE, ends - time.monotonic()))
        except GeneratorExit:
            raise  # the client has gone
        except (Exception, SystemExit) as error:
            yield sse.event(error_json(_failure(error)), event="error")
        finally:
            pump.leave()
        yield sse.DONE

    response = Events(body(), mimetype=_EVENT_STREAM)
    response.pump = pump
    return response


def _text_stream(pieces: Iterator[object], source: object, scope: Scope, ends: float) -> Response:
    """Stream the pieces as one text.

    The first piece is taken before the response begins. So a handler that fails at once is answered with the status of
    its error.
    """
    with scope():
        first = next(pieces, None)

    def body() -> Iterator[bytes]:
        piece = first
        try:
            while piece is not None:
                yield _encoded(piece)
                if time.monotonic() >= ends:
                    raise AnswerTooLong.of_stream()
                with scope():
                    piece = next(pieces, None)
        except GeneratorExit:
            raise  # the client has gone
        except (Exception, SystemExit) as error:
            raise _failure(error) from error  # the connection is cut before the last chunk, which clients notice
        finally:
            for closing in (pieces, source):
                close = getattr(closing, "close", None)
                if close is not None:
                    close()

    _encoded(first) if first is not None else None
    return Response(body(), mimetype="text/plain")


def _failure(error: BaseException) -> FunctionError:
    if isinstance(error, AnswerTooLong):
        log.warning("%s", error.text)
        return error
    log.error("the handler's stream broke", exc_info=error)
    return error if isinstance(error, FunctionError) else HandlerFailed(f"{type(error).__name__}: {error}")


def _encoded(piece: object) -> bytes:
    if isinstance(piece, (bytes, bytearray)):
        return bytes(piece)
    return _text(piece).encode()


def _text(piece: object) -> str:
    if isinstance(piece, (bytes, bytearray)):
        return piece.decode("utf-8", "replace")
    if isinstance(piece, str):
        return piece
    raise BadHandlerResult(f"the handler's iterator yielded a {type(piece).__name__}; yield text or bytes")


def error_json(error: FunctionError) -> str:
    """Return the body of a failed request's response, in OpenAI's shape."""
    import json

    kind = "invalid_request_error" if error.status < 500 else "server_error"
    param = getattr(error, "param", None)
    return json.dumps({"error": {"message": error.text, "type": kind, "param": param, "code": error.code}})


def toy_context(**settings: Any) -> Context:
    """Return a context for `handler_test.py`, with the toy model: without weights and without torch."""
    from runtime.function.testing import toy_model

    return Context(toy_model(**settings))
