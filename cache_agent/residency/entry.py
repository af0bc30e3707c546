"""Owns the state of one copy in memory (`Entry`) and of one URI (`Alias`), and the errors that name them. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from cache_agent.errors import NoCapacity, WrongRevision
from cache_agent.model.manifest import Manifest
from cache_agent.policy.copies import listed, mb

State = Literal["loading", "ready", "evicting"]


@dataclass(slots=True)
class Entry:
    """One copy of a source's bytes in DRAM. `leases` maps each lease to the revision it insists on, if any."""

    number: int
    uri: str
    manifest: Manifest
    state: State = "loading"
    reserved: bool = False
    revision: str = ""
    last_used: float = 0.0
    uses: int = 0
    seconds: float = 1.0
    priority: float = 0.0
    doomed: bool = False  # evicted with its last lease
    leases: dict[int, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return self.manifest.nbytes


@dataclass(slots=True)
class Alias:
    """The source that a URI was last seen to name, and the leases that wait for an answer."""

    source: str = ""
    checked: float = -math.inf  # never
    resolving: bool = False
    offers: int = 0  # being examined; leases that are asked for meanwhile wait, or there would be a second copy
    waiting: dict[int, str] = field(default_factory=dict)


def no_capacity(needed: int, capacity: int, stays: list[Entry], goes: int, why: Callable[[Entry], str]) -> NoCapacity:
    """Build the error that lists what stays and why, the largest first; `goes` are the bytes that could be evicted."""
    return NoCapacity(
        f"the model needs {mb(needed)}; the agent's budget is {mb(capacity)}, of which "
        f"{mb(sum(entry.bytes for entry in stays))} are in use",
        listed(stays, why),
        f" and {mb(goes)} could be evicted. Give the agent more memory (--dram), or use a smaller model",
    )


def wrong_revision(uri: str, found: str, wanted: str) -> WrongRevision:
    return WrongRevision(f"{uri} is at revision {found} now and {wanted} was asked for; drop the pin, or restore it")
