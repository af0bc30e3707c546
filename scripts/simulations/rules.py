"""Keep-alive rules: those of papers, after their text or code, and the shipped one, all with one interface."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Sequence

from cache_agent.policy import eviction, keepalive
from cache_agent.policy.keepalive import History, LayerCost
from simulations.functions import Call, Function
from simulations.worlds import Hold, Rule


def pooled(stack: Sequence[LayerCost]) -> LayerCost:
    """Return the first layer of `stack` with the price of all the layers that it keeps alive.

    `stack` is a layer and the layers below that nothing else needs, the nearest first; keeping the first keeps all of
    them. Where a layer below costs more memory for the seconds that it saves, it alone would go sooner; so both count
    as one layer, and the first is kept as long as the dearest such part of the stack is worth its memory.
    """
    seconds, size = 0.0, 0
    best = stack[0]
    for layer in stack:
        seconds, size = seconds + layer.seconds, size + layer.bytes
        if seconds * best.bytes < best.seconds * size:
            best = LayerCost(best.name, seconds, size)
    return best


class Priced(Rule):
    """The shipped rule, `cache_agent.policy.keepalive`."""

    def __init__(self, rho: float) -> None:
        self._rho = rho
        self._histories: dict[str, History] = defaultdict(History)

    def reach(self, layer: LayerCost, now: float) -> None:
        self._histories[layer.name].used(now)

    def idle(self, layer: LayerCost, below: Sequence[LayerCost], alone: int, now: float) -> Hold:
        history = self._histories[layer.name]
        history.idle(now)
        return Hold(keepalive.keep(pooled([layer, *below[:alone]]), history.gaps, self._rho).hold)


class RainbowCake(Rule):
    """min(IAT_p, β) for each layer (Yu et al., "RainbowCake", ASPLOS 2024).

    IAT_p is the 0.8 quantile of an exponential distribution whose mean is taken from the last six arrivals at that
    layer, for any function; β = α·t / ((1 − α)·m) with α = 0.996, for t seconds and m MB of that layer. The published
    code differs from that, and does so here with `code`: m is what the whole container takes at that layer, both times
    are rounded up to seconds, and IAT_p is at least a minute before the comparison with β.
    """

    ALPHA, QUANTILE, LENGTH, FLOOR, LONGEST = 0.996, 0.8, 6, 60.0, 600.0

    def __init__(self, rho: float | None = None, *, code: bool = False) -> None:
        """With `rho`, α follows from that exchange rate."""
        self._rho = self.ALPHA / (1 - self.ALPHA) / 1e3 if rho is None else rho  # GB·s instead of MB·s
        self._code = code
        self._arrivals: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=self.LENGTH))

    def arrive(self, function: Function, now: float) -> None:
        for layer in function.layers:
            self._arrivals[layer.name].append(now)

    def idle(self, layer: LayerCost, below: Sequence[LayerCost], alone: int, now: float) -> Hold:  # noqa: ARG002
        arrivals = self._arrivals[layer.name]
        mean = (now - arrivals[0]) / len(arrivals)
        expected = -math.log(1 - self.QUANTILE) * mean if mean > 0 else self.LONGEST
        if not self._code:
            return Hold(min(expected, keepalive.beta(layer, self._rho)))
        size = layer.bytes + sum(other.bytes for other in below)
        beta = math.ceil(keepalive.beta(layer._replace(bytes=size), self._rho))
        return Hold(min(max(math.ceil(expected), self.FLOOR), beta))


class Fixed(Rule):
    """OpenWhisk's rule: whole containers are kept for ten minutes."""

    def __init__(self, seconds: float = 600.0) -> None:
        self._seconds = seconds

    def idle(self, layer: LayerCost, below: Sequence[LayerCost], alone: int, now: float) -> Hold:  # noqa: ARG002
        return Hold(self._seconds if layer.name.startswith("user") else 0.0)


class Seuss(Rule):
    """Keep layers without users' code for ten minutes (Cadden et al., EuroSys 2020, as run by RainbowCake)."""

    def idle(self, layer: LayerCost, below: Sequence[LayerCost], alone: int, now: float) -> Hold:  # noqa: ARG002
        return Hold(0.0 if layer.name == "bare" or layer.name.startswith("user") else 600.0)


