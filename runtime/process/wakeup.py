"""A socket that makes a poll return when a signal comes. Standard library only."""

from __future__ import annotations

import contextlib
import signal
import socket


class Wakeup:
    """A socket that is readable after each of these signals. One per process, for its main thread."""

    def __init__(self, *signals: int) -> None:
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, lambda _number, _frame: None)  # Python writes only numbers of handled signals

    def fileno(self) -> int:
        return self._read.fileno()

    @property
    def fds(self) -> set[int]:
        return {self._read.fileno(), self._write.fileno()}

    def take(self) -> bytes:
        """Return the numbers of the signals since the last call, one byte each."""
        with contextlib.suppress(BlockingIOError):
            return self._read.recv(4096)
        return b""

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._read.close()
        self._write.close()
