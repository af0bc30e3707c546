"""Owns what this process is made of, as layers are compared by it. Standard library only."""

from __future__ import annotations

import os
import sys
import zlib

from runtime.layers import keys

LOCK = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "base.lock")


def needs() -> keys.Needs:
    """Down to `bare`; what is deeper is for whoever asks to fill in."""
    return keys.Needs(
        machine=os.uname().machine,
        python=f"{sys.implementation.cache_tag}-{'.'.join(map(str, sys.version_info[:3]))}",
        base=_base(),
        environment=keys.relevant(os.environ),
        uid=os.geteuid(),
    )


def _base() -> str:
    """Of the locked base set. It tells versions apart, and guards against nobody."""
    try:
        with open(LOCK, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return ""
    return f"{zlib.crc32(text):08x}-{len(text)}"
