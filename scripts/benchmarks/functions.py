"""One function in two ways, in a container: plain (Flask, gunicorn, from_pretrained) and ours.

A request and a probe are sent when the entrypoint is executed, and retried until the port is open, as a platform's
queue does.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.containers import NAMESPACES, Container, MemoryCgroup, container
from benchmarks.harness import Sample, Unavailable
from runtime.container import native
from runtime.layers.building import WARM

WITHOUT_MODEL = {"handler": "/word", "ready": "/_/ready", "stream": "/words"}  # by name, paths that ask no model
PROMPT_TOKENS = 32  # the checkpoints' tokenizer merges letters only: every digit is a token
_FOLDER = Path(__file__).parent / "function"
_SECONDS = 300.0
_ANSWERS = 15


def prompt() -> str:
    """Return a new prompt each time, so that a function cannot reuse the rows of an earlier one."""
    return f"{next(_number):0{PROMPT_TOKENS}}"[::-1]


_number = itertools.count(1)


@dataclass(slots=True)
class Function:
    """A started function. `first_token` and `http_ready` are ms from the execution of its entrypoint."""

    container: Container
    port: int
    marks: str  # route that reports the phases
    first_token: float = 0.0
    http_ready: float = 0.0
    _threads: list[threading.Thread] = field(default_factory=list)

    def begin(self, health: str) -> None:
        """Execute the entrypoint and send both requests."""
        self.container.start()

        def ask() -> None:
            self._retry("POST", "/", prompt())
            self.first_token = (time.monotonic_ns() - self.container.started) / 1e6

        def probe() -> None:
            self._retry("GET", health)
            self.http_ready = (time.monotonic_ns() - self.container.started) / 1e6

        self._threads = [threading.Thread(target=work, daemon=True) for work in (ask, probe)]
        for thread in self._threads:
            thread.start()

    def answered(self) -> None:
        """Wait for both answers. Raises `Unavailable` with the end of the function's log."""
        for thread in self._threads:
            thread.join(_SECONDS)
        if not (self.first_token and self.http_ready):
            raise Unavailable(f"the function did not answer: {self.container.output()[-500:]}")

    def ask(self) -> float:
        """Return the ms of one more first token."""
        start = time.monotonic_ns()
        self.request("POST", "/", prompt())
        return (time.monotonic_ns() - start) / 1e6

    def request(self, method: str, path: str, body: str | None = None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise Unavailable(f"the function answered {response.status}: {answer[:300].decode(errors='replace')}")
        return answer

    def connections(self) -> Sample:
        """Return the ms to the first byte of answers that ask no model.

        `kept_…` is on one connection, from its second answer on; `fresh_…` with a connection for each.
        """
        found: dict[str, float] = {}
        for name, path in WITHOUT_MODEL.items():
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)) as kept:
                _first_byte(kept, path)  # later answers on this connection may wait for an acknowledgement
                found[f"kept_{name}_ms"] = statistics.median(_first_byte(kept, path) for _ in range(_ANSWERS))
            fresh = []
            for _ in range(_ANSWERS):
                with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)) as once:
                    fresh.append(_first_byte(once, path))
            found[f"fresh_{name}_ms"] = statistics.median(fresh)
        return found

    def phases(self) -> Sample:
        """Return `<phase>_ms` of the start, as the function itself reports."""
        marks: Any = json.loads(self.request("GET", self.marks))
        if isinstance(marks, dict):
            return {
                f"{span['owner']}: {span['name']} ms": (span["end_ns"] - span["start_ns"]) / 1e6
                for span in marks["spans"]
            }
        found, last = {}, self.container.started
        for name, at in marks:
            found[f"{name} ms"] = (at - last) / 1e6
            last = at
        return found

    def _retry(self, method: str, path: str, body: str | None = None) -> None:
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline and self.container.process.poll() is None:
            try:
                self.request(method, path, body)
            except OSError:
                time.sleep(0.002)
            except (Unavailable, http.client.HTTPException):
                return
            else:
                return


def _first_byte(connection: http.client.HTTPConnection, path: str) -> float:
    """Return the ms until an answer's first byte comes, with the connecting where the connection is not open yet."""
    start = time.monotonic_ns()
    connection.request("GET", path)
    response = connection.getresponse()
    begin = response.read(1)
    took = (time.monotonic_ns() - start) / 1e6
    response.read()
    if response.status != 200 or not begin:
        raise Unavailable(f"the function answered {path} with {response.status}")
    return took


