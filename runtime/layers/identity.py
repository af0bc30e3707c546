"""The needs of this process, by which layers are compared. Standard library only."""

from __future__ import annotations

import os
import sys
import zlib

from runtime.layers import keys

LOCK = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "base.lock")


def needs() -> keys.Needs:
    """Return this process's needs at the level `bare`; the caller adds deeper ones."""
    return keys.Needs(
        machine=os.uname().machine,
        python=f"{sys.implementation.cache_tag}-{'.'.join(map(str, sys.version_info[:3]))}",
        base=_base(),
        environment=keys.relevant(os.environ),
        uid=os.geteuid(),
    )


def _base() -> str:
    """Return a checksum of the locked base set, which tells versions apart and is no protection; "" without a lock."""
    try:
        with open(LOCK, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return ""
    return f"{zlib.crc32(text):08x}-{len(text)}"
