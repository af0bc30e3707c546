"""The stand-in for Knative's queue-proxy keeps to the real one's rules: the same tests for both, where
KNATIVE_QUEUE_PROXY names it. And a function behind the real one, from its start to its end."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from knative_pods import CHAT, HANDLER, Pod, QueueProxy, RealQueueProxy, ask, opened

from runtime.sse import EventParser

pytestmark = pytest.mark.timeout(240)

# A container that is ready when it is told to be, and as slow as a test asks it to be.
APP = """
import http.server, sys, threading

gate, ready = threading.Event(), threading.Event()

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.chunks()
        if self.path == "/never":
            gate.wait(30)
        self.send_response(200)
        self.send_header("X-Length", str(length))
        self.send_header("X-Body", body.decode())
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.piece(b"first ")
        if self.path == "/gate":
            gate.wait(30)
        self.piece(b"last")
        self.piece(b"")
    def do_GET(self):
        {"/open": gate.set, "/close": gate.clear, "/be-ready": ready.set}.get(self.path, lambda: None)()
        self.send_response(200 if ready.is_set() or self.path != "/_/ready" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def chunks(self):
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)
    def piece(self, data):
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))
        self.wfile.flush()
    def log_message(self, *arguments):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def real() -> Callable[..., RealQueueProxy]:
    program = os.environ.get("KNATIVE_QUEUE_PROXY", "")
    if not program:
        pytest.skip("KNATIVE_QUEUE_PROXY does not name the real program")
    return functools.partial(RealQueueProxy, program)


