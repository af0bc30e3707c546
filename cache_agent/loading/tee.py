"""Owns the writing of a model's image to SSD while its bytes still arrive: a thread that follows a load, or memory.

The thread reads the segments through read-only mappings, so that `ready` does not wait for the disk. Its queue holds
numbers of chunks, never bytes. The segments are sealed after the tee, because the kernel refuses a seal while a page is
being written out. An error here costs the image and nothing else.
"""

from __future__ import annotations

import logging
import mmap
import queue
import threading
from collections.abc import Callable, Sequence

import xxhash

from cache_agent.model.manifest import Manifest
from cache_agent.tiers.ssd import Writing

log = logging.getLogger("glowplug.ssd")


class Tee:
    """Write chunks as they finish, until `complete` or `cancel`; `ended` is set when files and maps are closed."""

    def __init__(
        self,
        plan: Manifest,
        begin: Callable[[], Writing | None],
        maps: list[mmap.mmap],
        on_end: Callable[[], None],
    ) -> None:
        """Take over `maps`, and start the thread, in which `begin` and `on_end` are called.

        `begin` returns the image to write, or None where none is wanted; it may block. `on_end` is called once, after
        `complete` or `cancel`, whether the image was written or not.
        """
        self._chunks = list(plan.chunks())
        self._begin = begin
        self._maps = maps
        self._on_end = on_end
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._over = False  # whether the end was taken from the queue
        self._checksums: Sequence[int] = ()
        self._seconds = 0.0
        self.ended = threading.Event()
        threading.Thread(target=self._run, name="tee", daemon=True).start()

    def add(self, chunk: int) -> None:
        """Queue a chunk, whose bytes are final."""
        self._queue.put(chunk)

    def follow_memory(self, maps: list[mmap.mmap], seconds: float) -> None:
        """Add all chunks of a model that is complete in memory, while computing their checksums; closes `maps`.

        `seconds` is the time that loading the model would take.
        """
        checksums = []
        try:
            for number, (segment, start, end) in enumerate(self._chunks):
                if self._cancelled.is_set():
                    return
                with memoryview(maps[segment]) as view, view[start:end] as chunk:
                    checksums.append(xxhash.xxh3_64_intdigest(chunk))
                self.add(number)
            self.complete(checksums, seconds)
        finally:
            for mapping in maps:
                mapping.close()

    def complete(self, checksums: Sequence[int], seconds: float) -> None:
        """End the image after all chunks were added; the load took `seconds`."""
        self._checksums, self._seconds = checksums, seconds
        self._queue.put(None)

    def cancel(self) -> None:
        """Give up after the chunk that is being written."""
        self._cancelled.set()
        self._queue.put(None)

    def _run(self) -> None:
        try:
            if (writing := self._begin()) is not None:
                self._follow(writing)
        except Exception:
            log.exception("keeping a model on SSD failed")
        finally:
            while not self._over:
                self._next()
            for mapping in self._maps:
                mapping.close()
            self._on_end()
            self.ended.set()

    def _follow(self, writing: Writing) -> None:
        whole = False
        try:
            whole = self._write(writing)
        except OSError as error:
            log.warning("%s is not kept on SSD: %s", writing.uri, error.strerror or error)
        finally:
            if not whole:
                writing.abandon()

    def _write(self, writing: Writing) -> bool:
        """Write chunks until the end of the queue; return whether the image is whole, and committed."""
        written = 0
        while (number := self._next()) is not None:
            if self._cancelled.is_set():
                return False
            segment, start, end = self._chunks[number]
            with memoryview(self._maps[segment]) as view, view[start:end] as chunk:
                writing.write(segment, start, chunk)
            written += 1
        if self._cancelled.is_set() or written != len(self._chunks):
            return False
        writing.commit(self._checksums, self._seconds)
        log.info("%s is on SSD", writing.uri)
        return True

    def _next(self) -> int | None:
        number = self._queue.get()
        self._over = number is None
        return number
