"""Owns the loop of a node's pool, between its zygotes and the containers that connect to its socket.

To a container's shim the pool looks like a zygote (see wire.py): it says `ready`, beats, forks on request, and tells
how its children have ended. A container is known by the pidfd that the kernel gives of the process that has connected
(`SO_PEERPIDFD`), not by what that process says: only the first process of a container is served, with one worker at a
time, and the worker always enters that very container.

The pool is a subreaper, so that workers whose zygote died become its children. Nothing keeps the loop from reaping: a
container only terminates once the last of its processes was reaped.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from cache_agent.policy import keepalive
from runtime.config import FunctionConfig
from runtime.layers import keys
from runtime.layers.building import ZygoteLayer
from runtime.layers.published import Published
from runtime.layers.rule import LayerRule
from runtime.layers.spawn import ChildEvent, Ended, Forked, ForkRefused, Spec
from runtime.pool.models import Models
from runtime.pool.tenants import Tenant
from runtime.process import kernel
from runtime.process.children import become_subreaper, reap
from runtime.process.wakeup import Wakeup
from runtime.process.wire import Wire, listen
from runtime.zygote import join
from runtime.zygote.forkserver import BEAT

PROGRAM = ("-m", "runtime.zygote.placed")
_GUESSED = keepalive.LayerCost("lang", 2.0, 250 << 20)
_REBUILD = 1.0, 60.0  # seconds before a lang zygote that was lost is built again, at first and at most
_TENANTS = 1024


class Pool:
    """A node's pool. `spares` and `models` are how many of each there may be at the same time."""

    def __init__(
        self,
        path: str,
        spec: Spec,
        made_of: keys.Needs,
        config: FunctionConfig,
        *,
        agent: str,
        spares: int,
        models: int,
        seccomp: str,
        say: Callable[[str], None],
    ) -> None:
        self._path, self._spec, self._config = path, spec, config
        self._spares, self._seccomp, self._say = spares, seccomp, say
        self._lang = ZygoteLayer("the lang layer", LayerRule(_GUESSED, config.start_price, math.inf, _REBUILD), say)
        self._models = Models(config, agent, made_of, self._lang, models, say)
        self._tenants: list[Tenant] = []
        self._published = Published("pool", path, config.start_price, self._models.leases.client)

    def run(self) -> int:
        """Serve until SIGTERM; return the exit code."""
        become_subreaper()
        kernel.dumpable(False)
        listener = listen(self._path)
        wake = Wakeup(signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        beat_at = now = time.monotonic()
        try:
            while True:
                readable = self._wait(listener, wake)
                if {signal.SIGTERM, signal.SIGINT} & set(wake.take()):
                    return 0
                now = time.monotonic()
                for pid, status in reap().items():  # zygotes, and workers whose zygote has died
                    self._learn(Ended(pid, status), now)
                self._tend_zygotes(now)
                if listener.fileno() in readable:
                    self._accept(listener)
                for tenant in self._tenants:
                    if not tenant.left and tenant.wire.fileno() in readable:
                        tenant.hear(now)
                self._tend_tenants(now)
                self._published.write(self._report(), now)
                if now >= beat_at:
                    beat_at = now + BEAT
                    for tenant in self._tenants:
                        tenant.send({"beat": 1})
        finally:
            self._published.close()
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            for tenant in self._tenants:
                tenant.close(now, ended=False)  # workers go on; the next pool serves their next start
            self._models.close()

    def _wait(self, listener: socket.socket, wake: Wakeup) -> set[int]:
        poller = select.poll()
        poller.register(wake, select.POLLIN)
        if len(self._tenants) < _TENANTS:
            poller.register(listener, select.POLLIN)
        for tenant in self._tenants:
            poller.register(tenant.wire, select.POLLIN | (select.POLLOUT if tenant.wire.waiting else 0))
        for fd in self._models.fds():
            poller.register(fd, select.POLLIN)
        return {fd for fd, _ in poller.poll(BEAT * 1000)}

    # --- zygotes --------------------------------------------------------------------------------------------------

    def _tend_zygotes(self, now: float) -> None:
        """Have a lang layer, let model layers come and go, and pass on what all zygotes say of their children."""
        if self._lang.presence == "absent" and self._lang.rule.retry.due(now):
            variables = {**os.environ, "GLOWPLUG_POOL_SECCOMP": self._seccomp}
            self._lang.boot(self._spec, now, variables, PROGRAM)
        for event in self._models.step(now):
            self._learn(event, now)
        for tenant in self._tenants:
            tenant.greet()
            if (spare := tenant.spare) is not None and not spare.pid and spare.zygote.state == "gone":
                tenant.unforked(spare.number, "the pool's zygote was lost", now)

    def _learn(self, event: ChildEvent, now: float) -> None:
        """Pass on, to the container concerned, what became of a process or of a request for one."""
        match event:
            case Forked(_, _, pidfd):
                if not any(tenant.forked(event, now) for tenant in self._tenants):
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # its container has left
                    os.close(pidfd)
            case ForkRefused(number, why):
                for tenant in self._tenants:
                    tenant.unforked(number, why, now)
            case Ended(pid, status):
                for tenant in self._tenants:
                    if tenant.ended(pid, status, now):
                        break

    # --- containers -----------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = listener.accept()
            wire = Wire(sock)
            try:
                pidfd, place = join.peer(sock)
                try:
                    self._admit(place)
                except join.JoinRefused:
                    os.close(pidfd)
                    raise
            except join.JoinRefused as refused:
                wire.dismiss({"failed": str(refused)})
                return
            self._tenants.append(Tenant(wire, pidfd, place, self._config, self._models, self._say))

    def _admit(self, place: join.ContainerPlace) -> None:
        if place.filtered and not self._seccomp:
            raise join.JoinRefused("its container has a seccomp filter, and the pool was given none")
        if any(not other.left and other.place.container == place.container for other in self._tenants):
            raise join.JoinRefused("its container is served already")

    def _tend_tenants(self, now: float) -> None:
        """Have workers and spares come and go, and forget containers that have left."""
        count = sum(tenant.spare is not None for tenant in self._tenants)
        for tenant in self._tenants:
            before = tenant.spare is not None
            tenant.tend(now, room=count - before < self._spares)
            count += (tenant.spare is not None) - before
        for tenant in [each for each in self._tenants if each.left]:
            self._tenants.remove(tenant)
            tenant.close(now, ended=True)

    def _report(self) -> list[dict[str, Any]]:
        """Return the layers as published.py draws them."""
        users = [tenant.serving.report() for tenant in self._tenants if tenant.serving is not None]
        above = [*self._models.report(), *users]
        if not self._lang.ready:
            return [{"level": "lang", "state": "building", "since": None}, *above]
        workers = sum(tenant.worker is not None for tenant in self._tenants)
        spares = sum(tenant.spare is not None for tenant in self._tenants)
        why = f"held for all containers of the node: {len(self._tenants)} are connected, {workers} have a worker"
        why += f", {spares} a spare"
        cost = self._lang.rule.decision.layer
        lang = {"level": "lang", "state": "used" if workers else "idle", "since": None, "why": why}
        return [{**lang, "seconds": cost.seconds, "bytes": cost.bytes}, *above]
