"""Owns the lang zygote of a node, and serves containers that connect to its socket: a supervisor for all of them.

To a container's shim the pool looks like a zygote (see wire.py): it says `ready`, beats, forks on request, and tells
how what it forked has ended. Who asks is known by the pidfd that the kernel gives of it (`SO_PEERPIDFD`), not by what
it says: only the first process of a container is served, one worker at a time, and always into that very container.

What there is of each container is in tenants.py, the layers above lang in models.py; here they are brought together.

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
from runtime.errors import StaleLayer
from runtime.wakeup import Wakeup
from runtime.zygote import join, kernel, layers
from runtime.zygote.forkserver import BEAT
from runtime.zygote.leasing import LayerLeases
from runtime.zygote.models import Models
from runtime.zygote.published import Published
from runtime.zygote.spawn import Ended, Forked, Lost, Ready, Refused, Spec, Zygote, boot
from runtime.zygote.tenants import Tenant
from runtime.zygote.wire import Gone, Unreadable, Wire, listen

PROGRAM = ("-m", "runtime.zygote.placed")
_REBUILD = 1.0  # seconds before a zygote that was lost is built again; doubles each time, up to a minute
_REBUILD_MOST = 60.0
_TENANTS = 1024
_STDIO = 3


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
        self._path, self._spec, self._config, self._made_of = path, spec, config, made_of
        self._spares, self._seccomp, self._say = spares, seccomp, say
        self._lang: Zygote | None = None
        self._ready: Ready | None = None
        self._rebuild_at, self._pause = 0.0, _REBUILD
        self._number = itertools.count(1).__next__
        self._models = Models(config, agent, made_of, models, self._number, say)
        self._tenants: dict[int, Tenant] = {}  # by fd
        self._forks: dict[int, Tenant] = {}  # by the number that a zygote knows
        self._published = Published("pool", path, config.start_price, LayerLeases(config, lambda: agent, "pool").client)

    def run(self) -> int:
        become_subreaper()
        kernel.dumpable(False)
        listener = listen(self._path)
        wake = Wakeup(signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        beat_at = 0.0
        try:
            while True:
                ready = self._wait(listener, wake)
                if {signal.SIGTERM, signal.SIGINT} & set(wake.take()):
                    return 0
                now = time.monotonic()
                self._reap(now)
                self._tend(now)
                if listener.fileno() in ready:
                    self._accept(listener)
                for tenant in [self._tenants[fd] for fd in ready & self._tenants.keys()]:
                    self._hear(tenant, now)
                self._tend_workers(now)
                self._tend_spares(now)
                self._published.write(self._report(), now)
                if now >= beat_at:
                    beat_at = now + BEAT
                    for tenant in list(self._tenants.values()):
                        self._tell(tenant, {"beat": 1})
        finally:
            self._published.close()
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            for tenant in list(self._tenants.values()):
                self._forget(tenant, ended=False)  # workers go on; the next pool serves their next start
            self._models.close()
            if self._lang is not None:
                self._lang.kill()

    def _wait(self, listener: socket.socket, wake: Wakeup) -> set[int]:
        poller = select.poll()
        poller.register(wake, select.POLLIN)
        if len(self._tenants) < _TENANTS:
            poller.register(listener, select.POLLIN)
        for fd, tenant in self._tenants.items():
            poller.register(fd, select.POLLIN | (select.POLLOUT if tenant.wire.waiting else 0))
        if self._lang is not None:
            poller.register(self._lang.wire, select.POLLIN)
        for fd in self._models.fds():
            poller.register(fd, select.POLLIN)
        return {fd for fd, _ in poller.poll(BEAT * 1000)}

    # --- zygotes --------------------------------------------------------------------------------------------------

    def _tend(self, now: float) -> None:
        """Has a lang layer, hears what all zygotes say, and lets those of models come and go."""
        if self._lang is None and now >= self._rebuild_at:
            variables = {**os.environ, "GLOWPLUG_POOL_SECCOMP": self._seccomp}
            self._lang = boot(self._spec, environment=variables, program=PROGRAM)
        for event in [] if self._lang is None else self._lang.read():
            match event:
                case Ready():
                    self._is_ready(event)
                case Lost():
                    self._lost(event.why, now)
                case _ if not self._models.takes(event, now):
                    self._take(event, now)
        # After what it has said: if it is the pool that was stopped, the beats are there.
        if self._lang is not None and (why := self._lang.overdue(now)):
            self._lang.kill()
            self._lost(f"{why} and was killed", now)
        for event in self._models.step(now, None if self._ready is None else self._lang):
            self._take(event, now)
        for number, tenant in list(self._forks.items()):
            if tenant.spare is not None and tenant.spare.zygote.state == "gone":
                self._unforked(number, "the pool's zygote was lost", now)

    def _is_ready(self, ready: Ready) -> None:
        self._ready, self._pause = ready, _REBUILD
        self._say(f"the {ready.level} layer is ready: {ready.seconds:.2f} s, {ready.bytes / 1e6:.0f} MB")
        for tenant in list(self._tenants.values()):
            self._greet(tenant)

    def _lost(self, why: str, now: float) -> None:
        self._say(f"a zygote was lost: {why}; another is built in {self._pause:.0f} s")
        if self._lang is not None:
            self._lang.close()
        self._lang, self._ready = None, None
        self._rebuild_at = now + self._pause
        self._pause = min(_REBUILD_MOST, 2 * self._pause)

    def _reap(self, now: float) -> None:
        """Zygotes, and workers whose zygote has died."""
        for pid, status in reap().items():
            self._ended(pid, status, now)

    def _take(self, event: Forked | Refused | Ended, now: float) -> None:
        match event:
            case Forked():
                self._forked(event, now)
            case Refused(number, why):
                self._unforked(number, why, now)
            case Ended(pid, status):
                self._ended(pid, status, now)

    # --- processes in containers ----------------------------------------------------------------------------------

    def _forked(self, event: Forked, now: float) -> None:
        tenant = self._forks.pop(event.number, None)
        placed = None if tenant is None else tenant.spare
        if tenant is None or placed is None or placed.number != event.number:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(event.pidfd, signal.SIGKILL)  # whoever it was for is gone
            os.close(event.pidfd)
            return
        placed.forked(event.pid, event.pidfd)
        if tenant.asked is not None:
            self._promote(tenant, now)

    def _unforked(self, number: int, why: str, now: float) -> None:
        tenant = self._forks.pop(number, None)
        if tenant is None or tenant.spare is None or tenant.spare.number != number:
            return
        self._drop_spare(tenant)
        tenant.broken = why
        if tenant.asked is not None:
            self._refuse(tenant, tenant.asked, why, now)

    def _promote(self, tenant: Tenant, now: float) -> None:
        """What was told to serve is there."""
        worker, number = tenant.promote(), tenant.asked
        tenant.asked = None
        self._models.began(tenant.wants, now)
        self._tell(tenant, {"forked": number, "pid": worker.inner}, [worker.pidfd])

    def _ended(self, pid: int, status: int, now: float) -> None:
        for tenant in self._tenants.values():
            if (worker := tenant.worker) is not None and worker.pid == pid:
                why = tenant.hear()
                tenant.worker = None
                worker.close()
                if tenant.serving is not None:
                    tenant.serving.ended()
                tenant.history.idle(now)
                self._models.ended(tenant.wants, now)
                if worker.layer is not None and os.waitstatus_to_exitcode(status) == StaleLayer.exit_code:
                    self._models.stale(worker.layer, now)
                self._tell(tenant, {"ended": worker.inner, "status": status})
                if why:
                    self._dismiss(tenant, why)
                return
            if tenant.spare is not None and tenant.spare.pid == pid:
                tenant.broken = tenant.hear() or "its spare was killed"
                self._drop_spare(tenant)
                return

    def _drop_spare(self, tenant: Tenant) -> None:
        if tenant.spare is not None:
            self._forks.pop(tenant.spare.number, None)  # one that is forked meanwhile is nobody's, and is killed
            tenant.drop_spare()

    def _prepare(self, tenant: Tenant) -> str:
        """Has a spare forked from the deepest layer; why not, or ""."""
        layer, why = self._models.deepest(tenant.wants)
        zygote = self._lang if layer is None else layer.zygote
        if zygote is None or self._ready is None:
            return "no zygote of the pool is ready"
        number = self._number()
        try:
            if refused := tenant.prepare(zygote, number, layer, why):
                return refused
        except Gone:
            return "the pool's zygote is gone"
        self._forks[number] = tenant
        return ""

    def _tend_workers(self, now: float) -> None:
        """Has those go that cost more idle than another one would, and those come for which a request is due."""
        for tenant in list(self._tenants.values()):
            if tenant.serving is not None and (wish := tenant.serving.wish(now)):
                self._tell(tenant, {"wish": wish})

    def _tend_spares(self, now: float) -> None:
        """One for every container that it is worth it for; none that stands on less, or more, than there is."""
        count = sum(tenant.spare is not None for tenant in self._tenants.values())
        for tenant in list(self._tenants.values()):
            if tenant.asked is not None or not tenant.greeted or tenant.worker is not None:
                continue
            if tenant.spare is not None:
                if why := tenant.hear():
                    self._dismiss(tenant, why)
                    continue
                deeper = self._models.deepest(tenant.wants)[0] is not tenant.spare.layer
                if not deeper and tenant.wanted(now, self._config.start_price):
                    continue
                self._drop_spare(tenant)
                count -= 1
            if count < self._spares and tenant.wanted(now, self._config.start_price):
                count += not self._prepare(tenant)

    def _report(self) -> list[dict[str, Any]]:
        """For people; see published.py."""
        workers = sum(tenant.worker is not None for tenant in self._tenants.values())
        spares = sum(tenant.spare is not None for tenant in self._tenants.values())
        users = [tenant.serving.report() for tenant in self._tenants.values() if tenant.serving is not None]
        if self._ready is None:
            return [{"level": "lang", "state": "building", "since": None}, *self._models.report(), *users]
        why = f"held for all containers of the node: {len(self._tenants)} are connected, {workers} have a worker"
        why += f", {spares} a spare"
        held = {"level": self._ready.level, "state": "used" if workers else "idle", "since": None, "why": why}
        return [{**held, "seconds": self._ready.seconds, "bytes": self._ready.bytes}, *self._models.report(), *users]

    # --- containers -----------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = listener.accept()
            wire = Wire(sock)
            try:
                pidfd, place = join.peer(sock)
                try:
                    self._admit(place)
                except join.Refused:
                    os.close(pidfd)
                    raise
            except join.Refused as refused:
                wire.dismiss({"failed": str(refused)})
                return
            self._tenants[wire.fileno()] = Tenant(wire, pidfd, place)

    def _admit(self, place: join.Place) -> None:
        if place.filtered and not self._seccomp:
            raise join.Refused("its container has a seccomp filter, and the pool was given none")
        if any(other.place.container == place.container for other in self._tenants.values()):
            raise join.Refused("its container is served already")

    def _greet(self, tenant: Tenant) -> None:
        """Once it is known what it is, and there is a layer for it."""
        if self._ready is not None and tenant.serving is not None and not tenant.greeted:
            tenant.greeted = True
            ready = self._ready
            self._tell(tenant, {"ready": ready.level, "key": "", "seconds": ready.seconds, "bytes": ready.bytes})

    def _hear(self, tenant: Tenant, now: float) -> None:
        try:
            tenant.wire.flush()
            while (received := tenant.wire.receive()) is not None:
                message, fds = received
                try:
                    self._answer(tenant, message, fds, now)
                finally:
                    for fd in fds:
                        os.close(fd)
        except Unreadable:
            with contextlib.suppress(OSError):  # to a shim of version 1, see messages.py, in its own words
                tenant.wire.sock.send(b'{"failed":"the pool is of another version"}')
            self._forget(tenant)
        except Gone:
            self._forget(tenant)

    def _answer(self, tenant: Tenant, message: dict[str, Any], fds: list[int], now: float) -> None:
        """Does what a shim may ask for. Whatever else is said is not passed on."""
        serving = tenant.serving
        match message:
            case {"wants": _} if serving is None:
                if why := tenant.introduce(message, self._made_of, now):
                    self._dismiss(tenant, why)
                    return
                if self._config.layers != "model":
                    tenant.wants = ""
                self._greet(tenant)
            case {
                "fork": int(number), "environment": dict(environment), "cwd": str(cwd), "start_id": str(start_id),
                "spans": list(spans),
            } if serving is not None and len(fds) >= 2 + _STDIO:  # fmt: skip
                order = {"environment": environment, "cwd": cwd, "start_id": start_id, "spans": spans}
                if tenant.worker is not None or tenant.asked is not None:
                    self._tell(tenant, {"refused": number, "why": "its container has a worker"})
                elif why := self._order(tenant, number, order, fds, now):
                    self._refuse(tenant, number, why, now)
            case _ if serving is None or not serving.tells(message, now, forked=tenant.worker is not None):
                raise Gone("no request that a shim makes")

    def _order(self, tenant: Tenant, number: int, order: dict[str, Any], fds: list[int], now: float) -> str:
        """Tells the container's spare to serve, or has another one forked that will; why not, or ""."""
        tenant.history.used(now)
        if tenant.serving is not None:
            tenant.serving.asked(now)
        self._models.asked(tenant.wants, now)
        for _ in range(2):  # a spare may be gone, and it is not known yet
            if tenant.spare is None and (why := self._prepare(tenant)):
                return why
            if not join.lives(tenant.pidfd):
                raise Gone("it has ended")
            try:
                tenant.order(order, fds)
            except Gone:
                self._drop_spare(tenant)
                continue
            tenant.asked = number
            if tenant.spare is not None and tenant.spare.pid:
                self._promote(tenant, now)
            return ""
        return "what was forked for it does not answer"

    def _refuse(self, tenant: Tenant, number: int, why: str, now: float) -> None:
        tenant.asked = None
        self._models.refused(tenant.wants, now)
        self._tell(tenant, {"refused": number, "why": why})

    def _tell(self, tenant: Tenant, message: dict[str, Any], fds: list[int] | None = None) -> None:
        try:
            tenant.wire.send(message, fds or [])
        except Gone:
            self._forget(tenant)

    def _dismiss(self, tenant: Tenant, why: str) -> None:
        """It is not served any more; `why`."""
        self._say(f"the container of process {tenant.place.pid} is not served: {why}")
        fd = tenant.wire.fileno()
        if self._tenants.get(fd) is tenant:
            tenant.wire.dismiss({"failed": why})
            self._forget(tenant, fd=fd)

    def _forget(self, tenant: Tenant, *, ended: bool = True, fd: int = -1) -> None:
        """Its shim has `ended`, or left; what it has in the container goes with it, unless it is the pool that ends."""
        if self._tenants.pop(tenant.wire.fileno() if fd < 0 else fd, None) is None:
            return
        if tenant.worker is not None:
            self._models.ended(tenant.wants, time.monotonic())
        self._drop_spare(tenant)
        tenant.close(ended=ended)
