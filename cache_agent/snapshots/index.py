"""Owns what an agent does for the requests of its functions: it checks names, signs every piece, and asks the store.

Functions hold no key of the cluster's and no credentials of the store's. What comes back from a store that many can
write to was signed by an agent of this cluster, as exactly this piece of this request, or it is refused.
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
from cache_agent.wire.requests import Checkpoint, Checkpointed, ClaimRequest, KeptStatus, TransferRequest
from cache_agent.wire.signing import sign, verified

_SPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,200}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{15,120}")
_OWNER = re.compile(r"[A-Za-z0-9._/-]{8,200}")
MOST = 16 << 20  # bytes that are kept of one request
_MOST_LEASE = 60.0


class SnapshotIndex:
    """Every method may be called from any thread. `within` is the namespace that the caller proved, or "": it keeps
    functions of other namespaces out."""

    def __init__(self, store: Snapshots, key: bytes) -> None:
        self._store = store
        self._key = key

    def keep(self, asked: Checkpoint, pieces: Sequence[bytes], within: str = "") -> Checkpointed:
        """`pieces` of all items, one after the other. Raises `StoreUnavailable`."""
        results, rest = [], list(pieces)
        for item in asked.items:
            own, rest = rest[: len(item.lengths)], rest[len(item.lengths) :]
            key = _key(within, item.space, item.id)
            signed = [sign(self._key, _about(key, item.at + n), piece) for n, piece in enumerate(own)]
            lease = _lease(item.lease)
            step = Keep(key, _owner(item.owner), item.epoch, item.at, tuple(signed), lease, item.done)
            try:
                results.append(KeptStatus(*self._store.keep(step)))
            except SnapshotTooLarge as error:
                results.append(KeptStatus("too_large", why=error.text))
        return Checkpointed(results)

    def claim(self, asked: ClaimRequest, within: str = "") -> Claimed:
        """Raises `StoreUnavailable`, `SnapshotForged`."""
        key = _key(within, asked.space, asked.id)
        found = self._store.claim(key, _owner(asked.owner), _lease(asked.lease))
        pieces = tuple(verified(self._key, _about(key, n), piece) for n, piece in enumerate(found.pieces))
        return found._replace(pieces=pieces)

    def transfer(self, asked: TransferRequest, within: str = "") -> bool:
        """Raises `StoreUnavailable`."""
        key, owner, successor = _key(within, asked.space, asked.id), _owner(asked.owner), _owner(asked.successor)
        return self._store.transfer(key, owner, asked.epoch, successor, _lease(asked.lease))

    def history(self, space: str, id: str, within: str = "") -> list[Change]:  # noqa: A002  it is one
        return self._store.history(_key(within, space, id))

    def close(self) -> None:
        self._store.close()


def open_index(config: AgentConfig, *, private: bool) -> SnapshotIndex:
    """As the settings have it; a `private` agent, and one without a key or a Redis, keeps all to itself.

    Raises `BadSetting`.
    """
    key = cluster_key(config.cluster_key_file)
    limits = config.snapshot_ttl, MOST, config.snapshot_space
    if private or not (key and config.redis_url):
        return SnapshotIndex(InProcessSnapshots(*limits), secrets.token_bytes(keyfile.LEAST))
    from cache_agent.snapshots.store_redis import RedisSnapshots  # redis-py is a tenth of a second that few agents need

    return SnapshotIndex(RedisSnapshots(config.redis_url, *limits, password_file=config.redis_password_file), key)


def cluster_key(path: Path | None) -> bytes:
    """The secret that all agents of the cluster share, or b"". Raises `BadSetting`."""
    if path is None:
        return b""
    try:
        return keyfile.read_key("GLOWPLUG_CLUSTER_KEY_FILE", path)
    except ValueError as error:
        raise BadSetting(str(error)) from error


def _key(within: str, space: str, id: str) -> Key:  # noqa: A002
    if not _SPACE.fullmatch(space) or not _ID.fullmatch(id):
        raise ProtocolError("a request that is kept has a function's name and an id of 16 to 121 letters and digits")
    return Key(f"@{within}/{space}" if within else space, id)  # which no space can spell


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
