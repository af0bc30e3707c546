"""Owns the model layers of a pool, each forked from `lang` on a lease of the pool's own.

A model is leased only once a worker with that model has run for two seconds. An idle layer costs its own pages and the
weights, which the agent cannot give up before the lease ends. Spares are forked from the layer, and go with it.

For the pool's thread only; nothing here waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from cache_agent.policy import keepalive
from runtime.config import FunctionConfig
from runtime.layers import building, keys, leases, published
from runtime.layers.building import ZygoteLayer
from runtime.layers.rule import LayerRule
from runtime.layers.spawn import ChildEvent

_SETTLED = 2.0  # seconds after which a worker shows by being alive that its function may have the model
_ROOM = 150 << 20  # bytes that a layer may take of its own
_KNOWN = 256  # models whose requests are remembered
_GUESSED = keepalive.LayerCost("model", 0.2, 100 << 20)


class PooledModel(ZygoteLayer):
    """One model's layer, and the number of workers that run with the model."""

    def __init__(self, uri: str, rule: LayerRule, say: Callable[[str], None]) -> None:
        super().__init__(f"the model layer of {uri}", rule, say, uri=uri, room=_ROOM)
        self.workers = 0  # with this model, whatever they were forked from
        self.run_since: float | None = None  # the start of the oldest worker
        self.trusted = False  # whether a worker has shown by being alive that the agent lends the model

    def freed(self, size: int) -> int:
        return size + (0 if self.lease is None else self.lease.manifest.nbytes)


class Models:
    """The layers on top of a pool's `lang`."""

    def __init__(
        self,
        config: FunctionConfig,
        agent: str,
        made_of: keys.Needs,
        lang: ZygoteLayer,
        most: int,
        say: Callable[[str], None],
    ) -> None:
        """`made_of` are the needs that `lang` meets; `most` is how many models there may be at the same time."""
        self._config, self._most, self._say = config, most, say
        self.lang, self.made_of = lang, made_of
        self.number = itertools.count(1).__next__  # the next request to fork has this number
        self.leases = leases.LayerLeases(config, lambda: agent, "pool")
        self._hold = config.holds.get("model")
        self._layers: dict[str, PooledModel] = {}

    # --- told by the pool -----------------------------------------------------------------------------------------

    def asked(self, uri: str, now: float) -> None:
        """Note that a container wants a worker with this model."""
        if uri:
            self._known(uri).rule.used(now)

    def refused(self, uri: str, now: float) -> None:
        """Note that the container got none."""
        if uri and not self._known(uri).workers:
            self._known(uri).rule.idle(now)

    def began(self, uri: str, now: float) -> None:
        """Note that a worker with this model serves; every `began` has its `ended`."""
        if uri:
            layer = self._known(uri)
            layer.workers += 1
            layer.run_since = now if layer.run_since is None else layer.run_since

    def ended(self, uri: str, now: float) -> None:
        """Note that a worker with this model has ended."""
        if uri:
            layer = self._known(uri)
            layer.workers -= 1
            if not layer.workers:
                layer.run_since = None
                layer.rule.idle(now)

    # --- asked by the pool ----------------------------------------------------------------------------------------

    def deepest(self, uri: str) -> tuple[ZygoteLayer | None, str]:
        """Return the layer that a worker with this model is forked from, if there is one, and why no deeper one."""
        if not self.lang.ready:
            return None, "no zygote of the pool is ready"
        if not uri:
            return self.lang, ""
        return building.deepest(self.made_of, uri, self.lang, self._layers.get(uri))

    def fds(self) -> list[int]:
        return [self.leases.fileno(), *(fd for layer in (self.lang, *self._layers.values()) for fd in layer.fds())]

    def step(self, now: float) -> list[ChildEvent]:
        """Build and drop what is due; return what zygotes say of workers and spares."""
        models = list(self._layers.values())
        events = [each for each in self.lang.hear(now) if not any(layer.takes(each, now) for layer in models)]
        for layer in models:
            layer.trusted |= layer.run_since is not None and now - layer.run_since >= _SETTLED
            events += layer.hear(now)
            if not layer.rule.wanted(now):
                layer.drop(layer.rule.why)
            elif self.lang.ready and self._due(layer, now):
                layer.ask(self.leases)
        for uri, found in self.leases.take():
            self._layers[uri].fork(found, self.lang, self.number(), now)
        return events

    def report(self) -> Iterator[dict[str, Any]]:
        """Yield the layers as published.py draws them."""
        for layer in self._layers.values():
            yield published.entry("model", layer.presence, layer.rule, layer.uri)

    def close(self) -> None:
        for layer in (*self._layers.values(), self.lang):
            layer.end()

    def _known(self, uri: str) -> PooledModel:
        if uri not in self._layers:
            if len(self._layers) >= _KNOWN:
                idle = [each for each in self._layers.values() if each.presence == "absent" and not each.workers]
                for each in idle[:1]:  # the layer that became known first
                    del self._layers[each.uri]
            self._layers[uri] = PooledModel(uri, LayerRule(_GUESSED, self._config.start_price, self._hold), self._say)
        return self._layers[uri]

    def _due(self, layer: PooledModel, now: float) -> bool:
        """Return whether to build the layer. A model that the agent may have refused to its functions is not built."""
        if layer.presence != "absent" or not layer.trusted or not layer.rule.retry.due(now):
            return False
        return sum(each.presence != "absent" for each in self._layers.values()) < self._most
