"""The function developer's code: how it is found, what it may return, and what happens when it goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response, jsonify

from runtime.errors import (
    BadHandlerResult,
    BadRequest,
    EngineBusy,
    HandlerFailed,
    HandlerImportFailed,
    HandlerNotFound,
    SharedWeightsError,
)
from runtime.function.handler import Context, Event, Handler, error_json, load, to_response, toy_context

MODEL: Any = object()
EVENTS = "text/event-stream"


@pytest.fixture(autouse=True)
def application() -> Iterator[Flask]:
    app = Flask("test")
    with app.test_request_context():
        yield app


@pytest.fixture(autouse=True)
def fresh_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test imports a `function` of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("function", "handler", "helper", "requests_of_the_function"):
            del sys.modules[name]


@pytest.fixture
def function(tmp_path: Path) -> Callable[..., str]:
    """`function(source, **files)` writes a folder with handler.py and returns its path."""

    def write(source: str | None, **files: str) -> str:
        folder = tmp_path / "function"
        folder.mkdir()
        if source is not None:
            files["handler"] = source
        for name, text in files.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(text))
        return str(folder)

    return write


def _answer(result: object, accept: str = "") -> Response:
    return Handler(lambda _event, _context: result)(Event(), Context(MODEL), accept)


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "status", "kind", "body"),
    [
        (None, 200, "text/html", b""),
        ("text", 200, "text/html", b"text"),
        ("Grüße", 200, "text/html", "Grüße".encode()),
        (b"\x00\xff", 200, "application/octet-stream", b"\x00\xff"),
        (bytearray(b"ab"), 200, "application/octet-stream", b"ab"),
        (memoryview(b"ab"), 200, "application/octet-stream", b"ab"),
        (5, 200, "text/html", b"5"),
        (2.5, 200, "text/html", b"2.5"),
        (True, 200, "text/html", b"True"),
        ({"answer": 42}, 200, "application/json", {"answer": 42}),
        ({}, 200, "application/json", {}),
        ([1, "two", None], 200, "application/json", [1, "two", None]),
        ({"statusCode": 201, "body": "made"}, 201, "text/html", b"made"),
        ({"statusCode": 204}, 204, "text/html", b""),
        ({"body": {"a": 1}}, 200, "application/json", {"a": 1}),
        ({"statusCode": 200, "body": b"raw"}, 200, "application/octet-stream", b"raw"),
        ({"statusCode": 200, "body": None}, 200, "text/html", b""),
        ({"headers": {"Content-Type": "text/csv"}, "body": "a,b"}, 200, "text/csv", b"a,b"),
        (("text", 202), 202, "text/html", b"text"),
        (({"a": 1}, 203), 203, "application/json", {"a": 1}),
        (("text", {"Content-Type": "text/plain"}), 200, "text/plain", b"text"),
    ],
)
def test_what_a_handler_may_return(result: object, status: int, kind: str, body: object) -> None:
    response = _answer(result)
    assert (response.status_code, response.mimetype) == (status, kind)
    if isinstance(body, bytes):
        assert response.get_data() == body
    else:
        assert response.get_json() == body


def test_a_flask_response_is_kept_as_it_is() -> None:
    made = Response("made", 418, headers={"X-Mine": "yes"})
    assert _answer(made) is made
    assert _answer(jsonify(a=1)).get_json() == {"a": 1}


def test_headers_of_a_response_dict() -> None:
    response = _answer(
        {"statusCode": 200, "body": "", "headers": {"X-Text": "a", "X-Number": 5, "Content-Type": "a/b"}}
    )
    assert (response.headers["X-Text"], response.headers["X-Number"], response.mimetype) == ("a", "5", "a/b")
    assert response.headers.getlist("Content-Type") == ["a/b"]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (object(), "returned a object"),
        (lambda: None, "returned a function"),
        ({"a": object()}, "no JSON"),
        ([b"bytes"], "no JSON"),
        ((1, 2, 3, 4), "tuple"),
        ((), "tuple"),
        ((object(), 200), "tuple"),
        ({"statusCode": "200"}, "statusCode is '200'"),
        ({"statusCode": 99}, "statusCode is 99"),
        ({"statusCode": 600}, "statusCode is 600"),
        ({"statusCode": True}, "statusCode is True"),
        ({"statusCode": None}, "statusCode is None"),
        ({"headers": ["X"]}, "headers are a list"),
        ({"body": object()}, "returned a object"),
        (iter([5]), "yielded a int"),
        (iter([{"a": 1}]), "yielded a dict"),
    ],
)
def test_what_is_no_answer(result: object, words: str) -> None:
    with pytest.raises(BadHandlerResult) as caught:
        _answer(result)
    assert words in caught.value.text
    assert caught.value.status == 500


# --- streams ----------------------------------------------------------------------------------------------------------


def test_pieces_are_plain_text_or_events() -> None:
    plain, events = _answer(iter(["a", b"b", "ü"])), _answer(iter(["a", b"b", "ü"]), EVENTS)
    assert (plain.mimetype, b"".join(plain.response)) == ("text/plain", "abü".encode())
    assert (events.mimetype, b"".join(events.response).decode()) == (
        EVENTS,
        "data: a\n\ndata: b\n\ndata: ü\n\ndata: [DONE]\n\n",
    )


def test_bytes_of_a_plain_stream_stay_as_they_are() -> None:
    assert b"".join(_answer(iter([b"\xff\x00"])).response) == b"\xff\x00"


def test_a_piece_with_line_breaks_is_one_event() -> None:
    body = b"".join(_answer(iter(["one\ntwo"]), EVENTS).response)
    assert body == b"data: one\ndata: two\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("accept", ["", EVENTS])
def test_an_empty_stream(accept: str) -> None:
    response = _answer(iter(()), accept)
    assert response.status_code == 200
    assert b"".join(response.response) == (b"data: [DONE]\n\n" if accept else b"")


def test_a_stream_with_status_and_headers() -> None:
    response = _answer({"statusCode": 207, "body": iter(["a"]), "headers": {"X-Mine": "yes"}})
    assert (response.status_code, response.headers["X-Mine"], b"".join(response.response)) == (207, "yes", b"a")


def test_only_the_first_piece_is_taken_before_the_response_begins() -> None:
    taken: list[int] = []

    def pieces() -> Iterator[str]:
        for n in range(3):
            taken.append(n)
            yield str(n)

    response = _answer(pieces())
    assert taken == [0]
    assert next(iter(response.response)) == b"0"
    assert taken == [0]


def test_a_stream_that_fails_at_once_is_an_error_with_a_status() -> None:
    def pieces() -> Iterator[str]:
        raise KeyError("gone")
        yield ""

    with pytest.raises(HandlerFailed, match="KeyError"):
        _answer(pieces())


def _broken(error: BaseException) -> Iterator[str]:
    yield "begun"
    raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyError("gone"), "handler_raised"), (SystemExit(3), "handler_raised"), (EngineBusy("full"), "busy")],
)
def test_a_stream_that_breaks(error: BaseException, code: str) -> None:
    first, last, done = list(_answer(_broken(error), EVENTS).response)
    assert (first, done) == (b"data: begun\n\n", b"data: [DONE]\n\n")
    event, data, _, _ = last.decode().split("\n")
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == code
    plain = iter(_answer(_broken(error)).response)
    assert next(plain) == b"begun"
    with pytest.raises((HandlerFailed, EngineBusy)):
        next(plain)


@pytest.mark.parametrize("accept", ["", EVENTS])
def test_a_piece_of_the_wrong_type_breaks_the_stream(accept: str) -> None:
    pieces = iter(_answer(iter(["ok", 5]), accept).response)
    next(pieces)
    if accept:
        assert b"handler_result" in next(pieces)
    else:
        with pytest.raises(BadHandlerResult):
            next(pieces)


@pytest.mark.parametrize("accept", ["", EVENTS])
def test_a_client_that_leaves_ends_the_developers_generator(accept: str, eventually: Callable[..., Any]) -> None:
    ended: list[str] = []

    def pieces() -> Iterator[str]:
        try:
            yield "a"
            yield "b"
        finally:
            ended.append("closed")

    response = _answer(pieces(), accept)
    next(iter(response.response))
    response.response.close()  # type: ignore[attr-defined]
    eventually(lambda: ended == ["closed"], what="it is closed, by the thread that runs it")


def test_a_stream_object_with_a_close_of_its_own_is_closed() -> None:
    closed: list[str] = []

    class Pieces:
        def __iter__(self) -> Iterator[str]:
            return iter(["a", "b"])

        def close(self) -> None:
            closed.append("closed")

    b"".join(_answer(Pieces()).response)
    assert closed == ["closed"]


# --- what goes wrong in `handle` --------------------------------------------------------------------------------------


def _raise(error: BaseException) -> Callable[[Event, Context], object]:
    def handle(_event: Event, _context: Context) -> object:
        raise error

    return handle


@pytest.mark.parametrize("error", [ValueError("bad"), KeyError("k"), SystemExit(1), RecursionError("deep")])
def test_whatever_it_raises_is_named(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(HandlerFailed) as caught:
        Handler(_raise(error))(Event(), Context(MODEL))
    assert type(error).__name__ in caught.value.text
    assert caught.value.__cause__ is error
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("error", [BadRequest("no", "max_tokens"), EngineBusy("full"), SharedWeightsError("w")])
def test_errors_of_ours_keep_their_status(error: Any) -> None:
    with pytest.raises(type(error)) as caught:
        Handler(_raise(error))(Event(), Context(MODEL))
    assert caught.value is error


def test_an_interrupt_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        Handler(_raise(KeyboardInterrupt()))(Event(), Context(MODEL))


def test_every_piece_of_their_code_runs_in_the_scope() -> None:
    inside = False

    class Scope:
        def __enter__(self) -> None:
            nonlocal inside
            inside = True

        def __exit__(self, *_: object) -> None:
            nonlocal inside
            inside = False

    seen: list[bool] = []

    def handle(_event: Event, _context: Context) -> object:
        seen.append(inside)

        def pieces() -> Iterator[str]:
            for _ in range(2):
                seen.append(inside)
                yield "x"
            seen.append(inside)

        return pieces()

    scope: Any = Scope
    b"".join(Handler(handle, scope)(Event(), Context(MODEL)).response)
    assert seen == [True] * 4
    assert not inside


def test_it_gets_event_and_context() -> None:
    seen: list[object] = []
    Handler(lambda event, context: seen.extend([event, context]))(
        Event(b"body", {"A": "b"}, "PUT", {"q": "1"}, "/p"), Context(MODEL, "host")
    )
    event, context = seen
    assert (event.body, event.headers, event.method, event.query, event.path) == (  # type: ignore[attr-defined]
        b"body", {"A": "b"}, "PUT", {"q": "1"}, "/p"
    )  # fmt: skip
    assert (context.model, context.hostname) == (MODEL, "host")  # type: ignore[attr-defined]


def test_the_error_body_is_json_whatever_the_text() -> None:
    body = error_json(HandlerFailed('quote " and \n line'))
    assert json.loads(body)["error"]["message"] == 'quote " and \n line'


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_handler_is_loaded(function: Callable[..., str]) -> None:
    handler = load(function("def handle(event, context): return event.body + b'!'"), "", MODEL)
    assert handler(Event(b"hi"), Context(MODEL)).get_data() == b"hi!"


@pytest.mark.parametrize("package", [False, True])
def test_imports_of_ones_own_modules(function: Callable[..., str], package: bool) -> None:
    files = {"helper": "NAME = 'helper'", "other": "from . import helper\nNAME = 'other of ' + helper.NAME"}
    if package:
        files["__init__"] = "SET = 'up'"
    source = """
        from . import helper
        from .other import NAME
        from function import helper as again
        import function.other
        import helper as plain

        assert helper is again

        def handle(event, context):
            return ' '.join([helper.NAME, NAME, plain.NAME])
        """
    handler = load(function(source, **files), "", MODEL)
    assert handler(Event(), Context(MODEL)).get_data() == b"helper other of helper helper"


def test_load_runs_once_with_the_model(function: Callable[..., str]) -> None:
    source = """
        loads = []

        def load(context):
            loads.append(context.model)

        def handle(event, context):
            return str(len(loads)) + str(loads[0] is context.model)
        """
    handler = load(function(source), "", MODEL)
    for _ in range(2):
        assert handler(Event(), Context(MODEL)).get_data() == b"1True"


def test_packages_are_found_before_the_folder_and_after_everything_else(
    function: Callable[..., str], tmp_path: Path
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "requests_of_the_function.py").write_text("NAME = 'packages'")
    (packages / "json.py").write_text("raise RuntimeError('not this one')")
    folder = function(
        "import json\nimport requests_of_the_function as r\ndef handle(e, c): return json.dumps(r.NAME)",
        requests_of_the_function="NAME = 'folder'",
        json="raise RuntimeError('nor this one')",
    )
    assert load(folder, str(packages), MODEL)(Event(), Context(MODEL)).get_data() == b'"packages"'
    assert sys.path[-2:] == [str(packages), folder]


def test_files_named_like_ours_cannot_take_their_place(function: Callable[..., str]) -> None:
    """In a process of its own, which has imported what a worker has by the time it comes to the handler."""
    ours = ["runtime", "cache_agent", "flask", "logging"]
    folder = function(
        "import runtime.sse, cache_agent.errors, flask, logging.config\ndef handle(e, c): return runtime.__file__",
        **dict.fromkeys(ours, "raise SystemExit('the user\\'s')"),
    )
    code = f"""
