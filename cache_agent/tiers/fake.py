"""An origin in memory, for tests and simulations: files as bytes, with faults and delays on demand."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping

from cache_agent.errors import ModelNotFound, OriginChanged
from cache_agent.model.manifest import SourceFile
from cache_agent.tiers.origin import ReadOneByOne


class FakeOrigin(ReadOneByOne):
    """An `Origin` in memory; `before_read(name, start, size)` may sleep, block or raise."""

    def __init__(
        self,
        uri: str,
        files: Mapping[str, bytes],
        *,
        seconds_per_read: float = 0.0,
        before_read: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.uri = uri
        self.contents = dict(files)
        self.seconds_per_read = seconds_per_read
        self.before_read = before_read
        self.reads = 0
        self.bytes_read = 0

    def files(self) -> list[SourceFile]:
        if not self.contents:
            raise ModelNotFound(f"{self.uri} holds no files")
        return [SourceFile(name, len(data), self._etag(data)) for name, data in sorted(self.contents.items())]

    def read_into(self, file: SourceFile, start: int, view: memoryview) -> None:
        if self.before_read is not None:
            self.before_read(file.name, start, len(view))
        if self.seconds_per_read:
            time.sleep(self.seconds_per_read)
        data = self.contents.get(file.name, b"")
        if self._etag(data) != file.etag or start + len(view) > len(data):
            raise OriginChanged(f"{self.uri}: {file.name} was overwritten while it was read")
        view[:] = data[start : start + len(view)]
        self.reads += 1
        self.bytes_read += len(view)

    @staticmethod
    def _etag(data: bytes) -> str:
        return hashlib.blake2b(data, digest_size=8).hexdigest()
