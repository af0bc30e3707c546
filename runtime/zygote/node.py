"""Owns a container's connection to its node's pool, and how long the worker from there is kept. Standard library only.

To the shim this is what `Pod` is: whom to ask for a worker. Zygotes are the pool's; here is only the worker, `user`,
which goes when holding it costs more than another fork. Where the pool cannot or must not be used, `why` says so, the
shim goes on as if there was none, and its ledger has the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cache_agent.policy import keepalive
from runtime.config import FunctionConfig
from runtime.zygote import layers, own, published
from runtime.zygote.spawn import Ended, Forked, Lost, Ready, Refused, Zygote
from runtime.zygote.wire import Gone, Wire

NO_ENTRY = "it could not enter the container"  # how the pool begins its reason not to be asked again
_ANSWER = 1.0  # seconds that the pool may take to say whether it serves this container
_GUESSED = keepalive.Layer("user", 0.3, 100 << 20)

Event = Forked | Refused | Ended


class Node:
    """One connection. For the shim's thread only."""

    holds_model = False  # here; the pool's are the pool's

    def __init__(self, config: FunctionConfig) -> None:
        self._config = config
        self._pool: Zygote | None = None
        self._number = 0
        self._asked = 0
        self._history = keepalive.History()
        self._cost = _GUESSED
        self._inside = 0
        self._serving = True
        self.why = ""  # the pool is not used
        self.published = published.Published("node", config.served_name, config.start_price)

    def connect(self) -> bool:
        """Whether the pool serves this container; else `why` it does not. Waits a second at the most."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(_ANSWER)
            sock.connect(self._config.pool)
        except OSError as error:
            sock.close()
            self.why = f"no pool answers at {self._config.pool} ({error.strerror or error})"
            return False
        pool = Zygote(Wire(sock), 0, -1, "")
        with contextlib.suppress(Gone):  # if it has gone, what it said before it did is read below
            pool.wire.send(self._wants())
        poller = select.poll()
        poller.register(pool.wire, select.POLLIN)
        deadline = time.monotonic() + _ANSWER
        self.why = "the pool has no zygote ready"
        while (left := deadline - time.monotonic()) > 0:
            poller.poll(left * 1000)
            for event in pool.read():
                match event:
                    case Ready(_, key):
                        self.why = _difference(key)
                        if not self.why:
                            self._pool = pool
                            return True
                        pool.close()
                        return False
                    case Lost(why):
                        self.why = why
                        return False
        pool.close()
        return False

    def _wants(self) -> dict[str, Any]:
        """So that the pool can begin before it is asked for a worker."""
        shared = self._config.layers == "model" and not self._config.private_weights
        return {"wants": self._config.model_uri if shared else ""}

    # --- what the shim tells --------------------------------------------------------------------------------------

    def worker_ready(self, kind: str, seconds: float, forked: bool, now: float) -> None:  # noqa: ARG002
        self._serving = True
        if forked:
            self._cost = self._cost._replace(seconds=seconds)
        if not self._inside:
            self._history.idle(now)

    def load(self, inside: int, now: float) -> None:
        self._inside = inside
        self._history.used(now) if inside else self._history.idle(now)

    def worker_bytes(self, size: int) -> None:
        self._cost = self._cost._replace(bytes=size)

    def worker_gone(self, now: float) -> None:  # noqa: ARG002
        self._serving = False

    # --- what the shim asks ---------------------------------------------------------------------------------------

    def fork(
        self,
        now: float,
        *,
        ahead: bool,
        listener: int,
        line: int,
        connections: Sequence[int],
        environment: Mapping[str, str],
        **more: Any,
    ) -> int:
        """Asks for a worker; the number that its `Forked` or `Refused` will have, 0 if the pool cannot be asked."""
        self._serving, self._inside = True, 0
        if not ahead:
            self._history.used(now)
        if self._pool is None and (self.why.startswith(NO_ENTRY) or not self.connect()):
            return 0
        assert self._pool is not None, "it was connected"
        self._number += 1
        request = {"fork": self._number, "environment": dict(environment), **more}
        try:
            self._pool.wire.send(request, [listener, line, *connections, 0, 1, 2])
        except (Gone, ValueError) as error:
            self._lose(str(error))
            return 0
        self._asked = self._number
        return self._number

    def fds(self) -> list[int]:
        return [] if self._pool is None else [self._pool.wire.fileno()]

    def step(self, now: float) -> list[Event]:
        """What concerns the shim's worker."""
        if self._pool is None:
            return []
        events: list[Event] = []
        for event in self._pool.read():
            match event:
                case Lost(why):
                    self._lose(why if why.startswith(NO_ENTRY) else f"the pool is gone: {why}")
                case Forked() | Refused():
                    self._asked = 0
                    events.append(event)
                case Ended():
                    events.append(event)
        if self._pool is not None and (why := self._pool.overdue(now)):
            self._lose(f"the pool {why.removeprefix('it ')}")
        if self._pool is None and self._asked:
            events.append(Refused(self._asked, self.why))
            self._asked = 0
        since = self._history.since
        state: published.State = "absent" if not self._serving else "used" if since is None else "idle"
        self.published.write([published.entry("user", state, since, self._decide())], now)
        return events

    def wants_drop(self, now: float) -> bool:
        age = self._history.age(now)
        return self._serving and not self._inside and age is not None and not self._decide().wanted(age)

    def wants_worker(self, now: float) -> bool:
        age, decision = self._history.age(now), self._decide()
        return not self._serving and age is not None and decision.ahead and decision.wanted(age)

    def seconds(self, now: float) -> float:
        age = self._history.age(now)
        return 1.0 if age is None else min(1.0, self._decide().changes_in(age) + 0.001)

    def close(self) -> None:
        self.published.close()
        self._lose("closed")

    def _decide(self) -> keepalive.Decision:
        if "user" in self._config.holds:
            return keepalive.Decision(self._cost, self._config.start_price, self._config.holds["user"])
        return keepalive.keep(self._cost, self._history.gaps, self._config.start_price)

    def _lose(self, why: str) -> None:
        self.why = why
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _difference(key: str) -> str:
    """What the pool's layer was made of (its key here, as JSON) and this function is not, or ""."""
    try:
        values = json.loads(key)
        pairs = tuple((str(name), str(value)) for name, value in values.pop("environment"))
        preload = tuple(map(str, values.pop("preload")))
        theirs = layers.Needs(**values, environment=pairs, preload=preload)
    except (ValueError, TypeError, KeyError):
        return "the pool is of another version"
    # The user is the container's own in any case, and what is not preloaded is imported when it is needed.
    ours = dataclasses.replace(own.needs(), uid=theirs.uid, domain=theirs.domain, preload=theirs.preload)
    found = layers.deepest(ours, [("pool", "lang", theirs)])
    return "" if found.layer else found.why
