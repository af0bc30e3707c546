"""A function's life on Knative: what `glowplug render` says, run behind a stand-in for queue-proxy."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from runtime import render
from runtime.sse import EventParser

pytestmark = pytest.mark.timeout(180)

CHAT = '{"messages": [{"role": "user", "content": "What is Glowplug?"}], "max_tokens": 8, "stream": %s}'
QUIET = 1.5  # the 30 s of the real one, after the last request, before it lets SIGTERM through
HANDLER = """
    import itertools
    import sys
    import threading

    gates = {}
    left = threading.Event()


    def handle(event, context):
        match event.path:
            case "/gated":
                return gated(gates.setdefault(event.query["name"], threading.Event()))
            case "/open":
                gates.setdefault(event.query["name"], threading.Event()).set()
            case "/endless":
                return endless()
            case "/left":
                return str(left.is_set())
            case "/shout":
                print("x" * 70_000, file=sys.stderr, flush=True)
            case "/echo":
                return {"text": event.body.decode(), "length": event.headers.get("Content-Length")}
        return "yes"


    def gated(gate):
        yield "first "
        gate.wait(60)
        yield "last"


    def endless():
        try:
            for number in itertools.count():
                yield f"{number} "
        finally:
            left.set()
    """
HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class QueueProxy(ThreadingHTTPServer):
    """What Knative puts before a container; every piece passes at once.

    It probes until the container is ready and holds requests till then, lets `concurrency` of them in, queues ten times
    as many and answers 503 beyond; after `timeout` seconds it answers 504, or, if the answer has begun, adds the text
    "request timeout" to it and ends it well.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, spec: dict[str, Any], container: int, timeout: float | None = None) -> None:
        self.container = container
        self.limit = timeout or spec["timeoutSeconds"]
        self.ready = threading.Event()
        self._probe = spec["containers"][0]["readinessProbe"]["httpGet"]["path"]
        self._places = threading.Semaphore(spec["containerConcurrency"])
        self._queue = threading.Semaphore(11 * spec["containerConcurrency"])
        self.arrived = time.monotonic()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self._watch, daemon=True).start()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def _watch(self) -> None:
        deadline = time.monotonic() + 120
        while not self.ready.wait(0.025) and time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.container, timeout=1)
                connection.request("GET", self._probe, headers={"K-Network-Probe": "queue"})
                if connection.getresponse().status == 200:
                    self.ready.set()

    @contextlib.contextmanager
    def place(self, deadline: float) -> Iterator[int]:
        """A place in the container (0), or the status to answer."""
        if not self._queue.acquire(blocking=False):
            yield 503
            return
        try:
            left = max(0.0, deadline - time.monotonic())
            if not self._places.acquire(timeout=left):
                yield 504
                return
            try:
                yield 0
            finally:
                self._places.release()
        finally:
            self._queue.release()

    def wait_quiet(self, deadline: float) -> None:
        """As its drain handler: returns when no request has come for a while."""
        while time.monotonic() < min(deadline, self.arrived + QUIET):
            time.sleep(0.02)

    def handle_error(self, *_: object) -> None:
        pass  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: QueueProxy

    def do_POST(self) -> None:
        self.server.arrived = time.monotonic()
        deadline = time.monotonic() + self.server.limit
        with self.server.place(deadline) as status:
            if status or not self.server.ready.wait(max(0.0, deadline - time.monotonic())):
                self._answer(status or 504)
                return
            self._pass_on(deadline)

    do_GET = do_POST

    def _pass_on(self, deadline: float) -> None:
        container = http.client.HTTPConnection("127.0.0.1", self.server.container, timeout=120)
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        names = HOP - {"content-length"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in names}
        body = self._chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if chunked:
            headers["Transfer-Encoding"] = "chunked"
        container.request(self.command, self.path, body, headers, encode_chunked=chunked)
        line = container.sock
        cut = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, [line])
        cut.daemon = True
        cut.start()
        with contextlib.closing(container), contextlib.closing(line):
            try:
                response = container.getresponse()
            except (OSError, http.client.HTTPException):
                self._answer(504 if time.monotonic() >= deadline else 502)
            else:
                self._stream(response, deadline)
            finally:
                cut.cancel()

    def _stream(self, response: http.client.HTTPResponse, deadline: float) -> None:
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            while piece := response.read1(1 << 16):
                self._chunk(piece)
        if time.monotonic() >= deadline:
            self._chunk(b"request timeout")
        self._chunk(b"")

    def _chunk(self, piece: bytes) -> None:
        self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.flush()

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _cut(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


class Pod:
    """The rendered Service's container as a process, and its queue-proxy; `delete` ends it as the kubelet would."""

    def __init__(self, image: Any, env: Mapping[str, str]) -> None:
        function = render.Function(
            name="chat", image="chat:1", model="/home/app/models/glowplug-demo", slots=8, start_timeout=120, timeout=60
        )
        (service,) = render.knative(function)
        self.spec = service["spec"]["template"]["spec"]
        (container,) = self.spec["containers"]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.tmp = Path(tempfile.mkdtemp(prefix="gp-pod-"))
        own = {variable["name"]: variable["value"] for variable in container["env"]}
        places = {"/home/app": str(image.home), "/tmp": str(self.tmp)}
        settings = {
            name: re.sub(r"^(/home/app|/tmp)\b", lambda found: places[found[0]], value)
            for name, value in {**image.dockerfile.environment, **own}.items()
        }
        settings |= {
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "HOME": str(image.home),
            "TMPDIR": str(self.tmp),
            "PYTHONPATH": str(image.inside("/usr/src/glowplug")),
            "PORT": str(self.port),  # Knative's
            "GLOWPLUG_THREADS": "1",
            **env,
        }
        self.log = self.tmp / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                container["command"], cwd=image.home, env=settings, stdout=log, stderr=log, start_new_session=True
            )
        self.proxy = QueueProxy(self.spec, self.port)

    def delete(self) -> int:
        """Waits until the proxy lets SIGTERM through; the exit code. At the end of the grace it is SIGKILL's."""
        deadline = time.monotonic() + self.spec["timeoutSeconds"]
        self.proxy.wait_quiet(deadline)
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        self.proxy.shutdown()
        self.proxy.server_close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        shutil.rmtree(self.tmp, ignore_errors=True)


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


