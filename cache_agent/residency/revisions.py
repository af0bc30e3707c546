"""Owns the revisions of sources: those that this node found, in memory and on SSD, and those that other nodes state."""

from __future__ import annotations

from threading import Lock

from cache_agent.cluster.directory import Directory
from cache_agent.tiers.ssd import Ssd

_MOST = 4096  # sources that are remembered; the oldest go


class Revisions:
    """Source id -> revision. Any thread."""

    def __init__(self, directory: Directory, ssd: Ssd | None, node: str, *, believe: int) -> None:
        """A revision that `believe` other nodes state counts as known; with 0, only this node's own admissions do."""
        self._directory = directory
        self._ssd = ssd
        self._node = node
        self._believe = believe
        self._lock = Lock()
        self._found: dict[str, str] = {}

    def of(self, source: str) -> str:
        """Return the revision of a source that was admitted before, here or at nodes that are believed, or ""."""
        with self._lock:
            found = self._found.get(source, "")
        found = found or (self._ssd.revision(source) if self._ssd else "")
        return found or (self.stated(source, self._believe) if self._believe else "")

    def stated(self, source: str, nodes: int) -> str:
        """Return the revision, not proved yet, that at least so many nodes state and none contradicts, or ""."""
        stated = self._directory.stated(source)
        return next(iter(stated.values())) if len(stated) >= nodes and len(set(stated.values())) == 1 else ""

    def remember(self, source: str, revision: str) -> None:
        """Note the revision of a source whose bytes this node has read and hashed."""
        with self._lock:
            self._found.pop(source, None)
            self._found[source] = revision
            while len(self._found) > _MOST:
                del self._found[next(iter(self._found))]
        self._directory.remember(source, revision, self._node)
        if self._ssd is not None:
            self._ssd.remember(source, revision)
