"""Owns a container's connection to its node's pool. Standard library only.

The shim asks `NodeMode` for a worker where it would ask `Pod`. Zygotes are the pool's, and so are the decisions: the
shim tells what happens, and the pool says when an idle worker may go. Where the pool cannot or must not be used, `why`
has the reason, which goes into the ledger, and the shim goes on as if there was no pool.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime.config import FunctionConfig
from runtime.layers import identity, spawn
from runtime.process import messages
from runtime.process.wire import Gone, Wire

if TYPE_CHECKING:
    from runtime.container.takeover import ShimState

POOL_SECONDS = 1.0  # seconds that the pool may take to say whether it serves this container
_AGAIN = 5.0  # seconds after which a pool that was lost is looked for


class PoolZygote(spawn.Zygote):
    """A pool as a shim sees it: a zygote that may also wish the idle worker away, and repeats the wish."""

    retire = False  # whether the pool wishes the worker to retire

    def _event(self, message: dict[str, Any], fds: list[int]) -> spawn.ZygoteEvent | None:
        match message, fds:
            case {"wish": what}, []:
                self.retire = what == "retire"
                return None
        return super()._event(message, fds)


class NodeMode:
    """The pool of a node as one shim uses it. For the shim's thread only."""

    holds_model = False  # in this container: model layers are the pool's

    def __init__(self, config: FunctionConfig) -> None:
        self._config = config
        self._pool: PoolZygote | None = None
        self._number = 0
        self._asked = 0
        self._again_at = 0.0
        self._known: dict[str, dict[str, Any]] = {}  # what another pool would have to be told of the worker
        self.why = ""  # the reason for which the pool is not used

    def connect(self) -> bool:
        """Return whether the pool serves this container; `why` says why not. Waits for a second at most."""
        pool = self._reach()
        return pool is not None and self._greeted(pool)

    def take_over(self, handed: ShimState) -> bool:
        """Go on with the connection of the static twin; return as `connect` does."""
        pool = PoolZygote(Wire(socket.socket(fileno=handed.pool)), 0, -1)
        self._number, self._asked = handed.number, handed.number if handed.forking else 0
        if handed.parked:
            self._known = {"parked": {"parked": 1}}
        elif handed.worker:
            self._known = {word: {word: value} for word, value in handed.known.items()}
        if not handed.greeted:
            return self._greeted(pool)
        pool.state, self._pool = "ready", pool
        return True

    def _greeted(self, pool: PoolZygote) -> bool:
        poller = select.poll()
        poller.register(pool.wire, select.POLLIN)
        deadline = time.monotonic() + POOL_SECONDS
        self.why = "the pool has no zygote ready"
        while (left := deadline - time.monotonic()) > 0:
            poller.poll(left * 1000)
            for event in pool.read():
                match event:
                    case spawn.ZygoteReady():
                        self._pool, self.why = pool, ""
                        return True
                    case spawn.Lost(why):
                        self.why = why
                        return False
        pool.close()
        return False

    def _reach(self) -> PoolZygote | None:
        """Connect to a pool and tell it what this function is made of, so that a spare can be forked ahead."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        try:
            sock.connect(self._config.pool)
        except OSError as error:
            sock.close()
            self.why = f"no pool answers at {self._config.pool} ({error.strerror or error})"
            return None
        pool = PoolZygote(Wire(sock), 0, -1)
        needs = identity.needs()
        made_of = {"wants": messages.VERSION, "machine": needs.machine, "python": needs.python, "base": needs.base}
        with contextlib.suppress(Gone):  # what the pool said before it went is still read
            pool.wire.send({**made_of, "environment": dict(os.environ), "cwd": os.getcwd()})
            for message in self._known.values():
                pool.wire.send(message)
        return pool

    # --- told by the shim -----------------------------------------------------------------------------------------

    def worker_ready(self, kind: str, seconds: float, forked: bool, now: float) -> None:  # noqa: ARG002
        self._tell({"serves": round(seconds, 6)})

    def load(self, inside: int, now: float) -> None:  # noqa: ARG002
        self._tell({"load": inside})

    def worker_bytes(self, size: int) -> None:
        self._tell({"bytes": size})

    def worker_gone(self, now: float) -> None:  # noqa: ARG002
        self._known.clear()
        if self._pool is not None:
            self._pool.retire = False  # the wish was for the worker that has gone
        self._tell({"parked": 1})

    def _tell(self, message: dict[str, Any]) -> None:
        self._known.update(dict.fromkeys(message, message))
        if self._pool is not None:
            with contextlib.suppress(Gone):  # `step` reads that the pool is gone
                self._pool.wire.send(message)

    # --- asked by the shim ----------------------------------------------------------------------------------------

    def fork(
        self,
        now: float,  # noqa: ARG002
        *,
        listener: int,
        line: int,
        connections: Sequence[int],
        environment: Mapping[str, str],
        **more: Any,
    ) -> int:
        """Ask for a worker; return the number of its `Forked` or `ForkRefused`, 0 if the pool cannot be asked."""
        self._known.clear()
        if self._pool is None and (self.why.startswith(spawn.NO_ENTRY) or not self.connect()):
            return 0
        assert self._pool is not None, "the pool is connected"
        self._pool.retire = False
        self._number += 1
        request = {"fork": self._number, "environment": dict(environment), **more}
        try:
            self._pool.wire.send(request, [listener, line, *connections, 0, 1, 2])
        except (Gone, ValueError) as error:
            self._lose(str(error))
            return 0
        self._asked = self._number
        return self._number

    def fds(self) -> list[int]:
        return [] if self._pool is None else [self._pool.wire.fileno()]

    def step(self, now: float) -> list[spawn.ChildEvent]:
        """Return what the pool says of this container's worker; look for a lost pool again."""
        if self._pool is None and self._known and now >= self._again_at and not self.why.startswith(spawn.NO_ENTRY):
            self._again_at = now + _AGAIN
            self._pool = self._reach()
        if self._pool is None:
            return []
        events: list[spawn.ChildEvent] = []
        for event in self._pool.read():
            match event:
                case spawn.Lost(why):
                    self._lose(why if why.startswith(spawn.NO_ENTRY) else f"the pool is gone: {why}")
                case spawn.Forked() | spawn.ForkRefused():
                    self._asked = 0
                    events.append(event)
                case spawn.Ended():
                    events.append(event)
        if self._pool is not None and (why := self._pool.overdue(now)):
            self._lose(f"the pool {why.removeprefix('it ')}")
        if self._pool is None and self._asked:
            events.append(spawn.ForkRefused(self._asked, self.why))
            self._asked = 0
        return events

    def wants_drop(self, now: float) -> bool:  # noqa: ARG002
        if self._pool is None or not self._pool.retire:
            return False
        self._pool.retire = False
        return True

    def seconds(self, now: float) -> float:  # noqa: ARG002
        return 1.0

    def close(self) -> None:
        self._lose("closed")

    def _lose(self, why: str) -> None:
        self.why = why
        self._again_at = time.monotonic() + _AGAIN
        if self._pool is not None:
            self._pool.close()
            self._pool = None
