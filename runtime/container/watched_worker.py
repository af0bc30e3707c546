"""One worker as its shim sees it: the line to the worker, its process, and signs of life.

    asked for ──adopt──▶ running ──its process ends──▶ ended ──close──▶

The shim asks `Supply` for a worker, and adopts the process that comes of it. Standard library only.
"""

from __future__ import annotations

import contextlib
import math
import select
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.process.children import Child
    from runtime.process.control import ShimEnd

ORPHAN_SECONDS = 2.0  # seconds that a dead worker's status may take to come


class WatchedWorker:
    """A worker, from when it is asked for; `child` is None until its process is there. For the shim's thread only."""

    def __init__(self, line: ShimEnd | None, poller: select.poll, timeout: float) -> None:
        """`poller` returns when the worker speaks or ends; a worker may be silent for `timeout` seconds."""
        self.child: Child | None = None
        self.asked_at = self.heard = time.monotonic()
        self.turn = 0  # of the last load that the worker told
        self.retired = self.finished = False  # what the worker said of itself, see control.py
        self._line, self._poller, self._timeout = line, poller, timeout
        self._dead_at = math.inf
        if line is not None:
            poller.register(line, select.POLLIN)

    def adopt(self, child: Child) -> None:
        """Take the worker's process, which was forked or booted."""
        self.child = child
        self._poller.register(child.pidfd, select.POLLIN)

    # --- the line -------------------------------------------------------------------------------------------------

    @property
    def reachable(self) -> bool:
        """Whether the worker runs and has not closed its end of the line."""
        return self.child is not None and self._line is not None

    def messages(self) -> list[dict[str, Any]]:
        """Return what the worker has said since the last call."""
        if self._line is None:
            return []
        found = self._line.messages()
        if found:
            self.heard = time.monotonic()
        for message in found:
            state = message.get("state")
            self.retired |= state == "retired"
            self.finished |= state in ("retired", "drained")
        if self._line.ended:
            self._close_line()
        return found

    def tell(self, **message: object) -> None:
        if self._line is not None:
            self._line.tell(**message)

    def _close_line(self) -> None:
        if self._line is not None:
            self._poller.unregister(self._line)
            self._line.close()
            self._line = None

    # --- the process ----------------------------------------------------------------------------------------------

    @property
    def status(self) -> int | None:
        """The status with which the worker has ended, as waitpid gives it; None before."""
        return None if self.child is None else self.child.status

    def signal(self, number: int) -> None:
        if self.child is not None:
            self.child.signal(number)

    def runs(self, now: float) -> bool:
        """Whether the process is there and lives. A dead one gets a status when nothing else tells how it ended."""
        child = self.child
        if child is None or child.status is not None:
            return False
        if not child.dead():
            return True
        if self._dead_at > now:
            self._dead_at = now
            self._poller.unregister(child.pidfd)  # a dead worker's pidfd would end every wait at once
        elif now - self._dead_at > ORPHAN_SECONDS:
            child.status = 0 if self.finished else 1 << 8  # the worker's zygote is gone, and the status with it
        return False

    def silent(self, now: float) -> bool:
        """Whether the worker has been silent for too long. True once; then the time begins anew."""
        if now - self.heard <= self._timeout:
            return False
        self.heard = now
        return True

    def close(self) -> None:
        """Close the line and the pidfd."""
        self._close_line()
        if self.child is not None:
            with contextlib.suppress(KeyError):
                self._poller.unregister(self.child.pidfd)
            self.child.close()
