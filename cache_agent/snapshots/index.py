"""Owns an agent's access to the store of snapshots: checks names, signs every piece, and asks the store.

Functions have neither the cluster's key nor the store's credentials. Many agents can write to the store, so a piece
that comes back is refused unless an agent of this cluster signed it, as exactly this piece of this request.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from cache_agent.access import keyfile
from cache_agent.config import AgentConfig
from cache_agent.errors import BadSetting, ProtocolError, SnapshotTooLarge
from cache_agent.snapshots.store import Change, Claimed, InProcessSnapshots, Keep, Key, Snapshots
from cache_agent.wire.requests import Checkpoint, Checkpointed, ClaimRequest, KeepStatus, TransferRequest
from cache_agent.wire.signing import sign, verified

_SPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,200}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{15,120}")
_OWNER = re.compile(r"[A-Za-z0-9._/-]{8,200}")
MOST = 16 << 20  # bytes that are kept of one request
_MOST_LEASE = 60.0


class SnapshotIndex:
    """The snapshots of one agent's functions. Any thread.

    `within` is the namespace that the caller proved, or "": functions of other namespaces have other records.
    """

    def __init__(self, store: Snapshots, key: bytes) -> None:
        self._store = store
        self._key = key

    def keep(self, asked: Checkpoint, pieces: Sequence[bytes], within: str = "") -> Checkpointed:
        """Add `pieces`, those of all items one after the other, to their records. Raises `StoreUnavailable`."""
        results, rest = [], list(pieces)
        for item in asked.items:
            taken, rest = rest[: len(item.lengths)], rest[len(item.lengths) :]
            key = _key(within, item.space, item.id)
            signed = [sign(self._key, _about(key, item.at + n), piece) for n, piece in enumerate(taken)]
            lease = _lease(item.lease)
            step = Keep(key, _owner(item.owner), item.epoch, item.at, tuple(signed), lease, item.done)
            try:
                results.append(KeepStatus(*self._store.keep(step)))
            except SnapshotTooLarge as error:
                results.append(KeepStatus("too_large", why=error.text))
        return Checkpointed(results)

    def claim(self, asked: ClaimRequest, within: str = "") -> Claimed:
        """Claim a record for an owner. Raises `StoreUnavailable`, `SnapshotForged`."""
        key = _key(within, asked.space, asked.id)
        found = self._store.claim(key, _owner(asked.owner), _lease(asked.lease))
        pieces = tuple(verified(self._key, _about(key, n), piece) for n, piece in enumerate(found.pieces))
        return found._replace(pieces=pieces)

    def transfer(self, asked: TransferRequest, within: str = "") -> bool:
        """Give a record to a successor; False where it is not the owner's any more. Raises `StoreUnavailable`."""
        key, owner, successor = _key(within, asked.space, asked.id), _owner(asked.owner), _owner(asked.successor)
        return self._store.transfer(key, owner, asked.epoch, successor, _lease(asked.lease))

    def history(self, space: str, id: str, within: str = "") -> list[Change]:  # noqa: A002  an id
        """Return the owners of a record, the first one first. Raises `StoreUnavailable`."""
        return self._store.history(_key(within, space, id))

    def close(self) -> None:
        self._store.close()


def open_index(config: AgentConfig, *, private: bool) -> SnapshotIndex:
    """Open the store of the settings: in memory for a `private` agent, and without a key or a Redis.

    Raises `BadSetting`.
    """
    key = cluster_key(config.cluster_key_file)
    limits = config.snapshot_ttl, MOST, config.snapshot_space
    if private or not (key and config.redis_url):
        return SnapshotIndex(InProcessSnapshots(*limits), secrets.token_bytes(keyfile.LEAST))
    # Imported here: redis-py takes 0.1 s, and few agents need it.
    from cache_agent.snapshots.store_redis import RedisSnapshots

    return SnapshotIndex(RedisSnapshots(config.redis_url, *limits, password_file=config.redis_password_file), key)


def cluster_key(path: Path | None) -> bytes:
    """Return the secret that all agents of the cluster share, or b"". Raises `BadSetting`."""
    if path is None:
        return b""
    try:
        return keyfile.read_key("GLOWPLUG_CLUSTER_KEY_FILE", path)
    except ValueError as error:
        raise BadSetting(str(error)) from error


def _key(within: str, space: str, id: str) -> Key:  # noqa: A002
    if not _SPACE.fullmatch(space) or not _ID.fullmatch(id):
        raise ProtocolError("a request that is kept has a function's name and an id of 16 to 121 letters and digits")
    return Key(f"@{within}/{space}" if within else space, id)  # no space can begin with "@"


def _owner(name: str) -> str:
    if not _OWNER.fullmatch(name):
        raise ProtocolError("an owner's name has 8 to 200 letters and digits")
    return name


def _lease(seconds: float) -> float:
    if not 0 <= seconds <= _MOST_LEASE:
        raise ProtocolError(f"a lease on a request lasts 0 to {_MOST_LEASE:.0f} s, not {seconds}")
    return seconds


def _about(key: Key, number: int) -> str:
    return f"piece {number} of {key.space} {key.id}"
