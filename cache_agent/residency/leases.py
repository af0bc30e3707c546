"""What the agent keeps for each residency entry and each request: memory, load, tee, story; closed by the agent."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cache_agent.ledger import Ledger
from cache_agent.loading.loader import ModelLoad
from cache_agent.loading.tee import Tee
from cache_agent.model.checkpoint import Description
from cache_agent.model.manifest import encode
from cache_agent.model.origin import Origin
from cache_agent.policy.rights import EVERYTHING, NOBODY, Caller, Permission
from cache_agent.tiers.dram import Dram
from cache_agent.wire.blobs import sealed_bytes
from cache_agent.wire.message import Message
from cache_agent.wire.messages import ErrorReply, LeaseReady

log = logging.getLogger("glowplug.agent")

_TEE_SECONDS = 10.0  # a disk that hangs for longer keeps the memory until it comes back


class Holder(Protocol):
    """Whoever leases or asks: a connection. `deliver` never blocks; the fds become the holder's to close.

    `pod` is the UID of the pod that it lives in, or "".
    """

    @property
    def pod(self) -> str: ...

    @property
    def caller(self) -> Caller: ...

    @property
    def grant(self) -> Permission:
        """What the caller may have now."""
        ...

    def deliver(self, message: Message, fds: list[int], load: ModelLoad | None = None) -> None: ...


@dataclass(slots=True)
class EntryMemory:
    """The memory and the story of one residency entry. `tier` is where its bytes came from."""

    description: Description
    phases: Ledger
    dram: Dram | None = None
    load: ModelLoad | None = None
    tee: Tee | None = None
    tier: str = "origin"
    work: int = 0  # bytes that pass on its tier until it is loaded
    manifest_fd: int = -1
    manifest_bytes: int = 0
    began: float = field(default_factory=time.monotonic)

    def keep_manifest(self) -> None:
        """Puts the manifest into memory of its own, to be handed out with the segments."""
        encoded = encode(self.description.manifest)
        self.manifest_fd, self.manifest_bytes = sealed_bytes(encoded, "glowplug:manifest"), len(encoded)

    def rest(self) -> int:
        """Bytes that are still to come."""
        if self.load is None or self.load.finished.is_set():
            return 0
        return self.load.total - self.load.progress()[1]

    def end_tee(self, seconds: float = _TEE_SECONDS) -> None:
        """Gives up what is being written to SSD, so that closing really frees the memory."""
        if self.tee is not None:
            self.tee.cancel()
            self.tee.ended.wait(seconds)

    def close(self) -> None:
        if self.dram is not None:
            self.dram.close()
            self.dram = None
        if self.manifest_fd >= 0:
            os.close(self.manifest_fd)
            self.manifest_fd = -1


@dataclass(slots=True)
class PendingRequest:
    """A request under way, about a URI. `evict_image` is one whose images are to go once the memory is given back."""

    holder: Holder
    model: str = ""
    start: int = field(default_factory=time.monotonic_ns)
    evict_image: str = ""


class Errand:
    """A holder that waits for a model and lets go of it at once."""

    pod = ""
    caller = NOBODY
    grant = EVERYTHING

    def __init__(self, uri: str, later: Callable[[Callable[[], None]], None], release: Callable[[int], None]) -> None:
        """`later(work)` runs it when whoever delivers is done with deciding."""
        self.lease = 0
        self._uri, self._later, self._release = uri, later, release

    def deliver(self, message: Message, fds: list[int], _load: ModelLoad | None = None) -> None:
        for fd in fds:
            os.close(fd)
        if isinstance(message, ErrorReply):
            log.warning("prefetching %s failed: %s", self._uri, message.text)
        if isinstance(message, LeaseReady):
            log.info("prefetched %s from %s", self._uri, message.tier)
        if isinstance(message, (LeaseReady, ErrorReply)):
            self._later(lambda: self._release(self.lease))


class Resident(NamedTuple):
    """An entry that is there already, and its revision."""

    entry: int
    revision: str


class Resolution(NamedTuple):
    description: Description
    origin: Origin
    phases: Ledger
    revision: str = ""
    answers: bool = True  # the origin, when it was asked
