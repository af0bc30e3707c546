"""Owns the memory of one revision: a memfd per segment, reserved before the first byte, sealed when it is complete.

While it loads, the agent's mapping is the only writable one: `F_SEAL_FUTURE_WRITE` refuses every other, also through
/proc/<pid>/fd. After `seal` nobody can write, grow or shrink the bytes for as long as anyone maps them.
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
_SPARE = 20  # one part in so many of the memory limit is never taken
_reserving = threading.Lock()  # two loads must not count on the same free memory
_F_SEAL_FUTURE_WRITE = 0x0010  # fcntl has no name for it before Python 3.12
_WHILE_LOADING = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE
_COMPLETE = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Segment:
    """One memfd. `fd` is a read-only description, fit to be handed out; `view` is writable until `seal`."""

    def __init__(self, size: int, *, huge: bool, name: str) -> None:
        """Raises `OSError` when the memory cannot be reserved."""
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if huge else 0)
        self.size = size
        owner = os.memfd_create(name, flags)
        try:
            os.ftruncate(owner, size)
            # A shared mapping of huge pages reserves them all, and its readers clear each as they fill it, in parallel:
            # clearing 2.2 GB ahead of them took 0.2 s of 1.0 s from a fast disk.
            if not (huge and limits.huge_reservations_hold()):
                os.posix_fallocate(owner, 0, size)
            self._map: mmap.mmap | None = mmap.mmap(owner, size, mmap.MAP_SHARED)
            fcntl.fcntl(owner, fcntl.F_ADD_SEALS, _WHILE_LOADING)
            os.fchmod(owner, 0o444)  # a memfd is born 0777: any user could reopen it writable and add seals
            self.fd = os.open(f"/proc/self/fd/{owner}", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(owner)
            raise
        self._owner = owner
        self.view: memoryview | None = memoryview(self._map)

    @classmethod
    def adopted(cls, fd: int) -> Segment:
        """A segment that is sealed already; takes over `fd`."""
        segment = cls.__new__(cls)
        segment.fd, segment.size = fd, os.fstat(fd).st_size
        segment._owner, segment._map, segment.view = -1, None, None
        return segment

    def freeze(self) -> None:
        """Gives up the writable mapping: nobody can write from here on. No reader of `view` may be left."""
        self._unmap()

    def seal(self) -> None:
        """Makes the bytes immutable for all to see; the kernel refuses it while a page is being written out."""
        self.freeze()
        if self._owner >= 0:
            try:
                fcntl.fcntl(self._owner, fcntl.F_ADD_SEALS, _COMPLETE)
            except OSError as error:
                # A client can hold these seals back, with F_SEAL_SEAL (EPERM) or a reference to a page, say in a pipe
                # (EBUSY). Nobody can write all the same: the only writable mapping is gone, and no other can be made.
                if error.errno == errno.EBUSY:  # another node may just be given some pages: it is tried again
                    return
                if error.errno != errno.EPERM:
                    raise
            os.close(self._owner)
            self._owner = -1

    def close(self) -> None:
        """Drops this process's hold; the memory is freed once no client maps it."""
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
        """Reserves `sizes` bytes each. Raises `NoCapacity` at once when they cannot be had, and takes nothing."""
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
        # Memory that is reserved to the last byte kills processes, ours or others', instead of failing here.
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
        """Memory of an earlier agent, proved to be a model's. The fds stay the caller's; raises `OSError`."""
        dram = cls.__new__(cls)
        dram.segments = []
        dram.page = limits.HUGE_PAGE if os.fstat(fds[0]).st_blksize == limits.HUGE_PAGE else _SMALL_PAGE
        try:
            for fd in fds:  # a description of our own, read-only: what the client does with its own is its affair
                dram.segments.append(Segment.adopted(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)))
        except BaseException:
            dram.close()
            raise
        return dram

    @property
    def fds(self) -> list[int]:
        return [segment.fd for segment in self.segments]

    def map(self) -> list[mmap.mmap]:
        """Read-only mappings of all segments; they outlive this object, and are the caller's to close."""
        return [mmap.mmap(s.fd, s.size, mmap.MAP_SHARED, mmap.PROT_READ) for s in self.segments]

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
