"""Owns a container that a pool serves: what its shim is answered, its worker, or the spare that waits to become one.

    no process ──prepare──▶ spare ──order──▶ worker ──ended──▶ no process

A spare is forked before anybody asks: when a container connects, whose shim has still things to do, and after its
worker has gone, for as long as holding it is cheaper than forking another (rule.py). It is in the container already,
and its memory is charged there; a request for a worker is a message to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cache_agent.policy import keepalive
from runtime.config import FunctionConfig
from runtime.errors import BadConfig, StaleLayer
from runtime.layers import keys
from runtime.layers.building import ZygoteLayer
from runtime.layers.rule import LayerRule
from runtime.layers.spawn import Forked, Zygote
from runtime.pool.models import Models
from runtime.pool.serving import Serving
from runtime.process import messages
from runtime.process import wire as wires
from runtime.process.wire import Gone, Unreadable, Wire
from runtime.zygote import join

_GUESSED = keepalive.LayerCost("spare", 0.03, 8 << 20)
_STDIO = 3


@dataclass(slots=True, eq=False)
class Placed:
    """A process in a container, forked from `layer`. Until it was forked it has no pid."""

    number: int  # of the request to fork it
    layer: ZygoteLayer
    zygote: Zygote  # the layer's, that was asked
    wire: Wire
    why: str  # it was forked from no deeper layer
    pid: int = 0
    pidfd: int = -1
    inner: int = 0  # its pid as the container sees it

    def forked(self, pid: int, pidfd: int) -> None:
        self.pid, self.pidfd, self.inner = pid, pidfd, _inner(pid)

    def order(self, request: dict[str, Any], fds: Sequence[int]) -> None:
        """Tells the process to serve. Raises `Gone` when it does not hear."""
        self.wire.send({**request, "why": self.why}, fds)
        if self.wire.waiting:
            raise Gone("it does not read")

    def kill(self) -> None:
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """A spare ends with its wire."""
        self.wire.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Tenant:
    """One container, from when its shim connects until it has `left`."""

    def __init__(
        self,
        wire: Wire,
        pidfd: int,
        place: join.ContainerPlace,
        config: FunctionConfig,
        models: Models,
        say: Callable[[str], None],
    ) -> None:
        """`pidfd` is of the container's first process, and closed with the wire."""
        self.wire, self.pidfd, self.place = wire, pidfd, place
        self.serving: Serving | None = None  # once the shim has said what its function is
        self.spare: Placed | None = None
        self.worker: Placed | None = None
        self.left = False  # its shim has gone, or is not served any more
        self._config, self._models, self._say = config, models, say
        self._rule = LayerRule(_GUESSED, config.start_price)  # of its spare
        self._model = ""  # the URI of its function's, if the pool may hold it
        self._greeted = False
        self._asked: int | None = None  # the number of its request for a worker that is under way
        self._broken = ""  # a spare that was lost here, so that none is forked ahead before there was a worker again

    # --- its shim -------------------------------------------------------------------------------------------------

    def tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            self.wire.send(message, fds)
        except Gone:
            self.left = True

    def greet(self) -> None:
        """Says that it can be served, once it is known what it is, and there is a layer for it."""
        lang = self._models.lang
        if self._greeted or self.serving is None or not lang.ready:
            return
        self._greeted = True
        cost = lang.rule.decision.layer
        self.tell({"ready": "lang", "key": "", "seconds": cost.seconds, "bytes": cost.bytes})

    def hear(self, now: float) -> None:
        """Answers what its shim has said."""
        try:
            self.wire.flush()
            while (received := self.wire.receive()) is not None:
                message, fds = received
                try:
                    self._answer(message, fds, now)
                finally:
                    for fd in fds:
                        os.close(fd)
        except Unreadable:
            with contextlib.suppress(OSError):  # to a shim of version 1, see messages.py, in its own words
                self.wire.sock.send(b'{"failed":"the pool is of another version"}')
            self.left = True
        except Gone:
            self.left = True

    def _answer(self, message: dict[str, Any], fds: list[int], now: float) -> None:
        """Does what a shim may ask for. Whatever else is said is not passed on."""
        match message:
            case {"wants": _} if self.serving is None:
                if why := self._introduce(message, now):
                    self._dismiss(why)
                else:
                    self.greet()
            case {
                "fork": int(number), "environment": dict(environment), "cwd": str(cwd), "start_id": str(start_id),
                "spans": list(spans),
            } if self.serving is not None and len(fds) >= 2 + _STDIO:  # fmt: skip
                request = {"environment": environment, "cwd": cwd, "start_id": start_id, "spans": spans}
                if self.worker is not None or self._asked is not None:
                    self.tell({"refused": number, "why": "its container has a worker"})
                    return
                self._rule.used(now)
                self.serving.asked(now)
                self._models.asked(self._model, now)
                if why := self._order(number, request, fds, now):
                    self._refuse(number, why, now)
            case _ if self.serving is None or not self.serving.tells(message, now, forked=self.worker is not None):
                raise Gone("no request that a shim makes")

    def _introduce(self, message: dict[str, Any], now: float) -> str:
        """It says what its function is made of; why that cannot be forked from what there is, or ""."""
        made_of = self._models.made_of
        match message:
            case {
                "wants": messages.VERSION, "machine": str(machine), "python": str(python), "base": str(base),
                "environment": dict(environment), "cwd": str(cwd),
            }:  # fmt: skip
                needs = replace(made_of, machine=machine, python=python, base=base)
            case _:
                return "the pool is of another version"
        # The user is the container's own in any case, and what is not preloaded is imported when it is needed.
        needs = replace(needs, environment=keys.relevant(environment))
        found = keys.deepest(needs, [("pool", "lang", made_of)])
        if not found.layer:
            return found.why
        try:
            self.serving = Serving(environment, cwd)
        except BadConfig as error:
            return error.text
        self._model = self.serving.model if self._config.layers == "model" else ""
        self._rule.idle(now)
        return ""

    def _refuse(self, number: int, why: str, now: float) -> None:
        self._asked = None
        self._models.refused(self._model, now)
        self.tell({"refused": number, "why": why})

    def _dismiss(self, why: str) -> None:
        """It is not served any more; `why`."""
        self._say(f"the container of process {self.place.pid} is not served: {why}")
        self.wire.dismiss({"failed": why})
        self.left = True

    # --- its processes --------------------------------------------------------------------------------------------

    def forked(self, event: Forked, now: float) -> bool:
        """Whether it is its spare that was forked."""
        if self.spare is None or self.spare.number != event.number:
            return False
        self.spare.forked(event.pid, event.pidfd)
        if self._asked is not None:
            self._promote(self.spare, now)
        return True

    def unforked(self, number: int, why: str, now: float) -> None:
        """A request to fork was refused; nothing happens if it was another's."""
        if self.spare is None or self.spare.number != number:
            return
        self._drop_spare()
        self._broken = why
        if self._asked is not None:
            self._refuse(self._asked, why, now)

    def ended(self, pid: int, status: int, now: float) -> bool:
        """Whether it is one of its processes that has ended."""
        if (worker := self.worker) is not None and worker.pid == pid:
            why = self._failure()
            self.worker = None
            worker.close()
            if self.serving is not None:
                self.serving.ended()
            self._rule.idle(now)
            self._models.ended(self._model, now)
            if os.waitstatus_to_exitcode(status) == StaleLayer.exit_code and worker.layer is not self._models.lang:
                worker.layer.drop("the agent has another revision")
            self.tell({"ended": worker.inner, "status": status})
            if why:
                self._dismiss(why)
        elif self.spare is not None and self.spare.pid == pid:
            self._broken = self._failure() or "its spare was killed"
            self._drop_spare()
        else:
            return False
        return True

    def tend(self, now: float, *, room: bool) -> None:
        """Has an idle worker go that costs more than another one would, and a spare come, if there is room, and go."""
        if self.serving is not None and (wish := self.serving.wish(now)):
            self.tell({"wish": wish})
        if self._asked is not None or not self._greeted or self.worker is not None:
            return
        if self.spare is not None:
            if why := self._failure():
                self._dismiss(why)
                return
            # A spare that stands on less, or more, than there is goes; while lang is built again, any spare serves.
            if self._models.deepest(self._model)[0] in (self.spare.layer, None) and self._wanted(now):
                return
            self._drop_spare()
        if room and self._wanted(now):
            self._prepare()

    def _wanted(self, now: float) -> bool:
        """Whether there should be a spare, though nobody asks."""
        if self.left or self._broken or self._rule.since is None:
            return False
        if self.serving is None or self.serving.state == "serving":
            return False  # another pool has forked what serves there
        return self._rule.wanted(now)

    def _prepare(self) -> str:
        """Has a spare forked from the deepest layer; why it cannot, or ""."""
        layer, why = self._models.deepest(self._model)
        if layer is None or layer.zygote is None:
            return why
        try:
            root = os.open(f"/proc/{self.place.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            return f"its root cannot be opened ({error.strerror})"
        number = self._models.number()
        ours, theirs = wires.pair()
        with theirs:
            request = {"fork": number, "kind": "spare", "place": self.place.dump(), "asked": time.monotonic_ns()}
            try:
                layer.zygote.wire.send(request, [theirs.fileno(), self.pidfd, root])
            except Gone:
                ours.close()
                return "the pool's zygote is gone"
            finally:
                os.close(root)
        self.spare = Placed(number, layer, layer.zygote, Wire(ours), why)
        return ""

    def _order(self, number: int, request: dict[str, Any], fds: list[int], now: float) -> str:
        """Tells the spare to serve, or has another one forked that will; why not, or ""."""
        for _ in range(2):  # a spare may be gone, and it is not known yet
            if self.spare is None and (why := self._prepare()):
                return why
            if not join.lives(self.pidfd):
                raise Gone("it has ended")
            assert self.spare is not None, "it was prepared"
            try:
                self.spare.order(request, fds)
            except Gone:
                self._drop_spare()
                continue
            self._asked = number
            if self.spare.pid:
                self._promote(self.spare, now)
            return ""
        return "what was forked for it does not answer"

    def _promote(self, spare: Placed, now: float) -> None:
        """The spare, which was told to serve, is there: it is the worker now."""
        self.worker, self.spare = spare, None
        number, self._asked, self._broken = self._asked, None, ""
        self._models.began(self._model, now)
        self.tell({"forked": number, "pid": spare.inner}, [spare.pidfd])

    def _failure(self) -> str:
        """What its process says before it serves: what it costs; or why it cannot be here, which is returned."""
        placed = self.worker or self.spare
        with contextlib.suppress(Gone):
            while placed is not None and (received := placed.wire.receive()) is not None:
                match received:
                    case {"parked": int(size), "seconds": float(seconds)}, []:
                        self._rule.measured(seconds=seconds, size=size or None)
                    case {"failed": str(why)}, []:
                        return why
        return ""

    def _drop_spare(self) -> None:
        if self.spare is not None:  # one that is forked meanwhile is nobody's, and is killed
            self.spare.kill()
            self.spare.close()
            self.spare = None

    def close(self, now: float, *, ended: bool) -> None:
        """If its shim has `ended` so will the container; a worker that is left has nobody to serve for."""
        if self.worker is not None:
            self._models.ended(self._model, now)
            if ended:
                self.worker.kill()
            self.worker.close()
        self._drop_spare()
        self.wire.close()
        os.close(self.pidfd)


def _inner(pid: int) -> int:
    """A process's number in its own pid namespace."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return pid
