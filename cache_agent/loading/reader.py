"""Owns the reading of chunks from a model's origin: which ranges are on their way, by how many readers, and retries.

Bytes go straight to their places in memory; a callback is called for every chunk that is whole.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from cache_agent.errors import AgentError, OriginUnavailable
from cache_agent.loading.parallelism import Parallelism
from cache_agent.model import ranges
from cache_agent.model.checkpoint import Description
from cache_agent.model.origin import Origin
from cache_agent.model.ranges import Range
from cache_agent.tiers.dram import Dram

log = logging.getLogger("glowplug.loader")

_ATTEMPTS = 5  # at one range in a row that may bring fewer than _WORTHWHILE bytes
_WORTHWHILE = 1 << 20  # bytes
_BETWEEN_ROUNDS = 1.0  # seconds, at most
_TICK = 0.05  # seconds between measurements of what the readers yield


@dataclass(slots=True)
class _Transfer:
    """A range on its way: the first `done` bytes are there; the first `piece` pieces, `end` bytes, are complete."""

    range: Range
    done: int = 0
    piece: int = 0
    end: int = 0


class OriginReader:
    """Reads chunks into `dram`. `read` once at a time; `read_chunk` and `sample` from any thread."""

    def __init__(
        self,
        description: Description,
        origin: Origin,
        dram: Dram,
        finish: Callable[[int], None],
        stopped: threading.Event,
        readers: int,
    ) -> None:
        """Prepare to read with at most `readers` parallel reads, until `stopped` is set.

        `finish(chunk)` is called when all bytes of a chunk are there, by the thread that read the last of them; it may
        raise an `AgentError`.
        """
        self._manifest = description.manifest
        self._origin, self._dram, self._finish, self._stopped = origin, dram, finish, stopped
        self._files = [description.source.file(file.name) for file in self._manifest.weight_files]
        self._lock = threading.Lock()  # guards all attributes below
        self._changed = threading.Condition(self._lock)
        self._transfers: list[_Transfer] = []
        self._by_chunk: dict[int, list[Range]] | None = None
        self._pieces = [0] * self._manifest.chunk_count  # pieces that each chunk still waits for
        self._work: deque[_Transfer] = deque()
        self._arrived = 0
        self._readers = 0
        self._over = False  # this round takes no more work
        self._parallelism = Parallelism(readers)
        self._failure: AgentError | None = None

    @property
    def arrived(self) -> int:
        """The number of bytes that the origin has delivered."""
        return self._arrived

    def read(self, missing: Collection[int]) -> None:
        """Read these chunks, with as many parallel reads as pay. Raises the first error that retries did not cure.

        A round that an unavailable origin ended is followed by another one for the missing bytes, unless it brought
        next to none.
        """
        wanted = ranges.plan(self._manifest)
        if len(missing) < self._manifest.chunk_count:
            wanted = ranges.only(wanted, set(missing))
        self._expect(wanted)
        with self._lock:
            empty = [number for number in missing if not self._pieces[number]]
        for number in empty:  # padding only
            self._finish(number)
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

    def read_chunk(self, number: int) -> None:
        """Read one chunk in this thread, and finish it. Raises the origin's error."""
        wanted = self._plan().get(number, [])
        with self._lock:
            self._pieces[number] = len(wanted)
        for each in wanted:
            self._fetch(_Transfer(each))
        if not wanted:  # padding only
            self._finish(number)

    def sample(self, number: int, size: int, choose: random.Random) -> bool:
        """Return whether `size` bytes of a chunk, at a random place, are the origin's. Raises the origin's error."""
        wanted = self._plan().get(number)
        if not wanted:
            return True
        each = choose.choice(wanted)
        piece = each.pieces[0]
        skip = choose.randrange(max(1, piece.size - size + 1))
        file = self._files[each.file]
        assert file is not None, "a manifest names only files of its source"
        found = self._origin.read(file, each.start + skip, min(size, piece.size))
        start = piece.offset + skip
        with self._dram.view(piece.segment, start, start + len(found)) as here:
            return here == found

    def _plan(self) -> dict[int, list[Range]]:
        """Return the ranges to read from the origin for each chunk."""
        with self._lock:
            if self._by_chunk is None:
                self._by_chunk = {}
                for each in ranges.only(ranges.plan(self._manifest), range(self._manifest.chunk_count)):
                    self._by_chunk.setdefault(each.pieces[0].chunk, []).append(each)
            return self._by_chunk

    # --- rounds ---------------------------------------------------------------------------------------------------

    def _expect(self, wanted: Sequence[Range]) -> None:
        self._transfers = [_Transfer(each) for each in wanted]
        self._pieces = [0] * self._manifest.chunk_count
        for each in wanted:
            for piece in each.pieces:
                self._pieces[piece.chunk] += 1

    def _round(self) -> None:
        """Try once to read everything that is missing, with as many readers as pay."""
        with self._lock:
            self._failure = None
            self._work = deque(transfer for transfer in self._transfers if transfer.done < transfer.range.size)
            self._over = False
            while True:
                if self._work and not self._over and not self._stopped.is_set():
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
        except Exception as error:  # a fault of this program must end the load, and not only this thread
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
                # Bytes that came are kept. Only a try that brought next to none counts: a slow link is not a dead one.
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
            views.extend(
                self._dram.view(piece.segment, piece.offset, piece.offset + piece.size)
                for piece in wanted.after(transfer.done)
            )
            start = wanted.start + transfer.done
            self._origin.read_scattered(file, start, views, lambda count: self._take_in(transfer, count))
        finally:
            for view in views:
                view.release()

    def _take_in(self, transfer: _Transfer, count: int) -> None:
        """Count `count` more bytes of a range, and finish the chunks that they complete."""
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
