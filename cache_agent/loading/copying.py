"""Copies of whole models between directories and origins: what `pull` and `push` (in pushing.py) share, and `pull`.

A copy can be interrupted at any moment and begun again: what is there and equal is left alone. Nothing counts as there
before it was read back from where it was written and its SHA-256 compared with that of what the source gave.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from cache_agent import manifest
from cache_agent.errors import (
    AccessDenied,
    AgentError,
    ModelNotFound,
    NoCapacity,
    OriginChanged,
    WrongRevision,
)
from cache_agent.loading.checkpoint import PICKLED, Description, describe, read_patiently
from cache_agent.manifest import SourceFile
from cache_agent.model.origin import Origin

STEP = 16 << 20
PARALLEL = 4
RECORD = ".glowplug-pull"  # not .json: it must not count as a file of the model

# Bytes done more, and of how many in the current stage ("reading", "checking", …); may be called from any thread.
Report = Callable[[str, int, int], None]


class Copied(NamedTuple):
    """`moved` of `size` bytes went over the wire; the rest was there already."""

    revision: str
    files: int
    size: int
    moved: int
    skipped: int


def wanted(files: list[SourceFile], description: Description) -> list[SourceFile]:
    """What belongs to a copy: what is served, and all else but pickles and hidden files.

    config.json comes last, so that a copy that is not complete is no model yet. Raises `OriginChanged` when the files
    are not those that were described.
    """
    if not set(description.source.files) <= set(files):
        raise OriginChanged(f"{description.source.uri} changed while it was looked at; run the same command again")
    served = {file.name for file in description.source.files}
    chosen = [
        file for file in files if file.name in served or not (file.name.startswith(".") or file.name.endswith(PICKLED))
    ]
    return sorted(chosen, key=lambda file: (file.name == "config.json", -file.size, file.name))


def revision(description: Description, digests: dict[str, str]) -> str:
    """The revision of files whose SHA-256 are known by name."""
    files = description.source.files
    # An index only says where tensors are; it is no part of a revision.
    return manifest.revision({file.name: (file.size, digests[file.name]) for file in files})


def hash_file(path: Path, size: int, report: Callable[[int], None]) -> str:
    """SHA-256 of the first `size` bytes. Raises `OriginChanged` when there are fewer."""
    total, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while left:
            if not (data := file.read(min(left, STEP))):
                raise OriginChanged(f"{path} became shorter while it was read")
            total.update(data)
            left -= len(data)
            report(len(data))
    return total.hexdigest()


def hash_origin(origin: Origin, file: SourceFile, report: Callable[[int], None]) -> str:
    """SHA-256 of what the origin gives."""
    total = hashlib.sha256()
    for start in range(0, file.size, STEP):
        data = read_patiently(origin, file, start, min(STEP, file.size - start))
        total.update(data)
        report(len(data))
    return total.hexdigest()


def local_error(error: OSError, path: Path) -> AgentError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoCapacity(f"{path}: {error.strerror}; make room and run the same command again, it goes on there")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(f"{path}: {error.strerror}; choose a directory that you may write")
    return ModelNotFound(f"{error.filename or path}: {error.strerror}")


def pull(origin: Origin, directory: Path, report: Report, pin: str = "") -> Copied:
    """Copies the model into `directory`. Raises `WrongRevision` when `pin` is given and is another's, and what

    `describe` does; local trouble as `NoCapacity` (disk full), `AccessDenied`, `ModelNotFound`.
    """
    try:
        return _Pull(origin, directory, report).run(pin)
    except OSError as error:
        raise local_error(error, directory) from error


class _Pull:
    def __init__(self, origin: Origin, directory: Path, report: Report) -> None:
        self._origin = origin
        self._directory = directory
        self._report = report
        self._record: dict[str, dict[str, Any]] = {}
        self._lock = Lock()
        self._moved = 0
        self._skipped = 0

    def run(self, pin: str) -> Copied:
        description = describe(self._origin)
        files = wanted(self._origin.files(), description)
        self._directory.mkdir(parents=True, exist_ok=True)
        with suppress(OSError, ValueError, TypeError, AttributeError):
            found = json.loads((self._directory / RECORD).read_text())
            self._record = {name: dict(entry) for name, entry in found.items()}
        *most, last = files
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="pull") as pool:
            size = sum(file.size for file in files)
            try:
                digests = dict(pool.map(lambda file: self._file(file, size), most))
                digests |= dict([self._file(last, size)])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        found_revision = revision(description, digests)
        if pin and pin != found_revision:
            raise WrongRevision(
                f"{self._origin.uri} is {found_revision}, not {pin}; {self._directory} holds the former"
            )
        return Copied(found_revision, len(files), size, self._moved, self._skipped)

    def _file(self, file: SourceFile, total: int) -> tuple[str, str]:
        target = self._directory / file.name

        def read(count: int) -> None:
            self._report("pulling", count, total)

        known = self._record.get(file.name, {})
        if known.get("etag") == file.etag and target.is_file() and target.stat().st_size == file.size:
            digest = hash_file(target, file.size, read)
            if digest == known.get("sha256"):
                with self._lock:
                    self._skipped += 1
                return file.name, digest
            read(-file.size)  # it is not what it was: once more, from the origin
        part = self._directory / f".{file.name[:150]}.{hashlib.sha256(file.etag.encode()).hexdigest()[:16]}.part"
        digest = self._fetch(file, part, read)
        written = hash_file(part, file.size, lambda _: None)
        if written != digest:
            part.unlink()
            raise OriginChanged(
                f"{part} does not hold what was written to it: {written} instead of {digest}; check the disk"
            )
        part.replace(target)
        with self._lock:
            self._record[file.name] = {"etag": file.etag, "size": file.size, "sha256": digest}
            text = json.dumps(self._record, indent=1, sort_keys=True)
            draft = self._directory / (RECORD + ".new")
            draft.write_text(text)
            draft.replace(self._directory / RECORD)
        return file.name, digest

    def _fetch(self, file: SourceFile, part: Path, report: Callable[[int], None]) -> str:
        """Brings what is missing of a file; its SHA-256, of the bytes as they came."""
        total = hashlib.sha256()
        with part.open("r+b" if part.exists() else "w+b") as out:
            # The last step of an interrupted copy may be torn.
            start = max(0, min(os.fstat(out.fileno()).st_size, file.size) // STEP - 1) * STEP
            for _ in range(0, start, STEP):
                total.update(data := out.read(STEP))
                report(len(data))
            out.seek(start)
            out.truncate()
            for position in range(start, file.size, STEP):
                data = read_patiently(self._origin, file, position, min(STEP, file.size - position))
                total.update(data)
                out.write(data)
                with self._lock:
                    self._moved += len(data)
                report(len(data))
            out.flush()
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that reading back reads the disk
        return total.hexdigest()
