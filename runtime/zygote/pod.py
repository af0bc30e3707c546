"""Owns the layers of one container: its zygotes, how long each is kept, and which one the next worker is forked from.

    user     the worker, which is the shim's: it goes when `wants_drop`, and comes when a request asks
    model    a zygote of the model, on a lease of its own
    lang     a zygote with everything imported
    bare     the shim

Built from lang to model while nobody needs the processor, given up from user to lang by price (cache_agent/policy/
keepalive.py). Nothing here waits: the shim polls `fds()` and calls `step`. A zygote that is being built is stopped for
as long as a request is served, because a container may have but one processor and may not lower a priority for a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from cache_agent.limits import available_bytes
from cache_agent.policy import keepalive
from runtime.config import FunctionConfig
from runtime.zygote import layers, leasing, own, published, spawn
from runtime.zygote.spawn import Ended, Forked, Lost, Ready, Refused, Spec, Zygote
from runtime.zygote.wire import Gone

if TYPE_CHECKING:
    from cache_agent.lease import Lease
    from runtime.kept import Memory

Event = Forked | Refused | Ended
Kept = Literal["user", "model", "lang"]

_SETTLED = 2.0  # seconds of idleness after which there is time for building
_RETRY = 30.0  # seconds after which a layer that could not be built is tried again; doubles each time
# What building and memory are taken for until they were measured.
_GUESSED: Mapping[Kept, keepalive.Layer] = {
    "user": keepalive.Layer("user", 0.3, 100 << 20),
    "model": keepalive.Layer("model", 0.2, 50 << 20),
    "lang": keepalive.Layer("lang", 2.0, 250 << 20),
}
_ROOM = 350 << 20  # bytes that a zygote may take before its pages are shared


class _Kept:
    """One level: its zygote, if there is one, what it costs, and how it was used."""

    def __init__(self, level: Kept) -> None:
        self.level = level
        self.cost = _GUESSED[level]
        self.history = keepalive.History()
        self.zygote: Zygote | None = None
        self.needs: layers.Needs | None = None
        self.retry_at, self.pause = 0.0, _RETRY

    @property
    def ready(self) -> bool:
        return self.zygote is not None and self.zygote.state == "ready"


class Pod:
    """One container's. For the shim's thread only; `agent()` is its agent's socket, `say` writes into its log."""

    def __init__(self, config: FunctionConfig, agent: Callable[[], str], say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self.why = ""  # a pod's own zygotes are never refused as a whole, as a pool's may be
        self._kept: dict[Kept, _Kept] = {level: _Kept(level) for level in ("user", "model", "lang")}
        self._hold = dict(config.holds)
        self._number = 0
        self._asked: tuple[int, Zygote] | None = None  # a worker that is to be forked, and by whom
        self._events: list[Event] = []
        self._boot_seconds = _GUESSED["lang"].seconds
        self._kind = ""
        self._serving = True  # a worker is there, or on its way
        self._inside = 0
        self.memory: Memory | None = None  # what workers over TCP left, if the shim keeps it
        self._pending_model: tuple[int, Any, Lease] | None = None
        self._leasing = False
        self._leases = leasing.LayerLeases(config, agent, "layers")
        self.published = published.Published("pod", config.served_name, config.start_price, self._leases.client)
        self._lease: Lease | None = None

    # --- what the shim tells --------------------------------------------------------------------------------------

    def worker_ready(self, kind: str, seconds: float, forked: bool, now: float) -> None:
        """A worker serves; it took so long since it was asked for."""
        self._kind = self._kind or kind
        self._serving = True
        user = self._kept["user"]
        if forked:
            user.cost = user.cost._replace(seconds=seconds)
        else:
            self._boot_seconds = seconds
        if not self._inside:
            user.history.idle(now)

    def load(self, inside: int, now: float) -> None:
        """So many requests are inside the worker."""
        self._inside = inside
        history = self._kept["user"].history
        history.used(now) if inside else history.idle(now)

    def worker_bytes(self, size: int) -> None:
        user = self._kept["user"]
        user.cost = user.cost._replace(bytes=size)

    def worker_gone(self, now: float) -> None:
        """No worker is there any more, and none is wanted just now."""
        self._serving = False
        for level in ("model", "lang"):
            if self._kept[level].ready:  # else it begins to be idle when it is
                self._kept[level].history.idle(now)

    @property
    def holds_model(self) -> bool:
        """A zygote of the model is there, or on its way."""
        return self._kept["model"].zygote is not None or self._leasing or self._pending_model is not None

    # --- what the shim asks ---------------------------------------------------------------------------------------

    def wants_drop(self, now: float) -> bool:
        """Whether holding an idle worker costs more than another one would."""
        user = self._kept["user"]
        age = user.history.age(now)
        return self._serving and not self._inside and age is not None and not self._decide("user").wanted(age)

    def fork(self, now: float, **arguments: Any) -> int:
        """Asks the deepest zygote that fits for a worker; the number that its `Forked` or `Refused` will have.

        0 if there is none: then the worker has to be booted. `arguments` are `Zygote.fork_worker`'s.
        """
        self._serving, self._inside = True, 0
        self._kept["user"].history.used(now)
        there = [(level, level, kept.needs) for level, kept in self._kept.items() if kept.ready and kept.needs]
        found = layers.deepest(self._needs("model"), there)
        reached = [self._kept[level] for level in ("model", "lang") if level == "model" or found.layer != "model"]
        for kept in reached:  # those that this request gets to, whether they are there or not
            kept.history.used(now)
        zygote = reached[-1].zygote
        if found.layer is None or zygote is None:
            return 0
        self._number += 1
        try:
            zygote.fork_worker(self._number, why=found.why, **arguments)
        except Gone:
            return 0
        self._asked = self._number, zygote
        return self._number

    def fds(self) -> list[int]:
        zygotes = [kept.zygote for kept in self._kept.values() if kept.zygote is not None]
        found = [self._leases.fileno(), *(each.wire.fileno() for each in zygotes if each.state != "gone")]
        if self._lease is not None:
            found.append(self._lease.fileno())
        return found

    def step(self, now: float) -> list[Event]:
        """Reads what zygotes said, builds and drops what is due; what concerns the shim's worker."""
        events = self._events = []
        for kept in self._kept.values():
            if kept.zygote is None:
                continue
            for event in kept.zygote.read():
                match event:
                    case Ready(level, _, seconds, size):
                        kept.cost = keepalive.Layer(kept.level, seconds, size)
                        kept.pause = _RETRY
                        if not self._serving:
                            kept.history.idle(now)
                        self._say(f"layer {level} is warm after {seconds:.2f} s and holds {size / 1e6:.0f} MB")
                    case Lost(why):
                        self._lost(kept, why, now)
                    case Forked(number, pid, pidfd) if self._pending_model and number == self._pending_model[0]:
                        _, wire, self._lease = self._pending_model
                        self._pending_model = None
                        self._kept["model"].zygote = Zygote(wire, pid, pidfd, "model")
                    case Refused(number, why) if self._pending_model and number == self._pending_model[0]:
                        self._forget_model(why, now)
                    case _:
                        if isinstance(event, (Forked, Refused)):
                            self._asked = None
                        events.append(event)
        self._take_lease(now)
        self._watch(now)
        self._drop(now)
        self._build(now)
        self.published.write(self.report(), now)
        return events

    def seconds(self, now: float) -> float:
        """When `step` should be called again at the latest."""
        due = [1.0]
        for level, kept in self._kept.items():
            age = kept.history.age(now)
            if age is not None:
                due.append(self._decide(level).changes_in(age) + 0.001)
                due.append(_SETTLED - age if age < _SETTLED else 1.0)
        return max(0.0, min(due))

    def report(self) -> list[dict[str, Any]]:
        """For people; see published.py."""
        found = []
        for level, kept in self._kept.items():
            state: published.State = "used" if kept.history.since is None else "idle"
            if kept.zygote is not None and kept.zygote.state == "building":
                state = "building"
            elif not (self._serving if level == "user" else kept.ready):
                state = "absent"
            found.append(published.entry(level, state, kept.history.since, self._decide(level)))
        return found

    def close(self) -> None:
        self.published.close()
        for kept in self._kept.values():
            if kept.zygote is not None:
                kept.zygote.kill()
                kept.zygote.close()
                kept.zygote = None
        if self._pending_model is not None:
            self._forget_model("", time.monotonic())
        self._drop_lease()

    # --- building and dropping ------------------------------------------------------------------------------------

    def _decide(self, level: Kept) -> keepalive.Decision:
        kept, rho = self._kept[level], self._config.start_price
        cost = kept.cost
        if level == "user" and not self._kept["lang"].ready:  # without it the next one has to be booted
            cost = cost._replace(seconds=self._boot_seconds)
        if level in self._hold:
            return keepalive.Decision(cost, rho, self._hold[level])
        return keepalive.keep(cost, kept.history.gaps, rho)

    def _wanted(self, level: Kept, now: float) -> bool:
        """Whether it should be there; while it is in use, whether it will be worth its price afterwards."""
        decision = self._decide(level)
        age = None if self._serving else self._kept[level].history.age(now)
        return decision.hold > 0 if age is None else decision.wanted(age)

    def _drop(self, now: float) -> None:
        for level in ("model", "lang"):
            kept = self._kept[level]
            if kept.zygote is None or self._wanted(level, now):
                continue
            if level == "lang" and (self._kept["model"].zygote is not None or self._leasing or self._pending_model):
                continue  # its pages are the model's, too: dropping it would free nothing
            why = f"held for {self._hold[level]:g} s" if level in self._hold else self._decide(level).why
            self._say(f"layer {level} is dropped, {why}")
            self._end(kept)

    def _end(self, kept: _Kept) -> None:
        assert kept.zygote is not None, "it was there"
        kept.zygote.kill()
        kept.zygote.close()
        kept.zygote = kept.needs = None
        if kept.level == "model":
            self._drop_lease()

    def _build(self, now: float) -> None:
        age = self._kept["user"].history.age(now)
        busy = self._inside > 0 or age is None
        for kept in self._kept.values():
            if kept.zygote is not None and kept.zygote.state == "building":
                kept.zygote.pause(busy)
        if busy or age is None or age < min(_SETTLED, self._hold.get("user", _SETTLED)) or not self._kind:
            return
        lang, model = self._kept["lang"], self._kept["model"]
        if lang.zygote is None:
            if self._config.layers != "off" and now >= lang.retry_at and self._wanted("lang", now):
                room = available_bytes()
                if room < _ROOM:
                    self._postpone(lang, f"{room / 1e6:.0f} MB are free, it may take {_ROOM / 1e6:.0f}", now)
                    return
                lang.needs = self._needs("lang")
                lang.zygote = spawn.boot(Spec(key="lang", kinds=(self._kind,), lean=self._config.lean_imports))
        elif (
            self._config.layers == "model"
            and not self._config.private_weights
            and lang.ready
            and model.zygote is None
            and self._pending_model is None
            and not self._leasing
            and now >= model.retry_at
            and self._wanted("model", now)
        ):
            self._leasing = True
            self._leases.ask(self._config.model_uri, self.memory.copies() if self.memory is not None else [])

    def _postpone(self, kept: _Kept, why: str, now: float) -> None:
        self._say(f"layer {kept.level} is not built: {why}; tried again after {kept.pause:.0f} s")
        kept.retry_at, kept.pause = now + kept.pause, min(3600.0, 2 * kept.pause)

    def _lost(self, kept: _Kept, why: str, now: float) -> None:
        if kept.zygote is None:
            return
        if self._asked is not None and self._asked[1] is kept.zygote:
            self._events.append(Refused(self._asked[0], why))
            self._asked = None
        self._end(kept)
        self._postpone(kept, why, now)
        if kept.level == "lang" and self._pending_model is not None:
            self._forget_model("the layer below it is gone", now)

    def _watch(self, now: float) -> None:
        for kept in self._kept.values():
            if kept.zygote is not None and (why := kept.zygote.overdue(now)):
                self._lost(kept, f"its zygote {why.removeprefix('it ')} and was killed", now)
        if self._lease is not None and (why := leasing.lost(self._lease)):
            model = self._kept["model"]
            if model.zygote is not None:
                self._end(model)
            self._drop_lease()
            self._postpone(model, why, now)

    # --- the model's lease ----------------------------------------------------------------------------------------

    def _take_lease(self, now: float) -> None:
        for _, found in self._leases.take():
            self._leased(found, now)

    def _leased(self, found: Lease | str, now: float) -> None:
        self._leasing = False
        lang, model = self._kept["lang"], self._kept["model"]
        if isinstance(found, str):
            self._postpone(model, found, now)
            return
        if lang.zygote is None or not lang.ready:
            found.close()
            return
        self._number += 1
        held = spawn.Held(found.manifest_bytes, found.manifest_fd, found.segments)
        try:
            wire = lang.zygote.fork_zygote(self._number, Spec(key="model"), held)
        except Gone:
            found.close()
            return
        model.needs = self._needs("model")
        self._pending_model = self._number, wire, found

    def _forget_model(self, why: str, now: float) -> None:
        assert self._pending_model is not None, "it was asked for"
        _, wire, lease = self._pending_model
        self._pending_model = None
        wire.close()
        lease.close()
        self._postpone(self._kept["model"], why, now)

    def _drop_lease(self) -> None:
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    # --- keys -----------------------------------------------------------------------------------------------------

    def _needs(self, level: layers.Level) -> layers.Needs:
        return replace(
            own.needs(),
            preload=(self._kind,),
            model=self._config.model_uri if level == "model" else "",
            private=self._config.private_weights,
        )
