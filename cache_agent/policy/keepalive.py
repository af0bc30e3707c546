"""The time for which an idle layer is held, by price. Pure.

Holding an idle layer costs memory, dropping the layer costs a start. One exchange rate makes the two comparable: ρ, the
GB·s of idle memory that a second of start is worth. A layer of m unique GB that takes t seconds to build can be held
for β = ρ·t/m seconds at the cost of one start. The best holding time T follows from the layer's last 64 gaps, which are
its times without use:

    T = argmin_T  Σ min(gap, T) / β + [gap > T]

Candidates for T are 0 and the gaps themselves, because between two gaps only the cost of holding grows; of equally good
ones the shortest is taken. Until eight gaps are known T = β, which never costs more than twice the best choice (Karlin
et al., "Competitive snoopy caching", Algorithmica 3, 1988): one long gap is no reason to give a layer up.

A gap begins when the last process that was forked from the layer is gone, because until then dropping the layer would
free nothing. A gap ends with the next request that the layer could serve, but not with one that finds a deeper layer.
`History` records the gaps, in seconds of the caller's clock. The layer's size is the memory that dropping it frees.

Example. torch and transformers, imported: 0.3 GB, 3 s. At ρ = 60 holding them for β = 600 s costs as much as importing
them again. If requests come every minute or two, and none at night, T is two minutes, and the layer is dropped for the
night. At ρ = 3 β is 30 s and T = 0: requests a minute apart pay for their imports.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

GB = 1e9
HISTORY = 64
_ENOUGH = 8  # gaps; fewer say less than the price alone


class LayerCost(NamedTuple):
    """The measured cost of a layer: `seconds` to build it on top of the layer below, `bytes` that dropping it frees."""

    name: str
    seconds: float
    bytes: int


class HoldDecision(NamedTuple):
    """The seconds for which a layer is held while idle (`hold`), and the history that this is based on.

    With this `hold`, `hits` of the `known` gaps would have ended with the layer still there, after `held` seconds of
    holding in all gaps together.
    """

    layer: LayerCost
    rho: float
    hold: float
    hits: int = 0
    known: int = 0
    held: float = 0.0

    def wanted(self, idle: float) -> bool:
        """Return whether the layer should be there after `idle` seconds without use."""
        return idle <= self.hold

    def changes_in(self, idle: float) -> float:
        """Return the seconds until `wanted` changes its answer, 0 if that is due now; infinite if it never does."""
        return self.hold - idle if self.hold >= idle else math.inf

    @property
    def why(self) -> str:
        """The reason for this decision, in one sentence."""
        size, price = f"{self.layer.bytes / GB:.3g} GB", f"{self.rho:g} GB·s a second"
        seconds = _span(self.layer.seconds)
        gaps = f"of its last {self.known} idle times {self.hits} were"
        if self.hold == math.inf:
            return "held: it takes no memory of its own"
        if beta(self.layer, self.rho) == 0:
            return "not held: " + (
                "building it takes no time" if self.rho else "memory has any price, starts have none"
            )
        if self.known < _ENOUGH:
            return (
                f"held for {_span(self.hold)}, little being known of its requests: so long {size} cost as much as a "
                f"start of {seconds} at {price}"
            )
        if self.hold == 0:
            return (
                f"not held: for its last {self.known} idle times {size} would have cost more than starts of {seconds} "
                f"at {price}"
            )
        return (
            f"held for {_span(self.hold)}: {gaps} no longer, and {size} for {_span(self.held)} cost less than "
            f"{self.hits} start{'s' if self.hits > 1 else ''} of {seconds} at {price}"
        )


class History:
    """The last gaps of a layer, and since when the layer is idle. One caller at a time.

        history.idle(now)          # nothing uses the layer any more
        history.used(now)          # a request reaches the layer, whether held or dropped before

    A call that repeats the one before does nothing. A clock that went back gives no gap.
    """

    def __init__(self, gaps: Iterable[float] = ()) -> None:
        self.gaps: deque[float] = deque(gaps, HISTORY)
        self.since: float | None = None  # when the layer became idle; None while it is in use

    def idle(self, now: float) -> None:
        if self.since is None:
            self.since = now

    def used(self, now: float) -> None:
        if self.since is not None and now >= self.since:
            self.gaps.append(now - self.since)
        self.since = None

    def age(self, now: float) -> float | None:
        """Return the seconds for which the layer has been idle; None while it is in use."""
        return None if self.since is None else max(0.0, now - self.since)


def beta(layer: LayerCost, rho: float) -> float:
    """Return the seconds for which holding a layer costs as much as building it once. Raises `ValueError`."""
    if not (rho >= 0 and layer.seconds >= 0 and layer.bytes >= 0):
        raise ValueError(f"a price cannot be negative: ρ is {rho}, the layer {layer}")
    worth = rho * layer.seconds
    if layer.bytes == 0:
        return math.inf if worth else 0.0
    return worth / (layer.bytes / GB)


def keep(layer: LayerCost, gaps: Iterable[float], rho: float) -> HoldDecision:
    """Return how long an idle layer is held at the exchange rate `rho` (GB·s per s).

    `gaps` are the gaps that ended, in seconds, in order; the last 64 count. Raises `ValueError` for a negative price.
    """
    limit = beta(layer, rho)
    known = sorted(gap for gap in deque(gaps, HISTORY) if 0.0 <= gap < math.inf)
    if limit in (0.0, math.inf) or len(known) < _ENOUGH:
        return HoldDecision(layer, rho, limit, known=len(known), hits=len(known), held=sum(known))
    # Costs are in seconds of holding; a start costs β seconds. `sums[k]` is the sum of the k shortest gaps.
    sums = [0.0, *accumulate(known)]
    count = len(known)
    costs = [
        total + after * (gap + limit) for total, gap, after in zip(sums[1:], known, range(count)[::-1], strict=True)
    ]
    best, index = limit * count, -1  # T = 0: every gap but those of no length ends in a start
    if (least := min(costs)) < best:
        index = costs.index(least)
    if index < 0:
        return HoldDecision(layer, rho, 0.0, known=count)
    held = sums[index + 1] + (count - 1 - index) * known[index]
    return HoldDecision(layer, rho, known[index], hits=index + 1, known=count, held=held)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
