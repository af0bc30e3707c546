"""Owns what is left of images that were found damaged: a bounded number, each with its reason, for who wants to know.

DIR/<image>-<when, ns>/    its small files, and `reason`; the segments are deleted
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("glowplug.ssd")

_MOST = 32
_WHEN = 19  # digits


class Quarantined(NamedTuple):
    name: str
    reason: str


class Quarantine:
    """Any thread. What it lists is of this agent's life; what is on disk outlives it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._found: list[Quarantined] = []

    def found(self) -> list[Quarantined]:
        with self._lock:
            return list(self._found)

    def note(self, name: str, reason: str) -> None:
        """Something of which nothing is left."""
        with self._lock:
            self._found = [*self._found, Quarantined(name, reason)][-_MOST:]

    def put(self, place: Path, reason: str) -> None:
        """Moves an image out of the way."""
        log.warning("%s is quarantined: %s", place, reason)
        self.note(place.name, reason)
        target = self.directory / f"{place.name}-{time.time_ns()}"
        try:
            place.rename(target)
            for segment in target.glob("*.seg"):
                segment.unlink()
            (target / "reason").write_text(reason + "\n")
            for old in sorted(self.directory.iterdir(), key=lambda entry: entry.name[-_WHEN:])[:-_MOST]:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            log.warning("%s cannot be put aside: %s", place, error)