@pytest.fixture(params=["stand-in", "real"])
def start(
    request: pytest.FixtureRequest, tmp_path: Path, eventually: Callable[..., Any]
) -> Iterator[Callable[..., SimpleNamespace]]:
    """`start(concurrency=2, timeout=20.0, ready=True)`: a proxy before APP; `proxy`, its `port`, the `container`'s."""
    before: Callable[..., Any] = real() if request.param == "real" else QueueProxy
    (tmp_path / "app.py").write_text(APP)
    with contextlib.ExitStack() as stack:

        def run(concurrency: int = 2, timeout: float = 20.0, *, ready: bool = True) -> SimpleNamespace:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                container = int(probe.getsockname()[1])
            app = subprocess.Popen([sys.executable, str(tmp_path / "app.py"), str(container)])
            stack.callback(app.wait, 20)
            stack.callback(app.kill)
            eventually(lambda: _answers(container), what="the container listens")
            spec = {
                "containerConcurrency": concurrency,
                "timeoutSeconds": timeout,
                "responseStartTimeoutSeconds": timeout,
                "containers": [{"readinessProbe": {"httpGet": {"path": "/_/ready"}}}],
            }
            proxy = before(spec, container)
            stack.callback(proxy.server_close)
            stack.callback(proxy.shutdown)
            if ready:
                tell(container, "/be-ready")
                assert proxy.ready.wait(20)
            return SimpleNamespace(proxy=proxy, port=proxy.port, container=container)

        yield run


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def tell(port: int, path: str) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", path)
        connection.getresponse().read()


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json", "*/*"])
def test_every_piece_passes_at_once(start: Callable[..., Any], accept: str) -> None:
    made = start()
    with opened(made.port, "/gate", b"x", Accept=accept) as response:
        assert response.read1(100) == b"first "
        tell(made.container, "/open")
        assert response.read() == b"last"


def test_bodies_in_chunks_stay_in_chunks(start: Callable[..., Any]) -> None:
    made = start()
    with opened(made.port, "/", iter([b"he", b"llo"]), Transfer_Encoding="chunked") as response:
        assert (response.getheader("X-Length"), response.getheader("X-Body")) == ("None", "hello")
    with opened(made.port, "/", b"hello") as response:
        assert (response.getheader("X-Length"), response.getheader("X-Body")) == ("5", "hello")


def test_readiness_is_the_containers(start: Callable[..., Any]) -> None:
    made = start(ready=False)
    assert not made.proxy.ready.wait(0.3)
    tell(made.container, "/be-ready")
    assert made.proxy.ready.wait(20)


def test_a_timeout_before_the_first_byte_is_a_504(start: Callable[..., Any]) -> None:
    made = start(timeout=1.0)
    assert ask(made.port, "/never", b"x") == (504, b"request timeout")


def test_a_timeout_in_the_middle_is_a_text_and_a_good_end(start: Callable[..., Any]) -> None:
    made = start(timeout=1.0)
    assert ask(made.port, "/gate", b"x", Accept="text/event-stream") == (200, b"first request timeout")


def test_ten_times_the_concurrency_wait_and_the_next_is_refused_at_once(
    start: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    made = start(concurrency=1, timeout=30.0)
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(ask(made.port, "/gate", b"x")[0])) for _ in range(14)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(statuses) == 3, 20, "one runs, ten wait, three are refused")
    assert statuses == [503] * 3
    tell(made.container, "/open")
    for thread in threads:
        thread.join(20)
    assert sorted(statuses[3:]) == [200] * 11


def test_its_drain_waits_until_no_request_has_come_for_a_while(start: Callable[..., Any]) -> None:
    """And lets them in meanwhile."""
    made = start(timeout=90.0)
    drained = threading.Event()

    def drain() -> None:
        made.proxy.wait_quiet(time.monotonic() + 90)
        drained.set()

    thread = threading.Thread(target=drain)
    thread.start()
    for _ in range(3):
        assert not drained.wait(0.4)
        tell(made.container, "/open")
        assert ask(made.port, "/", b"x")[0] == 200
    thread.join(90)
    assert drained.is_set()


@pytest.fixture(scope="module")
def pod(make_image: Callable[..., Any]) -> Iterator[Pod]:
    """A function behind the real program, whose timeout is 8 s; the function ends its answers after 3."""
    before = real()
    made = Pod(make_image(textwrap.dedent(HANDLER)), {"GLOWPLUG_ANSWER_LIMIT": "3"}, before, timeout=8)
    try:
        assert made.proxy.ready.wait(120), made.output()
        yield made
    finally:
        made.close()


def test_a_function_behind_the_real_one(pod: Pod, at_once: Callable[..., list[Any]]) -> None:
    port, chat = pod.proxy.port, "/v1/chat/completions"
    whole, events, chunked = at_once(
        [
            lambda: ask(port, chat, CHAT % "false"),
            lambda: ask(port, chat, CHAT % "true", Accept="text/event-stream"),
            lambda: ask(port, "/echo", iter([b"a", b"b"]), Transfer_Encoding="chunked"),
        ]
    )
    assert (whole[0], events[0], chunked[0]) == (200, 200, 200)
    assert events[1].endswith(b"data: [DONE]\n\n")
    assert json.loads(chunked[1]) == {"text": "ab", "length": None}


def test_a_function_ends_its_stream_before_the_real_one_does(pod: Pod) -> None:
    try:
        status, body = ask(pod.proxy.port, "/gated?name=never", Accept="text/event-stream")
    finally:
        ask(pod.port, "/open?name=never")
    *_, error, done = EventParser().feed(body)
    assert (status, json.loads(error.data)["error"]["code"], done.data) == (200, "answer_limit", "[DONE]")


def test_a_clients_leaving_passes_through_the_real_one(pod: Pod, eventually: Callable[..., Any]) -> None:
    with opened(pod.proxy.port, "/endless", Accept="text/event-stream") as stream:
        assert stream.read1()
    eventually(lambda: ask(pod.proxy.port, "/left")[1] == b"True", 30, "the generator was closed")


def test_a_pod_with_the_real_one_is_deleted(pod: Pod) -> None:
    """The last of the module: SIGTERM comes 30 s after the last request, and the function ends with 0."""
    begun = time.monotonic()
    assert pod.delete() == 0, pod.output()
    assert time.monotonic() - begun >= 29
