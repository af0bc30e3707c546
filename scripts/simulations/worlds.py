"""The worlds of keep-alive: containers that a call uses up, and zygotes that a call forks. A rule decides what stays.

In `Containers` a call takes the deepest idle container that fits, and builds the missing layers; afterwards the
container belongs to that function. Several idle containers of a function are counted each. In `Zygotes` there is one
process per layer; calls fork it, and its pages are in use while a process forked from it runs.

Memory is idle while no call runs on it; it is counted in GB·s from the first call to the last.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from cache_agent.policy.keepalive import GB, LayerCost
from simulations.functions import Call, Function

FORK = 0.02  # seconds from a call to its forked, placed and joined process
PRIVATE = 0.1  # of the layers below, that a process forked from them has as pages of its own


class Hold(NamedTuple):
    """A rule's decision on an idle layer, in seconds of idleness: how long it stays, and when it is built again."""

    hold: float
    rebuild: float = math.inf
    until: float = math.inf


class Rule:
    """The interface of a rule. Times are the trace's, in seconds."""

    capacity = math.inf  # bytes of memory that containers may take altogether
    adopts = False  # whether an idle container serves any function of its language (Pagurus)

    def arrive(self, function: Function, now: float) -> None:
        """Note a call before it is served."""

    def reach(self, layer: LayerCost, now: float) -> None:
        """Note that a call looks for this layer, after it has found no deeper one."""

    def idle(self, layer: LayerCost, below: Sequence[LayerCost], alone: int, now: float) -> Hold:
        """Decide on a layer that has become idle.

        `below` are the layers that it stands on, the nearest first; the first `alone` of them are idle without it.
        """
        raise NotImplementedError

    def worth(self, function: Function, size: int) -> float:
        """Return the worth of a container of `size` bytes; where `capacity` is short, the least worth goes first."""
        raise NotImplementedError

    def evicted(self, worth: float) -> None:
        """Note that a container of this worth was evicted."""


@dataclass(slots=True)
class Result:
    """`starts` in seconds, one per call; `idle` in GB·s; `found` counts calls by the layer that they found."""

    starts: list[float] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)
    idle: float = 0.0


class World:
    """Run a trace under a rule."""

    def __init__(self, functions: Sequence[Function], rule: Rule) -> None:
        self.functions = functions
        self.rule = rule
        self.result = Result()
        self._events: list[tuple[float, int, str, Any, int]] = []
        self._order = count()
        self._idle_bytes = 0
        self._counted = 0.0

    def run(self, calls: Sequence[Call]) -> Result:
        self._counted = calls[0].at if calls else 0.0
        for call in calls:
            while self._events and self._events[0][0] <= call.at:
                self._step()
            self._count(call.at)
            self._serve(call)
        return self.result

    def _step(self) -> None:
        at, _, kind, subject, version = heapq.heappop(self._events)
        self._count(at)
        getattr(self, f"_{kind}")(subject, version, at)

    def _at(self, at: float, kind: str, subject: object, version: int = 0) -> None:
        if at < math.inf:
            heapq.heappush(self._events, (at, next(self._order), kind, subject, version))

    def _count(self, now: float) -> None:
        self.result.idle += self._idle_bytes * (now - self._counted) / GB
        self._counted = now

    def _started(self, seconds: float, found: str) -> None:
        self.result.starts.append(seconds)
        self.result.found[found.partition(":")[0]] += 1

    def _serve(self, call: Call) -> None:
        raise NotImplementedError


@dataclass(slots=True, eq=False)
class _Zygote:
    layer: LayerCost
    below: tuple[_Zygote, ...]  # the nearest first
    present: bool = False
    ready: float = 0.0
    running: int = 0  # calls, in everything that was forked from it
    children: int = 0  # layers that stand on it and are there
    version: int = 0  # timers of an older one are void

    @property
    def idle(self) -> bool:
        return not self.running and not self.children


