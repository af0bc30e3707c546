"""Owns the bytes of one model on their way into memory: from where each chunk comes, checksums, proof, progress."""

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
from cache_agent.wire.peers import Said

log = logging.getLogger("glowplug.loader")


class Helper(Protocol):
    """Fills chunks of a load from elsewhere than its origin, for as long as that helps; then the rest is read there."""

    def run(self) -> None:
        """Raises the `AgentError` of an origin that will not deliver."""
        ...

    def reading(self) -> list[int]:
        """Chunks that are being read from the origin now."""
        ...

    def invite(self, node: str, address: str) -> None:
        """Another node loads the same."""
        ...

    def blame(self, peer: str, why: str) -> None:
        """What a peer gave turned out to be wrong."""
        ...


class ModelLoad:
    """The bytes of one model on their way. Progress may be read, and watched, from any thread."""

    def __init__(
        self,
        description: Description,
        origin: Origin,
        dram: Dram,
        *,
        readers: int = 4,
        image: Reading | None = None,
        speaks: bool = False,
        known: str = "",
    ) -> None:
        """`readers` is the largest number of parallel reads; how many there are depends on what the origin yields.

        With an `image` the bytes come from there, and only chunks that are damaged in it from the origin. A load that
        `speaks` computes what other nodes need to check its chunks. `known` is the revision that the bytes have to be
        when peers gave some of them.
        """
        self.description = description
        self.manifest = description.manifest
        self.dram = dram
        self.total = self.manifest.nbytes
        self.image = image
        self.helper: Helper | None = None
        self.proved = ""  # the revision that the bytes were shown to be
        self.given: dict[int, str] = {}  # chunks that came from peers, and from whom
        self.said: list[Said] = []  # of every chunk, in the order in which they came; only ever longer
        self._digests: dict[int, str] = {}
        self._settled = False  # nothing that peers gave can turn out to be wrong any more
        self._speaks = speaks
        self.damaged: list[int] = []  # chunks that the image had wrong
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
        self.observer: Callable[[], None] | None = None  # the agent's own; like a watcher, for the whole load

    def progress(self) -> tuple[list[int], int]:
        """(verified bytes from the start of each segment without a hole, all verified bytes)."""
        with self._lock:
            return list(self._ready), self._done

    def watch(self, wake: Callable[[], None]) -> None:
        """Calls `wake` after every chunk, from a reader's thread: it must neither block nor raise."""
        with self._lock:
            self._watchers.append(wake)

    def unwatch(self, wake: Callable[[], None]) -> None:
        with self._lock:
            if wake in self._watchers:
                self._watchers.remove(wake)

    def stop(self) -> None:
        """Makes `run` give up soon."""
        self._stopped.set()

    def run(self) -> None:
        """Fills the segments and gives up writing to them. Raises the first `AgentError` that retries did not cure."""
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
            if self.tee is None:  # otherwise the tee does it at its end
                self.dram.seal()
        finally:
            self.finished.set()

    def _prove(self) -> None:
        """What peers gave has to be the revision that this source is said to be, or comes from the origin after all."""
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
            if not self.given:  # all is the origin's now: what was said of it is wrong, and admission will tell
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
        """Chunks that are being read from the origin now."""
        return self.helper.reading() if self.helper is not None else []

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def view(self, number: int) -> memoryview:
        """The memory of a chunk, which the caller alone fills; the caller releases it."""
        segment, start, end = self._chunks[number]
        view = self.dram.segments[segment].view
        assert view is not None, "segments are sealed only after all readers are done"
        return view[start:end]

    def accept(self, number: int, digest: str, peer: str) -> None:
        """A chunk's memory was filled by a peer, and its digest is the one that is believed."""
        with self.view(number) as chunk:
            self.checksums[number] = xxhash.xxh3_64_intdigest(chunk)
        with self._lock:
            self.given[number] = peer
        self._complete(number, digest)

    def fits(self, number: int) -> bool:
        """Whether a chunk's memory is what a damaged image on SSD once had there; True where there is none."""
        if self.image is None:
            return True
        with self.view(number) as chunk:
            return self.image.proves(number, chunk)

    def has(self, number: int) -> bool:
        """A chunk is here, whole and right."""
        with self._lock:
            return self._finished[number]

    def said_of(self, number: int) -> str:
        """The digest of a chunk that is here, or ""."""
        with self._lock:
            return self._digests.get(number, "") if self._finished[number] else ""

    def reopen(self, number: int) -> None:
        """What is in a chunk's memory is not to be believed any more."""
        segment, start, end = self._chunks[number]
        with self.view(number) as chunk:
            chunk[:] = bytes(len(chunk))  # the origin has nothing for the gaps between tensors, which are zero
        with self._lock:
            self.given.pop(number, None)
            if not self._finished[number]:
                return
            self._finished[number] = False
            self._done -= end - start
            if self._prefix[segment] > number:
                self._prefix[segment], self._ready[segment] = number, start
        if self.tee is not None:  # it may have written the chunk already
            self.tee.cancel()

    # --- reading --------------------------------------------------------------------------------------------------

    def _read_image(self, image: Reading) -> None:
        """Takes every chunk that is right in the image; the others are in `damaged` afterwards."""
        with ThreadPoolExecutor(min(self._most, len(self._chunks)), thread_name_prefix="image") as pool:
            for _ in pool.map(lambda number: self._from_image(image, number), range(len(self._chunks))):
                pass

    def _from_image(self, image: Reading, number: int) -> None:
        if self._stopped.is_set():
            return
        segment, start, end = self._chunks[number]
        view = self.dram.segments[segment].view
        assert view is not None, "segments are sealed only after all readers are done"
        with view[start:end] as chunk:
            try:
                right, why = image.read(number, segment, start, chunk), "its checksum does not fit"
            except OSError as error:
                right, why = False, error.strerror or str(error)
            if not right:
                chunk[:] = bytes(len(chunk))  # the origin has nothing for the gaps between tensors, which are zero
        if right:
            self.checksums[number] = image.index.checksums[number]
            self._complete(number, self._spoken(number))
            return
        log.warning("chunk %d of %s on SSD is damaged (%s); reading the origin", number, self._origin.uri, why)
        with self._lock:
            self.damaged.append(number)

    def _finish(self, number: int) -> None:
        """All bytes of a chunk are there."""
        segment, start, end = self._chunks[number]
        view = self.dram.segments[segment].view
        assert view is not None, "segments are sealed only after all readers are done"
        with view[start:end] as chunk:
            self.checksums[number] = xxhash.xxh3_64_intdigest(chunk)
        if self.image is not None and self.checksums[number] != self.image.index.checksums[number]:
            raise OriginChanged(f"{self._origin.uri}: a file was overwritten without a new date or ETag")
        self._complete(number, self._spoken(number), own=True)

    def _advance(self, segment: int) -> None:
        """Counts on from the start of a segment, under the lock.

        What peers gave counts when the load is over: until then it may turn out to be wrong, and somebody may be
        running the model's first layers already.
        """
        position = self._prefix[segment]
        while position < len(self._chunks) and self._chunks[position][0] == segment and self._finished[position]:
            if position in self.given and not self._settled:
                break
            self._ready[segment] = self._chunks[position][2]
            position += 1
        self._prefix[segment] = position

    def _spoken(self, number: int) -> str:
        if not self._speaks:
            return ""
        with self.view(number) as chunk:
            return content.chunk_digest(chunk)

    def _complete(self, number: int, digest: str, *, own: bool = False) -> None:
        """A chunk's bytes are final: counts it, and tells those who wait for it."""
        segment, start, end = self._chunks[number]
        with self._lock:
            if self._speaks:
                self.said.append(Said(number, digest, own))
                self._digests[number] = digest
            self._finished[number] = True
            self._done += end - start
            self._advance(segment)
            watchers = [*self._watchers, *([self.observer] if self.observer else ())]
        if self.tee is not None:
            self.tee.add(number)
        for wake in watchers:
            wake()
