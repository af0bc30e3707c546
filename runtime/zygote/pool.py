"""Owns the loop of a node's pool: the zygotes (zygotes.py), and the containers that connect to its socket.

To a container's shim the pool looks like a zygote (see wire.py): it says `ready`, beats, forks on request, and tells
how what it forked has ended (containers.py).

It is a subreaper, so that workers whose zygote died are its own, and nothing that it waits for can keep it from
reaping: a container only terminates once the last of its processes has been.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from runtime.children import become_subreaper, reap
from runtime.config import FunctionConfig
from runtime.wakeup import Wakeup
from runtime.zygote import kernel, layers
from runtime.zygote.containers import Containers
from runtime.zygote.forkserver import BEAT
from runtime.zygote.models import Models
from runtime.zygote.published import Published
from runtime.zygote.spawn import Ended, Spec
from runtime.zygote.wire import listen
from runtime.zygote.zygotes import Zygotes


class Pool:
    """`run()` serves until SIGTERM. `spares` and `models` are how many of each there may be at the same time."""

    def __init__(
        self,
        path: str,
        spec: Spec,
        made_of: layers.Needs,
        config: FunctionConfig,
        *,
        agent: str,
        spares: int,
        models: int,
        seccomp: str,
        say: Callable[[str], None],
    ) -> None:
        number = itertools.count(1).__next__
        held = Models(config, agent, made_of, models, number, say)
        self._path = path
        self._zygotes = Zygotes(spec, held, seccomp, say)
        self._containers = Containers(config, made_of, self._zygotes, number, spares=spares, seccomp=seccomp, say=say)
        self._published = Published("pool", path, config.start_price, held.leases.client)

    def run(self) -> int:
        become_subreaper()
        kernel.dumpable(False)
        listener = listen(self._path)
        wake = Wakeup(signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        containers, zygotes = self._containers, self._zygotes
        beat_at = 0.0
        try:
            while True:
                readable = self._wait(listener, wake)
                if {signal.SIGTERM, signal.SIGINT} & set(wake.take()):
                    return 0
                now = time.monotonic()
                # Zygotes, and workers whose zygote has died.
                ended = [Ended(pid, status) for pid, status in reap().items()]
                containers.learn([*ended, *zygotes.step(now)], now)
                if listener.fileno() in readable:
                    containers.accept(listener)
                containers.hear(readable, now)
                containers.tend(now)
                self._published.write(self._report(), now)
                if now >= beat_at:
                    beat_at = now + BEAT
                    containers.beat()
        finally:
            self._published.close()
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            containers.close()
            zygotes.close()

    def _wait(self, listener: socket.socket, wake: Wakeup) -> set[int]:
        poller = select.poll()
        poller.register(wake, select.POLLIN)
        if not self._containers.full:
            poller.register(listener, select.POLLIN)
        for fd, events in self._containers.watched():
            poller.register(fd, events)
        for fd in self._zygotes.fds():
            poller.register(fd, select.POLLIN)
        return {fd for fd, _ in poller.poll(BEAT * 1000)}

    def _report(self) -> list[dict[str, Any]]:
        """For people; see published.py."""
        above = [*self._zygotes.models.report(), *self._containers.report()]
        ready = self._zygotes.ready
        if ready is None:
            return [{"level": "lang", "state": "building", "since": None}, *above]
        connected, workers, spares = self._containers.counts()
        why = f"held for all containers of the node: {connected} are connected, {workers} have a worker"
        why += f", {spares} a spare"
        held = {"level": ready.level, "state": "used" if workers else "idle", "since": None, "why": why}
        return [{**held, "seconds": ready.seconds, "bytes": ready.bytes}, *above]
