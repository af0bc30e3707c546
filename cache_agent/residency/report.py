"""Builds the parts of a status reply: entries, images, tiers, the cluster. Pure: values in, messages out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from cache_agent.cluster.directory import Directory
from cache_agent.policy.estimate import Measured
from cache_agent.residency.entry import Entry
from cache_agent.residency.memory import EntryMemory
from cache_agent.tiers.quarantine import Quarantined
from cache_agent.tiers.ssd import Stored
from cache_agent.wire.operations import (
    ClusterReply,
    HoldingStatus,
    ImageStatus,
    ModelStatus,
    NodeStatus,
    QuarantineStatus,
    SsdStatus,
    StatusReply,
    TierStatus,
)

_TIERS = ("origin", "peer", "ssd", "dram")


def model(entry: Entry, memory: EntryMemory | None, pinned: bool, now: float) -> ModelStatus:
    load = memory.load if memory else None
    return ModelStatus(
        model=entry.uri,
        source=entry.manifest.source,
        revision=entry.revision,
        state=entry.state,
        tier="dram",
        bytes=entry.bytes,
        done=entry.bytes if entry.state != "loading" else load.progress()[1] if load else 0,
        page=memory.dram.page if memory and memory.dram else 0,
        leases=len(entry.leases),
        idle_seconds=0.0 if entry.leases else max(0.0, now - entry.last_used),
        pinned=pinned,
        age_seconds=max(0.0, now - memory.began) if memory else 0.0,
    )


def ssd(
    directory: Path, capacity: int, used: int, images: Iterable[Stored], quarantined: Iterable[Quarantined]
) -> SsdStatus:
    return SsdStatus(
        str(directory),
        capacity,
        used,
        [ImageStatus(i.index.uri, i.index.source, i.revision, i.index.bytes, i.users) for i in images],
        [QuarantineStatus(name, reason[:256]) for name, reason in quarantined],
    )


def cluster(directory: Directory) -> ClusterReply:
    """Build the reply about all nodes, from the directory's mirror."""
    nodes = []
    for node in directory.nodes():
        rates = {tier: directory.bandwidth(node.name, tier) for tier in _TIERS}
        nodes.append(NodeStatus(*node, {tier: rate for tier, rate in rates.items() if rate}))
    return ClusterReply(
        nodes,
        [HoldingStatus(model, *holding) for model, held in directory.holdings().items() for holding in held],
    )


def tiers(measured: Mapping[str, Measured]) -> list[TierStatus]:
    return [TierStatus(name, m.loads, m.rate, m.error, m.predicted, m.took) for name, m in sorted(measured.items())]


def visible(status: StatusReply, may_have: Callable[[str], bool]) -> StatusReply:
    """Reduce a status to the models that a caller may have: it says nothing that depends on other models."""
    models = [model for model in status.models if may_have(model.model)]
    return StatusReply(status.node, status.pid, status.capacity, sum(model.bytes for model in models), models)
