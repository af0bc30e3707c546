"""Owns a node's books: residency's machine and the memory behind each of its entries, under one lock.

Whoever decides or looks does so under `lock`; whoever acts does it outside.
"""

from __future__ import annotations

import threading
import time

from cache_agent.policy.estimate import Estimate, Estimator, shared
from cache_agent.residency import adoption, report
from cache_agent.residency.leases import EntryMemory, Resident
from cache_agent.residency.machine import Residency
from cache_agent.wire.operations import EstimateReply, ModelStatus, TierStatus


class ResidencyLedger:
    """Every method may be called from any thread; the fields are for who holds `lock`."""

    def __init__(self, capacity: int, revalidate: float) -> None:
        """As `Residency`."""
        self.lock = threading.RLock()  # guards everything below
        self.residency = Residency(capacity, revalidate)
        self.memories: dict[int, EntryMemory] = {}
        self.closing = False
        self._estimator = Estimator()

    def memory_of(self, source: str) -> EntryMemory | None:
        """The copy in memory, or on its way there."""
        with self.lock:
            entry = self.residency.entry_with(source)
            return self.memories.get(entry.number) if entry is not None else None

    def resident(self, inodes: list[tuple[int, int]]) -> Resident | None:
        """The entry whose memory this is."""
        with self.lock:
            for number, memory in self.memories.items():
                if memory.dram is not None and adoption.inodes(memory.dram.fds) == inodes:
                    return Resident(number, self.residency.entries[number].revision)
        return None

    def is_resident(self, uri: str) -> bool:
        """In memory, or on its way there."""
        with self.lock:
            return self.residency.entry_of(uri) is not None

    def pinned(self) -> set[str]:
        """Sources of the models that are kept."""
        with self.lock:
            return self.residency.pinned

    def answers(self, seconds: float) -> bool:
        """Whether anything can be decided within so many seconds."""
        if not self.lock.acquire(timeout=seconds):
            return False
        self.lock.release()
        return True

    def status(self) -> tuple[int, int, list[ModelStatus]]:
        """(capacity, used, models); bytes."""
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
        """What a lease on a model that is here, or on its way, would take now."""
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
        """What a load of so many bytes from this tier would take now."""
        with self.lock:
            return EstimateReply(*self._estimator.predict(tier, self._work(tier, size)), size)

    def expect(self, memory: EntryMemory) -> Estimate:
        """What a load that begins now will take; it notes its work."""
        with self.lock:
            memory.work = self._work(memory.tier, memory.description.manifest.nbytes)
            return self._estimator.predict(memory.tier, memory.work)

    def learn(self, memory: EntryMemory, expected: Estimate, seconds: float) -> None:
        """What it took."""
        with self.lock:
            self._estimator.learn(memory.tier, memory.work, expected, seconds)

    def _work(self, tier: str, size: int) -> int:
        """Bytes that pass on the tier until `size` of a load are through; under the lock."""
        return shared(size, (memory.rest() for memory in self.memories.values() if memory.tier == tier))
