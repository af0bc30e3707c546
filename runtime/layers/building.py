"""Owns the zygote of one layer, from building it to ending it, for a supervisor: a pod's shim, or a pool.

    lang     absent ──boot──▶ building ──▶ there ──price, loss──▶ absent
    model    absent ──ask──▶ leasing ──fork──▶ forking ──takes──▶ building ──▶ there ──price, loss──▶ absent

The layer's rule says how long it is held, and when building it is tried again after a failure (rule.py). Nothing here
waits: a supervisor polls `fds()` and calls `hear`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from cache_agent.limits import available_bytes
from runtime.layers import keys, spawn
from runtime.layers import leases as leasing
from runtime.layers.rule import LayerRule, Presence
from runtime.layers.spawn import ChildEvent, Ended, ForkRefused, Lost, Spec, Zygote, ZygoteReady
from runtime.process.wire import Gone, Wire

if TYPE_CHECKING:
    from cache_agent.client.lease import Lease


WARM = "is warm after"  # of a layer, in the log: benchmarks and tests wait for it
_BELOW = "the layer below it is gone"


class _Fork(NamedTuple):
    """A request for a model's zygote that is under way; `wire` will be the wire to that zygote."""

    number: int
    wire: Wire
    below: Zygote


class ZygoteLayer:
    """A lang layer, or the layer of the model at `uri` on a lease of the supervisor's own.

    `name` and `say` are for the log. The layer is not built where fewer than `room` bytes are free: it may take so many
    before its pages are shared.
    """

    def __init__(self, name: str, rule: LayerRule, say: Callable[[str], None], *, uri: str = "", room: int = 0) -> None:
        self.name, self.rule, self.uri = name, rule, uri
        self.zygote: Zygote | None = None
        self.lease: Lease | None = None
        self._say, self._room = say, room
        self._leasing = False
        self._forking: _Fork | None = None

    @property
    def presence(self) -> Presence:
        if self.zygote is None:
            return "building" if self._leasing or self._forking is not None else "absent"
        return "there" if self.zygote.state == "ready" else "building"

    @property
    def ready(self) -> bool:
        """Whether the layer may be forked."""
        return self.presence == "there"

    def fds(self) -> list[int]:
        """Return the fds that become readable when there is something to hear."""
        zygote = [] if self.zygote is None or self.zygote.state == "gone" else [self.zygote.wire.fileno()]
        return zygote + ([] if self.lease is None else [self.lease.fileno()])

    # --- building -------------------------------------------------------------------------------------------------

    def boot(
        self,
        spec: Spec,
        now: float,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = spawn.PROGRAM,
    ) -> None:
        """Begin with the interpreter; the arguments are as for `spawn.boot`."""
        if why := self._crowded():
            self.postpone(why, now)
        else:
            self.zygote = spawn.boot(spec, environment=environment, program=program)

    def ask(self, leases: leasing.LayerLeases, memory: Sequence[int] = ()) -> None:
        """Have the model leased; the result is for `fork`. `memory` is as for `LayerLeases.ask`."""
        self._leasing = True
        leases.ask(self.uri, memory)

    def fork(self, found: Lease | str, lang: ZygoteLayer, number: int, now: float) -> None:
        """Have a lang layer forked on the lease that was found, which is this layer's from now on."""
        self._leasing = False
        if isinstance(found, str):
            self.postpone(found, now)
            return
        self.lease = found
        if lang.zygote is None or not lang.ready:
            self.postpone(_BELOW, now)
        elif why := self._crowded():
            self.postpone(why, now)
        else:
            fds = spawn.LeaseFds(found.manifest_bytes, found.manifest_fd, found.segments)
            try:
                wire = lang.zygote.fork_zygote(number, Spec(key=self.uri), fds)
                self._forking = _Fork(number, wire, lang.zygote)
            except Gone:
                self.postpone(_BELOW, now)

    def takes(self, event: ChildEvent, now: float) -> bool:
        """Take an event of a lang layer that is about this layer's own zygote; return whether it was."""
        fork = self._forking
        if fork is None or isinstance(event, Ended) or event.number != fork.number:
            return False
        if isinstance(event, ForkRefused):
            self.postpone(event.why, now)
        else:
            self.zygote, self._forking = Zygote(fork.wire, event.pid, event.pidfd), None
        return True

    def pause(self, paused: bool) -> None:
        """Stop the zygote while it is being built, or let it go on."""
        if self.zygote is not None and not self.ready:
            self.zygote.pause(paused)

    def hear(self, now: float) -> list[ChildEvent]:
        """Return what the zygote says of its children; end a layer that is lost."""
        events: list[ChildEvent] = []
        for event in [] if self.zygote is None else self.zygote.read():
            match event:
                case ZygoteReady(_, _, seconds, size):
                    self.rule.measured(seconds=seconds, size=self.freed(size))
                    self.rule.retry.worked()
                    self._say(f"{self.name} {WARM} {seconds:.2f} s and holds {size / 1e6:.0f} MB")
                case Lost(why):
                    self.postpone(f"its zygote was lost: {why}", now)
                case _:
                    events.append(event)
        # Only after reading: if it was the supervisor that had been stopped, the beats are there.
        if self.zygote is not None and (why := self.zygote.overdue(now)):
            self.postpone(f"its zygote {why.removeprefix('it ')} and was killed", now)
        if self._forking is not None and self._forking.below.state == "gone":
            self.postpone(_BELOW, now)
        if self.lease is not None and (why := leasing.lost(self.lease)):
            self.postpone(why, now)
        return events

    def freed(self, size: int) -> int:
        """Return the bytes that would be free if the layer went, of which `size` are its zygote's."""
        return size

    def _crowded(self) -> str:
        """Return why there is no room for another process, or ""."""
        if (free := available_bytes()) < self._room:
            return f"{free / 1e6:.0f} MB are free, it may take {self._room / 1e6:.0f}"
        return ""

    # --- ending ---------------------------------------------------------------------------------------------------

    def drop(self, why: str) -> None:
        """End a layer that is there and not wanted."""
        if self.zygote is not None:
            self._say(f"{self.name} is dropped, {why}")
            self.end()

    def postpone(self, why: str, now: float) -> None:
        """End what there is of the layer; building it is tried again after a pause."""
        self.end(why)
        self._say(f"{self.name} is not there: {why}; tried again after {self.rule.retry.failed(now):.0f} s")

    def end(self, why: str = "") -> None:
        """End zygote and lease, or the attempt to get them. `why` is told where a fork was asked for."""
        if self.zygote is not None:
            self.zygote.kill(why)
            self.zygote.close()
        if self._forking is not None:
            self._forking.wire.close()
        if self.lease is not None:
            self.lease.close()
        self.zygote = self._forking = self.lease = None


def deepest(
    made_of: keys.Needs, uri: str, lang: ZygoteLayer, model: ZygoteLayer | None
) -> tuple[ZygoteLayer | None, str]:
    """Return the layer that a worker with the model at `uri` is forked from, if one is ready, and why no deeper one.

    `made_of` are the needs that the lang layer meets.
    """
    wanted = replace(made_of, model=uri)
    there: list[tuple[str, keys.Level, keys.Needs]] = []
    if model is not None and model.ready:
        there.append(("model", "model", wanted))
    if lang.ready:
        there.append(("lang", "lang", made_of))
    found = keys.deepest(wanted, there)
    return {"model": model, "lang": lang}.get(found.layer or ""), found.why
