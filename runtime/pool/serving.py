"""The worker of a container, the layer `user`, as a pool knows it: what it costs, and when it goes. Pure.

    absent ──asked──▶ starting ──serves──▶ serving ──ended──▶ absent ──parked──▶ parked ──asked──▶ starting …

The container's shim tells what happens; a worker that another pool had forked is one like any other. `absent` is for a
moment: a shim asks for another worker, or says that it has none on purpose.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

from cache_agent.policy import keepalive
from runtime.config import from_environment
from runtime.layers import published
from runtime.layers.rule import LayerRule, Presence

_GUESSED = keepalive.LayerCost("user", 0.3, 100 << 20)
_AGAIN = 1.0  # seconds after which what was wanted is said again
_SETTINGS = ("MODEL", "NAME", "LAYERS", "PRIVATE_WEIGHTS", "HOLD", "START_PRICE")

State = Literal["absent", "starting", "serving", "parked"]


class Serving:
    """One container's worker, by what its function has set."""

    def __init__(self, environment: Mapping[str, str], cwd: str) -> None:
        """Raises `BadConfig`. Settings of other parts are the function's own affair."""
        names = [f"GLOWPLUG_{name}" for name in _SETTINGS]
        config = from_environment({name: environment[name] for name in names if name in environment})
        uri = config.model_uri
        if "://" not in config.model:  # a path is one in the container
            uri = "file://" + os.path.normpath(os.path.join(cwd, config.model))
        self.model = uri if config.layers == "model" and not config.private_weights else ""
        self.state: State = "absent"
        self._uri, self._name = uri, config.served_name
        self._inside = 0
        self._again_at = -math.inf
        self._rule = LayerRule(_GUESSED, config.start_price, config.holds.get("user"))

    def asked(self, now: float) -> None:
        """A worker is asked for, by a request."""
        self._rule.used(now)
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
                    self._rule.measured(seconds=float(seconds))
                if not self._inside:
                    self._rule.idle(now)
            case {"load": int(inside)} if inside >= 0:
                self._inside = inside
                self._rule.used(now) if inside else self._rule.idle(now)
            case {"bytes": int(size)} if 0 <= size < 1 << 60:
                self._rule.measured(size=size)
            case {"parked": 1}:
                self.state = "parked"
            case _:
                return False
        return True

    def wish(self, now: float) -> Literal["", "retire"]:
        """Return "retire", for the shim, where holding an idle worker costs more than another one would."""
        if self.state != "serving" or self._inside or now < self._again_at or not self._rule.expired(now):
            return ""
        self._again_at = now + _AGAIN
        return "retire"

    def report(self) -> dict[str, Any]:
        """For people; see published.py."""
        presence: Presence = "absent" if self.state in ("absent", "parked") else "there"
        return {**published.entry("user", presence, self._rule, self._uri), "function": self._name}
