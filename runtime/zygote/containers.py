"""Owns the containers that a pool serves: who is admitted, what their shims are answered, what is forked for them.

Who asks is known by the pidfd that the kernel gives of it (`SO_PEERPIDFD`), not by what it says: only the first process
of a container is served, one worker at a time, and always into that very container. What there is of one is a tenant
(tenants.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from runtime.config import FunctionConfig
from runtime.errors import StaleLayer
from runtime.zygote import join, layers
from runtime.zygote.building import Event
from runtime.zygote.rule import LayerRule
from runtime.zygote.spawn import Ended, Forked, Refused
from runtime.zygote.tenants import GUESSED, Tenant
from runtime.zygote.wire import Gone, Wire
from runtime.zygote.zygotes import Zygotes

_TENANTS = 1024
_STDIO = 3


class Containers:
    """All of a pool's. `spares` are how many may wait in all containers at the same time."""

    def __init__(
        self,
        config: FunctionConfig,
        made_of: layers.Needs,
        zygotes: Zygotes,
        number: Callable[[], int],
        *,
        spares: int,
        seccomp: str,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._made_of, self._zygotes, self._models = config, made_of, zygotes, zygotes.models
        self._number, self._spares, self._seccomp, self._say = number, spares, seccomp, say
        self._tenants: dict[int, Tenant] = {}  # by fd
        self._forks: dict[int, Tenant] = {}  # by the number that a zygote knows

    # --- what the pool's loop calls -------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        return len(self._tenants) >= _TENANTS

    def watched(self) -> Iterator[tuple[int, int]]:
        """Fds, and the events for which they are polled."""
        for fd, tenant in self._tenants.items():
            yield fd, select.POLLIN | (select.POLLOUT if tenant.wire.waiting else 0)

    def learn(self, events: Iterable[Event], now: float) -> None:
        """Acts on what zygotes say of processes in containers, and on whether zygotes are there or gone."""
        for tenant in list(self._tenants.values()):
            self._greet(tenant)
        for event in events:
            match event:
                case Forked():
                    self._forked(event, now)
                case Refused(number, why):
                    self._unforked(number, why, now)
                case Ended(pid, status):
                    self._ended(pid, status, now)
        for number, tenant in list(self._forks.items()):
            if tenant.spare is not None and tenant.spare.zygote.state == "gone":
                self._unforked(number, "the pool's zygote was lost", now)

    def hear(self, readable: set[int], now: float) -> None:
        """Answers the shims that have said something."""
        for tenant in [self._tenants[fd] for fd in readable & self._tenants.keys()]:
            self._hear(tenant, now)

    def tend(self, now: float) -> None:
        """Has idle workers go that cost more than another one would, and spares come and go."""
        for tenant in list(self._tenants.values()):
            if tenant.serving is not None and (wish := tenant.serving.wish(now)):
                self._tell(tenant, {"wish": wish})
        self._tend_spares(now)

    def beat(self) -> None:
        for tenant in list(self._tenants.values()):
            self._tell(tenant, {"beat": 1})

    def counts(self) -> tuple[int, int, int]:
        """How many containers are connected, have a worker, and have a spare."""
        tenants = self._tenants.values()
        return (
            len(tenants),
            sum(each.worker is not None for each in tenants),
            sum(each.spare is not None for each in tenants),
        )

    def report(self) -> list[dict[str, Any]]:
        """For people; see published.py."""
        return [tenant.serving.report() for tenant in self._tenants.values() if tenant.serving is not None]

    def close(self) -> None:
        """Workers go on; the next pool serves their next start."""
        for tenant in list(self._tenants.values()):
            self._forget(tenant, ended=False)

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
                tenant.rule.idle(now)
                self._models.ended(tenant.wants, now)
                if worker.layer is not None and os.waitstatus_to_exitcode(status) == StaleLayer.exit_code:
                    worker.layer.drop("the agent has another revision")
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
        zygote, layer, why = self._zygotes.deepest(tenant.wants)
        if zygote is None:
            return why
        number = self._number()
        try:
            if refused := tenant.prepare(zygote, number, layer, why):
                return refused
        except Gone:
            return "the pool's zygote is gone"
        self._forks[number] = tenant
        return ""

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
                if not deeper and tenant.wanted(now):
                    continue
                self._drop_spare(tenant)
                count -= 1
            if count < self._spares and tenant.wanted(now):
                count += not self._prepare(tenant)

    # --- shims ----------------------------------------------------------------------------------------------------

    def accept(self, listener: socket.socket) -> None:
        """Takes a connection of a container that can be served."""
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
            rule = LayerRule(GUESSED, self._config.start_price)
            self._tenants[wire.fileno()] = Tenant(wire, pidfd, place, rule)

    def _admit(self, place: join.Place) -> None:
        if place.filtered and not self._seccomp:
            raise join.Refused("its container has a seccomp filter, and the pool was given none")
        if any(other.place.container == place.container for other in self._tenants.values()):
            raise join.Refused("its container is served already")

    def _greet(self, tenant: Tenant) -> None:
        """Once it is known what it is, and there is a layer for it."""
        ready = self._zygotes.ready
        if ready is not None and tenant.serving is not None and not tenant.greeted:
            tenant.greeted = True
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
                "spans": str(spans),
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
        tenant.rule.used(now)
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
