"""How much memory this process may still take: huge page pool, cgroup (v1 and v2), host. Reads /proc and /sys."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

HUGE_PAGE = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # v1 writes a number close to 2**63 for "no limit"


def free_huge_bytes() -> int:
    """Bytes of 2 MiB pages that are neither in use nor promised to anyone; 0 where the machine has no pool."""
    try:
        free = int((_POOL / "free_hugepages").read_text())
        reserved = int((_POOL / "resv_hugepages").read_text())
    except (OSError, ValueError):
        return 0
    headroom = min(_cgroup_headrooms("hugetlb.2MB.max", "hugetlb.2MB.current", "hugetlb", "hugetlb.2MB"), default=None)
    pool = max(0, free - reserved) * HUGE_PAGE
    return pool if headroom is None else min(pool, headroom)


def available_bytes() -> int:
    """Bytes of ordinary memory that can still be taken, by the tightest of the cgroup's limits and the host."""
    host = _meminfo("MemAvailable")
    return min([host, *_cgroup_headrooms("memory.max", "memory.current", "memory", "memory")])


def memory_limit() -> int:
    """Bytes this process may use at all: its cgroup's limit, or the host's memory."""
    limits = [limit for limit, _ in _cgroup_limits("memory.max", "memory.current", "memory", "memory")]
    return min([_meminfo("MemTotal"), *limits])


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {field}")


def _cgroup_headrooms(limit: str, current: str, controller: str, prefix: str) -> Iterator[int]:
    for most, used in _cgroup_limits(limit, current, controller, prefix):
        yield max(0, most - used)


def _cgroup_limits(limit: str, current: str, controller: str, prefix: str) -> Iterator[tuple[int, int]]:
    """(limit, usage) of every level from this process's cgroup to the root that has a limit, in both hierarchies."""
    v1_limit, v1_current = f"{prefix}.limit_in_bytes", f"{prefix}.usage_in_bytes"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _walk(_CGROUPS, path, limit, current)
                yield from _walk(_CGROUPS / "unified", path, limit, current)
            elif controller in controllers.split(","):
                yield from _walk(_CGROUPS / controllers, path, v1_limit, v1_current)
                yield from _walk(_CGROUPS / controller, path, v1_limit, v1_current)


def _walk(root: Path, path: str, limit: str, current: str) -> Iterator[tuple[int, int]]:
    # In a container with its own cgroup namespace the path is "/"; without one the path may not exist below `root`,
    # and the container's own cgroup is mounted there.
    place = root / path.lstrip("/")
    if not place.is_dir():
        place = root
    while True:
        with contextlib.suppress(OSError, ValueError):
            text = (place / limit).read_text().strip()
            if text != "max" and int(text) < _UNLIMITED:
                yield int(text), int((place / current).read_text())
        if place == root:
            return
        place = place.parent
