"""Signatures of snapshots and of messages between agents: HMAC-SHA256 with the cluster's key. Pure.

    signed := "GS" version (1 byte) tag (32 bytes) data
    tag    := HMAC-SHA256(key, version, length of about (4 bytes), about, data)

`about` names the kind of the bytes and their owner, so that bytes which were signed for one purpose or owner do not
pass for another.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from cache_agent.errors import SnapshotForged

_VERSION = b"\1"
_FRONT = b"GS" + _VERSION
_TAG = hashlib.sha256().digest_size


def sign(key: bytes, about: str, data: bytes) -> bytes:
    """Return `data` with its signature in front."""
    return _FRONT + _tag(key, about, data) + data


def verified(key: bytes, about: str, signed: bytes) -> bytes:
    """Return the data behind a signature. Raises `SnapshotForged` unless it was signed with this key and `about`."""
    data = signed[len(_FRONT) + _TAG :]
    tag = signed[len(_FRONT) : len(_FRONT) + _TAG]
    if not signed.startswith(_FRONT) or len(tag) != _TAG:
        raise SnapshotForged(f"{about} is not signed; it is cut off, or was put there by somebody else")
    if not hmac.compare_digest(tag, _tag(key, about, data)):
        raise SnapshotForged(
            f"the signature of {about} is wrong: it was changed, it belongs elsewhere, or it was made with another "
            "cluster key; give all agents the same GLOWPLUG_CLUSTER_KEY_FILE"
        )
    return data


def _tag(key: bytes, about: str, data: bytes) -> bytes:
    name = about.encode()
    return hmac.digest(key, _VERSION + struct.pack("!I", len(name)) + name + data, "sha256")
