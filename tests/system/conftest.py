"""Whole functions as processes: `glowplug serve` in a session of its own, seen as its platform and clients see it.

Tests take what they need by fixture name. A function that a test started is stopped by the end of the test, and must
then have left nothing: no process, no directory in its TMPDIR.
"""

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
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 180.0  # what only a broken function, or a hopelessly loaded machine, would take
NODE_AGENT = Path("/run/glowplug/agent.sock")
CONTEXT = 16384  # tokens; long enough that a generation is still running when a test gets to it


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])

    @property
    def text(self) -> str:
        return str(self.json["error"]["message"])


class Function:
    """One `glowplug serve`. Leaving its `with` block kills what is left of it."""

    def __init__(self, directory: Path, arguments: tuple[str, ...], env: Mapping[str, str]) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.temporary = directory / "t"
        self.temporary.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("GLOWPLUG_", "AWS_")) and k != "PORT"}
        self.env = {
            **kept,
            "TMPDIR": str(self.temporary),
            "GLOWPLUG_DRAM": "64M",
            "GLOWPLUG_HUGE_PAGES": "never",
            "GLOWPLUG_HOST": "127.0.0.1",
            "GLOWPLUG_THREADS": "1",
            "GLOWPLUG_LAYERS": "off",  # what is warm beside the worker takes processors; who tests that turns it on
            "HF_HUB_OFFLINE": "1",
            **env,
        }
        command = [sys.executable, str(Path(sys.prefix) / "bin" / "glowplug"), "serve", *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.pid = self.process.pid
        self._port = 0

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
        """Polls until `condition()` is true and returns what it gave; fails with the function's log."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"not within {seconds:.0f} s: {what}\n{self.output()}")
            time.sleep(0.01)
        return found

    def says(self, text: str, seconds: float = SECONDS) -> str:
        """Waits until the log has `text`; the whole log."""
        return str(self.until(lambda: text in self.output() and self.output(), f"the log says {text!r}", seconds))

    # --- its port -----------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        if not self._port:
            match = self.until(lambda: re.search(r"port (\d+) is open", self.output()), "the port is open")
            self._port = int(match[1])
        return self._port

    def connect(self, seconds: float = SECONDS) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)

    def request(
        self,
        path: str = "/",
        body: object = None,
        *,
        method: str = "",
        headers: Mapping[str, str] | None = None,
        seconds: float = SECONDS,
    ) -> Answer:
        data = json.dumps(body) if isinstance(body, (dict, list)) else body
        kind = {"Content-Type": "application/json"} if isinstance(body, (dict, list)) else {}
        with contextlib.closing(self.connect(seconds)) as connection:
            connection.request(method or ("GET" if body is None else "POST"), path, data, {**kind, **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())

    def wait_ready(self) -> Function:
        def ready() -> bool:
            if self.process.poll() is not None:
                pytest.fail(f"the function ended with {self.process.returncode}:\n{self.output()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.request("/_/ready", seconds=5).status == 200
            return False

        self.until(ready, "the function is ready")
        return self

    def wait_phase(self, *phases: str) -> str:
        """Waits until the start has reached one of `phases`; which."""

        def reached() -> str:
            with contextlib.suppress(OSError, http.client.HTTPException):
                phase = str(self.request("/_/ready", seconds=5).json["phase"])
                return phase if phase in phases else ""
            return ""

        return str(self.until(reached, f"the start reached {phases}"))

    def spans(self) -> list[dict[str, Any]]:
        return list(self.request("/_/ledger").json["spans"])

    # --- its processes ------------------------------------------------------------------------------------------------

    def children(self) -> dict[int, str]:
        """pid → command line of the shim's living children."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                    if int(parent) == self.pid and state != "Z":
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def _child(self, module: str, old: int) -> int:
        def find() -> int:
            return next((pid for pid, line in self.children().items() if module in line and pid != old), 0)

        return int(self.until(find, f"{module} runs"))

    def descendants(self) -> dict[int, str]:
        """pid → name (as `ps -o comm` has it) of everything alive that came from it, itself excluded."""
        found = {}
        for pid in self.alive():
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
        found.pop(self.pid, None)
        return found

    def worker(self, old: int = 0) -> int:
        """The worker's pid; waits for one that is not `old`."""
        return self._child("runtime.worker.worker", old)

    def agent(self, old: int = 0) -> int:
        """The private agent's pid; waits for one that is not `old`."""
        return self._child("cache_agent.daemon", old)

    def alive(self) -> list[int]:
        """Every living process of its session."""
        return processes(self.pid)

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit code (negative: killed by that signal)."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end within {seconds:.0f} s:\n{self.output()}")

    def stop(self, seconds: float = SECONDS) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait(seconds)

    def assert_nothing_left(self) -> None:
        """After the shim has ended, its children end by themselves, and their directories are gone."""
        self.until(lambda: not self.alive(), f"its processes end, and not {self.alive()}")
        # torch makes its compiler's cache directory when that is imported; it is meant to stay.
        left = [path.name for path in self.temporary.iterdir() if not path.name.startswith("torchinductor_")]
        assert not left, f"left in TMPDIR: {left}"

    def __enter__(self) -> Function:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.process.poll() is None and kind is None:
                assert self.stop() == 0, self.output()
            if kind is None:
                self.assert_nothing_left()
        finally:
            for pid in self.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(SECONDS)


