"""The simulation of a cluster: nodes with places, tiers and one loader each; requests that start, wait, move and end.

Simplifications: a node's loads run one after the other; a model runs on one place; an idle instance keeps its place
until a request needs the place; a request moves only to a node that has its model in memory.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from simulations.trace import Request

GB = 10**9


class Hardware(NamedTuple):
    """Hardware of each node, in bytes and bytes per second, and the seconds for a token read or written."""

    nodes: int = 20
    places: int = 2
    dram: int = 64 * GB
    ssd: int = 256 * GB
    dram_rate: float = 12.0 * GB  # to where a simulated node computes
    ssd_rate: float = 2.5 * GB
    origin_rate: float = 1.25 * GB  # a network of 10 Gbit/s
    attach: float = 0.05
    prefill: float = 1 / 4000
    decode: float = 0.03
    move_token: float = 1 / 8000  # recomputing a token elsewhere: ServerlessLLM's a
    move_base: float = 0.2  # and its b


@dataclass(eq=False, slots=True)
class Instance:
    """A model on a place. `request` is None while it idles."""

    node: Node
    model: int
    request: Running | None = None
    used: float = 0.0


@dataclass(eq=False, slots=True)
class Running:
    model: int
    arrival: float
    service: float
    tokens: int
    start: float = -1.0  # seconds until its model was there
    tier: str = ""
    ends: float = 0.0
    moved: bool = False


@dataclass(eq=False, slots=True)
class Node:
    name: str
    places: int
    instances: list[Instance] = field(default_factory=list)
    waiting: deque[Running] = field(default_factory=deque)
    dram: OrderedDict[int, int] = field(default_factory=OrderedDict)  # model → bytes, the least used first
    ssd: OrderedDict[int, int] = field(default_factory=OrderedDict)
    arriving: dict[int, float] = field(default_factory=dict)  # model → when its last load is or was over
    loader_free: float = 0.0

    @property
    def open(self) -> int:
        """Return the number of places that are free, or have idle instances."""
        return self.places - sum(instance.request is not None for instance in self.instances)

    def queue(self, now: float) -> float:
        return max(0.0, self.loader_free - now)


class Choice(NamedTuple):
    """A policy's choice of a node; `victim` is the running instance that moves to `target` before, if any."""

    node: Node
    victim: Instance | None = None
    target: Node | None = None


# None: no place is open; the request stays pending, as a pod would, and is asked for again when one opens.
Policy = Callable[["Cluster", int, float], Choice | None]


