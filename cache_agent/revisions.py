"""Which revision a source was found to be: what this node's SSD and the other nodes remember of earlier admissions."""

from __future__ import annotations

from cache_agent.directory import Directory
from cache_agent.tiers.ssd import Ssd


class Revisions:
    """Any thread."""

    def __init__(self, directory: Directory, ssd: Ssd | None) -> None:
        self._directory = directory
        self._ssd = ssd

    def of(self, source: str) -> str:
        """The revision of a source that was admitted before, here or elsewhere, or ""."""
        return self._directory.revision(source) or (self._ssd.revision(source) if self._ssd else "")

    def remember(self, source: str, revision: str) -> None:
        """A source's bytes were read and hashed."""
        self._directory.remember(source, revision)
        if self._ssd is not None:
            self._ssd.remember(source, revision)
