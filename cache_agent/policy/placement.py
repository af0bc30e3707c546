"""Where a model starts soonest: the expected seconds on each node, by which way, and why. Pure.

Three ways lead to a model that runs, and a node offers the quickest of its own:

    load    queue + Σ missing bytes / bandwidth of the tier they lie in + attach
    wait    until what runs there ends, and then load
    move    what runs there goes elsewhere, and then load

This is the trade of ServerlessLLM (Fu et al., OSDI 2024, section 6): its loading time is q + n / b, with n bytes and
bandwidth b, and its migration time a · (t_in + t_out) + b, in tokens. `move_seconds` arrives here computed, by whoever
runs the generation. Unlike there, tiers add up: a node that has half of a model in memory reads the other half only.

No agent tells what runs on its node: `wait` and `move` are ways of the simulator, and of files that `glowplug place
--estimates` reads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Bytes = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=253)]

# Bytes per second where nobody has measured yet: what a plain cloud disk and an object store in its region give.
ASSUMED: Mapping[str, float] = {"dram": math.inf, "ssd": 1.0e9, "peer": 0.8e9, "origin": 0.25e9}
TOP = 10  # kube-scheduler's extenders score from 0 to 10
_NOTICED = 0.1  # seconds; of less nobody takes note, and no placement should turn on it
_MEANINGFUL = math.log(4.0)  # scores use their whole range when the worst start takes four times the best


class Tier(msgspec.Struct, frozen=True):
    """A tier of a node has the model's first `bytes`; `bandwidth` is measured, in bytes per second, 0 if nobody has."""

    name: Name
    bytes: Bytes
    bandwidth: Seconds = 0.0

    @property
    def rate(self) -> float:
        return self.bandwidth or ASSUMED.get(self.name, ASSUMED["origin"])


class RunningModel(msgspec.Struct, frozen=True):
    """What takes a place that the model needs. `move_seconds` None: it cannot be moved."""

    ends_in: Seconds
    move_seconds: Seconds | None = None


class PlacementNode(msgspec.Struct, frozen=True):
    """What is known of one node. `queue` is the loading that is before us, in seconds; `places` are free ones.

    `alive`: its agent was heard of lately. Without one the function reads the origin by itself, for itself. `capacity`
    is what its agent has for weights, in bytes; 0 if nobody said.
    """

    name: Name
    alive: bool = True
    tiers: tuple[Tier, ...] = ()
    queue: Seconds = 0.0
    attach: Seconds = 0.05
    places: int = 1
    running: tuple[RunningModel, ...] = ()
    origin: Seconds = 0.0  # bytes per second of the origin, as this node measured it; 0 if it did not
    capacity: Bytes = 0


class View(msgspec.Struct, frozen=True):
    """A model of so many bytes, as the nodes see it."""

    bytes: Bytes
    nodes: tuple[PlacementNode, ...] = ()


class PlacementDecision(NamedTuple):
    """The quickest way to the model on a node. `measured`: which share of the loading time rests on measurements."""

    node: str
    way: str
    seconds: float
    tier: str
    measured: float
    why: str


def decide(size: int, node: PlacementNode) -> PlacementDecision:
    """What a node offers for a model of `size` bytes."""
    load, tier, measured, steps = _loading(size, node)
    if node.alive and 0 < node.capacity < size:
        why = f"its agent has {node.capacity / 1e6:.0f} MB for weights in all, and refuses {size / 1e6:.0f} MB"
        return PlacementDecision(node.name, "none", math.inf, tier, 1.0, why)
    if node.places > 0:
        return PlacementDecision(node.name, "load", load, tier, measured, steps)
    ways: list[tuple[float, str, str]] = []
    for running in node.running:
        ways.append((running.ends_in, "wait", f"wait {running.ends_in:.2f} s for what runs there to end"))
        if running.move_seconds is not None:
            ways.append((running.move_seconds, "move", f"move what runs there in {running.move_seconds:.2f} s"))
    if not ways:
        return PlacementDecision(
            node.name, "none", math.inf, tier, measured, "no place is free, and nothing is known to end"
        )
    before, way, text = min(ways)
    return PlacementDecision(node.name, way, before + load, tier, measured, f"{text}; {steps}")


