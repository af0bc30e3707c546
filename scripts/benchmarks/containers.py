"""Containers for benchmarks: namespaces of their own, a memory limit where asked for, nothing left at the end.

A container is made first and its entrypoint executed later, as on a platform, so that the function alone is measured.
Without root the entrypoint runs in a session of its own instead, and `NAMESPACES` is false.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from memory import descendants

from benchmarks.harness import Unavailable

NAMESPACES = os.geteuid() == 0 and shutil.which("unshare") is not None
_UNSHARE = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
# The launcher joins its cgroup (0 means itself), waits for a line, and becomes the entrypoint.
_WAIT = 'if [ -n "$CGROUP" ]; then echo 0 > "$CGROUP"; unset CGROUP; fi; read -r _; exec "$@"'
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(slots=True)
class Container:
    """A container; `started` is the time of its entrypoint's execution, in ns of CLOCK_MONOTONIC."""

    process: subprocess.Popen[bytes]
    log: Path
    started: int = 0

    def start(self) -> None:
        assert self.process.stdin is not None, "it was asked for"
        self.started = time.monotonic_ns()
        self.process.stdin.write(b"go\n")
        self.process.stdin.close()

    def pids(self) -> list[int]:
        """Return its processes, by their numbers outside, without the launcher."""
        found = descendants(self.process.pid)
        return found[1:] if NAMESPACES else found

    def output(self) -> str:
        return self.log.read_text(errors="replace")


@contextlib.contextmanager
def container(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path, cgroup: MemoryCgroup | None = None
) -> Iterator[Container]:
    """Make a container that waits for `start()`; all its processes are killed at the end of the block."""
    place = Path(tempfile.mkdtemp(prefix="gp-"))
    try:
        variables = {**environment, "TMPDIR": str(place), "HOME": str(place)}
        variables["CGROUP"] = str(cgroup.place / "cgroup.procs") if cgroup is not None else ""
        log = place / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*(_UNSHARE if NAMESPACES else ()), "sh", "-c", _WAIT, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=variables,
                cwd=cwd,
                start_new_session=True,
            )
        try:
            yield Container(process, log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    finally:
        shutil.rmtree(place, ignore_errors=True)


# --- memory limits ----------------------------------------------------------------------------------------------------


class MemoryCgroup:
    """A memory cgroup of version 1 or 2; a context manager that removes it once its processes are gone."""

    def __init__(self, name: str, limit: int) -> None:
        """Make the cgroup. Raises `Unavailable` where cgroups cannot be made."""
        v1 = _CGROUPS / "memory"
        self._v1 = v1.is_dir()
        # Version 2 allows no processes beside child cgroups, so ours lies directly below the root.
        parent = v1 / _own_v1().lstrip("/") if self._v1 else _CGROUPS
        self.place = parent / f"glowplug-bench-{os.getpid()}-{name}"
        try:
            self.place.mkdir()
        except OSError as error:
            raise Unavailable(f"no memory cgroup can be made here: {error.strerror}") from error
        try:
            self.limit(limit)
        except OSError as error:
            self.place.rmdir()
            raise Unavailable(f"no memory limit can be set here: {error}") from error

    def limit(self, size: int) -> None:
        (self.place / ("memory.limit_in_bytes" if self._v1 else "memory.max")).write_text(f"{size}\n")

    def usage(self) -> int:
        """Return the bytes that the kernel charges to the cgroup, without huge pages."""
        return int((self.place / ("memory.usage_in_bytes" if self._v1 else "memory.current")).read_text())

    def reclaim(self) -> None:
        """Reclaim every page of its processes that the kernel can, as a node under pressure does with an idle pod."""
        for _ in range(3):
            # EAGAIN or EBUSY: the kernel has reclaimed all that it can.
            with contextlib.suppress(OSError):
                if self._v1:
                    (self.place / "memory.force_empty").write_text("1\n")
                else:
                    (self.place / "memory.reclaim").write_text(f"{self.usage()}\n")

    def close(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                self.place.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _own_v1() -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") and (_CGROUPS / "memory" / path.lstrip("/")).is_dir():
            return path
    return "/"
