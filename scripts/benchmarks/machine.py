"""The machine: its page cache and its pool of huge pages, which benchmarks change, and its noise."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HUGE_PAGE = 2 << 20
_POOL = Path("/proc/sys/vm/nr_hugepages")
_FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
_SPARE_PAGES = 24  # for the buffer of raw reads

# --- page cache -------------------------------------------------------------------------------------------------------


def drop(paths: Iterable[Path]) -> None:
    """Drop these files from the page cache; mapped pages stay there."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def drop_everything() -> bool:
    """Drop the whole page cache, libraries included; False without the right to."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError:
        return False
    return True


def warm(paths: Iterable[Path]) -> None:
    """Read these files into the page cache."""
    buffer = bytearray(16 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cached(path: Path) -> int:
    """Return the bytes of a file that are in the page cache."""
    size = path.stat().st_size
    if size == 0:
        return 0
    pages = -(-size // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    fd = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"{path} cannot be mapped")
    try:
        found = (ctypes.c_ubyte * pages)()
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found):
            raise OSError(ctypes.get_errno(), f"mincore({path})")
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return min(size, sum(page & 1 for page in bytes(found)) * mmap.PAGESIZE)


# --- huge pages -------------------------------------------------------------------------------------------------------


@contextmanager
def huge_pages(size: int) -> Iterator[int]:
    """Provide `size` bytes of free 2 MiB pages for the block; yields 0 where the pool cannot be made.

    The lock is the one that tests take: meanwhile no test reserves pages, or restores the pool.
    """
    if not size or not os.access(_POOL, os.W_OK) or not _FREE.exists():
        yield 0
        return
    wanted = -(-size // _HUGE_PAGE) + _SPARE_PAGES
    with (Path(tempfile.gettempdir()) / "glowplug-huge-pages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = _POOL.read_text()
        try:
            with suppress(OSError):
                taken = int(before) - int(_FREE.read_text())
                if int(_FREE.read_text()) < wanted:
                    drop_everything()
                    Path("/proc/sys/vm/compact_memory").write_text("1\n")
                    _POOL.write_text(f"{taken + wanted}\n")
            yield size if int(_FREE.read_text()) >= wanted else 0
        finally:
            _POOL.write_text(before)


def hugetlb_buffer(size: int) -> mmap.mmap | None:
    """Return anonymous memory of huge pages, or None where the pool has too few."""
    map_hugetlb = 0x40000
    try:
        return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_hugetlb)
    except OSError:
        return None


# --- noise ------------------------------------------------------------------------------------------------------------


def probe() -> float:
    """Return the seconds of a fixed piece of work, the best of five: the present speed of one processor."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        total = 0
        for value in range(300_000):
            total += value * value
        times.append(time.perf_counter() - start)
    return min(times)


def others(seconds: float = 0.25) -> float:
    """Return the share of the machine's processors that is busy while this process does nothing."""
    busy, total = _jiffies()
    time.sleep(seconds)
    busy_after, total_after = _jiffies()
    return (busy_after - busy) / max(1, total_after - total)


def _jiffies() -> tuple[int, int]:
    """Return (busy, all); time stolen by a hypervisor counts as busy, waiting for a disk does not."""
    values = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = values[3] + values[4]
    return sum(values) - idle, sum(values)
