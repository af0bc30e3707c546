"""Tells whether a file has to be read again: it is another one by now, or was written to."""

from __future__ import annotations

import os
from pathlib import Path

Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp:
    """Another one for every content that replaces the file or is written into it. Raises `OSError`."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns
