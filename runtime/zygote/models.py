"""Owns the model layers of a pool: which there are, what each costs, how long it is held, and on whose lease.

    absent ──a worker of it has run for two seconds──▶ leasing ─▶ forking ─▶ building ─▶ ready ──price, loss──▶ absent

A layer is forked from `lang`, on a lease of the pool's own. What it costs while it is idle are its own pages and the
weights, which the agent cannot give up before the lease ends. Spares stand on it, and go with it.

For the pool's thread only; nothing here waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from cache_agent.limits import available_bytes
from cache_agent.policy import keepalive
from runtime.config import FunctionConfig
from runtime.zygote import layers, leasing, published, spawn
from runtime.zygote.spawn import Ended, Forked, Lost, Ready, Refused, Spec, Zygote
from runtime.zygote.wire import Gone, Wire

if TYPE_CHECKING:
    from cache_agent.lease import Lease

Event = Forked | Refused | Ended

_SETTLED = 2.0  # seconds for which a worker has to live, so that its function may have the model
_RETRY = 30.0  # seconds after which a layer that could not be built is tried again; doubles each time
_ROOM = 150 << 20  # bytes that a layer may take of its own
_KNOWN = 256  # models whose requests are remembered
_GUESSED = keepalive.Layer("model", 0.2, 100 << 20)


class ModelLayer:
    """One model: its zygote, if there is one, and how it was asked for."""

    def __init__(self, uri: str, needs: layers.Needs) -> None:
        self.uri, self.needs = uri, needs
        self.cost = _GUESSED
        self.history = keepalive.History()
        self.workers = 0  # that stand on this model, whatever they were forked from
        self.run_since: float | None = None  # the oldest of them
        self.trusted = False  # one of them has lived, so that the agent has lent the model to it
        self.state: Literal["absent", "leasing", "forking", "there"] = "absent"
        self.number = 0
        self.wire: Wire | None = None
        self.zygote: Zygote | None = None
        self.lease: Lease | None = None
        self.retry_at, self.pause = 0.0, _RETRY

    @property
    def ready(self) -> bool:
        return self.zygote is not None and self.zygote.state == "ready"


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
        self._leases = leasing.LayerLeases(config, lambda: agent, "pool")
        self._layers: dict[str, ModelLayer] = {}

    # --- what the pool tells --------------------------------------------------------------------------------------

    def asked(self, uri: str, now: float) -> None:
        """A container wants a worker with this model."""
        if uri:
            self._known(uri).history.used(now)

    def refused(self, uri: str, now: float) -> None:
        """It got none."""
        if uri and not self._known(uri).workers:
            self._known(uri).history.idle(now)

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
                layer.history.idle(now)

    def stale(self, layer: ModelLayer, now: float) -> None:
        """A worker found that the agent lends other bytes by now."""
        if layer.zygote is not None:
            self._say(f"the model layer of {layer.uri} is dropped: the agent has another revision")
            self._end(layer, now)

    # --- what the pool asks ---------------------------------------------------------------------------------------

    def deepest(self, uri: str) -> tuple[ModelLayer | None, str]:
        """The layer from which a worker with this model is forked, None if from lang; and why it is no deeper one."""
        if not uri:
            return None, ""
        wanted = replace(self._made_of, model=uri)
        there: list[tuple[str, layers.Level, layers.Needs]] = [("", "lang", self._made_of)]
        layer = self._layers.get(uri)
        if layer is not None and layer.ready:
            there.append((uri, "model", layer.needs))
        found = layers.deepest(wanted, there)
        return (layer, "") if found.level == "model" else (None, found.why)

    def fds(self) -> list[int]:
        found = [self._leases.fileno()]
        for layer in self._layers.values():
            if layer.zygote is not None and layer.zygote.state != "gone":
                found.append(layer.zygote.wire.fileno())
            if layer.lease is not None:
                found.append(layer.lease.fileno())
        return found

    def takes(self, event: Event, now: float) -> bool:
        """Whether what the lang layer says is about a layer that is forked from it."""
        for layer in self._layers.values():
            if layer.state == "forking" and isinstance(event, (Forked, Refused)) and event.number == layer.number:
                if isinstance(event, Refused):
                    self._postpone(layer, event.why, now)
                else:
                    assert layer.wire is not None, "it was asked for with its wire"
                    layer.zygote = Zygote(layer.wire, event.pid, event.pidfd, layer.uri)
                    layer.state, layer.wire = "there", None
                return True
        return False

    def step(self, now: float, lang: Zygote | None) -> list[Event]:
        """Builds and drops what is due; what zygotes say about workers. `lang` is there if it can be forked from."""
        events: list[Event] = []
        for layer in list(self._layers.values()):
            layer.trusted |= layer.run_since is not None and now - layer.run_since >= _SETTLED
            if layer.zygote is not None:
                events += self._hear(layer, now)
            if layer.lease is not None and (why := leasing.lost(layer.lease)):
                self._postpone(layer, why, now)
            if layer.zygote is not None and not self._wanted(layer, now):
                self._say(f"the model layer of {layer.uri} is dropped, {self._decide(layer).why}")
                self._end(layer, now)
            elif self._due(layer, now) and lang is not None:
                layer.state = "leasing"
                self._leases.ask(layer.uri)
        for uri, found in self._leases.take():
            self._leased(uri, found, lang, now)
        return events

    def report(self) -> Iterator[dict[str, Any]]:
        """For people; see published.py."""
        for layer in self._layers.values():
            state: published.State = "used" if layer.workers else "idle"
            if (layer.state == "there" and not layer.ready) or layer.state in ("leasing", "forking"):
                state = "building"
            elif layer.state == "absent":
                state = "absent"
            yield published.entry("model", state, layer.history.since, self._decide(layer), layer.uri)

    def close(self) -> None:
        for layer in self._layers.values():
            self._end(layer, 0.0)

    # --- building and dropping ------------------------------------------------------------------------------------

    def _known(self, uri: str) -> ModelLayer:
        if uri not in self._layers:
            if len(self._layers) >= _KNOWN:
                idle = [each for each in self._layers.values() if each.state == "absent" and not each.workers]
                for each in idle[:1]:  # the one that became known first
                    del self._layers[each.uri]
            self._layers[uri] = ModelLayer(uri, replace(self._made_of, model=uri))
        return self._layers[uri]

    def _decide(self, layer: ModelLayer) -> keepalive.Decision:
        if "model" in self._config.holds:
            return keepalive.Decision(layer.cost, self._config.start_price, self._config.holds["model"])
        return keepalive.keep(layer.cost, layer.history.gaps, self._config.start_price)

    def _wanted(self, layer: ModelLayer, now: float) -> bool:
        """Whether it should be there; while it is in use, whether it will be worth its price afterwards."""
        decision, age = self._decide(layer), layer.history.age(now)
        return decision.hold > 0 if age is None else decision.wanted(age)

    def _due(self, layer: ModelLayer, now: float) -> bool:
        """Whether it is to be built. The pool asks for no model that the agent may have refused to who wants it."""
        if layer.state != "absent" or not layer.trusted or now < layer.retry_at or not self._wanted(layer, now):
            return False
        return sum(each.state != "absent" for each in self._layers.values()) < self._most

    def _leased(self, uri: str, found: Lease | str, lang: Zygote | None, now: float) -> None:
        layer = self._layers.get(uri)
        if layer is None or layer.state != "leasing" or lang is None or isinstance(found, str):
            if not isinstance(found, str):
                found.close()
            if layer is not None and layer.state == "leasing":
                self._postpone(layer, found if isinstance(found, str) else "the layer below it is gone", now)
            return
        layer.lease = found
        if (room := available_bytes()) < _ROOM:
            self._postpone(layer, f"{room / 1e6:.0f} MB are free, it may take {_ROOM / 1e6:.0f}", now)
            return
        layer.number = self._number()
        held = spawn.Held(found.manifest_bytes, found.manifest_fd, found.segments)
        try:
            layer.wire = lang.fork_zygote(layer.number, Spec(key=uri), held)
            layer.state = "forking"
        except Gone:
            self._postpone(layer, "the layer below it is gone", now)

    def _hear(self, layer: ModelLayer, now: float) -> list[Event]:
        assert layer.zygote is not None, "it is heard"
        events: list[Event] = []
        for event in layer.zygote.read():
            match event:
                case Ready(_, _, seconds, size):
                    weights = 0 if layer.lease is None else layer.lease.manifest.nbytes
                    layer.cost, layer.pause = keepalive.Layer("model", seconds, size + weights), _RETRY
                    self._say(f"the model layer of {layer.uri} is ready: {seconds:.2f} s, {size / 1e6:.0f} MB")
                case Lost(why):
                    self._postpone(layer, f"its zygote was lost: {why}", now)
                case _:
                    events.append(event)
        if layer.zygote is not None and (why := layer.zygote.overdue(now)):
            self._postpone(layer, f"its zygote {why.removeprefix('it ')} and was killed", now)
        return events

    def _postpone(self, layer: ModelLayer, why: str, now: float) -> None:
        self._say(f"the model layer of {layer.uri} is not there: {why}; tried again after {layer.pause:.0f} s")
        self._end(layer, now + layer.pause)
        layer.pause = min(3600.0, 2 * layer.pause)

    def _end(self, layer: ModelLayer, retry_at: float) -> None:
        if layer.zygote is not None:
            layer.zygote.kill()
            layer.zygote.close()
        if layer.wire is not None:
            layer.wire.close()
        if layer.lease is not None:
            layer.lease.close()
        layer.zygote = layer.wire = layer.lease = None
        layer.state, layer.retry_at = "absent", retry_at