def processes(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


@contextlib.contextmanager
def _running(arguments: tuple[str, ...], env: Mapping[str, str]) -> Iterator[Function]:
    directory = Path(tempfile.mkdtemp(prefix="gp-"))  # short: the private agent's socket lies in it
    try:
        with Function(directory, arguments, env) as function:
            yield function
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write(folder: Path, handler: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "handler.py").write_text(textwrap.dedent(handler))
    return folder


@pytest.fixture(scope="session")
def random_checkpoint() -> Callable[..., Path]:
    """`random_checkpoint(directory, context=0, arch="llama", …)`: a seeded checkpoint of scripts/make_tiny_model."""

    def make(directory: Path, *, context: int = 0, **options: Any) -> Path:
        scripts = str(ROOT / "scripts")
        if scripts not in sys.path:
            sys.path.append(scripts)
        from tiny_model.random_checkpoint import random_checkpoint

        random_checkpoint(directory, **{"arch": "llama", "size": "tiny", **options})
        if context:
            path = directory / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": context}))
        return directory

    return make


@pytest.fixture(scope="session")
def checkpoint(random_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 0.2 million parameters with a long context. Read it, do not change it."""
    return random_checkpoint(tmp_path_factory.mktemp("models") / "llama", context=CONTEXT)


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """`with serving(*arguments, handler=SOURCE_OR_FOLDER, model=, socket=, port=0, **GLOWPLUG settings) as function:`

    Without `socket` the function has a private agent.
    """

    @contextlib.contextmanager
    def start(
        *arguments: str,
        handler: str | Path = "",
        model: object = "",
        socket: object = "",
        env: Mapping[str, str] | None = None,
        port: int = 0,
        **settings: object,
    ) -> Iterator[Function]:
        if not socket and NODE_AGENT.exists():
            pytest.skip(f"this machine has an agent of its own at {NODE_AGENT}")
        variables = {f"GLOWPLUG_{name.upper()}": str(value) for name, value in settings.items()}
        variables |= {"GLOWPLUG_PORT": str(port), **(env or {})}
        if model:
            variables["GLOWPLUG_MODEL"] = str(model)
        if socket:
            variables["GLOWPLUG_SOCKET"] = str(socket)
        with contextlib.ExitStack() as stack:
            if isinstance(handler, str) and handler:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gp-handler-")))
                handler = _write(place / "function", handler)
            folder = (str(handler),) if handler else ()
            yield stack.enter_context(_running((*folder, *arguments), variables))

    return start


@pytest.fixture
def started(serving: Callable[..., Any]) -> Iterator[Callable[..., Function]]:
    """`started(…)` is `serving(…)` until the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(serving(*arguments, **options))


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody else serves."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def sse(body: bytes) -> list[str]:
    """The data of each event."""
    return [block.removeprefix("data: ") for block in body.decode().split("\n\n") if block.startswith("data: ")]


@pytest.fixture(scope="session")
def sse_data() -> Callable[[bytes], list[str]]:
    """`sse_data(body)`: the data of each event of a stream."""
    return sse
