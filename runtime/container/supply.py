"""The source of a container's workers: its node's pool, its own zygotes, or the interpreter.

    ask ──▶ forking ──Forked──▶ a worker
     └──none to fork from, refused, no answer──▶ a worker that begins with the interpreter

Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from runtime.config import FunctionConfig
from runtime.process.children import Child, spawn

if TYPE_CHECKING:
    from runtime.container.node import NodeMode
    from runtime.container.pod import Pod
    from runtime.container.takeover import ShimState
    from runtime.layers.spawn import ChildEvent, Ended
    from runtime.process.fd_store import FdStore

FORK_SECONDS = 2.0  # seconds in which a request to fork has to be answered


class Order(NamedTuple):
    """A request for a worker. `line` is the worker's end, closed here once the worker has it; `spans` still grow."""

    line: socket.socket
    connections: list[socket.socket]
    start_id: str
    spans: list[tuple[str, str, int, int]]


class Supply:
    """The supply of one container. For the shim's thread only."""

    def __init__(
        self,
        config: FunctionConfig,
        listener: socket.socket,
        agent: Callable[[], str],
        note: Callable[[str, int], None],
        say: Callable[[str], None],
    ) -> None:
        """`agent()` is the agent's socket; `note(why, since)` writes into the ledger, `say` into the log."""
        self._config, self._listener, self._agent, self._note, self._say = config, listener, agent, note, say
        self.layers: Pod | NodeMode | None = None  # the zygotes that are asked
        self.fd_store: FdStore | None = None  # weights that a worker got over TCP, for the next worker
        if config.socket.startswith("tcp:"):
            from runtime.process.fd_store import FdStore

            self.fd_store = FdStore()
        self.forked = False  # whether the last worker was forked
        self._order: Order | None = None
        self._number = 0
        self._until = 0.0

    def find_pool(self) -> None:
        """Use the node's pool, if there is one and it serves this container: the first start is a fork, too."""
        if self._config.layers == "off" or not os.path.exists(self._config.pool):
            return
        start = time.monotonic_ns()
        from runtime.container.node import NodeMode

        node = NodeMode(self._config)
        if node.connect():
            self.layers = node
        else:
            self._note(f"no pool: {node.why}", start)

    def take_over(self, handed: ShimState, order: Order | None) -> None:
        """Go on with the static twin's pool, and with the worker that the twin has asked for."""
        start = time.monotonic_ns()
        from runtime.container.node import NodeMode

        if handed.pool >= 0:
            node = NodeMode(self._config)
            if node.take_over(handed):
                self.layers = node
            else:
                self._note(f"no pool: {node.why}", start)
        elif handed.ask_pool:
            self.find_pool()
        else:
            self._note(f"no pool: {handed.why}", start)
        self.forked = True
        self._order, self._number, self._until = order, handed.number, handed.asked_at + FORK_SECONDS

    def keep_layers(self) -> Pod | NodeMode | None:
        """Return the zygotes that are asked. Without a pool they are the container's own, from the first worker on."""
        if self.layers is None and self._config.layers != "off":
            from runtime.container.pod import Pod

            self.layers = Pod(self._config, self._agent, self._say, self.fd_store)
        return self.layers

    def ask(self, order: Order) -> Child | None:
        """Have a worker forked from the deepest layer, else start one; None if `step` will return the forked one."""
        start = time.monotonic_ns()
        number, layers = 0, self.layers
        self.forked = False
        if layers is not None:
            number = layers.fork(
                time.monotonic(),
                listener=self._listener.fileno(),
                line=order.line.fileno(),
                connections=[each.fileno() for each in order.connections],
                environment=self._environment(),
                start_id=order.start_id,
                spans=order.spans,
                cwd=os.getcwd(),
            )
        if number:
            self._order, self._number, self._until = order, number, time.monotonic() + FORK_SECONDS
            return None
        if layers is not None and layers.why:
            self._note(f"no pool: {layers.why}", start)
            layers.close()
            self.layers = None  # from now on the container has zygotes of its own
        return self._boot(order)

    def step(self, now: float) -> list[Child | Ended]:
        """Have zygotes built and dropped; return workers that are there now, and ends of others."""
        found = [] if self.layers is None else self._heard(self.layers.step(now))
        if self._order is not None and now >= self._until:
            found.append(self._boot_instead("the zygote did not answer"))
        return found

    def _heard(self, events: Sequence[ChildEvent]) -> list[Child | Ended]:
        """Return what the answers of a zygote, or of the pool, mean to the shim."""
        from runtime.layers.spawn import Ended, Forked, ForkRefused  # a shim without layers never imports the module

        found: list[Child | Ended] = []
        for event in events:
            match event:
                case Forked(number, pid, pidfd):
                    if self._order is None or number != self._number:
                        os.close(pidfd)  # the worker came too late: its line is closed, and it ends by itself
                        continue
                    self._order.line.close()
                    self._order, self.forked = None, True
                    found.append(Child(pid, pidfd))
                case ForkRefused(number, why) if self._order is not None and number == self._number:
                    found.append(self._boot_instead(why))
                case Ended():
                    found.append(event)
        return found

    def _boot_instead(self, why: str) -> Child:
        assert self._order is not None, "a fork was asked for"
        order, self._order = self._order, None
        self._note(f"not forked: {why}", time.monotonic_ns())
        return self._boot(order)

    def _boot(self, order: Order) -> Child:
        with order.line as line:
            fds = [self._listener.fileno(), line.fileno(), *(each.fileno() for each in order.connections)]
            listener, control, *connections = map(str, fds)
            arguments = [listener, control, str(os.getpid()), order.start_id, json.dumps(order.spans), *connections]
            # A SIGTERM must not kill a worker that has no handler yet: requests may wait for the worker already.
            blocked = (signal.SIGTERM, signal.SIGINT)
            return spawn(["-P", "-m", "runtime.worker.worker", *arguments], fds, self._environment(), blocked)

    def _environment(self) -> dict[str, str]:
        return dict(os.environ, GLOWPLUG_SOCKET=self._agent())

    def close(self) -> None:
        if self.layers is not None:
            self.layers.close()
