"""Owns the index from sources and revisions to copies. Pure.

Several sources may name one copy; of copies with the same revision the first one is leased.
"""

from __future__ import annotations

from collections.abc import Mapping

from cache_agent.residency.entry import Entry


class Catalogue:
    """An index over `entries`, which the caller owns; one caller at a time."""

    def __init__(self, entries: Mapping[int, Entry]) -> None:
        self._entries = entries
        self._by_source: dict[str, int] = {}
        self._by_revision: dict[str, int] = {}

    def __contains__(self, source: str) -> bool:
        return source in self._by_source

    def find(self, source: str) -> Entry | None:
        number = self._by_source.get(source)
        return None if number is None else self._entries[number]

    def has(self, revision: str) -> bool:
        return revision in self._by_revision

    def names(self, source: str, entry: Entry) -> bool:
        return self._by_source.get(source) == entry.number

    def first(self, entry: Entry) -> Entry:
        """Return the copy that leases on the entry's revision get."""
        return self._entries[self._by_revision.get(entry.revision, entry.number)]

    def add(self, entry: Entry) -> None:
        """Add a copy whose source and revision have none yet."""
        self._by_source[entry.manifest.source] = entry.number
        if entry.revision:
            self._by_revision[entry.revision] = entry.number

    def same(self, source: str, revision: str) -> None:
        """Let the source name the copy of this revision, if there is one."""
        if revision in self._by_revision:
            self._by_source[source] = self._by_revision[revision]

    def admitted(self, entry: Entry) -> None:
        """Add the copy's revision, which has become known; the source now names the first copy with that revision."""
        first = self._by_revision.setdefault(entry.revision, entry.number)
        if first != entry.number:
            self._by_source[entry.manifest.source] = first

    def drop(self, entry: Entry) -> None:
        """Remove the entry; another copy of its revision, if there is one, takes its place."""
        copies = (e.number for e in self._entries.values() if e.revision == entry.revision and e.state != "evicting")
        successor = next((number for number in copies if number != entry.number), None) if entry.revision else None
        for index in (self._by_source, self._by_revision):
            for key in [key for key, number in index.items() if number == entry.number]:
                if successor is None:
                    del index[key]
                else:
                    index[key] = successor
