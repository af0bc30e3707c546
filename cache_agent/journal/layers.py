"""Owns what the supervisors of this node's functions last told of their layers, as far as they still live."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

from cache_agent.policy import keepalive
from cache_agent.wire.layers import FunctionLayers, Layer, LayerStatus, LayersTold

KEPT = 256  # supervisors
SILENT_SECONDS = 100.0  # after which one is taken to have ended; each speaks every thirty


class _Word(NamedTuple):
    told: LayersTold
    at: float


class Layers:
    """Every method may be called from any thread. `clock` is CLOCK_MONOTONIC, which the functions of a node share."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._words: OrderedDict[str, _Word] = OrderedDict()

    def tell(self, told: LayersTold) -> None:
        with self._lock:
            self._words.pop(told.id, None)
            if told.layers:
                self._words[told.id] = _Word(told, self._clock())
            if len(self._words) > KEPT:
                self._words.popitem(last=False)

    def status(self) -> list[FunctionLayers]:
        """By the functions' names."""
        now = self._clock()
        with self._lock:
            words = [word.told for word in self._words.values() if now - word.at <= SILENT_SECONDS]
        return [
            FunctionLayers(
                told.function, told.mode, told.price, [_status(layer, told.price, now) for layer in told.layers]
            )
            for told in sorted(words, key=lambda told: (told.function, told.id))
        ]


def _status(layer: Layer, price: float, now: float) -> LayerStatus:
    kept = keepalive.LayerCost(layer.level, layer.seconds, layer.bytes)
    worth = keepalive.beta(kept, price)
    idle = None if layer.since is None else max(0.0, now - layer.since)
    left = None
    if idle is not None and layer.state == "idle" and layer.hold is not None:
        left = keepalive.HoldDecision(kept, price, layer.hold).changes_in(idle)
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
