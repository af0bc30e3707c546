"""A function under the real of-watchdog, with the image's own environment: from the first instant to a lost client."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.timeout(180)

CHAT = '{"messages": [{"role": "user", "content": "What is Glowplug?"}], "max_tokens": 8, "stream": %s}'
LONG_LINE = 70 << 10
# `gate` holds a stream between two pieces for as long as a test likes.
HANDLER = """
    import itertools
    import sys
    import threading

    import runtime

    gates = {}
    left = threading.Event()


    def handle(event, context):
        match event.path:
            case "/words":
                return iter(["one ", "two ", "three"])
            case "/gated":
                return gated(gates.setdefault(event.query["name"], threading.Event()))
            case "/open":
                gates.setdefault(event.query["name"], threading.Event()).set()
            case "/endless":
                return endless()
            case "/left":
                return str(left.is_set())
            case "/shout":
                for stream in (sys.stdout, sys.stderr):
                    print("x" * int(event.query["length"]), file=stream, flush=True)
            case "/echo":
                sent = {name: event.headers.get(name) for name in ("Content-Length", "Transfer-Encoding")}
                return {"text": event.body.decode(), **sent}
            case "/runtime":
                return runtime.__file__
        return {"statusCode": 200, "body": "yes"}


    def gated(gate):
        yield "first "
        gate.wait()
        yield "last"


    def endless():
        try:
            for number in itertools.count():
                yield f"{number} "
        finally:
            left.set()
    """


@pytest.fixture(scope="module")
def started(
    start_watchdog: Callable[..., Any], make_image: Callable[..., Any], at_once: Callable[..., list[Any]]
) -> Iterator[SimpleNamespace]:
    """The function, and what the requests got that were there in its first instant, while nothing was loaded."""
    with start_watchdog(make_image(textwrap.dedent(HANDLER))) as function:
        chat = "/v1/chat/completions"
        calls = {
            "ready": lambda: function.ask("/_/ready", method="GET"),
            "json": lambda: function.ask("/hello", Accept="application/json"),
            "events": lambda: function.ask("/words", Accept="text/event-stream"),
            "chat": lambda: function.ask(chat, CHAT % "false", Accept="application/json"),
            "chat events": lambda: function.ask(chat, CHAT % "true", Accept="text/event-stream"),
            "body in chunks": lambda: function.ask("/echo", iter([b"a", b"b"]), Transfer_Encoding="chunked"),
        }
        first = dict(zip(calls, at_once(list(calls.values())), strict=True))
        yield SimpleNamespace(function=function, first=first)


@pytest.fixture
def function(started: SimpleNamespace) -> Any:
    assert started.function.process.poll() is None, started.function.output()
    return started.function


@pytest.fixture
def client(function: Any) -> Iterator[openai.OpenAI]:
    """As the README says: of-watchdog streams to those who accept an event stream."""
    url, accept = f"http://127.0.0.1:{function.port}/v1", {"Accept": "text/event-stream"}
    with openai.OpenAI(base_url=url, api_key="none", default_headers=accept, max_retries=0, timeout=60) as made:
        yield made


def test_requests_of_the_first_instant_are_answered(started: SimpleNamespace) -> None:
    """Never the empty 200 that of-watchdog gives an event stream, nor its 500, while nobody listens behind it."""
    first = started.first
    for name in ("json", "events", "chat", "chat events", "body in chunks"):
        assert first[name].status == 200, (name, first[name])
        assert first[name].body, name
    assert first["json"].body == b"yes"
    assert first["events"].body == b"data: one \n\ndata: two \n\ndata: three\n\ndata: [DONE]\n\n"
    assert first["chat"].json["choices"][0]["message"]["role"] == "assistant"
    assert first["chat events"].body.endswith(b"data: [DONE]\n\n")
    assert first["body in chunks"].json["text"] == "ab"


def test_readiness_is_the_functions_own(started: SimpleNamespace, function: Any) -> None:
    assert started.first["ready"].status == 503
    assert function.ask("/_/ready", method="GET").status == 200
    assert function.ask("/_/health", method="GET").status == 200


def test_runs_the_runtime_that_the_template_brought(function: Any) -> None:
    (place,) = function.ask("/runtime").body.decode().splitlines()
    assert place.startswith(str(function.image.inside("/usr/src/glowplug")))


@pytest.mark.parametrize(
    ("accept", "first", "rest"),
    [
        ("text/event-stream", b"data: first \n\n", b"data: last\n\ndata: [DONE]\n\n"),
        ("text/event-stream, */*", b"data: first \n\n", b"data: last\n\ndata: [DONE]\n\n"),
        ("application/x-ndjson", b"first ", b"last"),
    ],
)
def test_streams_piece_by_piece(function: Any, accept: str, first: bytes, rest: bytes) -> None:
    gate = f"name={accept.encode().hex()}"
    with function.open(f"/gated?{gate}", Accept=accept) as stream:
        assert stream.read1() == first  # and not the rest, which nobody has let go yet
        function.ask(f"/open?{gate}")
        assert stream.read() == rest


@pytest.mark.parametrize("accept", ["application/json", "*/*", ""])
def test_answers_in_one_piece_to_all_others(function: Any, accept: str) -> None:
    answer = function.ask("/words", **({"Accept": accept} if accept else {}))
    assert (answer.status, answer.body) == (200, b"one two three")


def test_openai_sdk(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    ask: dict[str, Any] = {"model": model.id, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6}
    whole = client.chat.completions.create(**ask, temperature=0)
    chunks = list(client.chat.completions.create(**ask, temperature=0, stream=True))
    assert whole.choices[0].message.content == "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(client.embeddings.create(model=model.id, input=["a", "b"]).data) == 2


def test_openai_sdk_gets_errors_it_knows(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.NotFoundError, match="another"):
        client.chat.completions.create(model="another", messages=messages)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="glowplug-demo", messages=messages, max_tokens=0)


def test_body_without_content_length(function: Any) -> None:
    """Also of-watchdog itself sends one on without its length."""
    pieces = [b"piece %d " % number * 1000 for number in range(20)]
    answer = function.ask("/echo", iter(pieces), Transfer_Encoding="chunked")
    assert answer.json["text"].encode() == b"".join(pieces)
    assert answer.json["Content-Length"] is None
    assert function.ask("/echo", b"short").json["text"] == "short"


def test_long_lines_of_the_log_block_nothing(function: Any, eventually: Callable[..., Any]) -> None:
    for _ in range(3):
        assert function.ask(f"/shout?length={LONG_LINE}").status == 200
    eventually(lambda: function.output().count("x" * LONG_LINE) == 6, what="six lines in the log")


def test_a_clients_leaving_ends_the_handlers_generator(function: Any, eventually: Callable[..., Any]) -> None:
    with function.open("/endless", Accept="text/event-stream") as stream:
        assert stream.read1()
        assert function.ask("/left").body == b"False"
    eventually(lambda: function.ask("/left").body == b"True", 30, "the generator was closed")
