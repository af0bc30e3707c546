"""Which revision a source was found to be: by this node, as it remembers and its SSD does, and by others."""

from __future__ import annotations

from threading import Lock

from cache_agent.cluster.directory import Directory
from cache_agent.tiers.ssd import Ssd

_MOST = 4096  # sources that are remembered; the oldest go


class Revisions:
    """Any thread."""

    def __init__(self, directory: Directory, ssd: Ssd | None, node: str, *, believe: int) -> None:
        """What `believe` other nodes say is taken for true without looking; 0: nothing is."""
        self._directory = directory
        self._ssd = ssd
        self._node = node
        self._believe = believe
        self._lock = Lock()
        self._own: dict[str, str] = {}

    def of(self, source: str) -> str:
        """The revision of a source that was admitted before, here or, where they are believed, elsewhere, or ""."""
        with self._lock:
            own = self._own.get(source, "")
        own = own or (self._ssd.revision(source) if self._ssd else "")
        return own or (self.stated(source, self._believe) if self._believe else "")

    def stated(self, source: str, nodes: int) -> str:
        """What at least so many nodes found a source to be and nobody denies, or "": it has yet to be proved."""
        stated = self._directory.stated(source)
        return next(iter(stated.values())) if len(stated) >= nodes and len(set(stated.values())) == 1 else ""

    def remember(self, source: str, revision: str) -> None:
        """A source's bytes were read and hashed, here."""
        with self._lock:
            self._own.pop(source, None)
            self._own[source] = revision
            while len(self._own) > _MOST:
                del self._own[next(iter(self._own))]
        self._directory.remember(source, revision, self._node)
        if self._ssd is not None:
            self._ssd.remember(source, revision)