class Zygotes(World):
    """One process per layer, forked and never used up."""

    def __init__(self, functions: Sequence[Function], rule: Rule) -> None:
        super().__init__(functions, rule)
        known: dict[str, _Zygote] = {}
        self._paths: list[tuple[_Zygote, ...]] = []  # of each function, its own layer first
        for function in functions:
            path: tuple[_Zygote, ...] = ()
            for layer in function.layers:
                if layer.name not in known:
                    private = sum(zygote.layer.bytes for zygote in path) * PRIVATE
                    known[layer.name] = _Zygote(layer._replace(bytes=layer.bytes + int(private)), path)
                path = (known[layer.name], *path)
            self._paths.append(path)

    def _serve(self, call: Call) -> None:
        path, now = self._paths[call.function], call.at
        self.rule.arrive(self.functions[call.function], now)
        found = next((zygote.layer.name for zygote in path if zygote.present), "cold")
        ready = self._build(path, now)
        for zygote in path:
            if not zygote.running:
                self._idle_bytes -= zygote.layer.bytes
            zygote.running += 1
            zygote.version += 1
        self._started(ready + FORK - now, found)
        self._at(ready + FORK + call.seconds, "end", path)

    def _build(self, path: Sequence[_Zygote], now: float) -> float:
        """Build missing layers, which are idle for the moment; return when all are there."""
        missing = []
        for zygote in path:
            self.rule.reach(zygote.layer, now)
            if zygote.present:
                break
            missing.append(zygote)
        ready = max(now, *(zygote.ready for zygote in path if zygote.present), now)
        for zygote in reversed(missing):
            ready += zygote.layer.seconds
            zygote.present, zygote.ready = True, ready
            self._idle_bytes += zygote.layer.bytes
            if zygote.below:
                zygote.below[0].children += 1
                zygote.below[0].version += 1
        return ready

    def _end(self, path: Sequence[_Zygote], _version: int, now: float) -> None:
        for zygote in path:
            zygote.running -= 1
            if not zygote.running:
                self._idle_bytes += zygote.layer.bytes
        if path[0].idle:
            self._rest(path[0], now)

    def _rest(self, zygote: _Zygote, now: float) -> None:
        """Make a layer idle, and set the time at which it goes."""
        alone = 0
        for other in zygote.below:
            if other.running or other.children > 1:
                break
            alone += 1
        plan = self.rule.idle(zygote.layer, [other.layer for other in zygote.below], alone, now)
        zygote.version += 1
        self._at(now + plan.rebuild, "ahead", (zygote, plan.until - plan.rebuild), zygote.version)
        if plan.hold <= 0:
            self._drop(zygote, zygote.version, now)
        else:
            self._at(now + plan.hold, "drop", zygote, zygote.version)

    def _drop(self, zygote: _Zygote, version: int, now: float) -> None:
        if version != zygote.version or not zygote.present:
            return
        zygote.present = False
        self._idle_bytes -= zygote.layer.bytes
        if zygote.below:
            below = zygote.below[0]
            below.children -= 1
            if below.idle:
                self._rest(below, now)

    def _ahead(self, subject: tuple[_Zygote, float], version: int, now: float) -> None:
        zygote, seconds = subject
        if version != zygote.version or zygote.present:
            return
        if zygote.below:
            self._build(zygote.below, now)
        zygote.present, zygote.ready = True, max(now, *(z.ready for z in zygote.below), now) + zygote.layer.seconds
        self._idle_bytes += zygote.layer.bytes
        if zygote.below:
            zygote.below[0].children += 1
            zygote.below[0].version += 1
        self._at(now + seconds, "drop", zygote, version)


@dataclass(slots=True, eq=False)
class _Container:
    layers: tuple[LayerCost, ...]
    function: int
    bytes: int = 0
    version: int = 0
    worth: float = 0.0


