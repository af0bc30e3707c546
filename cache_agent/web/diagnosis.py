"""The diagnosis of a start from its ledger: where its time went, its longest phase, and what would shorten it. Pure.

Spans of shim and worker follow one another. The agent's spans run beside them, and count only as far as the worker
waited. Each instant belongs to the span of shim or worker that began last and has not ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cache_agent.ledger import Span

_WAIT = "weights"  # the worker's span of waiting for bytes
_FIRST = "first token"
_TRANSFER = "transfer from "
_NOWHERE = "between the phases"


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Facts of the node: the model's bytes (0: unknown), an SSD tier or none, huge pages under the model or not."""

    bytes: int = 0
    ssd: bool = False
    huge_pages: bool = False


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result: `seconds` from the first span to the end of the last, and `phases` in seconds, the longest first."""

    seconds: float
    bottleneck: str
    share: float
    sentence: str
    rate: float = 0.0  # bytes per second of the transfer, where one happened
    phases: dict[str, float] = field(default_factory=dict)


def diagnose(spans: Sequence[Span], tier: str, node: NodeFacts) -> Diagnosis | None:
    """Diagnose a start whose bytes came from `tier` ("": unknown). None where no time was spent."""
    parts = attribute([span for span in spans if span.owner != "agent"])
    total = sum(parts.values()) / 1e9
    if not total:
        return None
    moved = sum(span.end - span.start for span in spans if (span.owner, span.name) == ("agent", "transfer")) / 1e9
    source = tier if moved else ""  # resident bytes were not transferred for this start
    phases = dict(sorted(((_named(name, source), ns / 1e9) for name, ns in parts.items()), key=lambda part: -part[1]))
    bottleneck = next(iter(phases))
    share = phases[bottleneck] / total
    rate = node.bytes / moved if moved and node.bytes else 0.0
    at = f" at {rate / 1e6:.0f} MB/s" if rate and bottleneck.startswith(_TRANSFER) else ""
    sentence = f"{bottleneck} took {share:.0%} of {total:.2f} s{at}{_advice(bottleneck, source, node)}"
    return Diagnosis(total, bottleneck, share, sentence, rate, phases)


def attribute(spans: Iterable[Span]) -> dict[str, int]:
    """Return nanoseconds by phase ("owner name"), from the first start to the last end.

    The time in which a ready function waited for its first request belongs to no phase.
    """
    ordered = sorted(spans, key=lambda span: (span.start, -span.end))
    starting = [span for span in ordered if span.name != _FIRST]
    edges = sorted({edge for span in starting for edge in (span.start, span.end)})
    parts: dict[str, int] = {}
    for begin, end in pairwise(edges):
        running = [span for span in starting if span.start <= begin and span.end >= end]
        name = f"{running[-1].owner} {running[-1].name}" if running else _NOWHERE
        parts[name] = parts.get(name, 0) + end - begin
    for span in ordered:
        if span.name == _FIRST and (rest := span.end - max([span.start, *edges[-1:]])) > 0:
            parts[f"{span.owner} {_FIRST}"] = rest
    return parts


def _named(name: str, tier: str) -> str:
    return f"{_TRANSFER}{tier}" if name == f"worker {_WAIT}" and tier else name


def _advice(bottleneck: str, tier: str, node: NodeFacts) -> str:
    if bottleneck.startswith(_TRANSFER):
        if tier == "origin" and not node.ssd:
            return "; this node's SSD tier is off (glowplug agent serve --ssd DIR), and glowplug warm MODEL loads ahead"
        if tier == "origin":
            return "; it was not on this node: glowplug warm MODEL loads ahead, and keeps it on SSD"
        pages = "" if node.huge_pages else "; huge pages more than double that"
        return f"{pages}; glowplug warm MODEL --pin keeps it in memory"
    match bottleneck.partition(" ")[2].partition(",")[0]:
        case "imports":
            return "; a warm layer forks that instead (node mode, or a parked replica with min-scale 1)"
        case "python" | "exec" | "restart" | "spawn" | "http" | "listen":
            return "; the processor is slow or shared: ask for a whole one (--cpu) while it starts"
        case "lease":
            return "; the origin was asked what the model is: it is slow to answer, or far away"
        case "weights":
            return "; the bytes were there, and the worker waited for them to be verified"
        case "attach" | "engine":
            return "; transformers builds the model: GLOWPLUG_PRIVATE_WEIGHTS copies all of it, leave it off"
        case "handler":
            return "; that is your handler.py: its imports and its load(context)"
        case "first token":
            return "; that is the prompt: a shorter one, or more processors (GLOWPLUG_THREADS)"
    return ""
