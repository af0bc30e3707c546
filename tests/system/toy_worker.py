"""A function's HTTP side on the toy model, as a process: what kills are aimed at. `python toy_worker.py SOCKET NAME`

On SIGUSR1 it drains.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from cache_agent.client import CacheClient
from cache_agent.ledger import Ledger
from cache_agent.snapshots.client import SnapshotClient
from runtime.app import create_app
from runtime.config import FunctionConfig
from runtime.handoff.checkpoint import Checkpoints
from runtime.handoff.moving import Moving
from runtime.handoff.seal import Plain
from runtime.handoff.snapshot import Place
from runtime.lifecycle import Lifecycle
from runtime.server import HttpServer
from runtime.testing import toy_model

LEASE = 0.8


def main(path: str, name: str) -> None:
    model = toy_model(step_delay=0.004, slots=16, context_length=1 << 16)
    client = SnapshotClient(lambda: CacheClient(path, timeout=2), timeout=2.0)
    here = Place("toy", "toy", "tok")
    model.book = Checkpoints(client, "chat", Plain(), lambda: here, owner=name, every=8, lease=LEASE)
    lifecycle = Lifecycle("toy", 64)
    moving = Moving("chat", lambda: CacheClient(path, timeout=2), model, lambda: here, Plain(), lifecycle, lambda: None)
    signal.signal(signal.SIGUSR1, lambda *_: moving.depart())
    lifecycle.opened(model, None)
    app = create_app(FunctionConfig(model="toy"), lifecycle, Ledger("worker", "x"), lambda _: None)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listener.getsockname()[1], flush=True)
    HttpServer(listener, app, capacity=32, parent=os.getppid(), on_beat=lambda: None).run_until_stopped()


if __name__ == "__main__":
    main(*sys.argv[1:])
