"""The estimate of how long a model will take to be ready, from the loads before. Pure.

    seconds = (bytes + Σ min(bytes, rest of each load under way on that tier)) / rate
    rate    = bytes of past loads / their seconds, both decayed: large loads count for more, old ones fade
    error   = decayed mean of |predicted − took| / took

The formula is the time of a load when all loads share the tier's rate fairly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

_DECAY = 0.7
_PRIOR = {"ssd": 1e9, "peer": 4e8, "origin": 2e8}  # bytes/s before the first load; such an estimate has confidence 0


class Estimate(NamedTuple):
    """The expected `seconds` of a load from `tier`; `confidence` from 0 (a guess) to 1 (the bytes are there)."""

    seconds: float
    tier: str
    confidence: float


@dataclass(slots=True)
class Measured:
    """The measurements of one tier; `predicted` and `took` are of the last load, in seconds."""

    loads: int = 0
    error: float = 0.0
    predicted: float = 0.0
    took: float = 0.0
    _bytes: float = 0.0
    _seconds: float = 0.0

    @property
    def rate(self) -> float:
        """The tier's speed in bytes per second; 0 before the first load."""
        return self._bytes / self._seconds if self._seconds else 0.0


class Estimator:
    """The measurements of one node. One caller at a time."""

    def __init__(self) -> None:
        self.tiers: dict[str, Measured] = {}

    def predict(self, tier: str, work: int) -> Estimate:
        """Return the estimate for `work` bytes from a tier; `shared` says how many bytes those are."""
        known = self.tiers.get(tier)
        if known is None or not known.rate:
            return Estimate(work / _PRIOR.get(tier, _PRIOR["origin"]), tier, 0.0)
        return Estimate(work / known.rate, tier, known.loads / (known.loads + 1) / (1 + known.error))

    def learn(self, tier: str, work: int, predicted: Estimate, took: float) -> None:
        """Record that a load of `work` bytes took `took` seconds; a guess (confidence 0) counts for no error."""
        known = self.tiers.setdefault(tier, Measured())
        took = max(took, 1e-6)
        if predicted.confidence > 0:
            error = abs(predicted.seconds - took) / took
            first = known.loads <= 1
            known.error = error if first else _DECAY * known.error + (1 - _DECAY) * error
        known.predicted, known.took = predicted.seconds, took
        known.loads += 1
        known._bytes = _DECAY * known._bytes + work
        known._seconds = _DECAY * known._seconds + took


def shared(size: int, rests: Iterable[int]) -> int:
    """Return the bytes that a tier moves before a load of `size` bytes ends, beside loads that have `rests` left."""
    return size + sum(min(size, rest) for rest in rests)
