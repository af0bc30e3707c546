"""The comparison of placement policies on a trace: shipped, random, least loaded, image locality, ServerlessLLM's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cache_agent.policy import placement
from simulations.cluster import GB, Choice, Cluster, Hardware, Policy
from simulations.trace import Request

MODELS = 50
_ZIPF = 0.9
_SIZES = (2.5, 6.5, 8.0, 14.0, 16.0, 26.0)  # GB in bf16: of 1.2 to 13 billion parameters

Row = dict[str, Any]


def lottery(cluster: Cluster, _model: int, _now: float) -> Choice | None:
    """Choose any node with an open place."""
    nodes = [node for node in cluster.nodes if node.open > 0]
    return Choice(cluster.random.choice(nodes)) if nodes else None


def least_loaded(cluster: Cluster, _model: int, now: float) -> Choice | None:
    """Choose the node with the most open places; among equals, the one with the shortest queue of loads."""
    best = max(cluster.nodes, key=lambda node: (node.open, -node.queue(now), node.name))
    return Choice(best) if best.open > 0 else None


def image_locality(cluster: Cluster, model: int, _now: float) -> Choice | None:
    """Choose as kube-scheduler would if models were images: by presence, the number of nodes that have it, free places.

    The formula of its ImageLocality plugin: size · (nodes that have it / nodes), from 23 MB on, at most from 1 GB on.
    """
    having = {node.name for node in cluster.nodes if model in node.dram or model in node.ssd}
    weight = cluster.sizes[model] * len(having) / len(cluster.nodes)
    locality = min(1.0, max(0.0, (weight - 23e6) / (1000e6 - 23e6)))
    nodes = [node for node in cluster.nodes if node.open > 0]
    if not nodes:
        return None
    return Choice(max(nodes, key=lambda node: (locality * (node.name in having) + node.open / node.places, node.name)))


def serverless_llm(cluster: Cluster, model: int, now: float) -> Choice | None:
    """Choose by ServerlessLLM's formula: the least q + n / b, with a migration where no place is open."""
    size, hardware = cluster.sizes[model], cluster.hardware
    best: tuple[float, str, Choice] | None = None
    for node in cluster.nodes:
        if model in node.dram:
            seconds = size / hardware.dram_rate
        else:
            seconds = node.queue(now) + size / (hardware.ssd_rate if model in node.ssd else hardware.origin_rate)
        choice = Choice(node)
        if node.open == 0:
            moving = cluster.movable(node)
            if moving is None or moving[0].request is None:
                continue
            seconds += cluster.move_seconds(moving[0].model, moving[0].request.tokens, now)
            choice = Choice(node, *moving)
        if best is None or (seconds, node.name) < best[:2]:
            best = seconds, node.name, choice
    return best[2] if best else None


def shipped(cluster: Cluster, model: int, now: float) -> Choice:
    """Choose by `cache_agent.policy.placement`, with the estimates that a directory has."""
    hardware, size = cluster.hardware, cluster.sizes[model]
    moves = {node.name: cluster.movable(node) for node in cluster.nodes if node.open == 0}
    nodes = []
    for node in cluster.nodes:
        tiers, running = [], []
        if model in node.dram:
            tiers.append(placement.Tier("dram", size, hardware.dram_rate))
        elif model in node.ssd:
            tiers.append(placement.Tier("ssd", size, hardware.ssd_rate))
        if moving := moves.get(node.name):
            assert moving[0].request is not None, "only what runs can move"
            seconds = cluster.move_seconds(moving[0].model, moving[0].request.tokens, now)
            running.append(placement.RunningModel(cluster.ends_in(node, now), seconds))
        elif node.open == 0:
            running.append(placement.RunningModel(cluster.ends_in(node, now)))
        queue = 0.0 if model in node.dram else node.queue(now)
        nodes.append(
            placement.PlacementNode(
                node.name,
                tiers=tuple(tiers),
                queue=queue,
                attach=hardware.attach,
                places=node.open,
                running=tuple(running),
                origin=hardware.origin_rate,
            )
        )
    best = placement.rank(placement.View(size, tuple(nodes)))[0]
    (node,) = (node for node in cluster.nodes if node.name == best.node)
    moving = moves.get(node.name)
    return Choice(node, *moving) if best.way == "move" and moving else Choice(node)


POLICIES: Mapping[str, Policy] = {
    "random": lottery,
    "least-loaded": least_loaded,
    "image-locality": image_locality,
    "serverless-llm": serverless_llm,
    "glowplug": shipped,
}


def workload(requests: Sequence[Request], seed: int) -> tuple[list[int], list[tuple[int, Request]]]:
    """Return the models' sizes in bytes, and a model for each request: Zipf popularity, independent of size."""
    source = random.Random(seed)  # noqa: S311
    sizes = [int(source.choice(_SIZES) * GB) for _ in range(MODELS)]
    weights = [1 / (rank + 1) ** _ZIPF for rank in range(MODELS)]
    return sizes, list(zip(source.choices(range(MODELS), weights, k=len(requests)), requests, strict=True))


def compare(requests: Sequence[Request], *, seeds: int, speed: float, hardware: Hardware | None = None) -> list[Row]:
    """Run each policy on each seed; a row for each, in seconds of start over all requests, warm ones 0."""
    rows: list[Row] = []
    for seed in range(seeds):
        sizes, assigned = workload(requests, seed)
        for name, policy in POLICIES.items():
            cluster = Cluster(sizes, policy, hardware or Hardware(), seed)
            cluster.run(assigned, speed)
            starts = sorted(request.start for request in cluster.done)
            tiers = Counter(request.tier for request in cluster.done)
            rows.append(
                {
                    "policy": name,
                    "seed": seed,
                    "mean": sum(starts) / len(starts),
                    "p50": starts[len(starts) // 2],
                    "p99": starts[min(len(starts) - 1, len(starts) * 99 // 100)],
                    "longest": starts[-1],
                    "moved": sum(request.moved for request in cluster.done),
                    **{tier: tiers[tier] / len(starts) for tier in ("warm", "dram", "ssd", "origin")},
                }
            )
    return rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return a row per policy: means over the seeds, and the lowest and highest mean of a seed."""
    found = []
    for name in POLICIES:
        own = [row for row in rows if row["policy"] == name]
        means = [row["mean"] for row in own]
        tiers = ", ".join(f"{t} {sum(row[t] for row in own) / len(own):.1%}" for t in ("dram", "ssd", "origin"))
        found.append(
            {
                "policy": name,
                "mean": sum(means) / len(own),
                "p99": sum(row["p99"] for row in own) / len(own),
                "lowest": min(means),
                "highest": max(means),
                "cold": 1 - sum(row["warm"] for row in own) / len(own),
                "tiers": tiers,
            }
        )
    return found
