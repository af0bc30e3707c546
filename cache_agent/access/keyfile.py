"""Reads keys from files (the cluster's, and in the runtime a function's own), and digests secrets."""

from __future__ import annotations

import hashlib
from pathlib import Path

LEAST = 32  # bytes


def read_key(setting: str, path: Path) -> bytes:
    """Return the key, without white space around it. Raises `ValueError` whose text names the setting.

    The caller translates the error into that of its own package.
    """
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
    """Return the hexadecimal SHA-256 of a secret, which is stored and compared in its place."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
