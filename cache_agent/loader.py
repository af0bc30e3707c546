"""Owns the transfer of one model's bytes from its origin into memory: parallel reads, retries, checksums, progress."""

from __future__ import annotations

import hashlib
import logging
import mmap
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import xxhash

from cache_agent import manifest as manifests
from cache_agent import ranges
from cache_agent.checkpoint import Description
from cache_agent.errors import AgentError, OriginChanged, OriginUnavailable
from cache_agent.manifest import Tensor
from cache_agent.parallelism import Parallelism
from cache_agent.ranges import Range
from cache_agent.tee import Tee
from cache_agent.tiers.dram import Dram
from cache_agent.tiers.origin import Origin
from cache_agent.tiers.ssd import Reading

log = logging.getLogger("glowplug.loader")

_ATTEMPTS = 5  # of one range, in a row, that brought less than the next
_WORTHWHILE = 1 << 20  # bytes
_BETWEEN_ROUNDS = 1.0  # seconds, at most
_TICK = 0.05  # seconds between looks at what the readers yield
_HASH_STEP = 8 << 20


@dataclass(slots=True)
class _Transfer:
    """A range on its way: the first `done` bytes are there; the first `piece` pieces, `end` bytes, are complete."""

    range: Range
    done: int = 0
    piece: int = 0
    end: int = 0


