"""Owns a container that a pool serves: the wire to its shim, and its process, which is a worker or a spare.

    no process ──prepare──▶ spare ──order──▶ worker ──ended──▶ no process

A spare is forked before the shim asks for a worker: when a container connects, while its shim has still things to do,
and after the worker has gone, for as long as holding a spare is cheaper than forking another (rule.py). A spare is in
the container already, and its memory is charged there; a request for a worker becomes a message to the spare.
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
_STDIO = 3  # fds: standard input, output and error


@dataclass(slots=True, eq=False)
class Placed:
    """A process in a container, forked from `layer`, or to be forked: then it has no pid yet."""

    number: int  # of the request to fork
    layer: ZygoteLayer
    zygote: Zygote  # of the layer, when it was asked
    wire: Wire
    why: str  # the reason for which no deeper layer was asked
    pid: int = 0
    pidfd: int = -1
    inner: int = 0  # the pid in the container's namespace

    def forked(self, pid: int, pidfd: int) -> None:
        self.pid, self.pidfd, self.inner = pid, pidfd, _inner(pid)

    def order(self, request: dict[str, Any], fds: Sequence[int]) -> None:
        """Tell the process to serve. Raises `Gone` if it does not read."""
        self.wire.send({**request, "why": self.why}, fds)
        if self.wire.waiting:
            raise Gone("it does not read")

    def kill(self) -> None:
        """Kill the process, if it was forked."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Close wire and pidfd; a spare ends with its wire."""
        self.wire.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Tenant:
    """One container, from when its shim connects until the shim has `left`."""

    def __init__(
        self,
        wire: Wire,
        pidfd: int,
        place: join.ContainerPlace,
        config: FunctionConfig,
        models: Models,
        say: Callable[[str], None],
    ) -> None:
        """`pidfd` is of the container's first process; `close` closes it, and the wire."""
        self.wire, self.pidfd, self.place = wire, pidfd, place
        self.serving: Serving | None = None  # None until the shim has told the function's needs
        self.spare: Placed | None = None
        self.worker: Placed | None = None
        self.left = False  # whether the shim has gone, or is not served any more
        self._config, self._models, self._say = config, models, say
        self._rule = LayerRule(_GUESSED, config.start_price)  # of the spare
        self._model = ""  # the URI of the function's model, if the pool may hold it
        self._greeted = False
        self._asked: int | None = None  # the number of the shim's request for a worker that is under way
        self._broken = ""  # why the last spare was lost: until there was a worker again, none is forked ahead

    # --- the shim -------------------------------------------------------------------------------------------------

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send the shim a message; it has `left` if it does not take it."""
        try:
            self.wire.send(message, fds)
        except Gone:
            self.left = True

    def greet(self) -> None:
        """Tell the shim, once, that its container can be served: its needs are known, and the lang layer is ready."""
        lang = self._models.lang
        if self._greeted or self.serving is None or not lang.ready:
            return
        self._greeted = True
        cost = lang.rule.decision.layer
        self.send({"ready": "lang", "key": "", "seconds": cost.seconds, "bytes": cost.bytes})

    def hear(self, now: float) -> None:
        """Read and answer what the shim has said."""
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
            with contextlib.suppress(OSError):  # in JSON, for a shim of version 1, see messages.py
                self.wire.sock.send(b'{"failed":"the pool is of another version"}')
            self.left = True
        except Gone:
            self.left = True

    def _answer(self, message: dict[str, Any], fds: list[int], now: float) -> None:
        """Do what a shim may ask for. Raises `Gone` for anything else."""
        match message:
            case {"wants": _} if self.serving is None:
                if why := self._introduce(message, now):
                    self._dismiss(why)
                else:
                    self.greet()
            case {
                "fork": int(number), "environment": dict(environment), "cwd": str(cwd), "start_id": str(start_id),
            } if self.serving is not None and len(fds) >= 2 + _STDIO:  # fmt: skip
                spans = message.get("spans", [])  # a message without any has no such field
                request = {"environment": environment, "cwd": cwd, "start_id": start_id, "spans": spans}
                if self.worker is not None or self._asked is not None:
                    self.send({"refused": number, "why": "its container has a worker"})
                    return
                self._rule.used(now)
                self.serving.asked(now)
                self._models.asked(self._model, now)
                if why := self._order(number, request, fds, now):
                    self._refuse(number, why, now)
            case _ if self.serving is None or not self.serving.tells(message, now, forked=self.worker is not None):
                raise Gone("no request that a shim makes")

    def _introduce(self, message: dict[str, Any], now: float) -> str:
        """Take the needs of the function; return why no layer of the pool meets them, or ""."""
        made_of = self._models.made_of
        match message:
            case {
                "wants": messages.VERSION, "machine": str(machine), "python": str(python), "base": str(base),
                "environment": dict(environment), "cwd": str(cwd),
            }:  # fmt: skip
                needs = replace(made_of, machine=machine, python=python, base=base)
            case _:
                return "the pool is of another version"
        # A worker becomes the container's user in any case, and imports what was not preloaded when it needs it.
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
        """Answer a request for a worker with the reason for which there is none."""
        self._asked = None
        self._models.refused(self._model, now)
        self.send({"refused": number, "why": why})

    def _dismiss(self, why: str) -> None:
        """Serve the container no longer, and tell its shim why."""
        self._say(f"the container of process {self.place.pid} is not served: {why}")
        self.wire.dismiss({"failed": why})
        self.left = True

    # --- the processes --------------------------------------------------------------------------------------------

    def forked(self, event: Forked, now: float) -> bool:
        """Take the process that was forked, if it is this container's spare; return whether it is."""
        if self.spare is None or self.spare.number != event.number:
            return False
        self.spare.forked(event.pid, event.pidfd)
        if self._asked is not None:
            self._promote(self.spare, now)
        return True

    def unforked(self, number: int, why: str, now: float) -> None:
        """Note that a request to fork was refused; nothing happens if it was another container's."""
        if self.spare is None or self.spare.number != number:
            return
        self._drop_spare()
        self._broken = why
        if self._asked is not None:
            self._refuse(self._asked, why, now)

    def ended(self, pid: int, status: int, now: float) -> bool:
        """Take the end of a process, if it is this container's worker or spare; return whether it is."""
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
            self.send({"ended": worker.inner, "status": status})
            if why:
                self._dismiss(why)
        elif self.spare is not None and self.spare.pid == pid:
            self._broken = self._failure() or "its spare was killed"
            self._drop_spare()
        else:
            return False
        return True

    def tend(self, now: float, *, room: bool) -> None:
        """Have an idle worker go that costs more than a start; have a spare come, if there is room, and go."""
        if self.serving is not None and (wish := self.serving.wish(now)):
            self.send({"wish": wish})
        if self._asked is not None or not self._greeted or self.worker is not None:
            return
        if self.spare is not None:
            if why := self._failure():
                self._dismiss(why)
                return
            # A spare from another layer than the deepest one goes. While lang is built again, any spare serves.
            if self._models.deepest(self._model)[0] in (self.spare.layer, None) and self._wanted(now):
                return
            self._drop_spare()
        if room and self._wanted(now):
            self._prepare()

    def _wanted(self, now: float) -> bool:
        """Return whether there should be a spare, though no worker is asked for."""
        if self.left or self._broken or self._rule.since is None:
            return False
        if self.serving is None or self.serving.state == "serving":
            return False  # the container's worker was forked by another pool
        return self._rule.wanted(now)

    def _prepare(self) -> str:
        """Have a spare forked from the deepest layer; return why that is not possible, or ""."""
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
        """Tell the spare to serve, or one that is forked now; return why that is not possible, or ""."""
        for _ in range(2):  # a spare may be gone without having been noticed
            if self.spare is None and (why := self._prepare()):
                return why
            if not join.lives(self.pidfd):
                raise Gone("it has ended")
            assert self.spare is not None, "a spare was prepared"
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
        """Make the spare, which was told to serve and was forked, the worker."""
        self.worker, self.spare = spare, None
        number, self._asked, self._broken = self._asked, None, ""
        self._models.began(self._model, now)
        self.send({"forked": number, "pid": spare.inner}, [spare.pidfd])

    def _failure(self) -> str:
        """Read what the process says before it serves: its costs are noted, a reason to fail is returned, else ""."""
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
        if self.spare is not None:  # a spare whose fork is under way is killed when it is told as forked
            self.spare.kill()
            self.spare.close()
            self.spare = None

    def close(self, now: float, *, ended: bool) -> None:
        """Close everything. If the shim has `ended`, so will its container: the worker is killed."""
        if self.worker is not None:
            self._models.ended(self._model, now)
            if ended:
                self.worker.kill()
            self.worker.close()
        self._drop_spare()
        self.wire.close()
        os.close(self.pidfd)


def _inner(pid: int) -> int:
    """Return the number of a process in its own pid namespace."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return pid