class Containers(World):
    """Containers that a call uses up, and that belong to its function afterwards."""

    def __init__(self, functions: Sequence[Function], rule: Rule) -> None:
        super().__init__(functions, rule)
        self._idle: dict[str, list[_Container]] = defaultdict(list)  # by their deepest layer, the last used last
        self._total = 0
        self._packed = {f.layers[-1].name: self._packing(f) for f in functions} if rule.adopts else {}

    def _packing(self, function: Function) -> int:
        """Return the bytes of packages of its language's three largest other functions in an idle container."""
        others = [each for each in self.functions if each.layers[:-1] == function.layers[:-1] and each is not function]
        return sum(sorted(each.layers[-1].bytes for each in others)[-3:])

    def _serve(self, call: Call) -> None:
        function, now = self.functions[call.function], call.at
        self.rule.arrive(function, now)
        layers = function.layers
        for depth in range(len(layers), 0, -1):
            layer = layers[depth - 1]
            self.rule.reach(layer, now)
            if self._idle[layer.name]:
                container = self._take(self._idle[layer.name][-1])
                start, found = sum(each.seconds for each in layers[depth:]), layer.name
                break
            if self.rule.adopts and depth == len(layers) and (other := self._lent(function)):
                container, start, found = self._take(other), 0.1 * layer.seconds, "adopted"
                break
        else:
            container, start, found = _Container((), call.function), sum(each.seconds for each in layers), "cold"
        self._total -= container.bytes
        container.layers, container.function = layers, call.function
        container.bytes = sum(layer.bytes for layer in layers)
        self._make_room(container.bytes)
        self._total += container.bytes
        self._started(start, found)
        self._at(now + start + call.seconds, "end", container)

    def _lent(self, function: Function) -> _Container | None:
        for other in self.functions:
            if other.layers[:-1] == function.layers[:-1] and self._idle[other.layers[-1].name]:
                return self._idle[other.layers[-1].name][-1]
        return None

    def _make_room(self, size: int) -> None:
        while self._total + size > self.rule.capacity:
            idle = [container for pool in self._idle.values() for container in pool]
            if not idle:
                return  # what runs is not stopped
            least = self._take(min(idle, key=lambda container: container.worth))
            self._total -= least.bytes
            self.rule.evicted(least.worth)

    def _take(self, container: _Container) -> _Container:
        self._idle[container.layers[-1].name].remove(container)
        self._idle_bytes -= container.bytes
        container.version += 1
        return container

    def _end(self, container: _Container, _version: int, now: float) -> None:
        function = self.functions[container.function]
        if packed := self._packed.get(function.layers[-1].name, 0):
            container.bytes += packed
            self._total += packed
        container.worth = self.rule.worth(function, container.bytes) if self.rule.capacity < math.inf else 0.0
        self._rest(container, now)

    def _rest(self, container: _Container, now: float) -> None:
        *below, layer = container.layers
        self._idle[layer.name].append(container)
        self._idle_bytes += container.bytes
        plan = self.rule.idle(layer, below[::-1], len(below), now)
        if plan.rebuild < math.inf:
            self._at(now + plan.rebuild, "ahead", (container.function, layer, plan.until - plan.rebuild))
        if plan.hold <= 0:
            self._demote(container, container.version, now)
        else:
            self._at(now + plan.hold, "demote", container, container.version)

    def _demote(self, container: _Container, version: int, now: float) -> None:
        if version != container.version:
            return
        self._take(container)
        self._total -= container.bytes
        container.layers = container.layers[:-1]
        if container.layers:
            container.bytes = sum(layer.bytes for layer in container.layers)
            self._total += container.bytes
            self._rest(container, now)

    def _ahead(self, subject: tuple[int, LayerCost, float], _version: int, now: float) -> None:
        """Make an idle container, if the function has none by then; its building counts as idle time."""
        number, layer, seconds = subject
        if self._idle[layer.name]:
            return
        layers = self.functions[number].layers
        made = _Container(layers[: layers.index(layer) + 1], number)
        made.bytes = sum(each.bytes for each in made.layers)
        self._make_room(made.bytes)
        self._total += made.bytes
        self._idle[layer.name].append(made)
        self._idle_bytes += made.bytes
        self._at(now + seconds, "demote", made, made.version)
