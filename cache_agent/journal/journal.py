"""Owns the events of this node since the agent's start, in a bounded ring with their reasons, and their counts.

Counts are by tier and model. From the hundredth model on all are counted together: clients must not be able to make
the memory of the agent, or of the metrics' collector, grow by asking for more models.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from msgspec.structs import asdict

from cache_agent.wire.message import TEXT_LIMIT
from cache_agent.wire.operations import EventRecord
from cache_agent.wire.requests import HandoffOutcome, HandoffRecord

log = logging.getLogger("glowplug.events")

OTHERS = "(others)"
ERROR_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)  # of |predicted − took| / took
_KEPT = 1000
_MODELS = 100
_HANDED = 64
_REPORTED = 1024  # hand-offs that a repeated report is recognised by: more than one report has


@dataclass(slots=True)
class Counts:
    """Counts since the agent's start; keys are (model, tier) where nothing else is said."""

    leases: Counter[tuple[str, str]] = field(default_factory=Counter)  # by where the bytes came from
    loads: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    evictions: Counter[tuple[str, str]] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)  # by code
    predicted: dict[str, float] = field(default_factory=dict)  # tier -> seconds, of loads that were predicted
    took: dict[str, float] = field(default_factory=dict)
    errors: dict[str, list[int]] = field(default_factory=dict)  # tier -> by ERROR_BUCKETS, and one for beyond
    error_sum: dict[str, float] = field(default_factory=dict)
    handoffs: Counter[tuple[str, str]] = field(default_factory=Counter)  # by outcome, and how
    handed_tokens: Counter[str] = field(default_factory=Counter)  # by function, of requests that moved
    handed_pause: dict[str, float] = field(default_factory=dict)  # seconds, by how


class Journal:
    """The ring and the counts. Any thread; only `wait` blocks."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` is the time of day, for people."""
        self._clock = clock
        self._changed = threading.Condition()
        self._ring: deque[EventRecord] = deque(maxlen=_KEPT)
        self._number = 0
        self._labels: set[str] = set()
        self._counts = Counts()
        self._handed: deque[HandoffRecord] = deque(maxlen=_HANDED)
        self._ending = False
        self._reported: deque[HandoffOutcome] = deque(maxlen=_REPORTED)

    # --- recording ------------------------------------------------------------------------------------------------

    def record(self, kind: str, model: str, text: str, *, level: int = logging.INFO) -> None:
        """Record an event, in the ring and in the log."""
        log.log(level, "%s", text, extra={"fields": {"event": kind}})
        with self._changed:
            self._number += 1
            self._ring.append(EventRecord(self._number, self._clock(), kind, model[:2048], text[:TEXT_LIMIT]))
            self._changed.notify_all()

    def leased(self, model: str, tier: str) -> None:
        """Count a lease whose weights are complete; `tier` is where they came from."""
        with self._changed:
            self._counts.leases[self._label(model), tier] += 1

    def loaded(
        self, model: str, tier: str, size: int, seconds: float, expected: float, *, guess: bool, page: int
    ) -> None:
        """Record a load of `size` bytes; `expected` seconds were estimated, `guess` without an earlier load."""
        with self._changed:
            key = self._label(model), tier
            counts = self._counts
            counts.loads[key] += 1
            counts.bytes[key] += size
            counts.seconds[key] = counts.seconds.get(key, 0.0) + seconds
            if not guess:
                error = abs(expected - seconds) / max(seconds, 1e-6)
                counts.predicted[tier] = counts.predicted.get(tier, 0.0) + expected
                counts.took[tier] = counts.took.get(tier, 0.0) + seconds
                counts.error_sum[tier] = counts.error_sum.get(tier, 0.0) + error
                buckets = counts.errors.setdefault(tier, [0] * (len(ERROR_BUCKETS) + 1))
                buckets[sum(error > bound for bound in ERROR_BUCKETS)] += 1
        self.record(
            "loaded",
            model,
            f"loaded {model} from {tier}: {size // 10**6} MB in {seconds:.2f} s ({expected:.2f} expected), "
            f"pages of {page >> 10} KiB",
        )

    def failed(self, model: str, tier: str, why: str) -> None:
        with self._changed:
            self._counts.failures[self._label(model), tier] += 1
        self.record("failed", model, f"loading {model} failed: {why}", level=logging.WARNING)

    def evicted(self, model: str, tier: str, size: int, why: str) -> None:
        with self._changed:
            self._counts.evictions[self._label(model), tier] += 1
        where = "" if tier == "dram" else f" from {tier.upper()}"
        self.record("evicted", model, f"evicted {model} ({size // 10**6} MB){where}: {why}")

    def refused(self, model: str, code: str, text: str) -> None:
        with self._changed:
            self._counts.refusals[code] += 1
        self.record("refused", model, f"refused {model}: {text} [{code}]")

    def handed(self, node: str, items: Sequence[HandoffOutcome]) -> None:
        """Record requests that a worker of this node has handed over, or tried to.

        A worker that got no answer in time reports again: known items are passed over.
        """
        for item in items:
            with self._changed:
                if item in self._reported:
                    continue
                self._reported.append(item)
                function = self._label(item.function)
                counts = self._counts
                counts.handoffs[item.outcome, item.how] += 1
                if item.outcome == "moved":
                    counts.handed_tokens[function] += item.tokens
                    counts.handed_pause[item.how] = counts.handed_pause.get(item.how, 0.0) + item.pause
                self._handed.append(HandoffRecord(**asdict(item), time=self._clock(), node=node))
            why = f": {item.reason}" if item.reason else ""
            self.record(
                "handoff",
                item.function,
                f"{item.id}: {item.outcome} from {item.source} to {item.destination} after {item.tokens} tokens "
                f"({item.how}, {item.pause * 1e3:.0f} ms){why}",
            )

    # --- reading --------------------------------------------------------------------------------------------------

    def since(self, number: int = 0, limit: int = _KEPT) -> list[EventRecord]:
        """Return the last `limit` of the events after the one with this number."""
        with self._changed:
            return [event for event in self._ring if event.number > number][-limit:]

    def wait(self, number: int, seconds: float) -> list[EventRecord]:
        """Return as `since` does, once there is an event, after `seconds`, or at once when the agent ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._ending or self._number > number, seconds)
        return self.since(number)

    def handoffs(self) -> list[HandoffRecord]:
        """Return the last hand-offs, the newest first."""
        with self._changed:
            return list(reversed(self._handed))

    def end(self) -> None:
        """Make `wait` return at once from here on: the agent ends."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def counts(self) -> Counts:
        """Return a copy of the counts."""
        with self._changed:
            return deepcopy(self._counts)

    def labels(self, models: Iterable[str]) -> list[str]:
        """Return the label under which each model is counted."""
        with self._changed:
            return [self._label(model) for model in models]

    def _label(self, model: str) -> str:
        if model in self._labels:
            return model
        if len(self._labels) >= _MODELS:
            return OTHERS
        self._labels.add(model)
        return model
