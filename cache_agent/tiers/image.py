"""The format of an image, which is a model on SSD, and its files: written once, each chunk checked when read back.

    <source id>.<LAYOUT>/
        0.seg 1.seg …    the segments, byte for byte as in memory
        manifest.json    as functions get it
        description      the source's description; the file's time is when the origin last confirmed it
        image.json       written last: source and URI, the segments' sizes, the xxh3-64 of every chunk
        revision         once the digest is known
    image.json, revision, description := xxh3-64 of the body (16 hex digits) LF body

A directory without a sound image.json is no image. Segments are multiples of 2 MiB and chunks lie on such multiples,
so that every transfer is fit for O_DIRECT, from and into the segments' own memory. On a filesystem that refuses
O_DIRECT transfers are buffered, and their pages are dropped afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import xxhash

from cache_agent.model.manifest import FORMAT, LAYOUT, MAX_MANIFEST, MOST_SEGMENTS, PAGE, Manifest, Size, encode

log = logging.getLogger("glowplug.ssd")

IMAGE = "image.json"
MANIFEST = "manifest.json"
REVISION = "revision"
DESCRIPTION = "description"
_VERSION = 1
_MAX_INDEX = 64 << 20
_REVISION = re.compile(r"rev-[0-9a-f]{40}")

Checksum = Annotated[int, msgspec.Meta(ge=0)]


class BadImage(Exception):
    """A directory that is no image of this program, or no whole one; the text is the reason."""


class Index(msgspec.Struct, frozen=True):
    """The content of image.json; loading the model from its origin took `seconds`."""

    source: str
    uri: str
    segments: tuple[Size, ...]
    chunk: Annotated[int, msgspec.Meta(ge=PAGE)]
    checksums: tuple[Checksum, ...]
    manifest: Checksum
    seconds: float = 0.0
    version: int = _VERSION
    format: int = FORMAT
    layout: int = LAYOUT

    @property
    def bytes(self) -> int:
        return sum(self.segments)


_decoder = msgspec.json.Decoder(Index)


def key(source: str, layout: int = LAYOUT) -> str:
    """Return the name of an image's directory."""
    return f"{source}.{layout}"


def index(plan: Manifest, uri: str, checksums: Sequence[int], seconds: float) -> Index:
    """Return the index of an image; `checksums` are the xxh3-64 of all chunks, in order."""
    return Index(
        source=plan.source,
        uri=uri,
        segments=plan.segments,
        chunk=plan.chunk,
        checksums=tuple(checksums),
        manifest=xxhash.xxh3_64_intdigest(encode(plan)),
        seconds=seconds,
    )


def seal(body: bytes) -> bytes:
    """Return a body with its checksum in front."""
    return b"%016x\n" % xxhash.xxh3_64_intdigest(body) + body


def unseal(data: bytes) -> bytes:
    """Return the body behind a checksum. Raises `BadImage` when the checksum is another one's."""
    body = data[17:]
    if data[:17] != b"%016x\n" % xxhash.xxh3_64_intdigest(body):
        raise BadImage("flipped: its own checksum does not fit")
    return body


