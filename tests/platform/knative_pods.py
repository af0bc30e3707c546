"""A function's pod on Knative without a cluster: its container as a process, and a proxy before it, real or not."""

from __future__ import annotations

import contextlib
import fcntl
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
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from runtime.commands import objects

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
    """Stands in for what Knative puts before a container; every piece passes at once.

    It probes until the container is ready and holds requests till then (in a cluster the activator does that), lets
    `concurrency` of them in, queues ten times as many and answers 503 beyond; after `timeout` seconds it answers 504,
    or, if the answer has begun, adds the text "request timeout" to it and ends it well.
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
    disable_nagle_algorithm = True  # as in every server in Go
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
        text = b"request timeout" if status == 504 else b""
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


def _cut(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


class RealQueueProxy:
    """The program of KNATIVE_QUEUE_PROXY, before a container. Its other ports are fixed: one at a time on a machine."""

    ADMIN = 8022

    def __init__(self, program: str, spec: dict[str, Any], container: int, timeout: float | None = None) -> None:
        self.ready = self
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        probe = spec["containers"][0]["readinessProbe"]["httpGet"]
        probe = {"httpGet": {**probe, "port": container, "host": "127.0.0.1", "scheme": "HTTP"}, "successThreshold": 1}
        settings = {
            "CONTAINER_CONCURRENCY": spec["containerConcurrency"],
            "QUEUE_SERVING_PORT": self.port,
            "QUEUE_SERVING_TLS_PORT": 0,
            "USER_PORT": container,
            "REVISION_TIMEOUT_SECONDS": int(timeout or spec["timeoutSeconds"]),
            "REVISION_RESPONSE_START_TIMEOUT_SECONDS": int(timeout or spec["responseStartTimeoutSeconds"]),
            "SERVING_READINESS_PROBE": json.dumps(probe),
            "SERVING_LOGGING_CONFIG": "",
            "SERVING_LOGGING_LEVEL": "error",
            "SERVING_NAMESPACE": "default",
            "SERVING_CONFIGURATION": "chat",
            "SERVING_REVISION": "chat-1",
            "SERVING_POD": "chat-1-0",
            "SERVING_POD_IP": "127.0.0.1",
        }
        self._lock = (Path(tempfile.gettempdir()) / "glowplug-queue-proxy.lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.process = subprocess.Popen(
            [program],
            env={"PATH": os.defpath, **{name: str(value) for name, value in settings.items()}},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while not (_listens(self.port) and _listens(self.ADMIN)):
            assert self.process.poll() is None, f"{program} ended with {self.process.returncode}"
            assert time.monotonic() < deadline, f"{program} does not listen"
            time.sleep(0.01)

    def wait(self, seconds: float) -> bool:
        """Until it says that the container is ready."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
                connection.request("GET", "/", headers={"User-Agent": "kube-probe/1.36", "K-Network-Probe": "queue"})
                if connection.getresponse().status == 200:
                    return True
            time.sleep(0.025)
        return False

    def wait_quiet(self, deadline: float) -> None:
        """As the kubelet deletes a pod: SIGTERM for the proxy, and its drain handler before the container's SIGTERM."""
        self.process.terminate()
        left = max(1.0, deadline - time.monotonic())
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.ADMIN, timeout=left)) as connection:
            connection.request("GET", "/wait-for-drain")
            connection.getresponse().read()

    def shutdown(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def server_close(self) -> None:
        self._lock.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Pod:
    """The rendered Service's container as a process, and its queue-proxy; `delete` ends it as the kubelet would."""

    def __init__(
        self,
        image: Any,
        env: Mapping[str, str],
        before: Callable[..., QueueProxy | RealQueueProxy] = QueueProxy,
        timeout: float | None = None,
    ) -> None:
        function = objects.Function(
            name="chat", image="chat:1", model="/home/app/models/glowplug-demo", slots=8, start_timeout=120, timeout=60
        )
        (service,) = objects.knative(function)
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
        command = list(container["command"])
        if command[0] == image.shim.name:  # where no compiler has made it: what it does outside of node mode
            command = (
                [str(image.shim)] if image.shim.exists() else [sys.executable, "-P", "-m", "runtime.container.shim"]
            )
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=image.home, env=settings, stdout=log, stderr=log, start_new_session=True
            )
        self.proxy = before(self.spec, self.port, timeout)

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


@contextlib.contextmanager
def opened(port: int, path: str, body: Any = b"", **headers: str) -> Iterator[http.client.HTTPResponse]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=90)) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", path, body, named, encode_chunked="Transfer-Encoding" in named)
        yield connection.getresponse()


def ask(port: int, path: str, body: Any = b"", **headers: str) -> tuple[int, bytes]:
    with opened(port, path, body, **headers) as response:
        return response.status, response.read()
