"""The reading of keys from files (the cluster's, and in the runtime a function's own), and the digest of a secret."""

from __future__ import annotations

import hashlib
from pathlib import Path

LEAST = 32  # bytes


def read_key(setting: str, path: Path) -> bytes:
    """Without white space around it. Raises `ValueError` whose text names the setting; whose mistake that is, and so

    which error, the caller knows."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"{setting}={path} cannot be read: {error}") from error
    if len(key) < LEAST:
        raise ValueError(
            f"{setting}={path} has {len(key)} bytes; use at least {LEAST}, like those of `openssl rand -hex 32`"
        )
    return key


def digest(secret: str) -> str:
    """A secret as it is remembered and compared: hexadecimal SHA-256."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
