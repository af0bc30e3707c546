"""Owns the quarantine: the remains of a bounded number of damaged images, each with the reason.

DIR/<image>-<time, ns>/    the image's small files, and `reason`; its segments are deleted
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
_WHEN = 19  # digits of a time in ns


class Quarantined(NamedTuple):
    """An image or file that was set aside, and why."""

    name: str
    reason: str


class Quarantine:
    """The quarantine of one SSD directory; any thread. `found` lists this agent's finds, the disk has older ones."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._found: list[Quarantined] = []

    def found(self) -> list[Quarantined]:
        with self._lock:
            return list(self._found)

    def note(self, name: str, reason: str) -> None:
        """List a find of which no file is left."""
        with self._lock:
            self._found = [*self._found, Quarantined(name, reason)][-_MOST:]

    def put(self, place: Path, reason: str) -> None:
        """Move a damaged image here."""
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
