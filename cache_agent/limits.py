"""The limits of this process: huge pages, memory, processors, by cgroup (v1 and v2) and host. Reads /proc and /sys."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

HugePages = Literal["auto", "always", "never"]
HUGE_PAGE = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # v1 writes a number close to 2**63 for "no limit"


def free_huge_bytes() -> int:
    """Return the bytes of 2 MiB pages that are neither used nor reserved; 0 where the machine has no pool."""
    try:
        free = int((_POOL / "free_hugepages").read_text())
        reserved = int((_POOL / "resv_hugepages").read_text())
    except (OSError, ValueError):
        return 0
    headroom = min(_cgroup_headrooms("hugetlb.2MB"), default=None)
    pool = max(0, free - reserved) * HUGE_PAGE
    return pool if headroom is None else min(pool, headroom)


def huge_reservations_hold() -> bool:
    """Return whether a granted reservation of huge pages guarantees their first use.

    A cgroup that limits only the use grants the reservation, and kills the process that first uses a page.
    """
    unlimited = 1 << 62
    use = min(_cgroup_headrooms("hugetlb.2MB"), default=unlimited)
    return use >= min(_cgroup_headrooms("hugetlb.2MB.rsvd"), default=unlimited)


def available_bytes() -> int:
    """Return the bytes of ordinary memory that are still free, by the tightest of the cgroup's limits and the host."""
    return min([_meminfo("MemAvailable"), *_cgroup_headrooms("memory")])


def memory_limit() -> int:
    """Return the bytes that this process may use at all: its cgroup's limit, or the host's memory."""
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _cgroup_limits("memory"))])


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {field}")


def _cgroup_headrooms(resource: str) -> Iterator[int]:
    for most, used in _cgroup_limits(resource):
        yield max(0, most - used)


def _cgroup_limits(resource: str) -> Iterator[tuple[int, int]]:
    """Yield (limit, usage) of each level with a limit, from this process's cgroup to the root, in both hierarchies.

    `resource` is the beginning of the files' names: "memory", "hugetlb.2MB", "hugetlb.2MB.rsvd".
    """
    controller = resource.partition(".")[0]
    limit, current = f"{resource}.max", f"{resource}.current"
    v1_limit, v1_current = f"{resource}.limit_in_bytes", f"{resource}.usage_in_bytes"
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
    for place in _places(root, path):
        with contextlib.suppress(OSError, ValueError):
            text = (place / limit).read_text().strip()
            if text != "max" and int(text) < _UNLIMITED:
                yield int(text), int((place / current).read_text())


def _places(root: Path, path: str) -> Iterator[Path]:
    """Yield a cgroup's directory and those above it, up to the root of the hierarchy that is mounted at `root`."""
    # In a container with its own cgroup namespace the path is "/"; without one the path may not exist below `root`,
    # and the container's own cgroup is mounted there.
    place = root / path.lstrip("/")
    if not place.is_dir():
        place = root
    while place != root:
        yield place
        place = place.parent
    yield root


def cpu_quota() -> int:
    """Return the number of processors that this process can use, by affinity and the cgroup's quota; at least 1."""
    cpus = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                quotas = (_quota_v2(place) for place in _places(_CGROUPS, path))
            elif "cpu" in controllers.split(","):
                quotas = (_quota_v1(place) for root in (controllers, "cpu") for place in _places(_CGROUPS / root, path))
            else:
                continue
            cpus = min([cpus, *(quota for quota in quotas if quota)])
    return max(1, math.ceil(cpus))


def _quota_v2(place: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (place / "cpu.max").read_text().split()
        return int(quota) / int(period)
    return 0.0


def _quota_v1(place: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        quota = int((place / "cpu.cfs_quota_us").read_text())
        return max(0.0, quota / int((place / "cpu.cfs_period_us").read_text()))
    return 0.0