class Load:
    """The bytes of one model on their way. Progress may be read, and watched, from any thread."""

    def __init__(
        self, description: Description, origin: Origin, dram: Dram, *, readers: int = 4, image: Reading | None = None
    ) -> None:
        """`readers` is the largest number of parallel reads; how many there are depends on what the origin yields.

        With an `image` the bytes come from there, and only chunks that are damaged in it from the origin.
        """
        self.description = description
        self.manifest = description.manifest
        self.dram = dram
        self.total = self.manifest.nbytes
        self.image = image
        self.damaged: list[int] = []  # chunks that the image had wrong
        self.tee: Tee | None = None
        self._most = readers
        self._origin = origin
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
        self._transfers: list[_Transfer] = []
        self._pieces = [0] * len(self._chunks)  # how many each chunk still waits for
        self._work: deque[_Transfer] = deque()
        self._arrived = 0
        self._readers = 0
        self._over = False  # this round takes no more work
        self._parallelism = Parallelism(readers)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._stopped = threading.Event()
        self.finished = threading.Event()
        self._failure: AgentError | None = None
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
        """Fills the segments and gives up writing to them. Raises the first `AgentError` that retries did not cure.

        While the origin comes and goes, a further round asks for what is missing, and only for that: it ends when a
        whole round has brought nothing.
        """
        try:
            wanted = ranges.plan(self.manifest)
            if self.image is not None:
                self._read_image(self.image)
                wanted = ranges.only(wanted, set(self.damaged))
            self._expect(wanted)
            while True:
                before = self._arrived
                try:
                    self._round()
                    break
                except OriginUnavailable as error:
                    if self._stopped.is_set() or self._arrived - before < _WORTHWHILE:
                        raise
                    log.warning("%s; going on with what is missing", error)
                    self._stopped.wait(random.uniform(0, _BETWEEN_ROUNDS))  # noqa: S311  jitter, not a secret
            self.dram.freeze()
            if self.tee is None:  # otherwise the tee does it at its end
                self.dram.seal()
        finally:
            self.finished.set()

    def _expect(self, wanted: Sequence[Range]) -> None:
        self._transfers = [_Transfer(each) for each in wanted]
        for each in wanted:
            for piece in each.pieces:
                self._pieces[piece.chunk] += 1

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
            self._complete(number)
            return
        log.warning("chunk %d of %s on SSD is damaged (%s); reading the origin", number, self._origin.uri, why)
        with self._lock:
            self.damaged.append(number)

    def _round(self) -> None:
        """One attempt at everything that is missing, with as many readers as pay."""
        with self._lock:
            self._failure = None
            self._work = deque(transfer for transfer in self._transfers if transfer.done < transfer.range.size)
            self._over = False
            empty = [number for number, pieces in enumerate(self._pieces) if not pieces and not self._finished[number]]
        for number in empty:  # padding only
            self._finish(number)
        with self._lock:
            while True:
                if self._work and not self._over:
                    limit = self._parallelism.observe(self._arrived, time.monotonic())
                    wanted = min(limit, self._readers + len(self._work))
                    while self._readers < wanted:
                        self._readers += 1
                        threading.Thread(target=self._reader, name=f"reader-{self._readers}", daemon=True).start()
                elif not self._readers:
                    break
                self._changed.wait(_TICK)
            failure = self._failure
        if failure is not None:
            raise failure
        if self._stopped.is_set():
            raise OriginUnavailable(f"{self._origin.uri}: loading was stopped; the agent is shutting down")

    def _reader(self) -> None:
        try:
            while (transfer := self._take()) is not None:
                self._fetch(transfer)
        except AgentError as error:
            self._fail(error)
        except Exception as error:  # a fault of ours must end the load, not a thread that nobody waits for
            log.exception("loading %s failed", self._origin.uri)
            self._fail(AgentError(f"loading {self._origin.uri} failed inside the agent: {error!r}"))
        finally:
            with self._lock:
                self._readers -= 1
                self._changed.notify_all()

    def _take(self) -> _Transfer | None:
        with self._lock:
            if self._over or self._stopped.is_set() or self._readers > self._parallelism.limit or not self._work:
                return None
            return self._work.popleft()

    def _fail(self, error: AgentError) -> None:
        with self._lock:
            self._failure = self._failure or error
            self._over = True

    def _fetch(self, transfer: _Transfer) -> None:
        attempt = 0
        while True:
            before = transfer.done
            try:
                self._read(transfer)
            except OriginUnavailable as error:
                # Bytes that came are kept. Only a try that brought next to none counts: a bad link is no dead one.
                attempt = 1 if transfer.done - before >= _WORTHWHILE else attempt + 1
                with self._lock:
                    self._parallelism.trouble()
                if attempt == _ATTEMPTS or self._stopped.is_set():
                    raise
                log.warning("%s; trying again", error)
                self._stopped.wait(random.uniform(0, 0.1 * 2**attempt))  # noqa: S311  jitter, not a secret
            else:
                return

    def _read(self, transfer: _Transfer) -> None:
        wanted = transfer.range
        file = self._files[wanted.file]
        assert file is not None, "a manifest names only files of its source"
        views: list[memoryview] = []
        try:
            for piece in wanted.after(transfer.done):
                view = self.dram.segments[piece.segment].view
                assert view is not None, "segments are sealed only after all readers are done"
                views.append(view[piece.offset : piece.offset + piece.size])
            start = wanted.start + transfer.done
            self._origin.read_scattered(file, start, views, lambda count: self._take_in(transfer, count))
        finally:
            for view in views:
                view.release()

    def _take_in(self, transfer: _Transfer, count: int) -> None:
        """So many more bytes of a range are there; what they complete is finished."""
        complete = []
        with self._lock:
            self._arrived += count
            transfer.done += count
            while transfer.piece < len(transfer.range.pieces):
                piece = transfer.range.pieces[transfer.piece]
                if transfer.done < transfer.end + piece.size:
                    break
                transfer.end += piece.size
                transfer.piece += 1
                self._pieces[piece.chunk] -= 1
                if not self._pieces[piece.chunk]:
                    complete.append(piece.chunk)
        for number in complete:
            self._finish(number)

    def _finish(self, number: int) -> None:
        """All bytes of a chunk are there."""
        segment, start, end = self._chunks[number]
        view = self.dram.segments[segment].view
        assert view is not None, "segments are sealed only after all readers are done"
        with view[start:end] as chunk:
            self.checksums[number] = xxhash.xxh3_64_intdigest(chunk)
        if self.image is not None and self.checksums[number] != self.image.index.checksums[number]:
            raise OriginChanged(f"{self._origin.uri}: a file was overwritten without a new date or ETag")
        self._complete(number)

    def _complete(self, number: int) -> None:
        """A chunk's bytes are final: counts it, and tells those who wait for it."""
        segment, start, end = self._chunks[number]
        with self._lock:
            self._finished[number] = True
            self._done += end - start
            position = self._prefix[segment]
            while position < len(self._chunks) and self._chunks[position][0] == segment and self._finished[position]:
                self._ready[segment] = self._chunks[position][2]
                position += 1
            self._prefix[segment] = position
            watchers = [*self._watchers, *([self.observer] if self.observer else ())]
        if self.tee is not None:
            self.tee.add(number)
        for wake in watchers:
            wake()


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