@contextlib.contextmanager
def opened(port: int, path: str, body: Any = b"", **headers: str) -> Iterator[http.client.HTTPResponse]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=90)) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", path, body, named, encode_chunked="Transfer-Encoding" in named)
        yield connection.getresponse()


def ask(port: int, path: str, body: Any = b"", **headers: str) -> tuple[int, bytes]:
    with opened(port, path, body, **headers) as response:
        return response.status, response.read()


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
    proxy = QueueProxy(pod.spec, pod.port, timeout=2.0)
    try:
        status, body = ask(proxy.port, "/gated?name=never", Accept="text/event-stream")
        assert status == 200
        assert body.endswith(b"request timeout")
        assert b"[DONE]" not in body
    finally:
        ask(pod.port, "/open?name=never")
        proxy.shutdown()
        proxy.server_close()


def test_a_function_ends_its_streams_before_the_timeout(start_pod: Any, image: Any) -> None:
    """What `glowplug render` sets 10 s below the platform's limit, here 2 s below it."""
    with start_pod(image, GLOWPLUG_ANSWER_LIMIT="2") as pod:
        assert pod.proxy.ready.wait(120)
        proxy = QueueProxy(pod.spec, pod.port, timeout=4.0)
        try:
            for path in ("/gated?name=never", "/endless"):
                status, body = ask(proxy.port, path, Accept="text/event-stream")
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
        with opened(port, "/gated?name=a", Accept="text/event-stream") as stream:
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
            assert pod.process.poll() is None, "it waits for the stream"
            assert ask(pod.port, "/open?name=a")[0] == 200
            assert stream.read() == b"data: last\n\ndata: [DONE]\n\n"
        deletion.join(60)
        assert codes == [0], pod.output()
    with start_pod(image) as pod:
        assert ask(pod.proxy.port, "/hello") == (200, b"yes")
        assert pod.delete() == 0