def rank(view: View) -> list[PlacementDecision]:
    """All nodes, the soonest first."""
    return sorted((decide(view.bytes, node) for node in view.nodes), key=lambda found: (found.seconds, found.node))


def covering(view: View, names: Iterable[str]) -> View:
    """The view with a node for each name: of one that nothing is known of, that it has no agent."""
    known = {node.name for node in view.nodes}
    return View(view.bytes, (*view.nodes, *(PlacementNode(name, alive=False) for name in names if name not in known)))


def scores(decisions: Iterable[PlacementDecision], names: Sequence[str]) -> dict[str, int]:
    """0 … 10 for each name; one without a decision gets 0, as the slowest one does.

    The scale is logarithmic, because 0.1 s against 1 s matters as much as 1 s against 10 s; and it shrinks where all
    nodes are about equally good, so that the scheduler's other reasons decide there.
    """
    known = {found.node: max(found.seconds, _NOTICED) for found in decisions if math.isfinite(found.seconds)}
    seconds = [known[name] for name in names if name in known]
    if not seconds:
        return dict.fromkeys(names, 0)
    worst = max(seconds)
    spread = max(math.log(worst / min(seconds)), _MEANINGFUL)
    return {name: round(TOP * math.log(worst / known[name]) / spread) if name in known else 0 for name in names}


def from_holdings(
    size: int,
    holdings: Iterable[tuple[str, str, int, int]],
    alive: Collection[str],
    bandwidths: Mapping[tuple[str, str], float] | None = None,
    capacities: Mapping[str, int] | None = None,
) -> View:
    """A view of what a directory holds: rows of (node, tier, bytes there, bytes in all), and (node, tier) → bytes/s."""
    measured, room = bandwidths or {}, capacities or {}
    tiers: dict[str, list[Tier]] = {name: [] for name in alive}
    for node, tier, done, _ in holdings:
        tiers.setdefault(node, []).append(Tier(tier, done, measured.get((node, tier), 0.0)))
    return View(
        size,
        tuple(
            PlacementNode(
                name,
                name in alive,
                tuple(found),
                origin=measured.get((name, "origin"), 0.0),
                capacity=room.get(name, 0),
            )
            for name, found in sorted(tiers.items())
        ),
    )


def _loading(size: int, node: PlacementNode) -> tuple[float, str, float, str]:
    """(seconds, the tier that most of them go to, share of them that was measured, the sum in words)."""
    origin = Tier("origin", size, node.origin)
    tiers = sorted(node.tiers, key=lambda tier: -tier.rate) if node.alive else []
    covered, parts = 0, []
    for tier in (*tiers, origin):
        part = min(size, tier.bytes) - covered
        if part > 0:
            parts.append((part / tier.rate, part, tier))
            covered += part
    transfer = sum(seconds for seconds, _, _ in parts)
    slowest = max(parts, default=(0.0, 0, origin), key=lambda part: part[0])
    measured = sum(seconds for seconds, _, tier in parts if tier.bandwidth) / transfer if transfer else 1.0
    words = [f"{part / 1e6:.0f} MB from {tier.name} in {seconds:.2f} s" for seconds, part, tier in parts if seconds]
    words = words or ["all of it is in memory"]
    # A queue of loads delays nobody whose bytes are there.
    queue = node.queue if transfer else 0.0
    if queue:
        words.insert(0, f"{queue:.2f} s of loading come first")
    if not node.alive:
        words.insert(0, "no agent is known there")
    return queue + transfer + node.attach, slowest[2].name, measured, ", ".join(words)
