"""A function's HTTP side on the toy model, as a process that tests kill.

    python toy_worker.py SOCKET NAME TOLD [halting | unkept]

On SIGUSR1 it drains. Each token that it sends to a client becomes a line of the file TOLD (`Line`), with the epoch and
the owner that it knows; two owners at once would show there. `/_toy/left` counts the requests that it still has. A
`halting` worker stops itself, as SIGSTOP does, in the middle of the first request that is copied to it; an `unkept` one
has no store for its requests.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import weakref
from typing import Any, NamedTuple

from cache_agent.client.cache_client import CacheClient
from cache_agent.client.snapshots import SnapshotClient
from cache_agent.ledger import Ledger
from runtime.config import FunctionConfig
from runtime.engine.base import TokenEvent
from runtime.function.testing import toy_model
from runtime.handoff import adopted, destination
from runtime.handoff.handoffs import Handoffs
from runtime.http.application import Application
from runtime.http.lifecycle import Lifecycle
from runtime.http.server import HttpServer
from runtime.resume.seal import Plain
from runtime.resume.session import Session
from runtime.resume.sessions import Sessions
from runtime.resume.snapshot import ReplicaIdentity

LEASE = 0.8


class Line(NamedTuple):
    """A token that a client got: number `index` of a choice, from `owner` under `epoch`, at the latest at `time`.

    `time` is of CLOCK_MONOTONIC, which is the same for all processes.
    """

    time: float
    id: str
    epoch: int
    owner: str
    choice: int
    index: int
    token: int

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @classmethod
    def parsed(cls, text: str) -> Line:
        time_, id_, epoch, owner, choice, index, token = text.split(" ")
        return cls(float(time_), id_, int(epoch), owner, int(choice), int(index), int(token))


class Watched(Sessions):
    """Write each token that goes to a client into a file that outlives this process."""

    def __init__(self, told: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._told = os.open(told, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._inherited: weakref.WeakSet[Session] = weakref.WeakSet()

    def record(self, session: Session, choice: int, event: TokenEvent) -> bool:
        permitted = super().record(session, choice, event)
        if permitted and event.token is not None and session not in self._inherited:
            # It was permitted while the lease ran: a process that was stopped since then must not seem to tell later.
            now = time.monotonic() if session.handed else min(time.monotonic(), session.until)
            owner = session.handed or self.owner
            line = Line(now, session.key.id, session.epoch, owner, choice, event.index, event.token)
            os.write(self._told, f"{line}\n".encode())
        return permitted

    def inherit(self, *arguments: Any) -> Session:
        session = super().inherit(*arguments)
        self._inherited.add(session)  # it is told to a client by the worker that drains
        return session

    @property
    def held(self) -> int:
        return len(self._sessions)


class Halting(adopted.AdoptedRequests):
    """Stop the process when a request has been announced, and before a byte of it is read."""

    def _accept(self, offer: Any) -> None:
        super()._accept(offer)
        os.kill(os.getpid(), signal.SIGSTOP)


def main(path: str, name: str, told: str, kind: str = "") -> None:
    model = toy_model(step_delay=0.004, slots=16, context_length=1 << 20)
    engine = model.engine  # its own, whatever it relays
    client = SnapshotClient(lambda: CacheClient(path, timeout=2), timeout=2.0)
    here = ReplicaIdentity("toy", "toy", "tok")
    sessions = Watched(told, client, "chat", Plain(), lambda: here, owner=name, every=8, lease=LEASE)
    model.sessions = None if kind == "unkept" else sessions
    if kind == "halting":
        destination.AdoptedRequests = Halting  # type: ignore[misc]
    lifecycle = Lifecycle("toy", 64)
    handoffs = Handoffs(
        "chat", lambda: CacheClient(path, timeout=2), model, lambda: here, Plain(), lifecycle, lambda: None
    )
    signal.signal(signal.SIGUSR1, lambda *_: handoffs.depart())
    lifecycle.opened(model, None)
    app = Application(FunctionConfig(model="toy"), lifecycle, Ledger("worker", "x"), lambda _: None)

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/_toy/left":
            return app(environ, start_response)
        stats = engine.stats()
        left = {"engine": stats.running + stats.waiting, "held": sessions.held, "inside": lifecycle.inside}
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(left).encode()]

    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listener.getsockname()[1], flush=True)
    HttpServer(listener, answer, capacity=32, parent=os.getppid(), on_beat=lambda: None).run_until_stopped()


if __name__ == "__main__":
    main(*sys.argv[1:])
