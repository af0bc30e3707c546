"""The contract of an origin, the place where a plain checkpoint lies. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cache_agent.model.manifest import SourceFile


class Origin(Protocol):
    """One model's place. Errors of the medium surface as `AgentError`s; reads may run in many threads at once."""

    uri: str

    def files(self) -> list[SourceFile]:
        """The files directly in the model's directory. Raises `ModelNotFound` when there are none."""
        ...

    def read(self, file: SourceFile, start: int, size: int) -> bytes:
        """Exactly `size` bytes of the file as it was listed; raises `OriginChanged` when it is another by now."""
        ...

    def read_into(self, file: SourceFile, start: int, view: memoryview) -> None:
        """Fills `view`; otherwise like `read`."""
        ...

    def read_scattered(
        self, file: SourceFile, start: int, views: Sequence[memoryview], arrived: Callable[[int], None]
    ) -> None:
        """Fills `views`, one after the other, from neighbouring bytes of the file, in one request where that counts.

        `arrived(count)` tells that so many more bytes, in order, are there and are the file's, also when an error
        follows: they need not be read again.
        """
        ...
