"""What ties a load to the SSD tier: the tee that keeps a model there, and the repair of an image found damaged."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Collection

from cache_agent.loader import Load
from cache_agent.manifest import Manifest
from cache_agent.tee import Tee
from cache_agent.tiers.dram import Dram
from cache_agent.tiers.ssd import Ssd, Writing


def follow(ssd: Ssd, dram: Dram, plan: Manifest, uri: str, revision: str, keep: Callable[[], Collection[str]]) -> Tee:
    """A tee that writes the model in `dram` to SSD and seals it in the end; `keep()` gives sources not to evict."""

    def begin() -> Writing | None:
        writing = ssd.begin(plan, uri, keep())
        if writing is not None and revision:
            ssd.remember(plan.source, revision)
        return writing

    return Tee(plan, begin, dram.map(), dram.seal)


def repair(ssd: Ssd, load: Load, maps: list[mmap.mmap]) -> None:
    """Writes the chunks that the load found damaged anew, from memory; closes `maps`."""
    chunks = list(load.manifest.chunks())
    try:
        with contextlib.ExitStack() as views:
            damaged = []
            for segment, start, end in (chunks[number] for number in load.damaged):
                view = views.enter_context(memoryview(maps[segment]))
                damaged.append((segment, start, views.enter_context(view[start:end])))
            ssd.repair(load.manifest.source, damaged)
    finally:
        for mapping in maps:
            mapping.close()