import cache_agent.client.cache_client, flask, runtime
from runtime.handler import Context, Event, load
handler = load({folder!r}, "", None)
with flask.Flask("t").test_request_context():
    print(handler(Event(), Context(None)).get_data(as_text=True) == runtime.__file__)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def handle(event, context)\n    pass", "SyntaxError"),
        ("import no_such_module", "requirements.txt"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("from . import missing", "ImportError"),
        ("def load(context): raise OSError('no disk')\ndef handle(e, c): ...", "no disk"),
        ("def load(): ...\ndef handle(e, c): ...", "TypeError"),
    ],
)
def test_a_handler_that_cannot_be_prepared(function: Callable[..., str], source: str, words: str) -> None:
    with pytest.raises(HandlerImportFailed) as caught:
        load(function(source), "", MODEL)
    assert words in caught.value.text
    assert "handler.py" in caught.value.text


def test_an_init_that_fails(function: Callable[..., str]) -> None:
    with pytest.raises(HandlerImportFailed, match="ZeroDivisionError"):
        load(function("def handle(e, c): ...", __init__="1 / 0"), "", MODEL)


@pytest.mark.parametrize("source", ["x = 1", "handle = 5", "def Handle(event, context): ..."])
def test_no_handle(function: Callable[..., str], source: str) -> None:
    with pytest.raises(HandlerNotFound, match=r"defines no handle\(event, context\)"):
        load(function(source), "", MODEL)


