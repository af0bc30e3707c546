"""A function's life on Knative: what `glowplug render` says, run behind a stand-in for queue-proxy."""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from knative_pods import CHAT, HANDLER, Pod, QueueProxy, ask, opened

from runtime.sse import EventParser

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def start_pod() -> Callable[..., Any]:
    @contextlib.contextmanager
    def start(image: Any, **env: str) -> Iterator[Pod]:
        pod = Pod(image, env)
        try:
            yield pod
        except BaseException:
            sys.stderr.write(pod.output())
            raise
        finally:
            pod.close()

    return start


@pytest.fixture(scope="module")
def image(make_image: Callable[..., Any]) -> Any:
    return make_image(textwrap.dedent(HANDLER))


@pytest.fixture(scope="module")
def started(start_pod: Any, image: Any, at_once: Callable[..., list[Any]]) -> Iterator[tuple[Pod, dict[str, Any]]]:
    """A pod, and what the requests got that were there in its first instant."""
    with start_pod(image) as pod:
        port, chat = pod.proxy.port, "/v1/chat/completions"
        calls = {
            "json": lambda: ask(port, "/hello", Accept="application/json"),
            "events": lambda: ask(port, "/hello", Accept="text/event-stream"),
            "chat": lambda: ask(port, chat, CHAT % "false"),
            "chat events": lambda: ask(port, chat, CHAT % "true", Accept="text/event-stream"),
            "body in chunks": lambda: ask(port, "/echo", iter([b"a", b"b"]), Transfer_Encoding="chunked"),
        }
        yield pod, dict(zip(calls, at_once(list(calls.values())), strict=True))


@pytest.fixture
def pod(started: tuple[Pod, dict[str, Any]]) -> Pod:
    assert started[0].process.poll() is None, started[0].output()
    return started[0]


def test_requests_of_the_first_instant_are_answered(started: tuple[Pod, dict[str, Any]]) -> None:
    first = started[1]
    assert all(status == 200 and body for status, body in first.values()), first
    assert first["json"][1] == b"yes"
    assert first["chat events"][1].endswith(b"data: [DONE]\n\n")
    assert json.loads(first["body in chunks"][1]) == {"text": "ab", "length": None}


@pytest.mark.parametrize("accept", ["text/event-stream", "text/event-stream, */*", "application/x-ndjson"])
def test_streams_piece_by_piece(pod: Pod, accept: str) -> None:
    name = accept.encode().hex()
    with opened(pod.proxy.port, f"/gated?name={name}", Accept=accept) as stream:
        assert b"first" in stream.read1()
        ask(pod.proxy.port, f"/open?name={name}")
        assert b"last" in stream.read()


@pytest.mark.parametrize("accept", ["application/json", "*/*"])
def test_answers_all_others(pod: Pod, accept: str) -> None:
    ask(pod.proxy.port, "/open?name=x")
    assert ask(pod.proxy.port, "/gated?name=x", Accept=accept) == (200, b"first last")


def test_a_clients_leaving_ends_the_handlers_generator(pod: Pod, eventually: Callable[..., Any]) -> None:
    with opened(pod.proxy.port, "/endless", Accept="text/event-stream") as stream:
        assert stream.read1()
    eventually(lambda: ask(pod.proxy.port, "/left")[1] == b"True", 30, "the generator was closed")


def test_a_long_line_of_the_log(pod: Pod, eventually: Callable[..., Any]) -> None:
    assert ask(pod.proxy.port, "/shout")[0] == 200
    eventually(lambda: "x" * 70_000 in pod.output(), what="the line")


def test_what_a_timeout_looks_like(pod: Pod) -> None:
    """The trap: an answer that took too long ends well, with status 200, and only its missing end tells."""
    proxy = QueueProxy(pod.spec, pod.port, timeout=3.0)
    try:
        status, body = ask(proxy.port, "/gated?name=never", Accept="text/event-stream")
        assert status == 200
        assert body.endswith(b"request timeout")
        assert b"[DONE]" not in body
    finally:
        ask(pod.port, "/open?name=never")
        proxy.shutdown()
        proxy.server_close()


def test_a_function_ends_its_streams_before_the_timeout(
    start_pod: Any, image: Any, at_once: Callable[..., list[Any]]
) -> None:
    """What `glowplug render` sets 10 s below the platform's limit, here 2 s below it."""
    with start_pod(image, GLOWPLUG_ANSWER_LIMIT="2") as pod:
        assert pod.proxy.ready.wait(120)
        proxy = QueueProxy(pod.spec, pod.port, timeout=4.0)
        try:
            paths = ("/gated?name=never", "/endless")
            calls = [lambda path=path: ask(proxy.port, path, Accept="text/event-stream") for path in paths]
            for status, body in at_once(calls):
                assert status == 200
                assert b"request timeout" not in body
                *_, error, done = EventParser().feed(body)
                assert (error.event, json.loads(error.data)["error"]["code"], done.data) == (
                    "error",
                    "answer_limit",
                    "[DONE]",
                )
        finally:
            ask(pod.port, "/open?name=never")
            proxy.shutdown()
            proxy.server_close()
        assert pod.delete() == 0


def test_from_one_to_zero_and_back(start_pod: Any, image: Any, eventually: Callable[..., Any]) -> None:
    """SIGTERM comes after the last request has been quiet; a stream that runs by then ends as it should."""
    with start_pod(image) as pod:
        port = pod.proxy.port
        with contextlib.ExitStack() as stack:
            sse = {"Accept": "text/event-stream"}
            streams = [stack.enter_context(opened(port, "/gated?name=a", **sse)) for _ in range(3)]
            for stream in streams:
                assert stream.read1() == b"data: first \n\n"
            assert ask(port, "/late") == (200, b"yes")
            codes: list[int] = []
            deletion = threading.Thread(target=lambda: codes.append(pod.delete()))
            deletion.start()
            for _ in range(5):  # the routes have not heard of it yet
                assert ask(port, "/late") == (200, b"yes")
                assert "draining" not in pod.output()
            eventually(lambda: "draining: SIGTERM" in pod.output(), 30, "the worker drains")
            assert ask(pod.port, "/late") == (200, b"yes"), "whoever still comes is served"
            assert pod.process.poll() is None, "it waits for the streams"
            assert ask(pod.port, "/open?name=a")[0] == 200
            for stream in streams:
                assert stream.read() == b"data: last\n\ndata: [DONE]\n\n"
        deletion.join(60)
        assert codes == [0], pod.output()
    with start_pod(image) as pod:
        assert ask(pod.proxy.port, "/hello") == (200, b"yes")
        assert pod.delete() == 0
