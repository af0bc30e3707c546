"""Owns the encryption of what is kept of requests: AES-256-GCM with the function's own key, or none.

    piece := 0 data                           the function has no key
           | 1 nonce (12 bytes) ciphertext    it has; `about`, which says which piece of which request, is bound to it

Agents and stores see prompts and answers otherwise. A function with a key takes no piece without encryption.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Any, Protocol

from cache_agent.access import keyfile
from runtime.errors import BadConfig, SnapshotRefused

_PLAIN, _SEALED = b"\0", b"\1"
_NONCE = 12


class Seal(Protocol):
    name: str  # the same for those with the same key; tells nothing about it

    def close(self, about: str, data: bytes) -> bytes: ...

    def open(self, about: str, piece: bytes) -> bytes:
        """Raises `SnapshotRefused`."""
        ...


class Plain:
    """Nothing is hidden."""

    name = "plain"

    def close(self, about: str, data: bytes) -> bytes:  # noqa: ARG002  the protocol's
        return _PLAIN + data

    def open(self, about: str, piece: bytes) -> bytes:
        if piece[:1] != _PLAIN:
            raise SnapshotRefused(f"{about} is encrypted; set GLOWPLUG_FUNCTION_KEY_FILE to the key it was kept with")
        return piece[1:]


class Sealed:
    """AES-256-GCM; `key` is any secret of at least 32 bytes."""

    def __init__(self, key: bytes) -> None:
        """Raises `BadConfig` where the library is missing."""
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise BadConfig(
                "GLOWPLUG_FUNCTION_KEY_FILE is set, and the distribution `cryptography` is not installed; add it to "
                "the function's requirements.txt"
            ) from error
        self.name = hashlib.sha256(b"glowplug name of a key\0" + key).hexdigest()[:16]
        self._cipher: Any = AESGCM(hashlib.sha256(b"glowplug snapshot pieces\0" + key).digest())
        self._invalid = InvalidTag

    def close(self, about: str, data: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE)
        return bytes(_SEALED + nonce + self._cipher.encrypt(nonce, data, about.encode()))

    def open(self, about: str, piece: bytes) -> bytes:
        if piece[:1] != _SEALED:
            raise SnapshotRefused(f"{about} is not encrypted, and this function has a key; it was kept by another")
        nonce, hidden = piece[1 : 1 + _NONCE], piece[1 + _NONCE :]
        try:
            return bytes(self._cipher.decrypt(nonce, hidden, about.encode()))
        except (self._invalid, ValueError) as error:
            raise SnapshotRefused(
                f"{about} cannot be decrypted: it was kept with another GLOWPLUG_FUNCTION_KEY_FILE, or changed"
            ) from error


def seal(key_file: str) -> Seal:
    """Raises `BadConfig`."""
    if not key_file:
        return Plain()
    try:
        return Sealed(keyfile.read_key("GLOWPLUG_FUNCTION_KEY_FILE", Path(key_file)))
    except ValueError as error:
        raise BadConfig(str(error)) from error
