"""A node in node mode: a pool with its layers, and containers with a memory limit."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import containers, functions
from benchmarks.containers import MemoryCgroup
from benchmarks.functions import Function
from benchmarks.harness import Sample, Unavailable
from runtime.layers.building import WARM

Layer = Literal["lang", "model"]
_SECONDS = 60.0
_SETTLED = 1.0  # seconds that a spare has before it is needed: idle workers are away for longer
_STEPS = ("pool: fork ms", "pool: cgroup ms", "pool: join ms")


@dataclass(frozen=True, slots=True)
class Node:
    """A node with one model, and one container at a time."""

    model: str
    agent: Path
    threads: int
    layer: Layer
    pool: Path
    cgroup: MemoryCgroup

    def start(self, **settings: str) -> AbstractContextManager[Function]:
        """Start a container for the first time; it has answered when the block begins."""
        variables = {"GLOWPLUG_POOL": str(self.pool), "GLOWPLUG_LAYERS": self.layer, **settings}
        return functions.glowplug(
            self.model, agent=self.agent, threads=self.threads, cgroup=self.cgroup, settings=variables, static=True
        )

    @contextlib.contextmanager
    def standby(self) -> Iterator[Function]:
        """Start a container and let its idle worker go; the next worker waits in it."""
        with self.start(GLOWPLUG_HOLD="user=1") as function:
            _until(lambda: b"parked" in function.request("GET", "/_/ready"), "it was not parked", function)
            _until(lambda: _waits(function), "no spare waits in it", function)
            time.sleep(_SETTLED)
            yield function

    def joined(self, function: Function) -> Sample:
        """Return the time to fork and place a function's worker. Raises `Unavailable` if there was no fork."""
        phases = function.phases()
        if not phases.keys() >= {*_STEPS}:
            raise Unavailable(f"the pool did not fork it: {', '.join(phases)}")
        return {"fork_join_ms": sum(phases[step] for step in _STEPS), **phases}


@contextlib.contextmanager
def node(model: str, *, agent: Path, threads: int, layer: Layer) -> Iterator[Node]:
    """Run a node in node mode for the block. Needs root."""
    with (
        functions.pool("llama", "--agent", str(agent)) as pool,
        containers.MemoryCgroup("node", 8 << 30) as cgroup,
    ):
        made = Node(model, agent, threads, layer, pool, cgroup)
        with made.start() as first:  # puts the runtime's files into the page cache, too
            if layer == "model":
                log = pool.with_name("log")
                _until(lambda: f"model layer of {model} {WARM}" in log.read_text(), "the pool has no model", first)
        yield made


def _waits(function: Function) -> bool:
    """Return whether the next worker waits: a process in the container that is a child of the pool's."""
    inside = {os.stat(f"/proc/{pid}/ns/pid").st_ino for pid in function.container.pids()}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() == "glowplug-spare":
                return os.stat(process / "ns/pid").st_ino in inside
    return False


def _until(condition: Callable[[], bool], what: str, function: Function) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise Unavailable(f"{what}: {function.container.output()[-500:]}")
        time.sleep(0.02)
