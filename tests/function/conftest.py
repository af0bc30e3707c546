"""What the tests of a function's parts share: leases of checkpoints, the HTTP server in a thread."""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


class Served:
    """A WSGI application behind the worker's own HTTP server, on a real socket, in a thread of this process."""

    def __init__(self, app: Callable[..., Iterable[bytes]], capacity: int) -> None:
        from runtime.http.server import HttpServer

        self.beats = 0
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.socket.getsockname()[1]
        self.server = HttpServer(self.socket, app, capacity=capacity, parent=os.getppid(), on_beat=self._beat)
        self.thread = threading.Thread(target=self.server.run_until_stopped)

    def _beat(self) -> None:
        self.beats += 1

    def start(self) -> Served:
        self.thread.start()
        return self

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def get(self, path: str = "/", **headers: str) -> tuple[int, bytes]:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()

    def raw(self, request: bytes) -> bytes:
        """All that comes back until the connection is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
            sock.sendall(request)
            answer = b""
            while data := sock.recv(65536):
                answer += data
            return answer

    def close(self) -> None:
        self.server.stop(at_once=True)
        if self.thread.is_alive():
            self.thread.join(30)
            assert not self.thread.is_alive(), "the server's thread did not end"
        self.socket.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """`serve(app, capacity=4)`: a running `Served`; the end of the test stops it. `start=False` only builds it."""
    served: list[Served] = []

    def make(app: Callable[..., Iterable[bytes]], capacity: int = 4, start: bool = True) -> Served:
        served.append(Served(app, capacity))
        return served[-1].start() if start else served[-1]

    yield make
    for each in served:
        each.close()


@pytest.fixture(scope="session")
def readable() -> Callable[[Any, float], bool]:
    """`readable(socket, seconds)`: whether something is to be read from it by then."""
    return lambda sock, seconds: bool(select.select([sock], [], [], seconds)[0])


@pytest.fixture(scope="session")
def random_checkpoint() -> Callable[..., Path]:
    """`random_checkpoint(directory, arch="llama", …)`: a seeded checkpoint of scripts/make_tiny_model."""

    def make(directory: Path, **options: Any) -> Path:
        scripts = str(ROOT / "scripts")
        if scripts not in sys.path:
            sys.path.append(scripts)
        from tiny_model.random_checkpoint import random_checkpoint

        random_checkpoint(directory, **{"arch": "llama", "size": "tiny", **options})
        return directory

    return make


@pytest.fixture(scope="module")
def weights_agent(agent_process: Callable[..., Any]) -> Iterator[Any]:
    """One agent for all the leases of a module."""
    with agent_process() as agent:
        yield agent


@pytest.fixture
def lease(weights_agent: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`lease(files)`: a ready lease on a checkpoint given as file name → content."""
    with contextlib.ExitStack() as stack:

        def take(files: Mapping[str, bytes]) -> Any:
            directory = tmp_path_factory.mktemp("leased")
            for name, data in files.items():
                (directory / name).write_bytes(data)
            lease = stack.enter_context(weights_agent.client.lease(f"file://{directory}"))
            lease.wait_ready(time.monotonic() + 60)
            return lease

        yield take
