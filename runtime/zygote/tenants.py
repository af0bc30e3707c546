"""Owns what a pool knows of one container: its shim, its worker, or the spare that waits there to become one.

    no process ──prepare──▶ spare ──serve──▶ worker ──ended──▶ no process

A spare is forked before anybody asks: when a container connects, whose shim has still things to do, and after its
worker has gone, for as long as holding it is cheaper than forking another (cache_agent/policy/keepalive.py). It is in
the container already, and its memory is charged there; a request for a worker is a message to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cache_agent.policy import keepalive
from runtime import messages
from runtime.errors import BadConfig
from runtime.zygote import layers
from runtime.zygote import wire as wires
from runtime.zygote.join import Place
from runtime.zygote.models import ModelLayer
from runtime.zygote.serving import Serving
from runtime.zygote.spawn import Zygote
from runtime.zygote.wire import Gone, Wire

_GUESSED = keepalive.Layer("spare", 0.03, 8 << 20)


@dataclass(slots=True, eq=False)
class Placed:
    """A process in a container; `layer` is the model's that it was forked from. Until it was forked it has no pid."""

    number: int  # of the request to fork it
    zygote: Zygote  # that was asked
    wire: Wire
    layer: ModelLayer | None
    why: str  # it was forked from no deeper layer
    pid: int = 0
    pidfd: int = -1
    inner: int = 0  # its pid as the container sees it

    def forked(self, pid: int, pidfd: int) -> None:
        self.pid, self.pidfd, self.inner = pid, pidfd, _inner(pid)

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


@dataclass(slots=True, eq=False)
class Tenant:
    wire: Wire
    pidfd: int
    place: Place
    serving: Serving | None = None  # once it has said what it is
    wants: str = ""  # the model's URI
    greeted: bool = False
    asked: int | None = None  # the number of its request for a worker that is under way
    spare: Placed | None = None
    worker: Placed | None = None
    broken: str = ""  # a spare that was lost here, so that none is forked ahead before there was a worker again
    history: keepalive.History = field(default_factory=keepalive.History)
    cost: keepalive.Layer = _GUESSED

    def wanted(self, now: float, rho: float) -> bool:
        """Whether there should be a spare, though nobody asks."""
        age = self.history.age(now)
        if self.broken or self.worker is not None or self.asked is not None or age is None:
            return False
        if self.serving is None or self.serving.state == "serving":
            return False  # another pool has forked what serves there
        return keepalive.keep(self.cost, self.history.gaps, rho).wanted(age)

    def introduce(self, message: dict[str, Any], made_of: layers.Needs, now: float) -> str:
        """It says what its function is made of; why that cannot be forked from what is `made_of` this, or ""."""
        match message:
            case {
                "wants": messages.VERSION, "machine": str(machine), "python": str(python), "base": str(base),
                "environment": dict(environment), "cwd": str(cwd),
            }:  # fmt: skip
                needs = replace(made_of, machine=machine, python=python, base=base)
            case _:
                return "the pool is of another version"
        # The user is the container's own in any case, and what is not preloaded is imported when it is needed.
        needs = replace(needs, environment=layers.relevant(environment))
        found = layers.deepest(needs, [("pool", "lang", made_of)])
        if not found.layer:
            return found.why
        try:
            self.serving = Serving(environment, cwd)
        except BadConfig as error:
            return error.text
        self.wants = self.serving.model
        self.history.idle(now)
        return ""

    def prepare(self, zygote: Zygote, number: int, layer: ModelLayer | None, why: str) -> str:
        """Has the zygote fork a spare; why it cannot, or "". Raises `Gone` if the zygote has."""
        try:
            root = os.open(f"/proc/{self.place.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            return f"its root cannot be opened ({error.strerror})"
        ours, theirs = wires.pair()
        with theirs:
            request = {"fork": number, "kind": "spare", "place": self.place.dump(), "asked": time.monotonic_ns()}
            try:
                zygote.wire.send(request, [theirs.fileno(), self.pidfd, root])
            except Gone:
                ours.close()
                raise
            finally:
                os.close(root)
        self.spare = Placed(number, zygote, Wire(ours), layer, why)
        return ""

    def order(self, request: dict[str, Any], fds: Sequence[int]) -> None:
        """Tells the spare to serve. Raises `Gone` when there is none that hears it."""
        if self.spare is None:
            raise Gone("there is no spare")
        self.spare.wire.send({**request, "why": self.spare.why}, fds)
        if self.spare.wire.waiting:
            raise Gone("it does not read")

    def promote(self) -> Placed:
        """The spare is the worker now."""
        assert self.spare is not None, "it was told to serve"
        worker = self.worker = self.spare
        self.spare, self.broken = None, ""
        return worker

    def hear(self) -> str:
        """What its process says before it serves: what it costs; or why it cannot be here, which is returned."""
        placed = self.worker or self.spare
        with contextlib.suppress(Gone):
            while placed is not None and (received := placed.wire.receive()) is not None:
                match received:
                    case {"parked": int(size), "seconds": float(seconds)}, []:
                        self.cost = keepalive.Layer("spare", seconds, size or self.cost.bytes)
                    case {"failed": str(why)}, []:
                        return why
        return ""

    def drop_spare(self) -> None:
        if self.spare is not None:
            self.spare.kill()
            self.spare.close()
            self.spare = None

    def close(self, *, ended: bool) -> None:
        """If its shim has `ended` so will the container; a worker that is left has nobody to serve for."""
        if self.worker is not None:
            if ended:
                self.worker.kill()
            self.worker.close()
        self.wire.close()
        os.close(self.pidfd)


def _inner(pid: int) -> int:
    """A process's number in its own pid namespace."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return pid