@contextlib.contextmanager
def plain(model: Path, *, threads: int, cgroup: MemoryCgroup | None = None) -> Iterator[Function]:
    """Start the plain function and ask it; it has answered when the block begins."""
    port = _free_port()
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "1", "--threads", "4"]
    command += ["--timeout", "600", "--log-level", "warning", "plain:app"]
    environment = _environment(threads, MODEL=str(model))
    with _started(command, environment, port, "/health", "/marks", cgroup) as function:
        yield function


@contextlib.contextmanager
def glowplug(
    model: str,
    *,
    agent: Path | None,
    threads: int,
    cgroup: MemoryCgroup | None = None,
    settings: Mapping[str, str] = MappingProxyType({"GLOWPLUG_LAYERS": "off"}),
    static: bool = False,
) -> Iterator[Function]:
    """Start our function and ask it, with the agent at this socket or a private one; `settings` are variables.

    With `static` its entrypoint is the shim's static twin, where there is one.
    """
    port = _free_port()
    environment = _environment(
        threads,
        PORT=str(port),
        GLOWPLUG_HOST="127.0.0.1",
        GLOWPLUG_MODEL=model,
        GLOWPLUG_HANDLER=str(_FOLDER),
        GLOWPLUG_THREADS=str(threads),
        GLOWPLUG_LOG_LEVEL="warning",
        PYTHONSAFEPATH="1",
        **settings,
        **({"GLOWPLUG_SOCKET": str(agent)} if agent else {}),
    )
    command = [str(static_shim())] if static and static_shim() else [sys.executable, "-m", "runtime.shim"]
    with _started(command, environment, port, "/_/health", "/_/ledger", cgroup) as function:
        yield function


@cache
def static_shim() -> Path | None:
    """Build the static shim for this interpreter; None without a compiler."""
    if not native.compiler():
        return None
    place = Path(__file__).parents[2] / "build"
    place.mkdir(exist_ok=True)
    native.build(str(place / "glowplug-shim"))
    return place / "glowplug-shim"


def shim_of_nodes() -> str:
    """Return the name of the shim that node mode's functions begin with, for people."""
    return "c" if static_shim() else "python"


@contextlib.contextmanager
def standby(model: str, *, agent: Path, threads: int, layer: str) -> Iterator[Function]:
    """Start our function in pod mode and let its idle worker go; this layer stays warm."""
    hold = {"GLOWPLUG_LAYERS": layer, "GLOWPLUG_HOLD": "user=1,model=inf,lang=inf"}
    with glowplug(model, agent=agent, threads=threads, settings=hold) as function:
        deadline = time.monotonic() + _SECONDS
        while b"parked" not in function.request("GET", "/_/ready") or f"layer {layer} {WARM}" not in (
            function.container.output()
        ):
            if time.monotonic() > deadline:
                raise Unavailable(f"the function was not parked: {function.container.output()[-500:]}")
            time.sleep(0.1)
        yield function


@contextlib.contextmanager
def pool(kind: str, *options: str) -> Iterator[Path]:
    """Run a pool until its zygote is ready; yield its socket, which a function gets, with its log beside it.

    Needs root. `options` are those of `glowplug pool`.
    """
    if not NAMESPACES:
        raise Unavailable("placing processes in containers takes root, and unshare")
    with tempfile.TemporaryDirectory(prefix="gp-pool-") as place:
        path, log = Path(place) / "pool.sock", Path(place) / "log"
        command = [sys.executable, "-c", "from runtime.cli import main; main()", "pool", "--kind", kind, *options]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--socket", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(1, PYTHONSAFEPATH="1"),
                cwd=_FOLDER,
            )
        try:
            deadline = time.monotonic() + _SECONDS
            while f"layer {WARM}" not in log.read_text():
                if time.monotonic() > deadline or process.poll() is not None:
                    raise Unavailable(f"the pool did not become ready: {log.read_text()[-500:]}")
                time.sleep(0.05)
            yield path
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def _started(
    command: list[str],
    environment: Mapping[str, str],
    port: int,
    health: str,
    marks: str,
    cgroup: MemoryCgroup | None,
) -> Iterator[Function]:
    with container(command, environment, _FOLDER, cgroup) as place:
        function = Function(place, port, marks)
        function.begin(health)
        function.answered()
        yield function


def _environment(threads: int, **settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GLOWPLUG_") and name != "PORT"}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # images have bytecode; here the first start writes it
    return {**kept, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **settings}


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
