"""The one rule of a warm layer: its costs, its use, how long it is held, when it is built again. Pure.

    rule = LayerRule(LayerCost("lang", 2.0, 250 << 20), rho=60.0)
    rule.measured(seconds=1.8, size=240 << 20)      # building and holding the layer cost so much
    rule.idle(now)                                  # nothing uses the layer any more
    rule.wanted(now)                                # until holding it longer costs more than building it again
    rule.used(now)                                  # a request reaches the layer, whether it is there or was dropped

A layer is held by price (cache_agent/policy/keepalive.py), or for a fixed time. Times: seconds of the caller's clock.
"""

from __future__ import annotations

import math
from typing import Literal

from cache_agent.policy import keepalive

Presence = Literal["absent", "building", "there"]

_RETRY, _RETRY_MOST = 30.0, 3600.0  # seconds after which a layer that could not be built is tried again


class Backoff:
    """Pauses between attempts: `first` seconds after a failure, twice as long after each further one, up to `most`."""

    def __init__(self, first: float, most: float) -> None:
        self._first, self._most = first, most
        self._pause = first
        self._until = -math.inf

    def failed(self, now: float) -> float:
        """Note a failed attempt; return the seconds until the next one."""
        pause, self._pause = self._pause, min(self._most, 2 * self._pause)
        self._until = now + pause
        return pause

    def worked(self) -> None:
        self._pause = self._first

    def due(self, now: float) -> bool:
        """Return whether there may be another attempt."""
        return now >= self._until


class LayerRule(keepalive.History):
    """The rule of one layer. One caller at a time."""

    def __init__(
        self,
        guessed: keepalive.LayerCost,
        rho: float,
        hold: float | None = None,
        retry: tuple[float, float] = (_RETRY, _RETRY_MOST),
    ) -> None:
        """`guessed` are the costs until they are measured; the layer is held for `hold` seconds, by price if None.

        `rho` is the price of a second of start, in GB·s of idle memory; `retry` are the pauses of a `Backoff`.
        """
        super().__init__()
        self.retry = Backoff(*retry)
        self._cost, self._rho, self._hold = guessed, rho, hold
        self._decision: keepalive.HoldDecision | None = None  # until a cost or an idle time is added

    def measured(self, *, seconds: float | None = None, size: int | None = None) -> None:
        """Note what building the layer took, and how many bytes would be free if it went."""
        known = self._cost
        cost = known._replace(
            seconds=known.seconds if seconds is None else seconds, bytes=known.bytes if size is None else size
        )
        if cost != known:
            self._cost, self._decision = cost, None

    def used(self, now: float) -> None:
        super().used(now)
        self._decision = None

    @property
    def decision(self) -> keepalive.HoldDecision:
        """The decision for how long the idle layer is held. Raises `ValueError` for a negative price."""
        if self._decision is None:
            if self._hold is None:
                self._decision = keepalive.keep(self._cost, self.gaps, self._rho)
            else:
                self._decision = keepalive.HoldDecision(self._cost, self._rho, self._hold)
        return self._decision

    @property
    def pays(self) -> bool:
        """Whether the layer is held at all once it is idle."""
        return self.decision.hold > 0

    def wanted(self, now: float) -> bool:
        """Return whether the layer is worth its memory; while it is in use, whether it will be afterwards."""
        age = self.age(now)
        return self.pays if age is None else self.decision.wanted(age)

    def expired(self, now: float) -> bool:
        """Return whether the layer is idle, and has been for longer than it is worth."""
        return self.since is not None and not self.wanted(now)

    def changes_in(self, now: float) -> float:
        """Return the seconds until the layer has `expired`; infinite if that is not to be foreseen."""
        age = self.age(now)
        return math.inf if age is None else self.decision.changes_in(age)

    @property
    def why(self) -> str:
        """The reason for which the layer is held or dropped, in words."""
        if self._hold is None:
            return self.decision.why
        return f"held for {self._hold:g} s" if math.isfinite(self._hold) else "held without end"