class Pagurus(Fixed):
    """Repack idle containers to serve other functions (Li et al., ATC 2022), simplified.

    Each container carries the packages of its language's three largest other functions; a function that adopts the
    container needs a tenth of the time of its own layer.
    """

    adopts = True


class Histogram(Rule):
    """The hybrid histogram policy (Shahrad et al., ATC 2020), by application, which is a function here.

    Idle times are in bins of a minute up to four hours; unload until the 5th percentile, keep until the 99th, 10 % of
    margin; where the histogram is not decisive (its bins' coefficient of variation below 2, or too many idle times
    beyond its range) keep for its whole range. Its ARIMA for rare functions is left out: here all calls are frequent.
    """

    BINS, MARGIN, REPRESENTATIVE, BEYOND = 240, 0.1, 2.0, 0.5

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._bins: dict[str, list[int]] = defaultdict(lambda: [0] * self.BINS)
        self._beyond: dict[str, int] = defaultdict(int)

    def reach(self, layer: LayerCost, now: float) -> None:
        since = self._since.pop(layer.name, None)
        if since is None or not layer.name.startswith("user"):
            return
        minute = int((now - since) / 60)
        if minute < self.BINS:
            self._bins[layer.name][minute] += 1
        else:
            self._beyond[layer.name] += 1

    def idle(self, layer: LayerCost, below: Sequence[LayerCost], alone: int, now: float) -> Hold:  # noqa: ARG002
        if not layer.name.startswith("user"):
            return Hold(0.0)
        self._since[layer.name] = now
        bins, beyond = self._bins[layer.name], self._beyond[layer.name]
        seen = sum(bins)
        if not seen or beyond > self.BEYOND * (seen + beyond) or self._variation(bins, seen) < self.REPRESENTATIVE:
            return Hold(60.0 * self.BINS)
        first, last = self._percentile(bins, 0.05 * seen), self._percentile(bins, 0.99 * seen) + 1
        unload, keep = 60.0 * first * (1 - self.MARGIN), 60.0 * last * (1 + self.MARGIN)
        return Hold(keep) if first == 0 else Hold(0.0, unload, keep)

    def _variation(self, bins: Sequence[int], seen: int) -> float:
        mean = seen / len(bins)
        return math.sqrt(sum((each - mean) ** 2 for each in bins) / len(bins)) / mean

    def _percentile(self, bins: Sequence[int], rank: float) -> int:
        passed = 0
        for minute, each in enumerate(bins):
            passed += each
            if passed >= rank and each:
                return minute
        return len(bins) - 1


class FaasCache(Rule):
    """Keep whole containers until memory is short, then GreedyDual-Size-Frequency (Fuerst and Sharma, ASPLOS 2021)."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self._clock = 0.0
        self._uses: dict[str, int] = defaultdict(int)

    def arrive(self, function: Function, now: float) -> None:  # noqa: ARG002
        self._uses[function.name] += 1

    def idle(self, layer: LayerCost, below: Sequence[LayerCost], alone: int, now: float) -> Hold:  # noqa: ARG002
        return Hold(math.inf if layer.name.startswith("user") else 0.0)

    def worth(self, function: Function, size: int) -> float:
        seconds = sum(layer.seconds for layer in function.layers)
        return eviction.priority(self._clock, self._uses[function.name], seconds, size)

    def evicted(self, worth: float) -> None:
        self._clock = max(self._clock, worth)


class Clairvoyant(Rule):
    """Keep a layer until its next call, which it knows, where that is cheaper than building the layer again."""

    def __init__(self, rho: float, functions: Sequence[Function], calls: Sequence[Call]) -> None:
        self._rho = rho
        self._calls: dict[str, list[float]] = defaultdict(list)
        for call in calls:
            for layer in functions[call.function].layers:
                self._calls[layer.name].append(call.at)

    def idle(self, layer: LayerCost, below: Sequence[LayerCost], alone: int, now: float) -> Hold:
        calls = self._calls[layer.name]
        following = bisect_right(calls, now)
        gap = calls[following] - now if following < len(calls) else math.inf
        worth = keepalive.beta(pooled([layer, *below[:alone]]), self._rho)
        return Hold(gap + 1e-6 if gap < worth else 0.0)
