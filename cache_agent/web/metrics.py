"""The agent's metrics for Prometheus: the journal's counts, and the agent's state at the moment of the scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from cache_agent import __version__
from cache_agent.journal.journal import ERROR_BUCKETS, Counts, Journal
from cache_agent.wire.operations import StatusReply

Values = Mapping[str, int] | Mapping[str, float] | Mapping[tuple[str, str], int] | Mapping[tuple[str, str], float]


class MeasuredAgent(Protocol):
    """The part of an agent that is measured."""

    journal: Journal

    def full_status(self) -> StatusReply: ...


class Collector:
    """A collector of prometheus_client. Any thread."""

    def __init__(self, node: MeasuredAgent) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, as they are now."""
        status, counts = self._node.full_status(), self._node.journal.counts()
        yield _gauge(
            "glowplug_info", "Always 1; says who answers.", ["node", "version"], {(status.node, __version__): 1}
        )
        yield from _space(status)
        yield from self._models(status)
        yield from _transfers(counts)
        yield from _estimates(status, counts)
        yield from _handoffs(counts)

    def _models(self, status: StatusReply) -> Iterator[Metric]:
        labels = self._node.journal.labels(model.model for model in status.models)
        resident: Counter[tuple[str, str]] = Counter()
        leases: Counter[str] = Counter()
        copies: Counter[str] = Counter()
        for label, model in zip(labels, status.models, strict=True):
            resident[label, "dram"] += model.bytes
            leases[label] += model.leases
            copies[label] += 1
        if status.ssd is not None:
            images = self._node.journal.labels(image.model for image in status.ssd.images)
            for label, image in zip(images, status.ssd.images, strict=True):
                resident[label, "ssd"] += image.bytes
        yield _gauge("glowplug_resident_bytes", "Bytes of a model in a tier.", ["model", "tier"], resident)
        yield _gauge("glowplug_leases", "Functions that hold a model.", ["model"], leases)
        yield _gauge(
            "glowplug_copies", "Copies of a model in memory; more than one after it changed.", ["model"], copies
        )


def _space(status: StatusReply) -> Iterator[Metric]:
    capacity = {"dram": status.capacity}
    used = {"dram": status.used}
    if status.ssd is not None:
        capacity["ssd"], used["ssd"] = status.ssd.capacity, status.ssd.used
    yield _gauge("glowplug_capacity_bytes", "What a tier may hold.", ["tier"], capacity)
    yield _gauge("glowplug_used_bytes", "What a tier holds.", ["tier"], used)
    orphaned = "Bytes that functions map, and nobody else can have."
    yield GaugeMetricFamily("glowplug_orphaned_bytes", orphaned, value=status.orphaned)
    if status.ssd is not None:
        aside = "Damaged images that were set aside."
        yield GaugeMetricFamily("glowplug_quarantined", aside, value=len(status.ssd.quarantined))


def _transfers(counts: Counts) -> Iterator[Metric]:
    where = ["model", "tier"]
    hits = "Leases that were granted, by the tier that the bytes came from; dram is a hit."
    yield _counter("glowplug_lease_grants", hits, where, counts.leases)
    yield _counter("glowplug_loads", "Models brought into memory.", where, counts.loads)
    yield _counter("glowplug_load_failures", "Loads that failed.", where, counts.failures)
    yield _counter("glowplug_load_bytes", "Bytes brought into memory.", where, counts.bytes)
    yield _counter("glowplug_load_seconds", "Seconds that loads took.", where, counts.seconds)
    yield _counter("glowplug_evictions", "Models that left a tier.", where, counts.evictions)
    yield _counter("glowplug_refusals", "Requests that could not be granted, by code.", ["code"], counts.refusals)


def _estimates(status: StatusReply, counts: Counts) -> Iterator[Metric]:
    rates = {tier.tier: tier.rate for tier in status.tiers}
    yield _gauge("glowplug_bandwidth_bytes_per_second", "What was measured of a tier.", ["tier"], rates)
    predicted = "Seconds that loads were expected to take, beside what they took."
    yield _counter("glowplug_predicted_seconds", predicted, ["tier"], counts.predicted)
    yield _counter("glowplug_predicted_took_seconds", "What those loads took.", ["tier"], counts.took)
    errors = HistogramMetricFamily(
        "glowplug_estimate_error", "|predicted - took| / took of loads that were predicted.", labels=["tier"]
    )
    for tier, buckets in counts.errors.items():
        total, rows = 0, []
        for bound, number in zip((*map(str, ERROR_BUCKETS), "+Inf"), buckets, strict=True):
            total += number
            rows.append((bound, total))
        errors.add_metric([tier], rows, counts.error_sum[tier])
    yield errors


def _handoffs(counts: Counts) -> Iterator[Metric]:
    fared = "Running requests of workers that drained, by outcome and how they travelled."
    yield _counter("glowplug_handoffs", fared, ["outcome", "how"], counts.handoffs)
    tokens = "Tokens that requests had when they were moved."
    yield _counter("glowplug_handoff_tokens", tokens, ["function"], counts.handed_tokens)
    pause = "Seconds in which moved requests stood still, in all."
    yield _counter("glowplug_handoff_pause_seconds", pause, ["how"], counts.handed_pause)


def _gauge(name: str, text: str, labels: list[str], values: Values) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric([key] if isinstance(key, str) else list(key), value)
    return family


def _counter(name: str, text: str, labels: list[str], values: Values) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric([key] if isinstance(key, str) else list(key), value)
    return family
