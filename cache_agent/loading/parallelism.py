"""The number of ranges to read at once, from what they yield. Pure: byte counts and times in, a number out.

The yield of n connections grows with n until something is full (the link, the store's share for this client, a
processor); more connections then only cost. So the number doubles as long as a doubling pays, and goes back when one
did not. After a while a doubling is tried again, because other traffic on the link comes and goes. Trouble (an error, a
request to slow down) halves the number at once, as in TCP.
"""

from __future__ import annotations

WINDOW = 0.25  # seconds for which a number of readers is measured before it is judged
PAYS = 1.10  # a doubling that brings less than 10 % more is not worth its connections
HOLD = 16  # windows until the next doubling after one that did not pay
START = 4


class Parallelism:
    """The number of reads that may run now, `limit`: between 1 and `most`."""

    def __init__(self, most: int, start: int = START) -> None:
        self.limit = max(1, min(most, start))
        self._most = max(1, most)
        self._since: float | None = None
        self._bytes = 0
        self._before = 0  # the number before the doubling that is on trial; 0 while none is
        self._rate = 0.0  # bytes per second with that number
        self._hold = 0

    def observe(self, total: int, now: float) -> int:
        """Take in that `total` bytes have arrived until `now` (seconds of a monotonic clock); return the new limit."""
        if self._since is None:
            self._restart(total, now)
            return self.limit
        seconds = now - self._since
        if seconds < WINDOW:
            return self.limit
        rate = (total - self._bytes) / seconds
        self._restart(total, now)
        if self._before:
            self._judge(rate)
        elif self._hold:
            self._hold -= 1
        elif rate > 0:
            self._try_more(rate)
        return self.limit

    def trouble(self) -> int:
        """Take in that a read failed in a way that fewer reads may cure; return the new limit."""
        self.limit = max(1, self.limit // 2)
        self._before = 0
        self._hold = HOLD
        self._since = None
        return self.limit

    def _try_more(self, rate: float) -> None:
        more = min(self._most, self.limit * 2)
        if more > self.limit:
            self._before, self._rate, self.limit = self.limit, rate, more

    def _judge(self, rate: float) -> None:
        if rate >= self._rate * PAYS:
            self._before = 0
            self._try_more(rate)
        else:
            self.limit, self._before, self._hold = self._before, 0, HOLD

    def _restart(self, total: int, now: float) -> None:
        self._since, self._bytes = now, total
