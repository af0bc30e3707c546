"""Ties a node's loads to its SSD tier, if there is one: images are read, written, repaired, discarded, evicted."""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager

from cache_agent.errors import BadCheckpoint
from cache_agent.loading.loader import ModelLoad
from cache_agent.loading.tee import Tee
from cache_agent.model.checkpoint import Description, decode_description, encode_description
from cache_agent.model.manifest import Manifest, chunk_place
from cache_agent.residency import report
from cache_agent.tiers.dram import Dram
from cache_agent.tiers.ssd import Reading, Ssd, Stored, Writing
from cache_agent.wire.operations import SsdStatus

log = logging.getLogger("glowplug.ssd")


@contextlib.contextmanager
def _chunk(ssd: Ssd | None, source: str, number: int) -> Iterator[memoryview | None]:
    reading = ssd.borrow(source) if ssd else None
    if reading is None:
        yield None
        return
    with contextlib.closing(reading):
        place = chunk_place(reading.index.segments, reading.index.chunk, number)
        if place is None:
            yield None
            return
        segment, start, end = place
        # A mapping of its own, because O_DIRECT needs aligned memory.
        with mmap.mmap(-1, end - start) as pages, memoryview(pages) as view:
            try:
                right = reading.read(number, segment, start, view)
            except OSError as error:
                log.warning("chunk %d of %s on SSD cannot be read: %s", number, reading.index.uri, error)
                right = False
            yield view if right else None


class Retention:
    """The images on a node's SSD. Any thread. Without an SSD there are none, and none is written."""

    def __init__(self, ssd: Ssd | None, pinned: Callable[[], Collection[str]]) -> None:
        """`pinned()` returns the sources whose images must stay."""
        self._ssd = ssd
        self._pinned = pinned

    def find(self, uri: str) -> Stored | None:
        """Return the image of the model at `uri` that was used last, or None."""
        return self._ssd.find(uri) if self._ssd else None

    def open(self, plan: Manifest) -> Reading | None:
        return self._ssd.open(plan) if self._ssd else None

    def read(self, source: str, number: int) -> AbstractContextManager[memoryview | None]:
        """Lend one chunk of an image, or None where the chunk is missing or damaged."""
        return _chunk(self._ssd, source, number)

    def chunks(self, source: str) -> int:
        """Return the number of chunks of a source's image; 0 where there is no image."""
        stored = self._ssd.stored(source) if self._ssd else None
        return len(stored.index.checksums) if stored else 0

    def description(self, source: str) -> tuple[Description, float] | None:
        """Return the description kept with a source's image, and when the origin last confirmed it (Unix time)."""
        data, validated = self._ssd.description(source) if self._ssd else (b"", 0.0)
        if not data:
            return None
        try:
            found = decode_description(data)
        except BadCheckpoint as error:
            log.warning("the description of %s on SSD cannot be used: %s", source, error)
            return None
        return (found, validated) if found.source.id == source else None

    def validated(self, source: str) -> None:
        """Note with the image that the origin has confirmed its source just now."""
        if self._ssd is not None:
            self._ssd.validated(source)

    def follow(self, dram: Dram, description: Description, uri: str, revision: str) -> Tee | None:
        """Return a tee that writes the model in `dram` to SSD and seals the memory at its end."""
        if self._ssd is None:
            return None
        ssd, plan = self._ssd, description.manifest

        def begin() -> Writing | None:
            writing = ssd.begin(plan, uri, self._pinned(), encode_description(description))
            if writing is not None and revision:
                ssd.remember(plan.source, revision)
            return writing

        return Tee(plan, begin, dram.map(), dram.seal)

    def discard(self, source: str) -> None:
        """Remove an image whose damaged chunks the origin does not have any more."""
        if self._ssd is not None:
            self._ssd.discard(source, "damaged, and the origin has other bytes now")

    def repair(self, load: ModelLoad, maps: list[mmap.mmap]) -> None:
        """Rewrite the chunks that the load found damaged, from memory; closes `maps`."""
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
        """Remove the images of the model at `uri`; return the bytes freed, 0 where loads read them."""
        return self._ssd.evict(uri) if self._ssd else 0

    def status(self) -> SsdStatus | None:
        return report.ssd(self._ssd.directory, self._ssd.capacity, *self._ssd.status()) if self._ssd else None

    def close(self) -> None:
        if self._ssd is not None:
            self._ssd.close()
