"""Owns the transfer of one model's bytes from its origin into memory: parallel reads, retries, checksums, progress."""

from __future__ import annotations

import hashlib
import logging
import mmap
import random
import threading
from collections.abc import Callable, Iterator, Sequence

import xxhash

from cache_agent import manifest as manifests
from cache_agent.checkpoint import Description
from cache_agent.errors import AgentError, OriginChanged, OriginUnavailable
from cache_agent.manifest import Read, Tensor
from cache_agent.tee import Tee
from cache_agent.tiers.dram import Dram
from cache_agent.tiers.origin import Origin
from cache_agent.tiers.ssd import Reading

log = logging.getLogger("glowplug.loader")

_ATTEMPTS = 5
_HASH_STEP = 8 << 20


class Load:
    """The bytes of one model on their way. Progress may be read, and watched, from any thread."""

    def __init__(
        self, description: Description, origin: Origin, dram: Dram, *, readers: int = 4, image: Reading | None = None
    ) -> None:
        """`readers` is the number of parallel reads; chunks that are damaged in `image` come from the origin."""
        self.description = description
        self.manifest = description.manifest
        self.dram = dram
        self.total = self.manifest.nbytes
        self.image = image
        self.damaged: list[int] = []  # chunks that the image had wrong
        self.tee: Tee | None = None
        self._origin = origin
        self._readers = readers
        self._files = [description.source.file(file.name) for file in self.manifest.weight_files]
        self._chunks = list(self.manifest.chunks())
        self.checksums = [0] * len(self._chunks)  # xxh3-64 of every chunk
        self._finished = [False] * len(self._chunks)
        self._done = 0
        self._ready = [0] * len(self.manifest.segments)
        self._prefix = [
            next(number for number, chunk in enumerate(self._chunks) if chunk[0] == segment)
            for segment in range(len(self.manifest.segments))
        ]
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.finished = threading.Event()
        self._failure: AgentError | None = None
        self._watchers: list[Callable[[], None]] = []

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
        self._stop.set()

    def run(self) -> None:
        """Fills the segments and gives up writing to them. Raises the first `AgentError` that retries did not cure."""
        try:
            self._run()
        finally:
            self.finished.set()

    def _run(self) -> None:
        work = iter(list(enumerate(manifests.reads(self.manifest))))
        take = threading.Lock()
        threads = [
            threading.Thread(target=self._reader, args=(work, take), name=f"reader-{number}", daemon=True)
            for number in range(min(self._readers, len(self._chunks)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise OriginUnavailable(f"{self._origin.uri}: loading was stopped; the agent is shutting down")
        self.dram.freeze()
        if self.tee is None:  # otherwise the tee does it at its end
            self.dram.seal()

    def _reader(self, work: Iterator[tuple[int, list[Read]]], take: threading.Lock) -> None:
        try:
            while not self._stop.is_set():
                with take:
                    item = next(work, None)
                if item is None:
                    return
                self._chunk(*item)
        except AgentError as error:
            self._fail(error)
        except Exception as error:  # a fault of ours must end the load, not a thread that nobody waits for
            log.exception("loading %s failed", self._origin.uri)
            self._fail(AgentError(f"loading {self._origin.uri} failed inside the agent: {error!r}"))

    def _fail(self, error: AgentError) -> None:
        with self._lock:
            self._failure = self._failure or error
        self._stop.set()

    def _chunk(self, number: int, reads: list[Read]) -> None:
        segment, start, end = self._chunks[number]
        view = self.dram.segments[segment].view
        assert view is not None, "segments are sealed only after all readers are done"
        with view[start:end] as chunk:
            if self.image is not None and self._from_image(self.image, number, chunk):
                self.checksums[number] = self.image.index.checksums[number]
            else:
                for read in reads:
                    with view[read.offset : read.offset + read.size] as target:
                        self._read(read, target)
                self.checksums[number] = xxhash.xxh3_64_intdigest(chunk)
                if self.image is not None and self.checksums[number] != self.image.index.checksums[number]:
                    raise OriginChanged(f"{self._origin.uri}: a file was overwritten without a new date or ETag")
        with self._lock:
            self._finished[number] = True
            self._done += end - start
            position = self._prefix[segment]
            while position < len(self._chunks) and self._chunks[position][0] == segment and self._finished[position]:
                self._ready[segment] = self._chunks[position][2]
                position += 1
            self._prefix[segment] = position
            watchers = list(self._watchers)
        if self.tee is not None:
            self.tee.add(number)
        for wake in watchers:
            wake()

    def _from_image(self, image: Reading, number: int, chunk: memoryview) -> bool:
        segment, start, _ = self._chunks[number]
        try:
            if image.read(number, segment, start, chunk):
                return True
            why = "its checksum does not fit"
        except OSError as error:
            why = error.strerror or str(error)
        log.warning("chunk %d of %s on SSD is damaged (%s); reading the origin", number, self._origin.uri, why)
        chunk[:] = bytes(len(chunk))  # the origin has nothing for the gaps between tensors, which are zero
        with self._lock:
            self.damaged.append(number)
        return False

    def _read(self, read: Read, target: memoryview) -> None:
        file = self._files[read.file]
        assert file is not None, "a manifest names only files of its source"
        for attempt in range(_ATTEMPTS):
            try:
                self._origin.read_into(file, read.file_offset, target)
            except OriginUnavailable as error:
                if attempt == _ATTEMPTS - 1 or self._stop.is_set():
                    raise
                log.warning("%s; trying again", error)
                self._stop.wait(random.uniform(0, 0.1 * 2**attempt))  # noqa: S311  jitter, not a secret
            else:
                return


def digest(description: Description, maps: Sequence[mmap.mmap]) -> str:
    """The revision: hashes the loaded bytes in the order of the files they came from (about 2 GB/s).

    `maps` are the segments, in order.
    """
    contents = {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in description.manifest.files.items()
    }
    by_file: list[list[Tensor]] = [[] for _ in description.manifest.weight_files]
    for tensor in description.manifest.tensors:
        by_file[tensor.file].append(tensor)
    for file, tensors in zip(description.manifest.weight_files, by_file, strict=True):
        tensors.sort(key=lambda tensor: tensor.file_offset)
        contents[file.name] = (file.size, _file_digest(description.headers[file.name], tensors, maps))
    return manifests.revision(contents)


def _file_digest(header: bytes, tensors: list[Tensor], maps: Sequence[mmap.mmap]) -> str:
    total = hashlib.sha256(header)
    for tensor in tensors:
        with memoryview(maps[tensor.segment]) as view:
            for start in range(tensor.offset, tensor.offset + tensor.size, _HASH_STEP):
                with view[start : min(start + _HASH_STEP, tensor.offset + tensor.size)] as step:
                    total.update(step)
    return total.hexdigest()