def read_index(directory: Path) -> Index:
    """Return the index of a whole image. Raises `BadImage` with the defect."""
    try:
        found = _decoder.decode(unseal(_small(directory / IMAGE, _MAX_INDEX)))
    except FileNotFoundError:
        raise BadImage("half-written: there is no image.json") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadImage(f"foreign: image.json is of no kind that this agent knows ({error})") from error
    if (found.version, found.format, found.layout) != (_VERSION, FORMAT, LAYOUT):
        raise BadImage(f"of another version: {found.version}.{found.format}.{found.layout}")
    if directory.name != key(found.source):
        raise BadImage(f"foreign: it is the image of {found.source}")
    if not 0 < len(found.segments) <= MOST_SEGMENTS or any(size == 0 or size % PAGE for size in found.segments):
        raise BadImage("foreign: its segments have impossible sizes")
    if found.chunk % PAGE or len(found.checksums) != sum(-(-size // found.chunk) for size in found.segments):
        raise BadImage("foreign: it has not one checksum for each chunk")
    for number, size in enumerate(found.segments):
        try:
            actual = (directory / f"{number}.seg").lstat().st_size
        except FileNotFoundError:
            raise BadImage(f"torn: segment {number} is missing") from None
        if actual != size:
            raise BadImage(f"truncated: segment {number} has {actual} bytes instead of {size}")
    try:
        content = _small(directory / MANIFEST, MAX_MANIFEST)
    except FileNotFoundError:
        raise BadImage("torn: its manifest is missing") from None
    if xxhash.xxh3_64_intdigest(content) != found.manifest:
        raise BadImage("flipped: its manifest's checksum does not fit")
    return found


def read_revision(directory: Path) -> str:
    """Return the image's revision; "" where none is known or the file is damaged, and it is to be computed again."""
    with contextlib.suppress(OSError, BadImage, UnicodeDecodeError):
        text = unseal(_small(directory / REVISION, 100)).decode().strip()
        if _REVISION.fullmatch(text):
            return text
    return ""


def read_description(directory: Path) -> tuple[bytes, float]:
    """Return the description and its time (seconds since 1970); (b"", 0) where there is none, or a damaged one."""
    path = directory / DESCRIPTION
    with contextlib.suppress(OSError, BadImage):
        return unseal(_small(path, MAX_MANIFEST)), path.stat().st_mtime
    return b"", 0.0


def write_durably(path: Path, data: bytes) -> None:
    """Replace a small file in one step: a reader, or a crash, finds the old content or the new one."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _small(path: Path, most: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise BadImage(f"foreign: {path.name} has more than {most} bytes")
    return data


class Segments:
    """The open segment files of one image. Reads and writes may run in many threads."""

    def __init__(self, directory: Path, count: int, *, create: bool = False, write: bool = False) -> None:
        """Open `count` files; with `create` they must be new. Raises `OSError`."""
        flags = (os.O_RDWR if write or create else os.O_RDONLY) | (os.O_CREAT | os.O_EXCL if create else 0)
        self.directory = directory
        self._fds: list[int] = []
        try:
            for number in range(count):
                self._fds.append(_open_direct(directory / f"{number}.seg", flags))
        except BaseException:
            self.close()
            raise

    def read(self, segment: int, start: int, view: memoryview) -> None:
        """Fill `view` from `start` of a segment. Raises `OSError`, also where the file ends early."""
        self._transfer(os.preadv, segment, start, view)

    def write(self, segment: int, start: int, view: memoryview) -> None:
        """Write `view` at `start` of a segment. Raises `OSError`."""
        self._transfer(os.pwritev, segment, start, view)

    def _transfer(self, call: object, segment: int, start: int, view: memoryview) -> None:
        fd, done = self._fds[segment], 0
        while done < len(view):
            try:
                with view[done:] as rest:
                    count = call(fd, [rest], start + done)  # type: ignore[operator]
            except OSError as error:
                if error.errno != errno.EINVAL or not _without_direct(fd):
                    raise
                log.warning("%s refuses O_DIRECT; going through the page cache", self.directory)
                continue
            if count == 0:
                raise OSError(errno.EIO, "the file is shorter than it should be")
            done += count
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            if call is os.pwritev:
                os.fdatasync(fd)
            os.posix_fadvise(fd, start, len(view), os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        for fd in self._fds:
            os.fsync(fd)

    def close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


def _open_direct(path: Path, flags: int) -> int:
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # Some kernels create the file before they find that its filesystem refuses O_DIRECT.
    fd = os.open(path, flags & ~os.O_EXCL, 0o600)
    log.info("%s: this filesystem refuses O_DIRECT; going through the page cache", path.parent)
    return fd


def _without_direct(fd: int) -> bool:
    """Switch a file to buffered transfers; False when its transfers were buffered already."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & os.O_DIRECT:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return True
