"""One copy of a model in memory, as the rules see it, and the words that name copies in errors. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Protocol, TypeVar


class Copy(Protocol):
    """One copy in memory: its URI, its size in bytes, and the leases on it."""

    @property
    def uri(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def leases(self) -> Collection[int]: ...


C = TypeVar("C", bound=Copy)


def listed(copies: Iterable[C], why: Callable[[C], str]) -> list[tuple[str, str]]:
    """Return (URI, a few words on the copy) of each copy, the largest first."""
    largest = sorted(copies, key=lambda copy: -copy.bytes)
    return [(copy.uri, f"{short(copy.uri)} {mb(copy.bytes)}, {why(copy)}") for copy in largest]


def short(uri: str) -> str:
    return uri if len(uri) <= 80 else f"…{uri[-79:]}"


def mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
