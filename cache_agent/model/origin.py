"""The contract of an origin, the place where a plain checkpoint lies. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cache_agent.model.manifest import SourceFile


class Origin(Protocol):
    """One model's place. Every error of the medium is raised as an `AgentError`; reads may run in many threads."""

    uri: str

    def files(self) -> list[SourceFile]:
        """Return the files directly in the model's directory. Raises `ModelNotFound` when there are none."""
        ...

    def read(self, file: SourceFile, start: int, size: int) -> bytes:
        """Return exactly `size` bytes from `start` of the listed file. Raises `OriginChanged` when the file changed."""
        ...

    def read_into(self, file: SourceFile, start: int, view: memoryview) -> None:
        """Fill `view` from `start` of the listed file; otherwise like `read`."""
        ...

    def read_scattered(
        self, file: SourceFile, start: int, views: Sequence[memoryview], arrived: Callable[[int], None]
    ) -> None:
        """Fill `views`, one after the other, from the bytes behind `start`; by one request where requests cost time.

        `arrived(count)` is called whenever `count` more bytes are in place, in order. They are the file's even if an
        error follows, and need not be read again.
        """
        ...
