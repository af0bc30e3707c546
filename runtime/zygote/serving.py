"""What a pool knows of a container's worker, the layer `user`, and decides: when it goes. Pure.

    absent ──asked──▶ starting ──serves──▶ serving ──ended──▶ absent ──parked──▶ parked ──asked──▶ starting …

Its shim tells; a worker that another pool had forked is one like any other. `absent` is for a moment: a shim asks for
another worker, or says that it has none on purpose.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

from cache_agent.policy import keepalive
from runtime.config import from_environment
from runtime.zygote import published

_GUESSED = keepalive.Layer("user", 0.3, 100 << 20)
_AGAIN = 1.0  # seconds after which what was wanted is said again
_SETTINGS = ("MODEL", "NAME", "LAYERS", "PRIVATE_WEIGHTS", "HOLD", "START_PRICE")

State = Literal["absent", "starting", "serving", "parked"]


class Serving:
    """One container's worker, by what its function has set."""

    def __init__(self, environment: Mapping[str, str], cwd: str) -> None:
        """Raises `BadConfig`. Settings of other parts are the function's own affair."""
        names = [f"GLOWPLUG_{name}" for name in _SETTINGS]
        self._config = config = from_environment({name: environment[name] for name in names if name in environment})
        uri = config.model_uri
        if "://" not in config.model:  # a path is one in the container
            uri = "file://" + os.path.normpath(os.path.join(cwd, config.model))
        self.model = uri if config.layers == "model" and not config.private_weights else ""
        self.state: State = "absent"
        self._uri = uri
        self._inside = 0
        self._again_at = 0.0
        self._cost = _GUESSED
        self._history = keepalive.History()
        self._decision: keepalive.Decision | None = None

    # --- what the pool sees, and the shim tells -------------------------------------------------------------------

    def asked(self, now: float) -> None:
        """A worker is asked for, by a request."""
        self._used(now)
        self.state, self._inside = "starting", 0

    def ended(self) -> None:
        """The worker has, for whatever reason."""
        self.state = "absent"

    def tells(self, message: Mapping[str, Any], now: float, *, forked: bool) -> bool:
        """Whether it is something that a shim tells; `forked`: of a worker of the pool's."""
        match message:
            case {"serves": int() | float() as seconds} if 0 <= seconds < math.inf:
                self.state = "serving"
                if forked:
                    self._cost, self._decision = self._cost._replace(seconds=float(seconds)), None
                if not self._inside:
                    self._history.idle(now)
            case {"load": int(inside)} if inside >= 0:
                self._inside = inside
                self._used(now) if inside else self._history.idle(now)
            case {"bytes": int(size)} if 0 <= size < 1 << 60:
                self._cost, self._decision = self._cost._replace(bytes=size), None
            case {"parked": 1}:
                self.state = "parked"
            case _:
                return False
        return True

    def _used(self, now: float) -> None:
        self._history.used(now)
        self._decision = None

    # --- what is decided ------------------------------------------------------------------------------------------

    @property
    def decision(self) -> keepalive.Decision:
        if self._decision is None:
            price = self._config.start_price
            if (held := self._config.holds.get("user")) is not None:
                self._decision = keepalive.Decision(self._cost, price, held)
            else:
                self._decision = keepalive.keep(self._cost, self._history.gaps, price)
        return self._decision

    def wish(self, now: float) -> Literal["", "retire"]:
        """Return "retire", for the shim, where holding an idle worker costs more than another one would."""
        age = self._history.age(now)
        if age is None or now < self._again_at:
            return ""
        if self.state == "serving" and not self._inside and not self.decision.wanted(age):
            self._again_at = now + _AGAIN
            return "retire"
        return ""

    def report(self) -> dict[str, Any]:
        """For people; see published.py."""
        since = self._history.since
        state: published.State = "absent" if self.state in ("absent", "parked") else "used" if since is None else "idle"
        entry = published.entry("user", state, since, self.decision, self._uri)
        return {**entry, "function": self._config.served_name}
