"""Child processes: starting them, signals, their ends, and facts about this process. Standard library only."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence

_PR_SET_CHILD_SUBREAPER = 36


class Child:
    """A process that this one started, or a zygote forked for it: pid, pidfd, and the status once it has ended."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid, self.pidfd = pid, pidfd
        self.status: int | None = None  # as waitpid gives it

    def signal(self, number: int) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def dead(self) -> bool:
        """Return whether the process has ended, also when its parent has not told how."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return self.status is not None or bool(poller.poll(0))

    def close(self) -> None:
        os.close(self.pidfd)


def spawn(
    arguments: Sequence[str], fds: Sequence[int], environment: Mapping[str, str], blocked: Sequence[int] = ()
) -> Child:
    """Start Python with these arguments. `fds` are inherited under their own numbers; all others are close-on-exec.

    Signals that are `blocked` wait until the process takes them.
    """
    for fd in fds:
        os.set_inheritable(fd, True)
    try:
        pid = os.posix_spawn(sys.executable, [sys.executable, *arguments], environment, setsigmask=blocked)
    finally:
        for fd in fds:
            os.set_inheritable(fd, False)
    return Child(pid, os.pidfd_open(pid))


def reap() -> dict[int, int]:
    """Return pid → status of every child that has ended; pid 1 and subreapers get the orphans of others, too."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def become_subreaper() -> None:
    """Have orphans among the descendants become children of this process."""
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def executed_at(now: int) -> int:
    """Return when this process was executed: ns of CLOCK_MONOTONIC, exact to 10 ms, not after `now`."""
    with open("/proc/self/stat", encoding="ascii") as file:
        ticks = int(file.read().rpartition(") ")[2].split()[19])
    since_boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
    return min(now, ticks * 10**9 // os.sysconf("SC_CLK_TCK") - since_boot)


def private_bytes() -> int:
    """Return the bytes that would be freed if this process ended: pages that no other process has."""
    total = 0
    with contextlib.suppress(OSError), open("/proc/self/smaps_rollup", encoding="ascii") as file:
        for line in file:
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total += int(line.split()[1]) << 10
    return total
