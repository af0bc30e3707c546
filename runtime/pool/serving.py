"""The worker of a container, the layer `user`, as a pool knows it: its costs, and when it goes. Pure.

    absent ──asked──▶ starting ──serves──▶ serving ──ended──▶ absent ──parked──▶ standby ──asked──▶ starting …

The container's shim tells what happens, also of a worker that another pool had forked. `absent` lasts for a moment: the
shim asks for another worker, or says that its container is on standby.
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
_AGAIN = 1.0  # seconds after which a wish is repeated
_SETTINGS = ("MODEL", "NAME", "LAYERS", "PRIVATE_WEIGHTS", "HOLD", "START_PRICE")

State = Literal["absent", "starting", "serving", "standby"]


class Serving:
    """One container's worker, with the settings of its function."""

    def __init__(self, environment: Mapping[str, str], cwd: str) -> None:
        """Read the settings that concern a pool from the function's environment. Raises `BadConfig` for those."""
        names = [f"GLOWPLUG_{name}" for name in _SETTINGS]
        config = from_environment({name: environment[name] for name in names if name in environment})
        uri = config.model_uri
        if "://" not in config.model:  # a path in the container
            uri = "file://" + os.path.normpath(os.path.join(cwd, config.model))
        self.model = uri if config.layers == "model" and not config.private_weights else ""
        self.state: State = "absent"
        self._uri, self._name = uri, config.served_name
        self._inside = 0
        self._again_at = -math.inf
        self._rule = LayerRule(_GUESSED, config.start_price, config.holds.get("user"))

    def asked(self, now: float) -> None:
        """Note that a request has asked for a worker."""
        self._rule.used(now)
        self.state, self._inside = "starting", 0

    def ended(self) -> None:
        """Note that the worker has ended, for whatever reason."""
        self.state = "absent"

    def tells(self, message: Mapping[str, Any], now: float, *, forked: bool) -> bool:
        """Take a message of the shim; return whether it is one. `forked`: the worker was forked by this pool."""
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
                self.state = "standby"
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
        """Return the layer as published.py draws it."""
        presence: Presence = "absent" if self.state in ("absent", "standby") else "there"
        return {**published.entry("user", presence, self._rule, self._uri), "function": self._name}
