"""The stand-in for of-watchdog keeps to the real one's rules: the same tests for both, where OF_WATCHDOG is set."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STAND_IN = Path(__file__).parent / "stand_in_watchdog.py"
# A function that is as slow, as loud or as dead as a test asks it to be.
APP = """
import http.server, os, signal, sys, threading, time

gate = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=end).start())

def end():
    print("function: SIGTERM", flush=True)
    time.sleep(0.2)
    os._exit(int(os.environ.get("exit_code", "0")))

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b""
        self.send_response(200)
        self.send_header("X-Length", str(length))
        self.send_header("X-Body", body.decode())
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.piece(b"first ")
        if self.path == "/slow":
            time.sleep(3)
        if self.path == "/gate":
            gate.wait(20)
        self.piece(b"last")
        self.piece(b"")
    def do_GET(self):
        gate.set()
        if self.path == "/exit":
            os._exit(int(os.environ.get("exit_code", "0")))
        self.send_response(503 if self.path == "/ready" else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def piece(self, data):
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))
        self.wfile.flush()
    def log_message(self, *arguments):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
SSE = {"Accept": "text/event-stream"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Running:
    def __init__(self, process: subprocess.Popen[bytes], port: int, upstream: int, log: Path) -> None:
        self.process, self.port, self.upstream, self.log = process, port, upstream, log

    @contextlib.contextmanager
    def open(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Iterator[Any]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request(method, path, body, headers)
            yield connection.getresponse()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status, and as much of the body as came."""
        with self.open(method, path, body, **headers) as response:
            try:
                return response.status, response.read()
            except http.client.IncompleteRead as cut:
                return response.status, cut.partial


@pytest.fixture(params=["stand-in", "real"])
def start(
    request: pytest.FixtureRequest, tmp_path: Path, eventually: Callable[..., Any]
) -> Iterator[Callable[..., Running]]:
    """`start(serving=True, **env)`: a watchdog before APP, or before nothing that listens."""
    program = str(STAND_IN)
    if request.param == "real":
        program = os.environ.get("OF_WATCHDOG", "") or pytest.skip("OF_WATCHDOG does not name the real program")
    (tmp_path / "app.py").write_text(APP)
    with contextlib.ExitStack() as stack:

        def run(*, serving: bool = True, **env: str) -> Running:
            stack.close()  # the real one has a port that only one at a time can have
            port, upstream = free_port(), free_port()
            settings = {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "fprocess": f"python {tmp_path}/app.py {upstream}" if serving else "sleep 60",
                "mode": "http",
                "port": str(port),
                "upstream_url": f"http://127.0.0.1:{upstream}",
                "http_buffer_req_body": "false",
                "prefix_logs": "false",
                "log_buffer_size": "-1",
                "healthcheck_interval": "1s",
                **env,
            }
            log = tmp_path / "log"
            command = [sys.executable, program] if program == str(STAND_IN) else [program]
            with log.open("wb") as output:
                process = subprocess.Popen(command, env=settings, stdout=output, stderr=output, start_new_session=True)
            stack.callback(process.wait, 10)
            stack.callback(_kill, process)
            made = Running(process, port, upstream, log)
            eventually(lambda: _listens(port), what="the watchdog listens")
            if serving:
                eventually(lambda: _listens(upstream), what="the function listens")
            return made

        yield run


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("accept", "streamed"),
    [
        ("text/event-stream", True),
        ("text/event-stream, */*", True),
        ("application/x-ndjson", True),
        ("application/json", False),
        ("*/*", False),
    ],
)
def test_streams_by_the_requests_accept(start: Callable[..., Running], accept: str, streamed: bool) -> None:
    function = start()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", function.port, timeout=20)) as connection:
        connection.request("POST", "/gate", b"x", {"Accept": accept})
        if streamed:
            response = connection.getresponse()
            assert response.read1(100) == b"first "
            function.ask("GET", "/open")
        else:
            connection.sock.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.sock.recv(1)  # not even the headers come before the end
            connection.sock.settimeout(20)
            function.ask("GET", "/open")
            response = connection.getresponse()
        assert response.read().endswith(b"last")


def test_bodies_go_on_without_their_length(start: Callable[..., Running]) -> None:
    with start().open("POST", "/", b"hello") as response:
        assert response.getheader("X-Length") == "None"


def test_nobody_listens_behind_it(start: Callable[..., Running]) -> None:
    function = start(serving=False)
    assert function.ask("POST", "/", b"x")[0] == 500
    assert function.ask("POST", "/", b"x", **SSE) == (200, b"")


def test_timeouts_cut_without_a_word(start: Callable[..., Running]) -> None:
    assert start(exec_timeout="1s", write_timeout="20s").ask("POST", "/slow", b"x") == (200, b"first ")
    assert start(exec_timeout="20s", write_timeout="1s").ask("POST", "/slow", b"x", **SSE) == (200, b"first ")


def test_readiness_is_the_functions(start: Callable[..., Running]) -> None:
    function = start(ready_path="/ready")
    assert function.ask("GET", "/_/ready")[0] == 503
    assert function.ask("GET", "/_/health")[0] == 200


def test_more_than_may_be_inside(start: Callable[..., Running]) -> None:
    function = start(max_inflight="1")
    with function.open("POST", "/gate", b"x", **SSE) as stream:
        assert stream.read1(100) == b"first "
        assert function.ask("POST", "/", b"x")[0] == 429


def test_sigterm(start: Callable[..., Running], eventually: Callable[..., Any]) -> None:
    """The function hears at once; the watchdog takes requests for healthcheck_interval more, and ends with 0."""
    function = start(healthcheck_interval="2s")
    function.process.terminate()
    eventually(lambda: "function: SIGTERM" in function.log.read_text(), what="the function's signal")
    assert function.process.poll() is None
    assert _listens(function.port)
    assert function.process.wait(20) == 0


def test_the_functions_end(start: Callable[..., Running], eventually: Callable[..., Any]) -> None:
    """After an exit of 0 the watchdog stays, and has a 500 for everyone; after any other it goes, too."""
    function = start(exit_code="0")
    with contextlib.suppress(http.client.HTTPException, OSError):
        function.ask("GET", "/exit")
    eventually(lambda: not _listens(function.upstream), what="the function is gone")
    assert function.ask("POST", "/", b"x")[0] == 500
    assert function.ask("GET", "/_/health")[0] == 200
    failing = start(exit_code="3")
    with contextlib.suppress(http.client.HTTPException, OSError):
        failing.ask("GET", "/exit")
    assert failing.process.wait(20) != 0
