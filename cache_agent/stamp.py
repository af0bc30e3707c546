"""The stamp of a file, which changes when the file is replaced or written to, and has to be read again."""

from __future__ import annotations

import os
from pathlib import Path

Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp:
    """Return the file's stamp: inode, size, and time of change in ns. Raises `OSError`."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns
