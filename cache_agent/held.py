"""What the agent keeps for each residency entry and each request: memory, load, tee, story; closed by the agent."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cache_agent.checkpoint import Description
from cache_agent.ledger import Ledger
from cache_agent.loader import Load
from cache_agent.protocol import Message
from cache_agent.tiers.dram import Dram
from cache_agent.tiers.origin import Origin

_TEE_SECONDS = 10.0  # a disk that hangs for longer keeps the memory until it comes back


class Holder(Protocol):
    """Whoever leases or asks: a connection. `deliver` never blocks; the fds become the holder's to close.

    `pod` is the UID of the pod that it says it lives in, or "".
    """

    @property
    def pod(self) -> str: ...

    def deliver(self, message: Message, fds: list[int], load: Load | None = None) -> None: ...


@dataclass(slots=True)
class Held:
    """The memory and the story of one residency entry. `tier` is where its bytes came from."""

    description: Description
    ledger: Ledger
    dram: Dram | None = None
    load: Load | None = None
    tier: str = "origin"
    manifest_fd: int = -1
    manifest_bytes: int = 0

    def end_tee(self, seconds: float = _TEE_SECONDS) -> None:
        """Gives up what is being written to SSD, so that closing really frees the memory."""
        if self.load is not None and self.load.tee is not None:
            self.load.tee.cancel()
            self.load.tee.ended.wait(seconds)

    def close(self) -> None:
        if self.dram is not None:
            self.dram.close()
            self.dram = None
        if self.manifest_fd >= 0:
            os.close(self.manifest_fd)
            self.manifest_fd = -1


@dataclass(slots=True)
class Asked:
    holder: Holder
    start: int = field(default_factory=time.monotonic_ns)


class Resolution(NamedTuple):
    description: Description
    origin: Origin
    ledger: Ledger
    revision: str = ""