def test_no_handler_py(function: Callable[..., str]) -> None:
    with pytest.raises(HandlerNotFound, match="GLOWPLUG_HANDLER must name the function's folder"):
        load(function(None, main="x = 1"), "", MODEL)
    with pytest.raises(HandlerNotFound):
        load("/no/such/folder", "", MODEL)


def test_an_error_of_ours_in_load_keeps_its_name(function: Callable[..., str]) -> None:
    source = """
        from runtime.errors import SharedWeightsError

        def load(context):
            raise SharedWeightsError("write")

        def handle(event, context): ...
        """
    with pytest.raises(SharedWeightsError):
        load(function(source), "", MODEL)


def test_the_toy_context_needs_no_weights_and_no_torch() -> None:
    code = """
import sys
from runtime.handler import Event, toy_context
context = toy_context()
print(context.model.generate(messages=[{"role": "user", "content": "hello there"}]))
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "hello there\nFalse False\n", done.stderr


def test_a_generation_can_be_returned_as_it_is() -> None:
    context = toy_context()
    messages = [{"role": "user", "content": "one two three"}]
    handler = Handler(lambda _event, given: given.model.generate(messages=messages, stream=True))
    assert b"".join(handler(Event(), context).response) == b"one two three"
    context.model.engine.close()


def test_to_response_can_be_used_alone() -> None:
    assert to_response("x").get_data() == b"x"
