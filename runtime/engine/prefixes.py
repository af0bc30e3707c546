"""Owns the cached rows of finished generations, for generations that begin with the same tokens. Pure.

A conversation's next turn begins with all that was said before, and requests with one system prompt begin alike. The
cache uses memory that is not promised to any generation: for a promise, the entry that was useless for longest goes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class CachedRows(Protocol):
    @property
    def nbytes(self) -> int: ...


K = TypeVar("K", bound=CachedRows)

_WIDTH = 4


@dataclass(slots=True)
class _Entry(Generic[K]):
    ids: bytes
    rows: K
    nbytes: int


def encoded(ids: Iterable[int]) -> bytes:
    """Return token ids in a form whose beginnings compare at the speed of memory."""
    return array("i", ids).tobytes()


def common(a: bytes, b: bytes) -> int:
    """Return the number of tokens that two `encoded` sequences begin with in common."""
    low, high = 0, min(len(a), len(b)) // _WIDTH
    if a[: high * _WIDTH] == b[: high * _WIDTH]:
        return high
    while low < high - 1:
        middle = (low + high) // 2
        if a[low * _WIDTH : middle * _WIDTH] == b[low * _WIDTH : middle * _WIDTH]:
            low = middle
        else:
            high = middle
    return low


class Prefixes(Generic[K]):
    """The rows of at most `most` finished generations, `nbytes` bytes in all. Not thread-safe."""

    def __init__(self, most: int = 64) -> None:
        self.nbytes = 0
        self._most = most
        self._entries: list[_Entry[K]] = []  # the least useful first

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, ids: bytes, others: Sequence[tuple[bytes, K]] = ()) -> tuple[K, int] | None:
        """Return the rows, cached or others, with the longest common beginning and its length; None without any."""
        best: tuple[K, int] | None = None
        used = None
        for entry in self._entries:
            length = common(entry.ids, ids)
            if length > (best[1] if best else 0):
                best, used = (entry.rows, length), entry
        for other, rows in others:
            length = common(other, ids)
            if length > (best[1] if best else 0):
                best, used = (rows, length), None
        if used is not None:
            self._entries.remove(used)
            self._entries.append(used)
        return best

    def add(self, ids: bytes, rows: K) -> None:
        """Cache `rows` of `ids`, in place of every entry that they continue; do nothing if an entry continues them."""
        if any(entry.ids.startswith(ids) for entry in self._entries):
            return
        for entry in [entry for entry in self._entries if ids.startswith(entry.ids)]:
            self._drop(entry)
        while len(self._entries) >= self._most:
            self.evict()
        self._entries.append(_Entry(ids, rows, rows.nbytes))
        self.nbytes += rows.nbytes

    def evict(self) -> bool:
        """Forget the entry that was useless for longest; False if there is none."""
        if not self._entries:
            return False
        self._drop(self._entries[0])
        return True

    def _drop(self, entry: _Entry[K]) -> None:
        self._entries.remove(entry)
        self.nbytes -= entry.nbytes
