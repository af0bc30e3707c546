"""Owns the model layers of a pool: which there are, for whom they are built, and on whose lease.

A model is leased only once a worker that has it has run for two seconds; its layer is forked from `lang`, on a lease of
the pool's own. What it costs while it is idle are its own pages and the weights, which the agent cannot give up before
the lease ends. Spares stand on it, and go with it.

For the pool's thread only; nothing here waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from cache_agent.policy import keepalive
from runtime.config import FunctionConfig
from runtime.zygote import layers, leasing, published, spawn
from runtime.zygote.building import Event, ModelLayer
from runtime.zygote.rule import LayerRule
from runtime.zygote.spawn import Zygote

_SETTLED = 2.0  # seconds for which a worker has to live, so that its function may have the model
_ROOM = 150 << 20  # bytes that a layer may take of its own
_KNOWN = 256  # models whose requests are remembered
_GUESSED = keepalive.Layer("model", 0.2, 100 << 20)


class PooledModel(ModelLayer):
    """One model's layer, and who runs with the model."""

    def __init__(self, uri: str, rule: LayerRule, say: Callable[[str], None]) -> None:
        super().__init__(f"the model layer of {uri}", uri, rule, say, _ROOM)
        self.workers = 0  # that stand on this model, whatever they were forked from
        self.run_since: float | None = None  # the oldest of them
        self.trusted = False  # one of them has lived, so that the agent has lent the model to it

    def _held(self, size: int) -> int:
        return size + (0 if self.lease is None else self.lease.manifest.nbytes)


class Models:
    """`most` layers at the same time; `made_of` is what the pool's lang layer is."""

    def __init__(
        self,
        config: FunctionConfig,
        agent: str,
        made_of: layers.Needs,
        most: int,
        number: Callable[[], int],
        say: Callable[[str], None],
    ) -> None:
        self._config, self._made_of, self._most, self._number, self._say = config, made_of, most, number, say
        self.leases = leasing.LayerLeases(config, lambda: agent, "pool")
        self._hold = config.holds.get("model")
        self._layers: dict[str, PooledModel] = {}

    # --- what the pool tells --------------------------------------------------------------------------------------

    def asked(self, uri: str, now: float) -> None:
        """A container wants a worker with this model."""
        if uri:
            self._known(uri).rule.used(now)

    def refused(self, uri: str, now: float) -> None:
        """It got none."""
        if uri and not self._known(uri).workers:
            self._known(uri).rule.idle(now)

    def began(self, uri: str, now: float) -> None:
        """A worker with this model serves; every `began` has its `ended`."""
        if uri:
            layer = self._known(uri)
            layer.workers += 1
            layer.run_since = now if layer.run_since is None else layer.run_since

    def ended(self, uri: str, now: float) -> None:
        if uri:
            layer = self._known(uri)
            layer.workers -= 1
            if not layer.workers:
                layer.run_since = None
                layer.rule.idle(now)

    def takes(self, event: spawn.Event, now: float) -> bool:
        """Whether what the lang layer says is about a layer that is forked from it."""
        return any(layer.takes(event, now) for layer in self._layers.values())

    # --- what the pool asks ---------------------------------------------------------------------------------------

    def deepest(self, uri: str) -> tuple[PooledModel | None, str]:
        """The layer from which a worker with this model is forked, None if from lang; and why it is no deeper one."""
        if not uri:
            return None, ""
        wanted = replace(self._made_of, model=uri)
        there: list[tuple[str, layers.Level, layers.Needs]] = [("", "lang", self._made_of)]
        layer = self._layers.get(uri)
        if layer is not None and layer.ready:
            there.append((uri, "model", wanted))
        found = layers.deepest(wanted, there)
        return (layer, "") if found.level == "model" else (None, found.why)

    def fds(self) -> list[int]:
        return [self.leases.fileno(), *(fd for layer in self._layers.values() for fd in layer.fds())]

    def step(self, now: float, lang: Zygote | None) -> list[Event]:
        """Builds and drops what is due; what zygotes say about workers. `lang` is there if it can be forked from."""
        events: list[Event] = []
        for layer in list(self._layers.values()):
            layer.trusted |= layer.run_since is not None and now - layer.run_since >= _SETTLED
            events += layer.hear(now)
            if layer.zygote is not None and not layer.rule.wanted(now):
                layer.drop(layer.rule.why)
            elif lang is not None and self._due(layer, now):
                layer.ask(self.leases)
        for uri, found in self.leases.take():
            self._layers[uri].fork(found, lang, self._number(), now)
        return events

    def report(self) -> Iterator[dict[str, Any]]:
        """For people; see published.py."""
        for layer in self._layers.values():
            yield published.entry("model", layer.presence, layer.rule, layer.uri)

    def close(self) -> None:
        for layer in self._layers.values():
            layer.end()

    def _known(self, uri: str) -> PooledModel:
        if uri not in self._layers:
            if len(self._layers) >= _KNOWN:
                idle = [each for each in self._layers.values() if each.presence == "absent" and not each.workers]
                for each in idle[:1]:  # the one that became known first
                    del self._layers[each.uri]
            self._layers[uri] = PooledModel(uri, LayerRule(_GUESSED, self._config.start_price, self._hold), self._say)
        return self._layers[uri]

    def _due(self, layer: PooledModel, now: float) -> bool:
        """Whether it is to be built. The pool asks for no model that the agent may have refused to who wants it."""
        if layer.presence != "absent" or not layer.trusted:
            return False
        if not layer.rule.retry.due(now) or not layer.rule.wanted(now):
            return False
        return sum(each.presence != "absent" for each in self._layers.values()) < self._most