class Cluster:
    """Run a trace under a policy; `done` has the finished requests."""

    def __init__(self, sizes: list[int], policy: Policy, hardware: Hardware, seed: int) -> None:
        self.sizes = sizes
        self.hardware = hardware
        self.random = random.Random(seed)  # noqa: S311
        self.nodes = [Node(f"node-{number}", hardware.places) for number in range(hardware.nodes)]
        self.done: list[Running] = []
        self.mean_service = 1.0
        self._policy = policy
        self._events: list[tuple[float, int, Instance, Running]] = []
        self._order = count()
        self._pending: deque[Running] = deque()
        # Every model has been somewhere before: on the SSD of two nodes.
        for model in range(len(sizes)):
            for node in self.random.sample(self.nodes, 2):
                self._keep(node.ssd, model, hardware.ssd, set())

    def run(self, requests: list[tuple[int, Request]], speed: float) -> None:
        hardware = self.hardware
        services = [r.context * hardware.prefill + r.generated * hardware.decode for _, r in requests]
        self.mean_service = sum(services) / max(1, len(services))
        for (model, request), service in zip(requests, services, strict=True):
            now = request.arrival / speed
            self._end_until(now)
            running = Running(model, now, service, request.context + request.generated)
            self.done.append(running)
            if self._pending or not self._arrive(running, now):
                self._pending.append(running)
        self._end_until(float("inf"))

    def _arrive(self, running: Running, now: float) -> bool:
        warm = [i for node in self.nodes for i in node.instances if i.model == running.model and i.request is None]
        if warm:
            self._serve(max(warm, key=lambda instance: instance.used), running, now, now, "warm")
            return True
        choice = self._policy(self, running.model, now)
        if choice is None:
            return False
        node = choice.node
        if choice.victim is not None and choice.target is not None:
            self._move(choice.victim, choice.target, now)
            self._begin(node, running, now + self.move_seconds(choice.victim.model, running.tokens, now))
        elif node.open > 0:
            self._begin(node, running, now)
        else:
            node.waiting.append(running)
        return True

    def _begin(self, node: Node, running: Running, now: float) -> None:
        """Take a place, an idle instance's if need be, and load the model."""
        if len(node.instances) >= node.places:
            idle = [instance for instance in node.instances if instance.request is None]
            node.instances.remove(min(idle, key=lambda instance: instance.used))
        instance = Instance(node, running.model)
        node.instances.append(instance)
        ready, tier = self._load(node, running.model, now)
        self._serve(instance, running, now, ready, tier)

    def _serve(self, instance: Instance, running: Running, now: float, ready: float, tier: str) -> None:
        running.start, running.tier = ready - running.arrival, tier
        instance.request, instance.used = running, now
        running.ends = ready + running.service
        heapq.heappush(self._events, (running.ends, next(self._order), instance, running))

    def _end_until(self, now: float) -> None:
        while self._events and self._events[0][0] <= now:
            at, _, instance, running = heapq.heappop(self._events)
            if instance.request is not running or running.ends != at:
                continue  # it was moved
            instance.request, instance.used = None, at
            if (same := self._same(instance)) is not None:
                self._serve(instance, same, at, at, "warm")
            elif instance.node.waiting:
                self._begin(instance.node, instance.node.waiting.popleft(), at)
            while self._pending and self._arrive(self._pending[0], at):
                self._pending.popleft()

    def _same(self, instance: Instance) -> Running | None:
        """Take the first request that waits, on any node, for the idle instance's model; None if there is none.

        Platforms queue per function, not per node.
        """
        queues = [queue for queue in (self._pending, *(node.waiting for node in self.nodes)) if queue]
        found = [
            (running.arrival, queue, running)
            for queue in queues
            for running in queue
            if running.model == instance.model
        ]
        if not found:
            return None
        _, queue, running = min(found, key=lambda entry: entry[0])
        queue.remove(running)
        return running

    def _load(self, node: Node, model: int, now: float) -> tuple[float, str]:
        """Return the time at which the model is on its device, and the tier that it came from."""
        hardware, size = self.hardware, self.sizes[model]
        used = {instance.model for instance in node.instances}
        if model in node.dram:
            node.dram.move_to_end(model)
            # It may still be on its way for another: then its bytes are waited for, once.
            return max(now, node.arriving.get(model, 0.0)) + self.dram_seconds(model), "dram"
        tier, rate = ("ssd", hardware.ssd_rate) if model in node.ssd else ("origin", hardware.origin_rate)
        begin = max(now, node.loader_free)
        node.loader_free = begin + size / rate
        node.arriving[model] = node.loader_free
        self._keep(node.dram, model, hardware.dram, used)
        self._keep(node.ssd, model, hardware.ssd, set())
        return node.loader_free + hardware.attach, tier

    def _keep(self, tier: OrderedDict[int, int], model: int, capacity: int, pinned: set[int]) -> None:
        size = self.sizes[model]
        for other in [other for other in tier if other not in pinned and other != model]:
            if sum(tier.values()) + size <= capacity:
                break
            del tier[other]
        tier[model] = size
        tier.move_to_end(model)

    def _move(self, victim: Instance, target: Node, now: float) -> None:
        running = victim.request
        assert running is not None, "only what runs can move"
        victim.node.instances.remove(victim)
        if len(target.instances) >= target.places:
            idle = [instance for instance in target.instances if instance.request is None]
            target.instances.remove(min(idle, key=lambda instance: instance.used))
        moved = Instance(target, victim.model, running, now)
        target.instances.append(moved)
        target.dram.move_to_end(victim.model)
        running.moved = True
        running.ends += self.move_seconds(victim.model, running.tokens, now) + self.dram_seconds(victim.model)
        heapq.heappush(self._events, (running.ends, next(self._order), moved, running))

    def dram_seconds(self, model: int) -> float:
        return self.sizes[model] / self.hardware.dram_rate + self.hardware.attach

    def move_seconds(self, model: int, tokens: int, now: float) -> float:  # noqa: ARG002
        """Return the seconds that a migration takes, by ServerlessLLM's formula: a · (t_in + t_out) + b."""
        return self.hardware.move_token * tokens + self.hardware.move_base

    def movable(self, node: Node) -> tuple[Instance, Node] | None:
        """Return an instance that can move away from a node, and its target; None if there is none.

        A request moves at most once, to a node with an open place and its model in memory.
        """
        for instance in node.instances:
            if instance.request is None or instance.request.moved or instance.request.start < 0:
                continue
            for target in self.nodes:
                if target is not node and target.open > 0 and not target.waiting and instance.model in target.dram:
                    return instance, target
        return None

    def ends_in(self, node: Node, now: float) -> float:
        """Return the expected seconds until a place opens for one more: the lengths of answers are not known."""
        left = sorted(
            max(0.1, instance.request.arrival + max(0.0, instance.request.start) + self.mean_service - now)
            for instance in node.instances
            if instance.request is not None
        )
        rounds, index = divmod(len(node.waiting), max(1, len(left)))
        return left[index] + rounds * self.mean_service if left else 0.0
