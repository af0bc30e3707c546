"""Owns the memory of one revision: a memfd per segment, reserved before the first byte, sealed when it is complete.

During the load the agent's mapping is the only writable one: `F_SEAL_FUTURE_WRITE` refuses every other, also through
/proc/<pid>/fd. After `seal` no process can write, grow or shrink the memory for as long as any process maps it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from types import TracebackType

from cache_agent import limits
from cache_agent.errors import NoCapacity
from cache_agent.limits import HugePages

_SMALL_PAGE = mmap.PAGESIZE
_SPARE = 20  # 1/20 of the memory limit is never taken
_reserving = threading.Lock()  # two loads must not count on the same free memory
_F_SEAL_FUTURE_WRITE = 0x0010  # fcntl has no name for it before Python 3.12
_WHILE_LOADING = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE
_COMPLETE = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Segment:
    """One memfd; `fd` is read-only and can be lent, `view` is writable until `freeze` or `seal`."""

    def __init__(self, size: int, *, huge: bool, name: str) -> None:
        """Reserve `size` bytes, of huge pages with `huge`. Raises `OSError` when they cannot be had."""
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if huge else 0)
        self.size = size
        owner = os.memfd_create(name, flags)
        try:
            os.ftruncate(owner, size)
            # A shared mapping of huge pages reserves them all, and the loader's threads clear each page as they fill
            # it: clearing 2.2 GB beforehand took 0.2 s of 1.0 s from a fast disk.
            if not (huge and limits.huge_reservations_hold()):
                os.posix_fallocate(owner, 0, size)
            self._map: mmap.mmap | None = mmap.mmap(owner, size, mmap.MAP_SHARED)
            fcntl.fcntl(owner, fcntl.F_ADD_SEALS, _WHILE_LOADING)
            os.fchmod(owner, 0o444)  # a new memfd has 0777: any user could reopen it writable and add seals
            self.fd = os.open(f"/proc/self/fd/{owner}", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(owner)
            raise
        self._owner = owner
        self.view: memoryview | None = memoryview(self._map)

    @classmethod
    def adopted(cls, fd: int) -> Segment:
        """Return a segment of memory that is sealed already; takes over `fd`."""
        segment = cls.__new__(cls)
        segment.fd, segment.size = fd, os.fstat(fd).st_size
        segment._owner, segment._map, segment.view = -1, None, None
        return segment

    def freeze(self) -> None:
        """Give up the writable mapping, so that no process can write any more. No slice of `view` may be left."""
        self._unmap()

    def seal(self) -> None:
        """Make the bytes immutable, as every process can check. The kernel refuses that while a page is written out."""
        self.freeze()
        if self._owner >= 0:
            try:
                fcntl.fcntl(self._owner, fcntl.F_ADD_SEALS, _COMPLETE)
            except OSError as error:
                # A client can prevent these seals, by F_SEAL_SEAL (EPERM) or by a reference to a page, say in a pipe
                # (EBUSY). The bytes are immutable all the same: the only writable mapping is gone, and no other can be
                # made. EBUSY also occurs while pages are sent to another node, so that the next call tries again.
                if error.errno == errno.EBUSY:
                    return
                if error.errno != errno.EPERM:
                    raise
            os.close(self._owner)
            self._owner = -1

    def close(self) -> None:
        """Close this process's fds and mapping; the memory is freed once no client maps it."""
        self._unmap()
        for fd in (self._owner, self.fd):
            if fd >= 0:
                os.close(fd)
        self._owner = self.fd = -1

    def _unmap(self) -> None:
        if self.view is not None:
            self.view.release()
            self.view = None
        if self._map is not None:
            self._map.close()
            self._map = None


class Dram:
    """All segments of one revision, of one page kind."""

    def __init__(self, sizes: Sequence[int], *, huge_pages: HugePages = "auto", name: str = "glowplug") -> None:
        """Reserve a segment of each size, in bytes. Raises `NoCapacity`, and then keeps none of them."""
        self.segments: list[Segment] = []
        self.page = _SMALL_PAGE
        with _reserving:
            self._choose(sizes, huge_pages, name)

    def _choose(self, sizes: Sequence[int], huge_pages: HugePages, name: str) -> None:
        total = sum(sizes)
        if huge_pages != "never" and (huge_pages == "always" or limits.free_huge_bytes() >= total):
            try:
                self._reserve(sizes, huge=True, name=name)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM) or huge_pages == "always":
                    raise NoCapacity(
                        f"the model needs {total / 1e6:.0f} MB of huge pages and the pool has "
                        f"{limits.free_huge_bytes() / 1e6:.0f} MB free ({error.strerror}). Raise vm.nr_hugepages, or "
                        "start the agent with --huge-pages auto"
                    ) from error
            else:
                self.page = limits.HUGE_PAGE
                return
        # Where all memory is reserved, the kernel kills processes later instead of refusing the reservation here.
        available = max(0, limits.available_bytes() - limits.memory_limit() // _SPARE)
        if total > available:
            raise NoCapacity(
                f"the model needs {total / 1e6:.0f} MB and {available / 1e6:.0f} MB of memory are available to the "
                "agent (its cgroup's limit, or the machine's). Give it more, or use a smaller model"
            )
        try:
            self._reserve(sizes, huge=False, name=name)
        except OSError as error:
            raise NoCapacity(f"the kernel refused {total / 1e6:.0f} MB of memory: {error.strerror}") from error

    def _reserve(self, sizes: Sequence[int], *, huge: bool, name: str) -> None:
        try:
            for number, size in enumerate(sizes):
                self.segments.append(Segment(size, huge=huge, name=f"{name}:{number}"))
        except BaseException:
            self.close()
            raise

    @classmethod
    def adopted(cls, fds: Sequence[int]) -> Dram:
        """Take over a model's memory from the fds that a client offers; those stay the caller's. Raises `OSError`."""
        dram = cls.__new__(cls)
        dram.segments = []
        dram.page = limits.HUGE_PAGE if os.fstat(fds[0]).st_blksize == limits.HUGE_PAGE else _SMALL_PAGE
        try:
            for fd in fds:  # opened anew, read-only: the client keeps control of its own description
                dram.segments.append(Segment.adopted(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)))
        except BaseException:
            dram.close()
            raise
        return dram

    @property
    def fds(self) -> list[int]:
        return [segment.fd for segment in self.segments]

    def map(self) -> list[mmap.mmap]:
        """Return read-only mappings of all segments; they outlive this object, and the caller closes them."""
        return [mmap.mmap(s.fd, s.size, mmap.MAP_SHARED, mmap.PROT_READ) for s in self.segments]

    def view(self, segment: int, start: int, end: int) -> memoryview:
        """Return writable memory of a segment that is not frozen yet; the caller releases the view."""
        view = self.segments[segment].view
        assert view is not None, "segments are frozen only after all readers are done"
        return view[start:end]

    def freeze(self) -> None:
        for segment in self.segments:
            segment.freeze()

    def seal(self) -> None:
        for segment in self.segments:
            segment.seal()

    def close(self) -> None:
        segments, self.segments = self.segments, []
        for segment in segments:
            segment.close()

    def __enter__(self) -> Dram:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
