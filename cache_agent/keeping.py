"""What ties a node's loads to its SSD tier, where it has one: images read and written, repaired, given up, evicted."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Collection

from cache_agent import report
from cache_agent.loader import Load
from cache_agent.manifest import Manifest
from cache_agent.messages import SsdStatus
from cache_agent.tee import Tee
from cache_agent.tiers.dram import Dram
from cache_agent.tiers.ssd import Reading, Ssd, Stored, Writing


class Keeping:
    """Any thread. Without an SSD there is nothing to find and nothing is kept."""

    def __init__(self, ssd: Ssd | None, pinned: Callable[[], Collection[str]]) -> None:
        """`pinned()` are the sources whose images must stay."""
        self._ssd = ssd
        self._pinned = pinned

    def find(self, uri: str) -> Stored | None:
        """The image of the model at `uri` that was used last."""
        return self._ssd.find(uri) if self._ssd else None

    def open(self, plan: Manifest) -> Reading | None:
        return self._ssd.open(plan) if self._ssd else None

    def follow(self, dram: Dram, plan: Manifest, uri: str, revision: str) -> Tee | None:
        """A tee that writes the model in `dram` to SSD and seals it in the end."""
        if self._ssd is None:
            return None
        ssd = self._ssd

        def begin() -> Writing | None:
            writing = ssd.begin(plan, uri, self._pinned())
            if writing is not None and revision:
                ssd.remember(plan.source, revision)
            return writing

        return Tee(plan, begin, dram.map(), dram.seal)

    def discard(self, source: str) -> None:
        """Gives an image up whose damage cannot be mended any more."""
        if self._ssd is not None:
            self._ssd.discard(source, "damaged, and the origin has other bytes now")

    def repair(self, load: Load, maps: list[mmap.mmap]) -> None:
        """Writes the chunks that the load found damaged anew, from memory; closes `maps`."""
        chunks = list(load.manifest.chunks())
        try:
            with contextlib.ExitStack() as views:
                damaged = []
                for segment, start, end in (chunks[number] for number in load.damaged):
                    view = views.enter_context(memoryview(maps[segment]))
                    damaged.append((segment, start, views.enter_context(view[start:end])))
                if self._ssd is not None:
                    self._ssd.repair(load.manifest.source, damaged)
        finally:
            for mapping in maps:
                mapping.close()

    def evict(self, uri: str) -> int:
        """Bytes given back; 0 where there is no image, or loads read it."""
        return self._ssd.evict(uri) if self._ssd else 0

    def status(self) -> SsdStatus | None:
        return report.ssd(self._ssd.directory, self._ssd.capacity, *self._ssd.status()) if self._ssd else None

    def close(self) -> None:
        if self._ssd is not None:
            self._ssd.close()
