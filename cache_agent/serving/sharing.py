"""Owns what this node gives to other nodes' agents: a model's description, its chunks, and news of arrivals."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import NamedTuple

from cache_agent.errors import ModelNotFound
from cache_agent.loading.loader import ModelLoad
from cache_agent.model import content
from cache_agent.model.checkpoint import encode_description
from cache_agent.model.manifest import LAYOUT
from cache_agent.residency.memory import EntryMemory
from cache_agent.residency.retention import Retention
from cache_agent.wire.link import Link
from cache_agent.wire.peers import Chunk, ChunkStatement, Described

_MOST_NEWS = 4096  # chunks in one message


class Sharing:
    """The models of this node, as other nodes read them. Any thread; the caller's thread sends."""

    def __init__(
        self, memory_of: Callable[[str], EntryMemory | None], lock: threading.RLock, retention: Retention
    ) -> None:
        """`memory_of(source)` is the copy in memory, which stays open while `lock` is held."""
        self._memory_of, self._lock, self._retention = memory_of, lock, retention

    def invite(self, source: str, node: str, address: str) -> None:
        """Let the load of a source know of a node that loads the same, to take chunks from it."""
        memory = self._memory_of(source)
        if memory is not None and memory.load is not None and memory.load.helper is not None:
            memory.load.helper.invite(node, address)

    def send(self, link: Link, source: str, number: int, layout: int) -> None:
        """Send a chunk from memory or SSD. Raises `ModelNotFound` when it is not here, or `Disconnected`."""
        if layout != LAYOUT:
            raise ModelNotFound(f"this agent lays models out as version {LAYOUT}, not {layout}")
        borrowed = self._borrow(source, number)
        if borrowed is not None:
            try:
                link.send(Chunk(borrowed.digest, borrowed.size))
                link.send_file(borrowed.fd, borrowed.start, borrowed.size)
            finally:
                os.close(borrowed.fd)
            return
        with self._retention.read(source, number) as chunk:
            if chunk is None:
                raise ModelNotFound(f"chunk {number} of {source} is not on this node now")
            link.send(Chunk(content.chunk_digest(chunk), len(chunk)))
            link.send_bytes(chunk)

    def _borrow(self, source: str, number: int) -> BorrowedChunk | None:
        """Return a verified chunk in memory, or None."""
        with self._lock:
            memory = self._memory_of(source)
            place = memory.description.manifest.chunk_place(number) if memory is not None else None
            if memory is None or memory.dram is None or place is None:
                return None
            if memory.load is not None and not memory.load.has(number):
                return None
            segment, start, end = place
            digest = memory.load.digest_of(number) if memory.load is not None else ""
            return BorrowedChunk(os.dup(memory.dram.fds[segment]), start, end - start, digest)

    def describe(self, link: Link, source: str) -> None:
        """Send the headers and small files of a model. Raises `ModelNotFound`, `Disconnected`."""
        memory = self._memory_of(source)
        if memory is not None:
            data = encode_description(memory.description)
        elif (found := self._retention.description(source)) is not None:
            data = encode_description(found[0])
        else:
            raise ModelNotFound(f"{source} is not on this node now")
        link.send(Described(len(data)))
        link.send_bytes(data)

    def follow(self, source: str) -> Following:
        """Begin to follow which chunks of a source arrive here. Raises `ModelNotFound` when nothing of it is here."""
        memory = self._memory_of(source)
        if memory is not None:
            return Following(source, memory, memory.load, memory.description.manifest.chunk_count, self._memory_of)
        if (chunks := self._retention.chunks(source)) == 0:
            raise ModelNotFound(f"{source} is not on this node now")
        return Following(source, None, None, chunks, self._memory_of)


class BorrowedChunk(NamedTuple):
    """A chunk in memory; `fd` is the borrower's to close."""

    fd: int
    start: int
    size: int
    digest: str


class Following:
    """The state of one other node that follows a source: which chunks it knows of. One thread."""

    def __init__(
        self,
        source: str,
        memory: EntryMemory | None,
        load: ModelLoad | None,
        chunks: int,
        find: Callable[[str], EntryMemory | None],
    ) -> None:
        self.load = load
        self._source, self._of, self._find = source, memory, find
        self._chunks = chunks
        self._sent = 0
        self.reading: list[int] = []

    @property
    def over(self) -> bool:
        """Whether the followed copy has left the memory, or its load has failed."""
        return self._of is not None and self._find(self._source) is not self._of

    def news(self) -> tuple[list[ChunkStatement], list[int]] | None:
        """Return chunks that have come, and those being read from the origin now; None where nothing has changed."""
        if self.load is not None and self.load.statements:
            said = self.load.statements[self._sent : self._sent + _MOST_NEWS]
            reading = self.load.reading()
        elif self.load is not None and not self.load.finished.is_set():
            said, reading = [], self.load.reading()
        else:  # all chunks are here and have no digests; a receiver verifies the whole model
            said = [ChunkStatement(number) for number in range(self._sent, min(self._sent + _MOST_NEWS, self._chunks))]
            reading = []
        if not said and reading == self.reading:
            return None
        self._sent += len(said)
        self.reading = reading
        return said, reading
