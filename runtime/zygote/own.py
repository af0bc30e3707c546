"""Owns what this process is made of, as layers are compared by it. Standard library only."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

from runtime.zygote import layers


def needs() -> layers.Needs:
    """Down to `bare`; what is deeper is for whoever asks to fill in."""
    return layers.Needs(
        machine=platform.machine(),
        python=f"{sys.implementation.cache_tag}-{platform.python_version()}",
        base=_base(),
        environment=layers.relevant(os.environ),
        uid=os.geteuid(),
    )


def _base() -> str:
    lock = Path(__file__).parents[1] / "base.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest()[:16] if lock.exists() else ""
