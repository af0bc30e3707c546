"""Owns the ledger of a node's residency: the state machine and the memory behind each of its entries, under one lock.

Decisions and looks are taken under `lock`; work is done outside.
"""

from __future__ import annotations

import threading
import time

from cache_agent.policy.estimate import Estimate, Estimator, shared
from cache_agent.residency import report
from cache_agent.residency.machine import Residency
from cache_agent.residency.memory import EntryMemory, Resident, inodes
from cache_agent.wire.operations import EstimateReply, ModelStatus, TierStatus


class ResidencyLedger:
    """The state of a node's DRAM tier. Methods: any thread; fields: under `lock`."""

    def __init__(self, capacity: int, revalidate: float) -> None:
        """`capacity` in bytes; `revalidate` in seconds, as in `Residency`."""
        self.lock = threading.RLock()  # guards everything below
        self.residency = Residency(capacity, revalidate)
        self.memories: dict[int, EntryMemory] = {}
        self.closing = False
        self._estimator = Estimator()

    def memory_of(self, source: str) -> EntryMemory | None:
        """Return the memory of a source's copy, whole or still loading, or None."""
        with self.lock:
            entry = self.residency.entry_with(source)
            return self.memories.get(entry.number) if entry is not None else None

    def resident(self, wanted: list[tuple[int, int]]) -> Resident | None:
        """Return the entry whose segments have these inodes, or None."""
        with self.lock:
            for number, memory in self.memories.items():
                if memory.dram is not None and inodes(memory.dram.fds) == wanted:
                    return Resident(number, self.residency.entries[number].revision)
        return None

    def is_resident(self, uri: str) -> bool:
        """Whether the model at `uri` is in memory, or loading."""
        with self.lock:
            return self.residency.entry_of(uri) is not None

    def pinned(self) -> set[str]:
        """Return the sources of the pinned models."""
        with self.lock:
            return self.residency.pinned

    def answers(self, seconds: float) -> bool:
        """Whether the lock can be had within so many seconds, so that anything can be decided."""
        if not self.lock.acquire(timeout=seconds):
            return False
        self.lock.release()
        return True

    def status(self) -> tuple[int, int, list[ModelStatus]]:
        """Return (capacity, used, models), the first two in bytes."""
        now = time.monotonic()
        with self.lock:
            machine = self.residency
            models = [
                report.model(entry, self.memories.get(entry.number), machine.is_pinned(entry), now)
                for entry in machine.entries.values()
            ]
            return machine.capacity, machine.used, models

    # --- how long things take -------------------------------------------------------------------------------------

    def tiers(self) -> list[TierStatus]:
        with self.lock:
            return report.tiers(self._estimator.tiers)

    def estimate(self, uri: str) -> EstimateReply | None:
        """Estimate a lease on a model that is in memory or loading; None for another model."""
        with self.lock:
            entry = self.residency.entry_of(uri)
            if entry is None:
                return None
            memory = self.memories.get(entry.number)
            if entry.state == "ready" or memory is None:
                return EstimateReply(0.0, "dram", 1.0, entry.bytes)
            return EstimateReply(
                *self._estimator.predict(memory.tier, self._work(memory.tier, memory.rest())), entry.bytes
            )

    def predict(self, tier: str, size: int) -> EstimateReply:
        """Estimate a load of `size` bytes from `tier` that would begin now."""
        with self.lock:
            return EstimateReply(*self._estimator.predict(tier, self._work(tier, size)), size)

    def expect(self, memory: EntryMemory) -> Estimate:
        """Estimate the load that begins now, and note its work for `learn`."""
        with self.lock:
            memory.work = self._work(memory.tier, memory.description.manifest.nbytes)
            return self._estimator.predict(memory.tier, memory.work)

    def learn(self, memory: EntryMemory, expected: Estimate, seconds: float) -> None:
        """Correct the estimates of the tier by the seconds that the load took."""
        with self.lock:
            self._estimator.learn(memory.tier, memory.work, expected, seconds)

    def _work(self, tier: str, size: int) -> int:
        """Return the bytes that pass on the tier until `size` of one load are through. Under the lock."""
        return shared(size, (memory.rest() for memory in self.memories.values() if memory.tier == tier))
