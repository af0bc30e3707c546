"""Workers' HTTP sides on the toy model, and an agent for them, all in this process."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cache_agent.client.cache_client import CacheClient
from cache_agent.client.snapshots import SnapshotClient
from cache_agent.cluster.directory import InProcessDirectory
from cache_agent.config import AgentConfig
from cache_agent.ledger import Ledger
from cache_agent.serving.agent import Agent
from cache_agent.serving.server import Server, listen
from cache_agent.snapshots.index import SnapshotIndex
from cache_agent.snapshots.store import InProcessSnapshots
from cache_agent.wire.requests import HandoffRecord
from runtime.config import FunctionConfig
from runtime.function.handler import Handler
from runtime.function.testing import toy_model
from runtime.handoff.handoffs import Handoffs
from runtime.http.application import Application
from runtime.http.lifecycle import Lifecycle
from runtime.resume.seal import Plain
from runtime.resume.sessions import Sessions
from runtime.resume.snapshot import ReplicaIdentity
from runtime.sse import EventParser

CHAT = "/v1/chat/completions"
WORDS = " ".join(f"w{n}ü" for n in range(60))
LEASE = 0.6


class Replica:
    """A worker's HTTP side on a toy model, with an agent; `url` is its address."""

    def __init__(self, agent: Any, serve: Callable[..., Any], **options: Any) -> None:
        self.model = toy_model(
            step_delay=options.get("delay", 0.002), slots=options.get("slots", 8), context_length=1 << 16
        )
        place = options.get("place") or ReplicaIdentity("toy", "toy", "tok", "", "")
        self.name = options.get("name", f"replica-{id(self)}")
        if options.get("keep", True):
            self.model.sessions = Sessions(
                SnapshotClient(lambda: agent.client, timeout=2.0),
                "chat",
                options.get("seal", Plain()),
                lambda: place,
                owner=self.name,
                every=options.get("every", 4),
                lease=LEASE,
            )
        self.config = FunctionConfig(model="toy")
        self.lifecycle = Lifecycle("toy", 64)
        self.released = threading.Event()
        self.handoffs: Handoffs | None = None
        if options.get("move", False):
            common = self.model, lambda: place, options.get("seal", Plain()), self.lifecycle, self._let_go
            self.handoffs = Handoffs("chat", lambda: agent.client, *common)
        handle = options.get("handle")
        self.lifecycle.opened(self.model, Handler(handle) if handle else None)
        self.served = serve(Application(self.config, self.lifecycle, Ledger("worker", "x"), lambda _: None), 32)
        self.url = f"http://127.0.0.1:{self.served.port}"

    def _let_go(self) -> None:
        self.model.let_go()
        self.released.set()

    def drain(self) -> None:
        assert self.handoffs is not None
        self.lifecycle.drain("a test")
        self.handoffs.depart()

    @property
    def running(self) -> int:
        """Return the number of generations in this worker's engine."""
        return len(self.model.engine.here()) if self.handoffs else self.model.engine.stats().running

    def close(self) -> None:
        if self.handoffs is not None:
            self.handoffs.close("the test is over", time.monotonic() + 5)
        if self.model.sessions is not None:
            self.model.sessions.close(time.monotonic() + 2)
        self.model.engine.close()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], bytes]:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(self.served.connect()) as connection:
            connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), names)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def cut(self, path: str, body: Any, after: int, **headers: str) -> list[Any]:
        """Return the first `after` events with an id, and cut the connection."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(self.served.connect()) as connection:
            connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), names)
            response = connection.getresponse()
            assert response.status == 200
            parser, events = EventParser(), []
            while len(events) < after and (chunk := response.read1(65536)):
                events += parser.feed(chunk)
            return events[:after]


class LocalAgent:
    """An agent in this process that serves no weights."""

    def __init__(self, place: Path) -> None:
        self.path = place / "agent.sock"
        config = AgentConfig(socket=self.path, dram=1 << 20, huge_pages="never")
        self.agent = Agent(config, InProcessDirectory())
        self.store = InProcessSnapshots(60.0, 1 << 20, 8 << 20)
        self.server = Server(self.agent, listen(self.path, 0o600), index=SnapshotIndex(self.store, b"k" * 32))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[LocalAgent]:
        """Run an agent until the end of the block, in a directory with a short path, as sockets need."""
        with tempfile.TemporaryDirectory(prefix="gp-") as place:
            agent = cls(Path(place))
            yield agent
            agent.close()

    @property
    def client(self) -> CacheClient:
        return CacheClient(self.path, timeout=10)

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(20)

    def handoffs(self) -> list[HandoffRecord]:
        return self.agent.journal.handoffs()

    def close(self) -> None:
        self.stop()
        self.server.close()
        self.agent.close(time.monotonic() + 5)


@contextlib.contextmanager
def replicas(agent: LocalAgent, serve: Callable[..., Any], **common: Any) -> Iterator[Callable[..., Replica]]:
    """`make(**options)`: replicas that use this agent, until the end of the block."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Replica:
            made = Replica(agent, serve, **common, **options)
            stack.callback(made.close)
            return made

        yield make


def chat(**more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": WORDS}
    return {"messages": [message], "stream": True, "stream_options": {"include_usage": True}, **more}


def frames(events: list[Any]) -> list[Any]:
    return [json.loads(event.data) for event in events if event.data != "[DONE]"]


def said(events: list[Any], choice: int = 0) -> str:
    return "".join(
        one["delta"].get("content", "")
        for frame in frames(events)
        for one in frame["choices"]
        if one["index"] == choice
    )


def parsed(body: bytes) -> list[Any]:
    return EventParser().feed(body)
