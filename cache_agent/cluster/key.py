"""Owns the cluster's key: agents prove to each other that they know it, and it never travels.

    proof(side) := HMAC-SHA256(key, PURPOSE, side, nonce of the caller, nonce of the called, caller's node, called's)

Both nonces are fresh, so that a recorded proof is worth nothing later, and the proof contains the side, so that an
agent's own proof cannot be sent back to it. Fields are length-prefixed: no two different lists give the same bytes.
The connection is not encrypted afterwards; the chunks on it are checked by digest.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Literal

from cache_agent.errors import AccessDenied
from cache_agent.wire import signing

_PURPOSE = b"glowplug peers 1"
_NONCE = 32  # hex digits

Side = Literal["caller", "called"]


def nonce() -> str:
    """Return a fresh nonce of 32 hex digits."""
    return secrets.token_hex(_NONCE // 2)


class ClusterKey:
    """The secret of a cluster's agents: proves and checks that an agent knows it, and signs data."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def proof(self, side: Side, callers: str, calleds: str, caller: str, called: str) -> str:
        """Return one side's proof; `callers` and `calleds` are the nonces, `caller` and `called` the nodes' names."""
        parts = (_PURPOSE, *(part.encode() for part in (side, callers, calleds, caller, called)))
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()

    def sign(self, about: str, data: bytes) -> bytes:
        """Sign data as that which `about` names, and nothing else; see `signing`."""
        return signing.sign(self._secret, about, data)

    def verified(self, about: str, signed: bytes) -> bytes:
        """Return the data. Raises `SnapshotForged` where it was not signed as that which `about` names."""
        return signing.verified(self._secret, about, signed)

    def check(self, proof: str, side: Side, callers: str, calleds: str, caller: str, called: str) -> None:
        """Raise `AccessDenied` unless the other side knows the key, too."""
        fresh = len(callers) >= _NONCE and len(calleds) >= _NONCE
        expected = self.proof(side, callers, calleds, caller, called)
        if not fresh or not hmac.compare_digest(proof.encode(), expected.encode()):
            raise AccessDenied(
                f"node {(caller if side == 'caller' else called)[:64]!r} does not know this cluster's key; give all "
                "agents the same GLOWPLUG_CLUSTER_KEY_FILE"
            )
