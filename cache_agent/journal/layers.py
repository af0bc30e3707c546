"""Owns the last report of each supervisor on this node about its function's layers, while the supervisor lives."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

from cache_agent.policy import keepalive
from cache_agent.wire.layers import FunctionLayers, Layer, LayersReport, LayerStatus

KEPT = 256  # supervisors
SILENT_SECONDS = 100.0  # after which a supervisor counts as ended; each reports every thirty


class _Report(NamedTuple):
    content: LayersReport
    at: float


class Layers:
    """The layers of this node's functions. Any thread. `clock` is CLOCK_MONOTONIC, which the functions share."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._reports: OrderedDict[str, _Report] = OrderedDict()  # by supervisor

    def add(self, report: LayersReport) -> None:
        """Replace the supervisor's former report; one without layers says that the supervisor ends."""
        with self._lock:
            self._reports.pop(report.id, None)
            if report.layers:
                self._reports[report.id] = _Report(report, self._clock())
            if len(self._reports) > KEPT:
                self._reports.popitem(last=False)

    def status(self) -> list[FunctionLayers]:
        """The layers of each function, ordered by the functions' names."""
        now = self._clock()
        with self._lock:
            reports = [report.content for report in self._reports.values() if now - report.at <= SILENT_SECONDS]
        reports.sort(key=lambda report: (report.function, report.id))
        return [
            FunctionLayers(r.function, r.mode, r.price, [_status(layer, r.price, now) for layer in r.layers])
            for r in reports
        ]


def _status(layer: Layer, price: float, now: float) -> LayerStatus:
    cost = keepalive.LayerCost(layer.level, layer.seconds, layer.bytes)
    worth = keepalive.beta(cost, price)
    idle = None if layer.since is None else max(0.0, now - layer.since)
    left = None
    if idle is not None and layer.state == "idle" and layer.hold is not None:
        left = keepalive.HoldDecision(cost, price, layer.hold).changes_in(idle)
    return LayerStatus(
        level=layer.level,
        state=layer.state,
        model=layer.model,
        bytes=layer.bytes,
        build_seconds=layer.seconds,
        worth_seconds=_finite(worth),
        idle_seconds=idle,
        left_seconds=_finite(left),
        why=layer.why,
    )


def _finite(seconds: float | None) -> float | None:
    return seconds if seconds is not None and math.isfinite(seconds) else None
