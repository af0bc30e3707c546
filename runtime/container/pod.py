"""Owns the layers of one container: its zygotes, and which one the next worker is forked from.

    user     the worker, which is the shim's: it goes when `wants_drop`, and comes when a request asks
    model    a zygote of the model, on a lease of its own
    lang     a zygote with everything imported
    bare     the shim

Layers are built from lang to model while no request needs the processor, and given up from user to lang by price
(rule.py). Nothing here waits: the shim polls `fds()` and calls `step`. A zygote that is being built is stopped for as
long as a request is served, because a container may have but one processor and may not lower a priority for a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cache_agent.policy import keepalive
from runtime.config import FunctionConfig
from runtime.layers import building, identity, keys, leases, published
from runtime.layers.building import ZygoteLayer
from runtime.layers.rule import LayerRule
from runtime.layers.spawn import ChildEvent, Forked, ForkRefused, Spec, Zygote
from runtime.process.wire import Gone

if TYPE_CHECKING:
    from runtime.process.fd_store import FdStore

_SETTLED = 2.0  # seconds of idleness after which there is time for building
_BOOT = 2.0  # seconds that starting a worker with the interpreter is taken for, until it was measured
# Costs of building and holding, until they were measured.
_GUESSED: Mapping[str, keepalive.LayerCost] = {
    "user": keepalive.LayerCost("user", 0.3, 100 << 20),
    "model": keepalive.LayerCost("model", 0.2, 50 << 20),
    "lang": keepalive.LayerCost("lang", 2.0, 250 << 20),
}
_ROOM = 350 << 20  # bytes that a zygote may take before its pages are shared


class Pod:
    """The layers of one container. For the shim's thread only."""

    why = ""  # a pod's own zygotes are never refused as a whole, as a pool's may be

    def __init__(
        self,
        config: FunctionConfig,
        agent: Callable[[], str],
        say: Callable[[str], None],
        fd_store: FdStore | None = None,
    ) -> None:
        """`agent()` is the agent's socket, `say` writes into the log; `fd_store` has weights that came over TCP."""
        holds = config.holds
        user, model, lang = (
            LayerRule(_GUESSED[level], config.start_price, holds.get(level)) for level in ("user", "model", "lang")
        )
        self._config, self._fd_store = config, fd_store
        self._shares_model = config.layers == "model" and not config.private_weights
        self._user = user
        self._model = ZygoteLayer("layer model", model, say, uri=config.model_uri)
        self._lang = ZygoteLayer("layer lang", lang, say, room=_ROOM)
        self._settled = min(_SETTLED, holds.get("user", _SETTLED))
        self._made_of: keys.Needs | None = None  # the lang layer, once a worker has said what kind of model it has
        self._fork_seconds, self._boot_seconds = _GUESSED["user"].seconds, _BOOT
        self._serving = True  # whether a worker is there, or on its way
        self._inside = 0
        self._number = itertools.count(1).__next__
        self._asked: tuple[int, Zygote] | None = None  # a request to fork a worker that is under way, and its zygote
        self._leases = leases.LayerLeases(config, agent, "layers")
        self._published = published.Published("pod", config.served_name, config.start_price, self._leases.client)

    # --- told by the shim -----------------------------------------------------------------------------------------

    def worker_ready(self, kind: str, seconds: float, forked: bool, now: float) -> None:
        """Note that a worker serves, `seconds` after it was asked for."""
        if self._made_of is None and kind:
            self._made_of = replace(identity.needs(), preload=(kind,), private=self._config.private_weights)
        self._serving = True
        if forked:
            self._fork_seconds = seconds
        else:
            self._boot_seconds = seconds
        if not self._inside:
            self._user.idle(now)

    def load(self, inside: int, now: float) -> None:
        """Note how many requests are inside the worker."""
        self._inside = inside
        self._user.used(now) if inside else self._user.idle(now)

    def worker_bytes(self, size: int) -> None:
        self._user.measured(size=size)

    def worker_gone(self, now: float) -> None:
        """Note that the container is on standby."""
        self._serving = False
        self._rest(now)

    # --- asked by the shim ----------------------------------------------------------------------------------------

    @property
    def holds_model(self) -> bool:
        """Whether a zygote of the model is there, or on its way."""
        return self._model.presence != "absent"

    def wants_drop(self, now: float) -> bool:
        """Return whether holding the idle worker costs more than starting another one would."""
        return self._serving and not self._inside and self._worker().expired(now)

    def fork(self, now: float, **arguments: Any) -> int:
        """Ask the deepest zygote that fits for a worker; return the number of its `Forked` or `ForkRefused`.

        The number is 0 where no zygote fits: then the worker has to be booted. `arguments` are `Zygote.fork_worker`'s.
        """
        self._serving, self._inside = True, 0
        layer, why = None, ""
        if self._made_of is not None:
            layer, why = building.deepest(self._made_of, self._model.uri, self._lang, self._model)
        # The request reaches these layers, whether they are there or not.
        self._user.used(now)
        self._model.rule.used(now)
        if layer is not self._model:
            self._lang.rule.used(now)
        if layer is None or layer.zygote is None:
            return 0
        number = self._number()
        try:
            layer.zygote.fork_worker(number, why=why, **arguments)
        except Gone:
            return 0
        self._asked = number, layer.zygote
        return number

    def fds(self) -> list[int]:
        return [self._leases.fileno(), *self._lang.fds(), *self._model.fds()]

    def step(self, now: float) -> list[ChildEvent]:
        """Read what zygotes said, build and drop what is due; return what concerns the shim's worker."""
        events = [
            event
            for layer in (self._lang, self._model)
            for event in layer.hear(now)
            if not self._model.takes(event, now)
        ]
        if self._asked is not None:
            number, zygote = self._asked
            if any(isinstance(event, (Forked, ForkRefused)) and event.number == number for event in events):
                self._asked = None
            elif zygote.state == "gone":
                events.append(ForkRefused(number, zygote.lost))
                self._asked = None
        for _, found in self._leases.take():
            self._model.fork(found, self._lang, self._number(), now)
        self._rest(now)
        self._drop(now)
        self._build(now)
        self._published.write(self.report(), now)
        return events

    def seconds(self, now: float) -> float:
        """Return the seconds after which `step` should be called again at the latest."""
        age = self._user.age(now)
        settles = _SETTLED - age if age is not None and age < _SETTLED else 1.0
        ends = [rule.changes_in(now) + 0.001 for rule in (self._worker(), self._model.rule, self._lang.rule)]
        return max(0.0, min(1.0, settles, *ends))

    def report(self) -> list[dict[str, Any]]:
        """Return the layers as published.py draws them."""
        return [
            published.entry("user", "there" if self._serving else "absent", self._worker()),
            published.entry("model", self._model.presence, self._model.rule),
            published.entry("lang", self._lang.presence, self._lang.rule),
        ]

    def close(self) -> None:
        self._published.close()
        self._model.end()
        self._lang.end()

    # --- building and dropping ------------------------------------------------------------------------------------

    def _worker(self) -> LayerRule:
        """Return the worker's rule, at the price of the next start, which is a boot where there is no lang layer."""
        self._user.measured(seconds=self._fork_seconds if self._lang.ready else self._boot_seconds)
        return self._user

    def _rest(self, now: float) -> None:
        """Note that layers are idle. The idle time of a layer that is being built begins when it is there."""
        for layer in (self._model, self._lang):
            if layer.ready and not self._serving:
                layer.rule.idle(now)

    def _wanted(self, layer: ZygoteLayer, now: float) -> bool:
        """Return whether the layer is worth its price; while there is a worker, whether it will be afterwards."""
        return layer.rule.pays if self._serving else layer.rule.wanted(now)

    def _drop(self, now: float) -> None:
        for layer in (self._model, self._lang):
            if layer.zygote is None or self._wanted(layer, now):
                continue
            if layer is self._model or not self.holds_model:  # pages of lang are the model's, too: nothing gets free
                layer.drop(layer.rule.why)

    def _build(self, now: float) -> None:
        age = None if self._inside else self._user.age(now)
        for layer in (self._lang, self._model):
            layer.pause(age is None)
        if age is None or age < self._settled or self._made_of is None:
            return
        if self._lang.zygote is None:
            if self._config.layers != "off" and self._due(self._lang, now):
                self._lang.boot(Spec(key="lang", kinds=self._made_of.preload, lean=self._config.lean_imports), now)
        elif self._shares_model and self._lang.ready and not self.holds_model and self._due(self._model, now):
            self._model.ask(self._leases, self._fd_store.copies() if self._fd_store is not None else [])

    def _due(self, layer: ZygoteLayer, now: float) -> bool:
        return layer.rule.retry.due(now) and self._wanted(layer, now)
