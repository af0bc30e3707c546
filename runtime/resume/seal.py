"""The encryption of recorded pieces and of hand-off messages: AES-256-GCM with the function's own key, or none.

    piece := 0 data                           without a key
           | 1 nonce (12 bytes) ciphertext    with a key; `about` names piece and request, and is authenticated with it

Without a key, agents and stores can read prompts and answers. A function with a key refuses pieces in plain text.
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
    """A cipher of pieces. `about` must be the same for encryption and decryption."""

    name: str  # the same for functions with the same key, which cannot be derived from it

    def close(self, about: str, data: bytes) -> bytes: ...

    def open(self, about: str, piece: bytes) -> bytes:
        """Decrypt a piece. Raises `SnapshotRefused`."""
        ...


class Plain:
    """No encryption."""

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
        """Derive the cipher's key and name. Raises `BadConfig` where the library is missing."""
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
    """Return the seal of a function with this key file; "" means no encryption. Raises `BadConfig`."""
    if not key_file:
        return Plain()
    try:
        return Sealed(keyfile.read_key("GLOWPLUG_FUNCTION_KEY_FILE", Path(key_file)))
    except ValueError as error:
        raise BadConfig(str(error)) from error
