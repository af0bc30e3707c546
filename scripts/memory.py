"""Memory of processes, from /proc: private and shared bytes, and the copies of weights on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one process: private ones, private and proportional shared ones together, and mapped weights."""

    pid: int
    private: int
    proportional: int
    weights: int


def footprint(pid: int) -> Footprint:
    """Read a process's footprint. Raises `ProcessLookupError` when the process is gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        private = sum(_kib(line) for line in rollup if line.startswith("Private_"))
        proportional = sum(_kib(line) for line in rollup if line.startswith("Pss:"))
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError as error:
        raise ProcessLookupError(f"process {pid} is gone") from error
    mapped = 0
    for line in maps:
        if _segment(line):
            start, end = line.split(maxsplit=1)[0].split("-")
            mapped += int(end, 16) - int(start, 16)
    return Footprint(pid, private, proportional, mapped)


def descendants(pid: int) -> list[int]:
    """Return a process and all its descendants that still run."""
    found = [pid]
    for place in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in place.read_text().split():
                found += descendants(int(child))
    return found


def weight_copies(pids: Iterable[int]) -> dict[int, int]:
    """Return inode → bytes of every weight segment that one of these processes has open or mapped, each once."""
    found: dict[int, int] = {}
    for place in (Path(f"/proc/{pid}") for pid in pids):
        with contextlib.suppress(OSError):
            for line in (place / "maps").read_text().splitlines():
                if _segment(line):
                    bounds, _, offset, _, inode, *_ = line.split(maxsplit=5)
                    start, end = bounds.split("-")
                    found[int(inode)] = max(found.get(int(inode), 0), int(end, 16) - int(start, 16) + int(offset, 16))
        with contextlib.suppress(OSError):
            for fd in (place / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if _segment(str(fd.readlink())):
                        status = fd.stat()
                        found[status.st_ino] = status.st_size
    return found


def _segment(text: str) -> bool:
    return "/memfd:glowplug:" in text and "manifest" not in text


def _kib(line: str) -> int:
    return int(line.split()[1]) * 1024
