"""The nodes where a model would start soonest: expected seconds on each node, the way to get there, the reason. Pure.

A model can be made to run on a node in three ways, of which the node offers the quickest:

    load    queue + Σ missing bytes / bandwidth of the tier they lie in + attach
    wait    until a running model ends, and then load
    move    a running model to another node, and then load

This is the trade of ServerlessLLM (Fu et al., OSDI 2024, section 6): its loading time is q + n / b, with n bytes and
bandwidth b, and its migration time a · (t_in + t_out) + b, in tokens; the caller computes the latter (`move_seconds`).
Unlike there, tiers add up: a node that has half of a model in memory reads the other half only.

Agents do not report what runs on their node: only the simulator, and files for `glowplug place --estimates`, have
running models, and so the ways `wait` and `move`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Bytes = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=253)]

# Bytes per second of tiers that were not measured yet: those of a plain cloud disk, and of a store in its region.
ASSUMED: Mapping[str, float] = {"dram": math.inf, "ssd": 1.0e9, "peer": 0.8e9, "origin": 0.25e9}
TOP = 10  # kube-scheduler's extenders score from 0 to 10
_NOTICED = 0.1  # seconds; a smaller difference should decide no placement
_MEANINGFUL = math.log(4.0)  # scores use their whole range when the worst start takes four times the best


class Tier(msgspec.Struct, frozen=True):
    """A tier of a node that has the model's first `bytes`; `bandwidth` as measured in bytes per second, or 0."""

    name: Name
    bytes: Bytes
    bandwidth: Seconds = 0.0

    @property
    def rate(self) -> float:
        return self.bandwidth or ASSUMED.get(self.name, ASSUMED["origin"])


class RunningModel(msgspec.Struct, frozen=True):
    """A running model in a place that the new one needs; with `move_seconds` None it cannot be moved."""

    ends_in: Seconds
    move_seconds: Seconds | None = None


class PlacementNode(msgspec.Struct, frozen=True):
    """One node as its agent reported it; `alive` while reports come.

    `queue` is the loading that comes first, in seconds, `attach` the seconds from loaded to ready, `places` the number
    of free places, `capacity` the agent's memory for weights in bytes, 0 where unknown. Without a living agent a
    function reads the origin itself.
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
    """A model of `bytes` bytes, and the nodes with their parts of the model."""

    bytes: Bytes
    nodes: tuple[PlacementNode, ...] = ()


class PlacementDecision(NamedTuple):
    """The quickest way to the model on a node; `measured` is the measured share (0 to 1) of its loading time."""

    node: str
    way: str
    seconds: float
    tier: str
    measured: float
    why: str


def decide(size: int, node: PlacementNode) -> PlacementDecision:
    """Return the quickest way of one node to a model of `size` bytes."""
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
    """Return the decisions of all nodes, the soonest first."""
    return sorted((decide(view.bytes, node) for node in view.nodes), key=lambda found: (found.seconds, found.node))


def covering(view: View, names: Iterable[str]) -> View:
    """Return the view with a node for each name; a node that is not in the view is added without an agent."""
    known = {node.name for node in view.nodes}
    return View(view.bytes, (*view.nodes, *(PlacementNode(name, alive=False) for name in names if name not in known)))


def scores(decisions: Iterable[PlacementDecision], names: Sequence[str]) -> dict[str, int]:
    """Return a score from 0 to 10 for each name; the slowest node, and a name without a decision, get 0.

    The scale is logarithmic, because 0.1 s against 1 s matters as much as 1 s against 10 s. Scores lie closer together
    where all nodes are about equally good, so that the scheduler's other reasons decide there.
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
    """Return a view of a directory's content: rows of (node, tier, bytes there, bytes in all).

    `bandwidths` are bytes per second by (node, tier), `capacities` bytes by node.
    """
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
    """Return (seconds, the tier that takes most of them, the measured share of them, the sum in words)."""
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
    # A queue of loads does not delay a model whose bytes are there.
    queue = node.queue if transfer else 0.0
    if queue:
        words.insert(0, f"{queue:.2f} s of loading come first")
    if not node.alive:
        words.insert(0, "no agent is known there")
    return queue + transfer + node.attach, slowest[2].name, measured, ", ".join(words)
