"""Owns the memory behind one residency entry: its segments and manifest, the load and the tee that fill them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cache_agent.ledger import Ledger
from cache_agent.loading.loader import ModelLoad
from cache_agent.loading.tee import Tee
from cache_agent.model.checkpoint import Description
from cache_agent.model.manifest import encode
from cache_agent.tiers.dram import Dram
from cache_agent.wire.blobs import sealed_bytes

_TEE_SECONDS = 10.0  # a disk that hangs for longer keeps the memory until the disk comes back


class Resident(NamedTuple):
    """The number of an entry that is in memory, and its revision."""

    entry: int
    revision: str


@dataclass(slots=True)
class EntryMemory:
    """The memory of one entry; `tier` is where its bytes came from, `phases` are the spans of its load."""

    description: Description
    phases: Ledger
    dram: Dram | None = None
    load: ModelLoad | None = None
    tee: Tee | None = None
    tier: str = "origin"
    work: int = 0  # bytes that pass on its tier until the entry is loaded
    manifest_fd: int = -1
    manifest_bytes: int = 0
    began: float = field(default_factory=time.monotonic)

    def keep_manifest(self) -> None:
        """Put the manifest into a memfd of its own, which leases get beside the segments."""
        encoded = encode(self.description.manifest)
        self.manifest_fd, self.manifest_bytes = sealed_bytes(encoded, "glowplug:manifest"), len(encoded)

    def rest(self) -> int:
        """Return the bytes that the load has yet to read; 0 without a load, or after its end."""
        if self.load is None or self.load.finished.is_set():
            return 0
        return self.load.total - self.load.progress()[1]

    def end_tee(self, seconds: float = _TEE_SECONDS) -> None:
        """Give up the image that is being written to SSD, so that `close` really frees the memory."""
        if self.tee is not None:
            self.tee.cancel()
            self.tee.ended.wait(seconds)

    def close(self) -> None:
        """Close the agent's descriptors; functions that map the segments keep them."""
        if self.dram is not None:
            self.dram.close()
            self.dram = None
        if self.manifest_fd >= 0:
            os.close(self.manifest_fd)
            self.manifest_fd = -1


def inodes(fds: Sequence[int]) -> list[tuple[int, int]]:
    """Return the device and inode of each fd: equal lists are the same memory, whichever process opened the fds."""
    found = [os.fstat(fd) for fd in fds]
    return [(status.st_dev, status.st_ino) for status in found]
