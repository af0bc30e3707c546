"""Owns the SSD tier: a directory of images, its capacity, and the choice of images to evict.

    DIR/lock          locked while an agent uses the directory
    DIR/images/       whole images (`image.py`), each renamed into place after all its files were synced
    DIR/partial/      images being written or removed; emptied at the start
    DIR/quarantine/   the remains of damaged images (`quarantine.py`)
Other files are left alone. Every image may be lost at any time: the origin has the model.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import msgspec
import xxhash

from cache_agent.errors import BadSetting
from cache_agent.model.manifest import LAYOUT, Manifest, encode
from cache_agent.policy import eviction
from cache_agent.tiers import image
from cache_agent.tiers.image import BadImage, Index, Segments
from cache_agent.tiers.quarantine import Quarantine, Quarantined

log = logging.getLogger("glowplug.ssd")

_NAME = re.compile(r"src-[0-9a-f]{40}\.(\d{1,6})")
_LOCK_SECONDS = 10.0
_SPARE = 20  # 1/20 of the filesystem is never filled


def _log_eviction(uri: str, size: int, why: str) -> None:
    log.info("evicted %s (%d MB) from SSD: %s", uri, size // 10**6, why)


@dataclass(slots=True)
class Stored:
    """One image; `users` is the number of loads that read it now."""

    index: Index
    revision: str = ""
    uses: int = 0
    priority: float = 0.0
    last_used: float = 0.0
    users: int = 0


class Ssd:
    """One agent's images. Every method may be called from any thread; those that touch files block."""

    def __init__(
        self,
        directory: Path,
        capacity: int = 0,
        report: Callable[[str, int], None] | None = None,
        on_evicted: Callable[[str, int, str], None] | None = None,
    ) -> None:
        """Open the directory; `capacity` in bytes, 0 for all that the filesystem can spare. Raises `BadSetting`.

        `report(source, bytes)` is called for every image that is found or written, and with 0 bytes when it goes;
        `on_evicted(uri, bytes, why)` for every image that is evicted.
        """
        self._report = report or (lambda _source, _bytes: None)
        self._on_evicted = on_evicted or _log_eviction
        self.directory = directory
        self._images = directory / "images"
        self._partial = directory / "partial"
        self.quarantine = Quarantine(directory / "quarantine")
        self._lock = threading.Lock()  # guards what follows
        self._stored: dict[str, Stored] = {}  # by source id
        self._writing: dict[str, int] = {}  # source id -> bytes set aside
        self._revisions: dict[str, str] = {}  # of sources whose image is still being written
        self._clock = 0.0
        self._numbers = count(1)
        try:
            for place in (directory, self._images, self._partial, self.quarantine.directory):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._guard = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._take_lock()
            filesystem = os.statvfs(directory)
            self._spare = filesystem.f_frsize * filesystem.f_blocks // _SPARE
            self.capacity = capacity or filesystem.f_frsize * filesystem.f_blocks - self._spare
            self._recover()
        except OSError as error:
            raise BadSetting(
                f"GLOWPLUG_SSD={directory} cannot be used: {error.strerror}; choose another --ssd"
            ) from error

    def _take_lock(self) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS  # a killed agent may need a moment to end
        while True:
            try:
                fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                os.close(self._guard)
                raise BadSetting(
                    f"another agent uses GLOWPLUG_SSD={self.directory}; give each its own directory (--ssd)"
                ) from None
            return

    # --- start ----------------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        for name in sorted(os.listdir(self._partial)):
            log.warning("%s: half-written image or removal of %s swept", self.directory, name)
            self.quarantine.note(name, "half-written: the agent ended before it was whole")
            shutil.rmtree(self._partial / name, ignore_errors=True)
        for name in sorted(os.listdir(self._images)):
            place = self._images / name
            match = _NAME.fullmatch(name)
            if match is None or place.is_symlink() or not place.is_dir():
                log.warning("%s is no image of this program; left alone", place)
                continue
            try:
                if int(match[1]) != LAYOUT:
                    raise BadImage(f"of another version: layout {match[1]}, this agent writes {LAYOUT}")
                found = image.read_index(place)
            except (BadImage, OSError) as error:
                self.quarantine.put(place, str(error))
                continue
            self._report(found.source, found.bytes)
            self._stored[found.source] = Stored(found, image.read_revision(place), last_used=time.monotonic())
        log.info(
            "%s: %d images, %d of %d MB", self.directory, len(self._stored), self._used // 10**6, self.capacity // 10**6
        )

    # --- what is here ---------------------------------------------------------------------------------------------

    @property
    def _used(self) -> int:
        """Bytes of all images, those being written included. The caller holds the lock."""
        return sum(stored.index.bytes for stored in self._stored.values()) + sum(self._writing.values())

    def status(self) -> tuple[int, list[Stored], list[Quarantined]]:
        """Return (bytes used, images, quarantine)."""
        with self._lock:
            return self._used, list(self._stored.values()), self.quarantine.found()

    def find(self, uri: str) -> Stored | None:
        """Return the image of the model at `uri` that was used last."""
        with self._lock:
            found = [stored for stored in self._stored.values() if stored.index.uri == uri]
        return max(found, key=lambda stored: stored.last_used, default=None)

    def revision(self, source: str) -> str:
        """Return the revision that a source was found to be, or ""."""
        with self._lock:
            return self._stored[source].revision if source in self._stored else self._revisions.get(source, "")

    def remember(self, source: str, revision: str) -> None:
        """Keep a source's revision with its image, now or once the image is written."""
        with self._lock:
            stored = self._stored.get(source)
            if stored is None:
                if source in self._writing:
                    self._revisions[source] = revision
                return
        self._write_revision(source, revision)
        with self._lock:  # only now, so that a revision that status shows survives a restart
            stored.revision = revision

    def _write_revision(self, source: str, revision: str) -> None:
        try:
            image.write_durably(self._images / image.key(source) / image.REVISION, image.seal(revision.encode()))
        except OSError as error:
            log.warning("the revision of %s cannot be kept: %s; it is computed again after a restart", source, error)

    # --- reading --------------------------------------------------------------------------------------------------

    def open(self, plan: Manifest) -> Reading | None:
        """Return the image of the model that `plan` lays out, for a load; None where there is none."""
        with self._lock:
            stored = self._stored.get(plan.source)
            if stored is None:
                return None
            stored.uses += 1
            stored.last_used = time.monotonic()
            stored.priority = eviction.priority(self._clock, stored.uses, stored.index.seconds, stored.index.bytes)
        if xxhash.xxh3_64_intdigest(encode(plan)) != stored.index.manifest:
            self.discard(plan.source, "of another version: it is laid out differently from what this agent would do")
            return None
        return self.borrow(plan.source)

    def borrow(self, source: str) -> Reading | None:
        """Return a source's image for a caller without a plan of it; None where there is none."""
        with self._lock:
            stored = self._stored.get(source)
            if stored is None:
                return None
            stored.users += 1
        try:
            return Reading(self, stored.index, Segments(self._images / image.key(source), len(stored.index.segments)))
        except OSError as error:
            self._close(source)
            self.discard(source, str(error))
            return None

    def stored(self, source: str) -> Stored | None:
        with self._lock:
            return self._stored.get(source)

    def description(self, source: str) -> tuple[bytes, float]:
        """Return a source's encoded description, and when the origin last confirmed it (seconds since 1970).

        Returns (b"", 0) where the image has none.
        """
        return image.read_description(self._images / image.key(source))

    def validated(self, source: str) -> None:
        """Record that the origin confirmed a source just now."""
        with contextlib.suppress(OSError):
            os.utime(self._images / image.key(source) / image.DESCRIPTION)

    def _close(self, source: str) -> None:
        with self._lock:
            if source in self._stored:
                self._stored[source].users -= 1

    def discard(self, source: str, reason: str) -> None:
        """Quarantine an image that turned out to be damaged; loads that read the image can go on."""
        with self._lock:
            if self._stored.pop(source, None) is None:
                return
        self._report(source, 0)
        self.quarantine.put(self._images / image.key(source), reason)

    def repair(self, source: str, chunks: Sequence[tuple[int, int, memoryview]]) -> None:
        """Write chunks anew, given as (segment, start, bytes); the bytes fit the image's own checksums."""
        with self._lock:
            stored = self._stored.get(source)
            if stored is None:
                return
            stored.users += 1
        try:
            with contextlib.closing(
                Segments(self._images / image.key(source), len(stored.index.segments), write=True)
            ) as segments:
                for segment, start, view in chunks:
                    segments.write(segment, start, view)
                segments.sync()
            log.warning("%s: %d chunks of %s were repaired", self.directory, len(chunks), stored.index.uri)
        except OSError as error:
            self.discard(source, f"damaged, and it cannot be repaired: {error.strerror}")
        finally:
            self._close(source)

    # --- writing --------------------------------------------------------------------------------------------------

    def begin(self, plan: Manifest, uri: str, keep: Collection[str] = (), description: bytes = b"") -> Writing | None:
        """Return a new image to write, or None where none fits; images of the sources in `keep` are not evicted."""
        with self._lock:
            if plan.source in self._stored or plan.source in self._writing:
                return None
            victims = self._make_room(plan.nbytes, keep)
            if victims is None:
                log.warning("%s (%d MB) is not kept on SSD: no room", uri, plan.nbytes // 10**6)
                return None
            self._writing[plan.source] = plan.nbytes
        for victim in victims:
            self._remove(victim, f"to make room for {uri}; smallest price")
        place = self._partial / f"{image.key(plan.source)}-{next(self._numbers)}"
        try:
            place.mkdir(mode=0o700)
            return Writing(self, plan, uri, place, Segments(place, len(plan.segments), create=True), description)
        except OSError as error:
            log.warning("%s is not kept on SSD: %s", uri, error)
            self._end(plan.source, place)
            return None

    def _make_room(self, needed: int, keep: Collection[str]) -> list[Stored] | None:
        """Choose the images to evict for `needed` bytes, and forget them; None where all would not be enough."""
        filesystem = os.statvfs(self.directory)
        free = filesystem.f_frsize * filesystem.f_bavail - self._spare - sum(self._writing.values())
        missing = max(needed - (self.capacity - self._used), needed - free)
        if needed > self.capacity or missing <= 0:
            return [] if needed <= self.capacity else None
        idle = (
            eviction.Candidate(source, stored.index.bytes, stored.priority, stored.last_used)
            for source, stored in self._stored.items()
            if not stored.users and source not in keep
        )
        choice = eviction.cheapest(idle, missing, self._clock)
        if choice is None:
            return None
        self._clock = choice.clock
        return [self._stored.pop(str(source)) for source in choice.keys]

    def _end(self, source: str, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        with self._lock:
            self._writing.pop(source, None)
            self._revisions.pop(source, None)

    def _commit(self, index: Index, place: Path) -> None:
        """Move a written image into place and list it. Raises `OSError`."""
        written = self.revision(index.source)
        if written:
            image.write_durably(place / image.REVISION, image.seal(written.encode()))
        with self._lock:
            place.rename(self._images / image.key(index.source))
            self._writing.pop(index.source, None)
            revision = self._revisions.pop(index.source, "")
            worth = eviction.priority(self._clock, 1, index.seconds, index.bytes)
            self._stored[index.source] = Stored(index, revision, 1, worth, time.monotonic())
        image.sync_directory(self._images)
        self._report(index.source, index.bytes)
        if revision != written:  # the digest became known meanwhile
            self._write_revision(index.source, revision)

    # --- leaving --------------------------------------------------------------------------------------------------

    def evict(self, uri: str) -> int:
        """Remove all images of a model that no load reads, and return their bytes."""
        with self._lock:
            sources = [source for source, s in self._stored.items() if s.index.uri == uri and not s.users]
            removed = [self._stored.pop(source) for source in sources]
        for stored in removed:
            self._remove(stored, "asked for")
        return sum(stored.index.bytes for stored in removed)

    def _remove(self, stored: Stored, why: str) -> None:
        name = image.key(stored.index.source)
        self._report(stored.index.source, 0)
        doomed = self._partial / f"{name}-{next(self._numbers)}"
        try:
            (self._images / name).rename(doomed)  # in one step: a crash halfway leaves no image with holes
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("the image of %s cannot be removed: %s", stored.index.uri, error)
        self._on_evicted(stored.index.uri, stored.index.bytes, why)

    def close(self) -> None:
        if self._guard >= 0:
            os.close(self._guard)
            self._guard = -1


class Reading:
    """An image while a load reads it; the image is not evicted meanwhile."""

    def __init__(self, ssd: Ssd, index: Index, segments: Segments) -> None:
        self.index = index
        self._ssd = ssd
        self._segments = segments

    def read(self, number: int, segment: int, start: int, view: memoryview) -> bool:
        """Fill `view` with chunk `number`; False where the bytes are not those that were written. Raises `OSError`."""
        self._segments.read(segment, start, view)
        return self.proves(number, view)

    def proves(self, number: int, view: memoryview) -> bool:
        """Return whether bytes have the checksum of chunk `number`."""
        return bool(xxhash.xxh3_64_intdigest(view) == self.index.checksums[number])

    def close(self) -> None:
        self._segments.close()
        self._ssd._close(self.index.source)


class Writing:
    """An image while it is written, by one thread; ends with `commit` or `abandon`."""

    def __init__(self, ssd: Ssd, plan: Manifest, uri: str, place: Path, segments: Segments, description: bytes) -> None:
        self._ssd, self._plan, self.uri, self._place, self._segments = ssd, plan, uri, place, segments
        self._description = description

    def write(self, segment: int, start: int, view: memoryview) -> None:
        """Write the bytes of a chunk. Raises `OSError`."""
        self._segments.write(segment, start, view)

    def commit(self, checksums: Sequence[int], seconds: float) -> None:
        """Make the image durable, then visible; `seconds` is the load's time. After an `OSError` call `abandon`."""
        self._segments.sync()
        image.write_durably(self._place / image.MANIFEST, encode(self._plan))
        image.write_durably(self._place / image.DESCRIPTION, image.seal(self._description))
        index = image.index(self._plan, self.uri, checksums, seconds)
        image.write_durably(self._place / image.IMAGE, image.seal(msgspec.json.encode(index)))
        self._ssd._commit(index, self._place)
        self._segments.close()

    def abandon(self) -> None:
        self._segments.close()
        self._ssd._end(self._plan.source, self._place)
