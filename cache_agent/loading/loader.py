"""Owns the loading of one model into memory: the source of each chunk, checksums, proof, progress.

`ModelLoad.run` takes chunks from an image on SSD, then from a helper (other nodes), then the rest from the origin.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import xxhash

from cache_agent.errors import OriginChanged
from cache_agent.loading.reader import OriginReader
from cache_agent.loading.tee import Tee
from cache_agent.model import content
from cache_agent.model.checkpoint import Description
from cache_agent.model.origin import Origin
from cache_agent.tiers.dram import Dram
from cache_agent.tiers.ssd import Reading
from cache_agent.wire.peers import ChunkStatement

log = logging.getLogger("glowplug.loader")


class Helper(Protocol):
    """The filling of a load's chunks from other nodes, for as long as those have some; the origin has the rest."""

    def run(self) -> None:
        """Fill chunks. Raises the `AgentError` of an origin that does not deliver."""
        ...

    def reading(self) -> list[int]:
        """Return the chunks that are being read from the origin now."""
        ...

    def invite(self, node: str, address: str) -> None:
        """Take note of another node that loads the same model."""
        ...

    def blame(self, peer: str, why: str) -> None:
        """Take note that a peer gave wrong bytes."""
        ...


class ModelLoad:
    """One load. Progress may be read, and watched, from any thread."""

    def __init__(
        self,
        description: Description,
        origin: Origin,
        dram: Dram,
        *,
        readers: int = 4,
        image: Reading | None = None,
        with_digests: bool = False,
        known: str = "",
    ) -> None:
        """Prepare a load with at most `readers` parallel reads; how many there are depends on what the origin yields.

        With an `image` the bytes come from there, and only its damaged chunks from the origin. With `with_digests` the
        digest of every chunk is computed for other nodes. `known` is the revision that the bytes must have when peers
        gave some of them, or "".
        """
        self.description = description
        self.manifest = description.manifest
        self.dram = dram
        self.total = self.manifest.nbytes
        self.image = image
        self.helper: Helper | None = None
        self.proved = ""  # the revision that the bytes were shown to have
        self.given: dict[int, str] = {}  # chunk -> the peer that gave it
        self.statements: list[ChunkStatement] = []  # of every chunk, in the order of arrival
        self._digests: dict[int, str] = {}
        self._settled = False  # whether no chunk of a peer can turn out to be wrong any more
        self._with_digests = with_digests
        self.damaged: list[int] = []  # chunks that are wrong in the image
        self.tee: Tee | None = None
        self._most = readers
        self._origin = origin
        self._chunks = list(self.manifest.chunks())
        self.checksums = [0] * len(self._chunks)  # xxh3-64 of every chunk
        self._finished = [False] * len(self._chunks)
        self._done = 0
        self._ready = [0] * len(self.manifest.segments)
        self._prefix = [
            next(number for number, chunk in enumerate(self._chunks) if chunk[0] == segment)
            for segment in range(len(self.manifest.segments))
        ]
        self.known = known
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.finished = threading.Event()
        self.reader = OriginReader(description, origin, dram, self._finish, self._stopped, readers)
        self._watchers: list[Callable[[], None]] = []
        self.observer: Callable[[], None] | None = None  # the agent's watcher, for the whole load

    def progress(self) -> tuple[list[int], int]:
        """Return (verified bytes from the start of each segment without a hole, all verified bytes)."""
        with self._lock:
            return list(self._ready), self._done

    def watch(self, wake: Callable[[], None]) -> None:
        """Call `wake` after every chunk, from a reader's thread; `wake` must neither block nor raise."""
        with self._lock:
            self._watchers.append(wake)

    def unwatch(self, wake: Callable[[], None]) -> None:
        with self._lock:
            if wake in self._watchers:
                self._watchers.remove(wake)

    def stop(self) -> None:
        """Make `run` give up soon."""
        self._stopped.set()

    def run(self) -> None:
        """Fill the segments, and freeze them. Raises the first `AgentError` that retries did not cure."""
        try:
            if self.image is not None:
                self._read_image(self.image)
            if self.helper is not None:
                self.helper.run()
            self.reader.read(self.missing())
            if self.given and self.known:
                self._prove()
            with self._lock:
                self._settled = True
                for segment in range(len(self._ready)):
                    self._advance(segment)
            self.dram.freeze()
            if self.tee is None:  # the end of a tee seals the memory otherwise
                self.dram.seal()
        finally:
            self.finished.set()

    def _prove(self) -> None:
        """Check that the bytes have the known revision, and read the peers' chunks from the origin if they have not."""
        for _ in range(2):
            maps = self.dram.map()
            try:
                right = content.gaps_are_zero(self.manifest, maps) and (
                    content.digest(self.description, maps) == self.known
                )
            finally:
                for mapping in maps:
                    mapping.close()
            if right:
                self.proved = self.known
                return
            if not self.given:  # all bytes are the origin's: the known revision is wrong, as admission will find
                log.warning("%s was said to be %s and is not", self._origin.uri, self.known)
                return
            log.warning("%s: what peers gave is not %s; reading the origin", self._origin.uri, self.known)
            given = {number: (peer, self.checksums[number]) for number, peer in self.given.items()}
            for number in given:
                self.reopen(number)
            self.reader.read(self.missing())
            for number, (peer, checksum) in given.items():
                if checksum != self.checksums[number] and self.helper is not None:
                    self.helper.blame(peer, f"chunk {number} of {self._origin.uri} is not what it gave")

    # --- for a helper ---------------------------------------------------------------------------------------------

    def missing(self) -> list[int]:
        with self._lock:
            return [number for number, finished in enumerate(self._finished) if not finished]

    def reading(self) -> list[int]:
        """Return the chunks that are being read from the origin now, for other nodes."""
        return self.helper.reading() if self.helper is not None else []

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def view(self, number: int) -> memoryview:
        """Return the memory of a chunk, which only the caller fills, and releases."""
        return self.dram.view(*self._chunks[number])

    def accept(self, number: int, digest: str, peer: str) -> None:
        """Count a chunk as complete that `peer` gave; `digest` is that of a node which read it from the origin."""
        with self.view(number) as chunk:
            self.checksums[number] = xxhash.xxh3_64_intdigest(chunk)
        with self._lock:
            self.given[number] = peer
        self._complete(number, digest)

    def fits(self, number: int) -> bool:
        """Return whether a chunk's memory fits the image's checksum; True for a load without an image."""
        if self.image is None:
            return True
        with self.view(number) as chunk:
            return self.image.proves(number, chunk)

    def has(self, number: int) -> bool:
        """Return whether a chunk is complete."""
        with self._lock:
            return self._finished[number]

    def digest_of(self, number: int) -> str:
        """Return the digest of a complete chunk, or ""."""
        with self._lock:
            return self._digests.get(number, "") if self._finished[number] else ""

    def reopen(self, number: int) -> None:
        """Count a chunk as missing again, because its bytes are wrong."""
        segment, start, end = self._chunks[number]
        self._clear(number)
        with self._lock:
            self.given.pop(number, None)
            if not self._finished[number]:
                return
            self._finished[number] = False
            self._done -= end - start
            if self._prefix[segment] > number:
                self._prefix[segment], self._ready[segment] = number, start
        if self.tee is not None:  # the tee may have written the chunk already
            self.tee.cancel()

    # --- reading --------------------------------------------------------------------------------------------------

    def _read_image(self, image: Reading) -> None:
        """Take every chunk that is right in the image; the others are in `damaged` afterwards."""
        with ThreadPoolExecutor(min(self._most, len(self._chunks)), thread_name_prefix="image") as pool:
            for _ in pool.map(lambda number: self._from_image(image, number), range(len(self._chunks))):
                pass

    def _from_image(self, image: Reading, number: int) -> None:
        if self._stopped.is_set():
            return
        segment, start, _ = self._chunks[number]
        with self.view(number) as chunk:
            try:
                right, why = image.read(number, segment, start, chunk), "its checksum does not fit"
            except OSError as error:
                right, why = False, error.strerror or str(error)
        if right:
            self.checksums[number] = image.index.checksums[number]
            self._complete(number, self._digest_for_peers(number))
            return
        self._clear(number)
        log.warning("chunk %d of %s on SSD is damaged (%s); reading the origin", number, self._origin.uri, why)
        with self._lock:
            self.damaged.append(number)

    def _clear(self, number: int) -> None:
        """Zero a chunk's memory: an origin brings only tensors, and the gaps between them must be zero."""
        with self.view(number) as chunk:
            chunk[:] = bytes(len(chunk))

    def _finish(self, number: int) -> None:
        """Check a chunk whose bytes all came from the origin, and count it as complete."""
        with self.view(number) as chunk:
            self.checksums[number] = xxhash.xxh3_64_intdigest(chunk)
        if self.image is not None and self.checksums[number] != self.image.index.checksums[number]:
            raise OriginChanged(f"{self._origin.uri}: a file was overwritten without a new date or ETag")
        self._complete(number, self._digest_for_peers(number), own=True)

    def _advance(self, segment: int) -> None:
        """Count the bytes that are complete from the start of a segment; the caller holds the lock.

        Chunks from peers count only at the end of the load: until then they may turn out to be wrong, and functions may
        run the model's first layers as soon as those are counted.
        """
        position = self._prefix[segment]
        while position < len(self._chunks) and self._chunks[position][0] == segment and self._finished[position]:
            if position in self.given and not self._settled:
                break
            self._ready[segment] = self._chunks[position][2]
            position += 1
        self._prefix[segment] = position

    def _digest_for_peers(self, number: int) -> str:
        """Return the digest of a chunk for other nodes, or "" where there are none."""
        if not self._with_digests:
            return ""
        with self.view(number) as chunk:
            return content.chunk_digest(chunk)

    def _complete(self, number: int, digest: str, *, own: bool = False) -> None:
        """Count a chunk whose bytes are final, and wake the watchers."""
        segment, start, end = self._chunks[number]
        with self._lock:
            if self._with_digests:
                self.statements.append(ChunkStatement(number, digest, own))
                self._digests[number] = digest
            self._finished[number] = True
            self._done += end - start
            self._advance(segment)
            watchers = [*self._watchers, *([self.observer] if self.observer else ())]
        if self.tee is not None:
            self.tee.add(number)
        for wake in watchers:
            wake()
